"""What a mesh costs by arithmetic alone: bytes, products and collectives over peak rates."""

from __future__ import annotations

import math

from jaxinf.aot.plan import sizes as parts
from jaxinf.aot.plan import traffic
from jaxinf.aot.plan.types import Case, Found, PerChip, Sizes, Terms
from jaxinf.aot.programs import piece_of
from jaxinf.aot.slices import Slice
from jaxinf.layers import MoESpec
from jaxinf.models.placing import check as check_model
from pallas_kernels.errors import InputError
from sharding import meshes
from sharding.collectives import AXES


def check(case: Case, where: Slice, sizes: Sizes) -> None:
    """Whether a mesh divides the slice, the model and the context.

    Raises:
      InputError: it does not; says which dimension, and which sizes would.
    """
    name, count = meshes.describe(sizes), math.prod(sizes.values())
    if count > where.devices:
        raise InputError(f'mesh="{name}" needs {count} devices, but {where.name} has {where.devices}.')
    check_model(case.spec, sizes)
    sequence = sizes.get("sequence", 1)
    if sequence > 1 and case.context % (2 * sequence):
        fine = [n for n in range(1, where.devices + 1) if n == 1 or case.context % (2 * n) == 0]
        raise InputError(
            f"sequence={sequence} does not divide the context={case.context} into pairs of equal chunks; "
            f"sequence may be {', '.join(map(str, fine[:12]))}"
        )


def found(case: Case, where: Slice, sizes: Sizes) -> Found:
    """Bytes and times of a mesh.

    Raises:
      InputError: as `check`.
    """
    check(case, where, sizes)
    weights = parts.weights(case, sizes)
    held, cache = sum(w.bytes for w in weights), parts.cache_bytes(case, sizes)
    temporaries = parts.activation_bytes(case, sizes, parts.rows(case, sizes) * piece(case, sizes))
    per_chip = PerChip(held, cache, temporaries, held + cache + temporaries, where.memory)
    uses = traffic.uses(case, where, sizes, 1, ring=False)
    prefill_uses = _prefill_uses(case, where, sizes)
    decode = Terms(
        _decode_bytes(case, sizes, weights) / where.bandwidth,
        _flops(case, sizes, weights, 1, case.context, parts.rows(case, sizes)) / where.bf16,
        sum(u.seconds for u in uses),
    )
    prefill = Terms(
        _prefill_bytes(case, sizes, weights) / where.bandwidth,
        _prefill_flops(case, sizes, weights) / where.bf16,
        sum(u.seconds for u in prefill_uses),
    )
    works, all_ticks = traffic.ticks(case, sizes)
    return Found(sizes, per_chip, decode, prefill, uses, prefill_uses, all_ticks / works)


def decode_seconds(found: Found) -> float:
    """A step: collectives wait for products, and stages of a pipeline for each other."""
    return found.decode.roofline * found.ticks + found.decode.ici


def prefill_seconds(found: Found) -> float:
    return found.prefill.roofline * found.ticks + found.prefill.ici


def piece(case: Case, sizes: Sizes) -> int:
    """Tokens of a prompt that one pass takes."""
    if case.spec.reads_prompts_whole or sizes.get("sequence", 1) > 1:
        return case.prompt
    return min(piece_of(parts.rows(case, sizes)), case.prompt)


def _passes(case: Case, sizes: Sizes) -> int:
    return math.ceil(case.prompt / piece(case, sizes))


def _read(weights: tuple[parts.Weight, ...], tied: bool, tokens: float, times: int) -> float:
    """Bytes of weights that passes over so many tokens (that meet at an expert) read, each `times` times."""
    total = 0.0
    for w in weights:
        if w.kind == "embedding" and not tied:
            continue
        share = parts.touched(w.share, tokens) if w.kind == "experts" else 1.0
        total += w.bytes * share * times
    return total


def _decode_bytes(case: Case, sizes: Sizes, weights: tuple[parts.Weight, ...]) -> float:
    micro = traffic.micro_batches(case, sizes)
    read = _read(weights, case.spec.tied, parts.group(case, sizes) / micro, micro)
    return read + _cache_read(case, sizes, case.context)


def _cache_read(case: Case, sizes: Sizes, context: float) -> float:
    """Bytes of the cache that a device reads for a query in each row."""
    return sum(
        count * parts.read(case, layer.attention, context, sizes) * parts.entry(case, layer.attention, sizes)
        for layer, count in parts.stage(case.spec, sizes)
    )


def _prefill_bytes(case: Case, sizes: Sizes, weights: tuple[parts.Weight, ...]) -> float:
    micro, passes = traffic.micro_batches(case, sizes), _passes(case, sizes)
    tokens = parts.group(case, sizes) * piece(case, sizes) / micro
    read = _read(weights, case.spec.tied, tokens, micro * passes)
    # Each pass reads what the passes before it wrote, and writes its own.
    cached = (passes - 1) / 2 + 1
    return read + cached * _cache_read(case, sizes, case.prompt)


def _flops(
    case: Case, sizes: Sizes, weights: tuple[parts.Weight, ...], tokens: float, context: float, rows: float
) -> float:
    """Of a pass over so many tokens a row, each of which sees `context` tokens."""
    group = parts.group(case, sizes)
    total = 0.0
    for w in weights:
        if w.kind == "experts":
            total += 2.0 * w.numbers * w.share * group * tokens  # the experts here serve all rows that meet here
        elif w.kind == "linear":
            total += 2.0 * w.numbers * rows * tokens
        elif w.kind == "head" or (w.kind == "embedding" and case.spec.tied):
            total += 2.0 * w.numbers * rows
    for layer, count in parts.stage(case.spec, sizes):
        q, _ = parts.heads(layer.attention, sizes)
        window = layer.attention.window
        visible = context / sizes.get("sequence", 1) if window is None else min(window, context)
        total += count * 4.0 * q * layer.attention.head_dim * visible * rows * tokens
    return total


def _prefill_flops(case: Case, sizes: Sizes, weights: tuple[parts.Weight, ...]) -> float:
    split = sizes.get("sequence", 1)
    # The queries of a ring are split, and each meets all keys before it: the same as all queries and split keys.
    whole = _flops(case, sizes, weights, case.prompt, case.prompt / 2, parts.rows(case, sizes))
    if split == 1:
        return whole
    alone = {**sizes, "sequence": 1}
    return _flops(case, alone, weights, case.prompt / split, case.prompt / 2, parts.rows(case, sizes))


def _prefill_uses(case: Case, where: Slice, sizes: Sizes) -> tuple:
    ring = sizes.get("sequence", 1) > 1
    tokens = case.prompt if ring else piece(case, sizes)
    passes = 1 if ring else _passes(case, sizes)
    return traffic.repeated(traffic.uses(case, where, sizes, tokens, ring=ring), passes)


def all_meshes(case: Case, where: Slice) -> list[dict[str, int]]:
    """Every mesh over the whole slice that divides the model; experts and sequences only where there are such."""
    experts = any(isinstance(layer.ffn, MoESpec) for layer in case.spec.layers())
    meshes_found = []
    for sizes in _factors(where.devices, len(AXES)):
        named: dict[str, int] = dict(zip(AXES, sizes, strict=True))
        if (named["expert"] > 1 and not experts) or named["data"] * named["expert"] > case.batch:
            continue
        try:
            check(case, where, named)
        except InputError:
            continue
        meshes_found.append(named)
    return meshes_found


def _factors(count: int, parts_left: int) -> list[tuple[int, ...]]:
    """All ordered ways to write `count` as a product of so many factors."""
    if parts_left == 1:
        return [(count,)]
    return [
        (first, *rest)
        for first in range(1, count + 1)
        if count % first == 0
        for rest in _factors(count // first, parts_left - 1)
    ]
