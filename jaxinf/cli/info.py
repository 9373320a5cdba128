"""`jaxinf info`: what a model is and how much memory it wants."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from jaxinf.cli import output
from jaxinf.cli.options import add_dtype, add_json

if TYPE_CHECKING:
    from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec
    from jaxinf.models import ModelSpec
    from jaxinf.models.describe import Description

EPILOG = """\
examples:
  jaxinf info stdlib
  jaxinf info gemma-3-27b --dtype bfloat16
  jaxinf info ./config.json --json

No weights are loaded. Active parameters are those that serve one token: of a mixture, its chosen experts.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="embedded model, folder, preset or config.json")
    add_dtype(parser, "the checkpoint's; bfloat16 for a preset")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from jaxinf.core import to_record
    from jaxinf.lm.architecture import architecture, weight_bytes
    from jaxinf.models.describe import describe

    found = architecture(args.model)
    spec, dtype = found.spec, args.dtype or found.dtype
    sizes = describe(spec, dtype=dtype)
    stored = None if found.quantize is None or found.folder is None else weight_bytes(found.folder)
    full = sizes.kv_bytes_per_token * spec.context + sizes.kv_bytes_of_windows
    if args.json:
        output.print_json(
            {
                "model": args.model,
                "dtype": dtype,
                "layers": spec.depth,
                "d_model": spec.d_model,
                "vocab": spec.vocab,
                "context": spec.context,
                "parameters": sizes.parameters,
                "active_parameters": sizes.active_parameters,
                "bytes": sizes.bytes if stored is None else stored,
                "quantized": found.quantize,
                "kv_bytes_per_token": sizes.kv_bytes_per_token,
                "kv_bytes_of_windows": sizes.kv_bytes_of_windows,
                "kv_bytes_at_context": full,
                "spec": to_record(spec),
            }
        )
        return 0
    facts = _facts(args.model, spec, sizes, dtype, full)
    if stored is not None:
        kept = (
            f"{output.size(stored)} in files, matrices as {found.quantize}; {output.size(sizes.bytes)} in {dtype}"
        )
        facts[4] = ("weights", kept)
    print(output.table(facts))
    print()
    print(output.table([("layers", "attention", "feed-forward"), *_layers(spec)], header=True))
    return 0


def _facts(name: str, spec: ModelSpec, sizes: Description, dtype: str, full: int) -> list[tuple[str, str]]:
    shape = f"{spec.depth} layers of width {spec.d_model}, vocabulary {spec.vocab:,}, context {spec.context:,}"
    cache = f"{output.size(sizes.kv_bytes_per_token)} a token"
    if sizes.kv_bytes_of_windows:
        cache += f", and at most {output.size(sizes.kv_bytes_of_windows)} in windows"
    return [
        ("model", name),
        ("shape", shape + (", tied head" if spec.tied else "")),
        ("parameters", output.many(sizes.parameters)),
        ("active", f"{output.many(sizes.active_parameters)} a token"),
        ("weights", f"{output.size(sizes.bytes)} in {dtype}"),
        ("KV cache", f"{cache}; {output.size(full)} a row at full context"),
    ]


def _layers(spec: ModelSpec) -> Iterator[tuple[str, str, str]]:
    """A row for each run of equal layers in each segment: "10 x 5" are five in a row, ten times."""
    for segment in spec.segments:
        for layer, equal in groupby(segment.period):
            run = len(list(equal))
            if len(segment.period) == run:
                times = str(segment.repeats * run)
            else:
                times = str(run) if segment.repeats == 1 else f"{segment.repeats} x {run}"
            yield times, _attention(layer.attention), _feed_forward(layer)


def _attention(spec: AttentionSpec) -> str:
    parts = [f"{spec.heads}/{spec.kv_heads} heads of {spec.head_dim}"]
    parts.append("full" if spec.window is None else f"window {spec.window:,}")
    if spec.rope is not None:
        scaling = type(spec.rope).__name__.removesuffix("RopeSpec").lower()
        share = "" if spec.rope.dim == spec.head_dim else f" of {spec.rope.dim}"
        parts.append(" ".join(f"{scaling} rope{share} {spec.rope.theta:g}".split()))
    parts.append("alibi" if spec.alibi is not None else "")
    parts.append("qk-norm" if spec.qk_norm is not None else "")
    parts.append("sinks" if spec.sinks else "")
    parts.append("softcap" if spec.softcap is not None else "")
    return ", ".join(part for part in parts if part)


def _feed_forward(layer: LayerSpec) -> str:
    from jaxinf.layers import MoESpec, TokenChoice

    ffn = layer.ffn
    if not isinstance(ffn, MoESpec):
        return f"{_activation(ffn)} {ffn.width:,}"
    if isinstance(ffn.router, TokenChoice):
        choice = f"{ffn.router.top_k} a token"
    else:
        choice = "chosen by experts"
    shared = "" if ffn.shared is None else f", {ffn.shared.width:,} shared"
    return f"{ffn.experts} experts, {choice}, {_activation(ffn)} {ffn.width:,}{shared}"


def _activation(ffn: FFNSpec | MoESpec) -> str:
    """What stands between the projections: "gated silu", "gelu", "clamped gated"."""
    kind = ffn.activation
    function = getattr(kind, "function", "clamped")
    return f"gated {function}" if kind.gated else function
