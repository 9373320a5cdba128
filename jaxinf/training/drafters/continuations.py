"""What the target itself would write: text on which its drafter will be judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.cache import Cache
from jaxinf.generation import Controls, SamplingParams, generate
from jaxinf.models import CausalLM
from jaxinf.training.data import Documents
from pallas_kernels.errors import InputError

TEMPERATURES = (0.0, 0.7, 1.0)


def cut_prompts(documents: Documents, *, count: int, length: int, seed: int) -> np.ndarray:
    """int32 `[count, length]`: stretches of the documents, taken end to end, from places drawn by the seed.

    Raises:
      InputError: the text is shorter than one.
    """
    tokens = documents.tokens
    if len(tokens) < length:
        raise InputError(f"the text has {len(tokens)} tokens, fewer than one prompt of {length}: give more text")
    starts = np.random.default_rng([seed, length]).integers(0, len(tokens) - length + 1, count)
    return tokens[starts[:, None] + np.arange(length)].astype(np.int32)


def continuations(
    model: CausalLM,
    prompts: np.ndarray,
    *,
    tokens: int,
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Prompts and what the model writes behind them, int32 `[N, T + tokens]`.

    Args:
      prompts: int32 `[N, T]`.
      tokens: how many are written; end-of-text tokens end nothing.
      temperatures: of the rows in turn; 0: the most likely token.
      seed: row i draws with `seed + i`.
      batch: rows at a time.
      progress: called with (rows done, rows in all).
    """
    count, length = prompts.shape
    out = np.empty((count, length + tokens), np.int32)
    for at in range(0, count, batch):
        rows = np.arange(at, at + batch) % count  # the last batch is filled up with the first rows
        controls = Controls.of([SamplingParams(temperatures[i % len(temperatures)]) for i in rows])
        cache = model.init_cache(batch, length + tokens)
        seeds = (np.arange(at, at + batch) + seed).astype(np.uint32)
        written = _write(model, prompts[rows], cache, controls, seeds, tokens)
        done = min(batch, count - at)
        out[at : at + done, :length] = prompts[at : at + done]
        out[at : at + done, length:] = np.asarray(written)[:done]
        if progress is not None:
            progress(at + done, count)
    return out


@partial(jax.jit, static_argnums=5)
def _write(model: CausalLM, prompts: jax.Array, cache: Cache, controls: Controls, seeds, tokens: int) -> jax.Array:
    counts = jnp.full((prompts.shape[0],), prompts.shape[1], jnp.int32)
    return generate(model, prompts, counts, cache, max_new_tokens=tokens, controls=controls, seeds=seeds)[1].tokens
