"""Attention layers of published models, from their configurations: what the ops' named cases are made of."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class AttentionShape:
    """Heads and head sizes of one attention layer."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    sinks: bool = False

    def shard(self, ways: int) -> "AttentionShape":
        """What one chip of a `ways`-fold tensor-parallel group computes; key heads are replicated when too few."""
        return replace(self, heads=self.heads // ways, kv_heads=max(1, self.kv_heads // ways))


SHAPES = {
    "llama3-8b": AttentionShape(32, 8, 128, 128),
    "llama3-70b": AttentionShape(64, 8, 128, 128),
    "qwen3-8b": AttentionShape(32, 8, 128, 128),
    "qwen3-30b-a3b": AttentionShape(32, 4, 128, 128),
    "gemma3-12b": AttentionShape(16, 8, 256, 256),
    "gemma3-12b-local": AttentionShape(16, 8, 256, 256, window=1024),
    "mixtral-8x7b": AttentionShape(32, 8, 128, 128),
    "gpt-oss-20b": AttentionShape(64, 8, 64, 64, sinks=True),
    "gpt-oss-20b-local": AttentionShape(64, 8, 64, 64, window=128, sinks=True),
    "deepseek-v3": AttentionShape(128, 128, 192, 128),
    # Latent attention with the up-projections absorbed: one key head, the latent itself is the value.
    "deepseek-v3-latent": AttentionShape(128, 1, 576, 512),
}
