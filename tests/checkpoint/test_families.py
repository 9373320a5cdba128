"""Every family against Hugging Face: logits of whole sequences, and greedy tokens through the cache."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxinf.cache import RollingCache
from jaxinf.checkpoint import load, read_spec
from jaxinf.checkpoint.families import FAMILIES
from jaxinf.models import CausalLM

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = sorted(path.parent.name for path in GOLDENS.glob("*/golden.safetensors"))
OLDER = sorted(path.parent.name for path in GOLDENS.glob("*/config_v4.json"))
NEW_TOKENS = 24
# The tiny models take longer to optimise than to run.
QUICK = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnames=("graph", "longest", "chunk"), compiler_options=QUICK)
def run(graph, params, tokens: jax.Array, lengths: jax.Array, longest: int, chunk: int | None):
    """Logits `[B, T, V]` without a cache; and the greedy tokens `[B, 24]` that follow prompts of `lengths`.

    The prompts go into the cache in one pass, or `chunk` columns at a time.
    """
    model: CausalLM = nnx.merge(graph, params)
    batch, prompts = tokens.shape[0], tokens[:, :longest]

    def append(cache, new, counts, *, fresh=False):
        hidden, cache, _ = model.hidden(new, cache, counts=counts, fresh=fresh)
        last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
        return cache, last

    cache = model.init_cache(batch, longest + NEW_TOKENS, max_append=chunk or 1)
    if chunk is None:
        cache, last = append(cache, prompts, lengths, fresh=True)
    else:
        last = jnp.zeros((batch, model.spec.d_model), model.dtype)
        for start in range(0, longest, chunk):
            piece = prompts[:, start : start + chunk]
            counts = jnp.clip(lengths - start, 0, piece.shape[1])
            cache, state = append(cache, piece, counts)
            last = jnp.where((counts > 0)[:, None], state, last)

    def step(carry, _):
        cache, last = carry
        token = jnp.argmax(model.logits(last), axis=-1).astype(jnp.int32)
        return append(cache, token[:, None], jnp.ones((batch,), jnp.int32)), token

    _, new = jax.lax.scan(step, (cache, last), None, length=NEW_TOKENS)
    return model(tokens), new.T


def check(case: str, *, layout: str = "list", chunk: int | None = None) -> None:
    arrays = load_file(GOLDENS / case / "golden.safetensors")
    model = load(GOLDENS / case, dtype="float32", layout=layout).model
    tokens, lengths = arrays["tokens"], arrays["prompt_lengths"]
    logits, greedy = run(*nnx.split(model), jnp.asarray(tokens), jnp.asarray(lengths), int(lengths.max()), chunk)
    assert np.abs(logits - arrays["logits"]).max() < 1e-4
    np.testing.assert_array_equal(greedy, arrays["greedy"])


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens(case: str) -> None:
    check(case)


@pytest.mark.parametrize("case", ["gemma3", "gpt_oss", "qwen3_moe_mixed", "bloom"])
def test_stacked(case: str) -> None:
    check(case, layout="stacked")


@pytest.mark.parametrize("case", ["gemma3", "mistral", "qwen2", "cohere2", "falcon_alibi"])
def test_chunked_prefill(case: str) -> None:
    check(case, chunk=4)


@pytest.mark.parametrize("case", OLDER)
def test_the_older_form_of_a_config_says_the_same(case: str, golden) -> None:
    newer, older = read_spec(GOLDENS / case), read_spec(golden(case, "config_v4.json"))
    # BLOOM's newer form does not tell its context.
    same_context = dataclasses.replace(older, context=newer.context)
    assert same_context == newer
    assert older.context == newer.context or "seq_length" in (GOLDENS / case / "config_v4.json").read_text()


def test_every_family_has_a_case() -> None:
    types = {json.loads((GOLDENS / case / "config.json").read_text())["model_type"] for case in CASES}
    # "gemma3" is "gemma3_text" under other names: see test_the_text_half_of_a_model_of_images.
    assert set(FAMILIES) - types == {"gemma3"}


def test_windows_get_rolling_caches() -> None:
    model = load(GOLDENS / "gemma3").model
    kinds = [type(c) for segment in model.init_cache(1, 35).layers for c in segment]
    assert kinds.count(RollingCache) == 7
    assert len(kinds) == 8
