"""How fast a model is on the device at hand, and what memory it takes."""

from __future__ import annotations

import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinf.checkpoint.parameters import abstract, slots
from jaxinf.generation import WIDTH, Runner, SamplingParams
from jaxinf.models import CausalLM, ModelSpec
from jaxinf.models.causal_lm import Layout
from pallas_kernels.errors import InputError


@dataclass(frozen=True)
class Device:
    """What a measurement ran on: the first of JAX's devices.

    platform: "cpu", "gpu" or "tpu". kind: the vendor's name. cores: that this process may use; on a CPU alone.
    """

    platform: str
    kind: str
    cores: int | None

    @classmethod
    def at_hand(cls) -> Device:
        first = jax.devices()[0]
        cores = None
        if first.platform == "cpu":
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return cls(first.platform, first.device_kind, cores)


@dataclass(frozen=True)
class Measurement:
    """Medians over `repeats` greedy runs of `batch` prompts of `prompt` tokens, `new` tokens each.

    prefill_seconds: one pass over the prompts, logits ready on the device.
    first_token_seconds: from the call to every row's first token on the host; the cache is made on the way.
    decode_seconds: the `new - 1` tokens after it; 0 where there are none.
    compile_seconds: what the first run took longer than a median one.
    cache_bytes, weights_bytes: of arrays on the device.
    peak_host_bytes: the most memory that the process has ever held, earlier measurements included; None where
      the system does not say. peak_device_bytes: the same of the device; None on a CPU.
    """

    batch: int
    prompt: int
    new: int
    repeats: int
    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float
    compile_seconds: float
    cache_bytes: int
    weights_bytes: int
    peak_host_bytes: int | None
    peak_device_bytes: int | None

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens of all rows."""
        return self.batch * self.prompt / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """New tokens of all rows after their first; None where there are none."""
        return self.batch * (self.new - 1) / self.decode_seconds if self.new > 1 else None


def random_model(spec: ModelSpec, dtype, layout: Layout | None = None, *, seed: int = 0) -> CausalLM:
    """A model to measure: its text is noise, its speed that of any weights.

    Matrices are drawn with a standard deviation of one over the root of their inputs, vectors are ones. One leaf
    at a time is drawn, on the device, so that nothing beyond the model needs memory.

    Args:
      layout: None: "list" on a CPU, "stacked" elsewhere.
    """
    layout = layout or ("list" if jax.default_backend() == "cpu" else "stacked")
    model = abstract(spec, jnp.dtype(dtype), layout)
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    for i, slot in enumerate(slots(model)):
        shape = tuple(slot.value.shape)
        vector = len(shape) - slot.stacked < 2
        drawn = _drawn(jax.random.key(seed), i, shape, jnp.dtype(slot.value.dtype).name, vector)
        flat[slot.path] = flat[slot.path].replace(drawn)
    return nnx.merge(graph, nnx.from_flat_state(flat))


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "vector"))
def _drawn(key: jax.Array, index: int, shape: tuple[int, ...], dtype: str, vector: bool) -> jax.Array:
    if vector:
        return jnp.ones(shape, dtype)
    return jax.random.normal(jax.random.fold_in(key, index), shape, dtype) * shape[-2] ** -0.5


def measure(
    runner: Runner,
    *,
    batch: int,
    prompt: int,
    new: int,
    repeats: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Runs prefill and generation once to compile and `repeats` times to measure, on random prompts.

    Args:
      progress: called with (runs done, runs in all) after each.

    Raises:
      InputError: numbers below 1, or a prompt and answer that pass the model's context.
    """
    for name, value in dict(batch=batch, prompt=prompt, new=new, repeats=repeats).items():
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    context = runner.spec.context
    if prompt + new - 1 > context:
        raise InputError(f"prompt={prompt} and new={new} need {prompt + new - 1} places; the context is {context}")
    prompts = np.random.default_rng(0).integers(0, runner.spec.vocab, (batch, prompt)).tolist()
    runs: list[tuple[float, float, float]] = []
    for done in range(repeats + 1):
        runs.append((_prefill(runner, prompts, new), *_generate(runner, prompts, new)))
        if progress is not None:
            progress(done + 1, repeats + 1)
    prefill, first, decode = (statistics.median(run[part] for run in runs[1:]) for part in range(3))
    cache = jax.eval_shape(lambda: runner.new_cache(batch, prompt + new - 1, limit=context))
    return Measurement(
        batch=batch,
        prompt=prompt,
        new=new,
        repeats=repeats,
        prefill_seconds=prefill,
        first_token_seconds=first,
        decode_seconds=decode,
        compile_seconds=max(0.0, sum(runs[0]) - (prefill + first + decode)),
        cache_bytes=_nbytes(cache),
        weights_bytes=_nbytes(runner.weights),
        peak_host_bytes=_peak_host_bytes(),
        peak_device_bytes=(jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    )


def _prefill(runner: Runner, prompts: list[list[int]], new: int) -> float:
    cache = runner.new_cache(len(prompts), len(prompts[0]) + new - 1, limit=runner.spec.context)
    jax.block_until_ready(cache)
    start = time.perf_counter()
    jax.block_until_ready(runner.prefill(prompts, cache, fresh=True))
    return time.perf_counter() - start


def _generate(runner: Runner, prompts: list[list[int]], new: int) -> tuple[float, float]:
    """Seconds to the first tokens, and of the rest."""
    rows = len(prompts)
    start = time.perf_counter()
    cache = runner.new_cache(rows, len(prompts[0]) + new - 1, limit=runner.spec.context)
    running = runner.begin(prompts, cache, limits=[new] * rows, params=[SamplingParams()] * rows, seeds=[0] * rows)
    first = time.perf_counter()
    left = new - 1
    while left:
        steps = min(left, WIDTH)
        running.advance(steps)
        left -= steps
    return first - start, time.perf_counter() - first if new > 1 else 0.0


def _nbytes(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _peak_host_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
