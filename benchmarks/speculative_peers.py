"""The embedded pair in transformers: the same weights as a Hugging Face folder, and its ways to draft.

Mellum is the one architecture there that has what the target has: windows and full attention by layer, dense and
sparse feed-forward parts by layer, normalised queries and keys.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxinf
from jaxinf.layers import MoESpec
from jaxinf.models import CausalLM

TOLERANCE = 2e-3
"""By which logits of the two may differ."""


def version() -> str | None:
    try:
        import transformers
    except ImportError:
        return None
    return transformers.__version__


def config(model: CausalLM) -> Any:
    from transformers import MellumConfig

    layers = list(model.spec.layers())
    a = layers[0].attention
    dense = [x.ffn.width for x in layers if not isinstance(x.ffn, MoESpec)]
    sparse = [x.ffn for x in layers if isinstance(x.ffn, MoESpec)]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return MellumConfig(
        vocab_size=model.spec.vocab,
        hidden_size=model.spec.d_model,
        intermediate_size=dense[0],
        num_hidden_layers=len(layers),
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        head_dim=a.head_dim,
        max_position_embeddings=model.spec.context,
        sliding_window=next(x.attention.window for x in layers if x.attention.window),
        tie_word_embeddings=True,
        num_experts=sparse[0].experts if sparse else 1,
        num_experts_per_tok=2 if sparse else 1,
        moe_intermediate_size=sparse[0].width if sparse else 1,
        layer_types=["sliding_attention" if x.attention.window else "full_attention" for x in layers],
        mlp_layer_types=["sparse" if isinstance(x.ffn, MoESpec) else "dense" for x in layers],
        rope_parameters={"full_attention": rope, "sliding_attention": rope},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def weights(model: CausalLM) -> dict[str, np.ndarray]:
    """The parameters under transformers' names and in its layout (outputs first), float32."""
    assert model.layout == "list"
    names = dict(query="q_proj", key="k_proj", value="v_proj", out="o_proj", query_norm="q_norm", key_norm="k_norm")
    norms = dict(attention_norm="input_layernorm", ffn_norm="post_attention_layernorm")
    found, number = {}, 0
    for segment in model.segments:
        for block in segment.blocks:
            at = f"model.layers.{number}"
            flat = {
                ".".join(map(str, path)): np.asarray(v.get_value(), np.float32)
                for path, v in nnx.to_flat_state(nnx.state(block))
            }
            for name, x in flat.items():
                part, *rest = name.split(".")
                if part == "attention":
                    found[f"{at}.self_attn.{names[rest[0]]}.weight"] = x.T if x.ndim == 2 else x
                elif part in norms:
                    found[f"{at}.{norms[part]}.weight"] = x
                elif rest[0] == "router":
                    found[f"{at}.mlp.gate.weight"] = x.T
                elif rest[0] != "experts":
                    found[f"{at}.mlp.{rest[0]}_proj.weight"] = x.T
            if "ffn.experts.up" in flat:
                gate, up, down = (flat[f"ffn.experts.{n}"].swapaxes(1, 2) for n in ("gate", "up", "down"))
                found[f"{at}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
                found[f"{at}.mlp.experts.down_proj"] = down
            number += 1
    assert model.final_norm is not None
    found["model.embed_tokens.weight"] = np.asarray(model.embed.table[...], np.float32)
    found["model.norm.weight"] = np.asarray(model.final_norm.scale[...], np.float32)  # type: ignore[union-attr]
    return found


def export(lm: jaxinf.LM, folder: Path) -> Path:
    """A Hugging Face folder of the model, and the proof that it computes the same.

    Raises:
      AssertionError: logits differ by more than `TOLERANCE`.
    """
    import torch
    from transformers import AutoModelForCausalLM, MellumForCausalLM

    made = MellumForCausalLM(config(lm.model))
    state = {name: torch.from_numpy(np.array(x, order="C")) for name, x in weights(lm.model).items()}
    missing, unexpected = made.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    made.tie_weights()
    made.save_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ids = np.random.default_rng(0).integers(1, lm.spec.vocab, (1, 200))
    with torch.no_grad():
        got = theirs(torch.from_numpy(ids)).logits.numpy()
    apart = np.abs(got - np.asarray(jax.device_get(lm.logits(ids.tolist())))).max()
    assert apart < TOLERANCE, f"logits differ by {apart}"
    return folder


class Peer:
    """transformers' `generate`, greedy: plain, with the draft model, or by prompt lookup.

    target, draft: folders.
    """

    def __init__(self, target: Path, draft: Path):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(os.cpu_count() or 1)
        self.target, self.draft = (
            AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval() for folder in (target, draft)
        )
        self.passes = 0
        forward = self.target.forward

        def counted(*args, **kwargs):
            self.passes += 1
            return forward(*args, **kwargs)

        self.target.forward = counted

    def generate(self, prompt: Sequence[int], new: int, how: str, tokens: int) -> tuple[list[int], float, int]:
        """`(new tokens, seconds, passes of the target)`; how: "plain", "assisted" or "lookup"."""
        import torch

        ids = torch.tensor([list(prompt)])
        options: dict[str, Any] = dict(max_new_tokens=new, do_sample=False, pad_token_id=0)
        options["attention_mask"] = torch.ones_like(ids)
        if how == "assisted":
            self.draft.generation_config.num_assistant_tokens = tokens
            self.draft.generation_config.num_assistant_tokens_schedule = "heuristic"
            options["assistant_model"] = self.draft
        elif how == "lookup":
            options["prompt_lookup_num_tokens"] = tokens
        self.passes = 0
        begun = time.perf_counter()
        with torch.no_grad():
            out = self.target.generate(ids, **options)
        return out[0, len(prompt) :].tolist(), time.perf_counter() - begun, self.passes
