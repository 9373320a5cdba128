"""JAX's kernels for prefill, at the block sizes found best on v5e and v6e.

Splash attention groups query heads by key head, and has causal and local masks; the older `flash_attention` wants
K and V repeated for every query head, which the copies counted here include.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from pallas_kernels.flash_attention.cases import Case
from pallas_kernels.named import Call

SPLASH = ((512, 512, 512), (512, 1024, 512), (1024, 1024, 512), (1024, 1024, 1024), (1024, 2048, 512))
LOCAL = ((256, 256, 256), (512, 512, 512), (512, 1024, 512), (1024, 1024, 512))
FLASH = ((512, 1024, 1024), (1024, 1024, 512), (1024, 1024, 1024))  # queries, keys, keys of one product
FITS = 4 << 30  # bytes of repeated keys


def peer(case: Case) -> list[tuple[str, Call]]:
    """Causal calls with one window and one head size; neither kernel divides by the root of the head size."""
    window = case.options.get("window")
    known = set(case.options) <= {"window"} and set(case.arrays) <= {"sinks"} and isinstance(window, int | None)
    if not known or case.dtype != "bfloat16" or case.queries != case.keys:
        return []
    found = []
    if case.head_dim == case.value_dim or case.head_dim % 128 == 0:
        for sizes in LOCAL if window else SPLASH:
            if sizes[1] <= case.keys:
                found.append((f"splash_attention {'/'.join(map(str, sizes))}", _splash(case, sizes, window)))
    repeated = 4 * case.batch * case.heads * case.keys * case.head_dim
    if window is None and not case.arrays and case.head_dim == case.value_dim and repeated <= FITS:
        for sizes in FLASH:
            if sizes[1] <= case.keys:
                found.append((f"flash_attention {'/'.join(map(str, sizes))}", _flash(case, sizes)))
    return found


def _splash(case: Case, sizes: tuple[int, int, int], window: int | None) -> Call:
    """Without the sinks: splash attention has none in every version of JAX, and they cost next to nothing."""
    share, tokens = case.heads // case.kv_heads, case.queries
    q, kv, compute = sizes

    def fn(queries, keys, values):
        shape = (tokens, tokens)
        one = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
        kernel = splash.make_splash_mqa_single_device(
            masks.MultiHeadMask([one] * share),
            block_sizes=splash.BlockSizes(block_q=q, block_kv=kv, block_kv_compute=compute),
        )
        grouped = queries.reshape(case.batch, case.kv_heads, share, tokens, -1)
        return jax.vmap(jax.vmap(kernel))(grouped, keys, values)

    return _call(case, fn)


def _flash(case: Case, sizes: tuple[int, int, int]) -> Call:
    share = case.heads // case.kv_heads
    q, kv, compute = sizes
    blocks = flash.BlockSizes(block_q=q, block_k_major=kv, block_k=compute, block_b=1)

    def fn(queries, keys, values):
        keys, values = (jnp.repeat(x, share, axis=1) for x in (keys, values))
        return flash.flash_attention(
            queries, keys, values, causal=True, sm_scale=case.head_dim**-0.5, block_sizes=blocks
        )

    return _call(case, fn)


def _call(case: Case, fn) -> Call:
    ours = case.call()
    return Call(fn, ours.args[:3], ours.work)
