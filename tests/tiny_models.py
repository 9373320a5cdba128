"""Tiny random models for the tests of generation and LM."""

from __future__ import annotations

from pathlib import Path

import jax
from flax import nnx

from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, RopeSpec
from jaxinf.models import CausalLM, ModelSpec, Segment

TOKENIZERS = Path(__file__).parent / "data" / "tokenizers"


def spec(
    *,
    vocab: int = 64,
    window: int | None = None,
    layers: int = 2,
    repeats: int = 1,
    context: int = 512,
    **attention,
) -> ModelSpec:
    """Two layers a repeat, or only the second of them; with a window, the first slides."""

    def layer(window):
        rope = attention.get("rope", RopeSpec(8))
        rest = {k: v for k, v in attention.items() if k != "rope"}
        return LayerSpec(AttentionSpec(4, 2, 8, rope=rope, window=window, **rest), FFNSpec(32))

    return ModelSpec(vocab, 32, (Segment((layer(window), layer(None))[2 - layers :], repeats),), context)


def model(spec: ModelSpec, *, layout="list", seed: int = 0, gain: float = 2.0) -> CausalLM:
    """Random weights, drawn wide enough that greedy tokens depend on the whole prompt."""
    made = CausalLM(spec, rngs=nnx.Rngs(seed), layout=layout)
    graph, state = nnx.split(made)
    return nnx.merge(graph, jax.tree.map(lambda x: x * gain if x.ndim > 1 else x, state))


@jax.jit
def whole(model: CausalLM, tokens: jax.Array) -> jax.Array:
    """Logits of whole sequences, without a cache."""
    return model(tokens)


class counted:
    """Names of the programs compiled inside the block."""

    def __enter__(self) -> list[str]:
        self.programs: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self.programs

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.programs.append(event)
