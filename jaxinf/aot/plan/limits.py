"""The largest batch and context that fit, and what would help where nothing does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxinf import compression
from jaxinf.aot.plan import arithmetic
from jaxinf.aot.plan import sizes as parts
from jaxinf.aot.plan.types import Case, PerChip, Sizes
from jaxinf.aot.slices import Slice, find, named
from jaxinf.cache import check_kind
from pallas_kernels import chips
from pallas_kernels.errors import InputError

_MOST = 1 << 24  # rows or tokens


def peak(case: Case, where: Slice, sizes: Sizes, known: tuple[Case, PerChip] | None) -> int:
    """Bytes on a device. known: a case that was compiled and what it holds, from which temporaries are scaled."""
    held = sum(w.bytes for w in parts.weights(case, sizes)) + parts.cache_bytes(case, sizes)
    if known is None:
        return held + parts.activation_bytes(case, sizes, parts.rows(case, sizes) * arithmetic.piece(case, sizes))
    then, measured = known
    growth = max(1.0, parts.rows(case, sizes) / parts.rows(then, sizes))
    code = measured.peak - measured.weights - measured.cache - measured.temporaries
    return held + code + int(growth * measured.temporaries)


def largest(case: Case, where: Slice, sizes: Sizes, known: tuple[Case, PerChip] | None = None) -> tuple[int, int]:
    """`(rows at this context, tokens a row at this batch)` that fit; 0: none. Found by bisection.

    The context ends where the model's positions do.
    """

    def rows_fit(batch: int) -> bool:
        return peak(dataclasses.replace(case, batch=batch), where, sizes, known) <= where.memory

    def tokens_fit(context: int) -> bool:
        if context > case.spec.context:
            return False
        prompt = min(case.prompt, context)
        return peak(dataclasses.replace(case, context=context, prompt=prompt), where, sizes, known) <= where.memory

    return _bisect(rows_fit), _bisect(tokens_fit)


def _bisect(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, if all smaller ones do."""
    high = 1
    while high <= _MOST and fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def remedy(case: Case, where: Slice, sizes: Sizes, known: tuple[Case, PerChip] | None = None) -> str:
    """What would make a plan fit, as the end of a sentence."""
    batch, context = largest(case, where, sizes, known)
    ideas = []
    if batch:
        ideas.append(f"a batch of at most {batch:,}")
    if context:
        ideas.append(f"a context of at most {context:,}")
    if case.quantize is None:
        for scheme in ("int8", "int4"):
            narrow = dataclasses.replace(case, quantize=scheme)
            if any(fits(narrow, where, each) for each in arithmetic.all_meshes(narrow, where)):
                ideas.append(f"--quantize {scheme}")
                break
    if case.cache is None:
        narrow = dataclasses.replace(case, cache="int8")
        if any(fits(narrow, where, each) for each in arithmetic.all_meshes(narrow, where)):
            ideas.append("--cache int8")
    bigger = smallest_slice(case, where)
    if bigger is not None:
        ideas.append(f"--tpu {bigger.name}")
    return " or ".join(ideas) if ideas else "nothing that is known here; take another chip"


def fits(case: Case, where: Slice, sizes: Sizes) -> bool:
    return peak(case, where, sizes, None) <= where.memory


def smallest_slice(case: Case, where: Slice) -> Slice | None:
    """The smallest slice of the same chip, larger than this one, that some mesh of it fits."""
    for name, shape in named(where.chip.name):
        slice_ = find(name)
        if slice_.devices <= where.devices or slice_.shape != shape:
            continue
        if slice_.devices > 1024:
            break
        if any(fits(case, slice_, sizes) for sizes in arithmetic.all_meshes(case, slice_)):
            return slice_
    return None


def other_chips(case: Case, count: int) -> list[str]:
    """Chips of which a slice with at most `count` devices would fit the case."""
    found = []
    for chip in chips.CHIPS:
        for name, _ in named(chip):
            slice_ = find(name)
            if slice_.devices > count:
                break
            if any(fits(case, slice_, sizes) for sizes in arithmetic.all_meshes(case, slice_)):
                found.append(name)
                break
    return found


def positive(case: Case) -> None:
    """Whether the sizes that are asked for make sense.

    Raises:
      InputError: a size below 1, a prompt longer than the context, a context longer than the model's,
        a kind of weights or cache that there is not.
    """
    for name in ("batch", "context", "prompt"):
        if getattr(case, name) < 1:
            raise InputError(f"{name}={getattr(case, name)} must be at least 1")
    if case.prompt > case.context:
        raise InputError(f"prompt={case.prompt} must be at most context={case.context}, which holds it")
    if case.context > case.spec.context:
        raise InputError(
            f"context={case.context} is beyond the {case.spec.context} tokens that {case.model} was made for"
        )
    if case.quantize is not None and case.quantize not in compression.SCHEMES:
        raise InputError(f"quantize={case.quantize!r} must be None or one of {', '.join(compression.SCHEMES)}")
    check_kind("cache", case.cache)
