"""What each way to quantise costs in accuracy and gains in bytes and time, in one table.

    python benchmarks/quantization.py [--json out.json] [--plot out.png]           (minutes)
    python benchmarks/quantization.py --schemes int8,int4 --tokens 2048 --no-speed (a quick look)
    python benchmarks/quantization.py --static                                     (extra: tpu; many minutes)

Accuracy is that of the embedded target model before rounding (`--model`) on its held-out text, teacher-forced, in
windows of its context, beside the same model in float32:
  bits/byte   what the model needs for the text
  KL          mean of KL(float32 || quantised) a token, in nats; where experts are chosen, also with the choices and
              weights of the float32 model (`fixed`): what flipped choices add is left out
  agree       tokens whose most likely one is the same
  weights     bits a quantised weight takes, scales included; MB of the whole model beside float32
Speed is decoding of the same model on this device, batch 1, in rounds that go through all schemes in turn, as a
ratio to float32 in the same round (medians). With `--static`, a decode step of Llama-3.1-8B (batch 1, context
1,024) on one chip, by a static model of the TPU compiler's schedule: nothing here has run on a TPU.

Rows marked qwix quantise the same weights with that library (`pip install qwix`), where it has the method.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import quantization_peers
from flax import nnx

import jaxinf
from jaxinf import compression
from jaxinf.layers import MoESpec
from jaxinf.models import CausalLM
from jaxinf.quant import QTensor, nbytes
from jaxinf.training.corpus import read_held_out, read_part

HELD_OUT = Path(__file__).parents[1] / "tests" / "data" / "stdlib_heldout.xz"
FLOAT = HELD_OUT.parent / "bfloat16" / "stdlib"
"""The embedded target before its matrices were rounded to int8."""
STATIC_CHIPS = ("v5e-1", "v6e-1")


# ------------------------------------------------------------------ accuracy


@functools.partial(jax.jit, static_argnums=0)
def nats(graph, state, tokens: jax.Array) -> jax.Array:
    """What `tokens[:, 1:]` cost, int32 `[1, T + 1]`."""
    logits = jax.nn.log_softmax(nnx.merge(graph, state)(tokens[:, :-1]))
    return -jnp.sum(jnp.take_along_axis(logits, tokens[:, 1:, None], -1))


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows of held-out text, int32 `[W, T + 1]`, the bytes that their targets stand for."""

    windows: np.ndarray
    bytes: int

    @property
    def tokens(self) -> int:
        return self.windows.shape[0] * (self.windows.shape[1] - 1)

    @classmethod
    def held_out(cls, lm: jaxinf.LM, tokens: int) -> "Text":
        assert lm.tokenizer is not None
        length = min(lm.context, tokens)
        ids: list[int] = []
        for data in read_held_out(HELD_OUT).values():
            ids += lm.tokenizer.encode(data.decode())
            if len(ids) > tokens + 1:
                break
        rows = [ids[i : i + length + 1] for i in range(0, tokens, length)]
        size = sum(len(lm.tokenizer.decode(row[1:]).encode()) for row in rows)
        return cls(np.asarray(rows, np.int32), size)


def calibration_text(lm: jaxinf.LM, tokens: int) -> compression.Calibration:
    """Files of the training part, picked at random, in rows of half a context."""
    assert lm.tokenizer is not None
    files = read_part("train")
    names = sorted(files)
    np.random.default_rng(0).shuffle(names)
    texts = (files[name].decode() for name in names)
    length = lm.context // 2
    return compression.Calibration.of_texts(texts, lm.tokenizer.encode, rows=tokens // length, length=length)


def accuracy(model: CausalLM, reference: CausalLM, text: Text) -> dict[str, float]:
    graph, state = nnx.split(model)
    total = sum(float(nats(graph, state, row[None])) for row in text.windows)
    found = {"bits_per_byte": total / np.log(2) / text.bytes}
    tokens = text.windows[:, :-1]
    free = compression.divergence(reference, model, tokens)
    found |= {"kl": max(free.kl, 0.0), "agreement": free.agreement}
    if any(isinstance(layer.ffn, MoESpec) for layer in model.spec.layers()):
        found["kl_fixed"] = max(compression.divergence(reference, model, tokens, same_routing=True).kl, 0.0)
    return found


def sizes(model: CausalLM) -> dict[str, float]:
    values = [v.get_value() for _, v in nnx.to_flat_state(nnx.state(model))]
    narrow = [v for v in values if isinstance(v, QTensor)]
    weights = sum(int(np.prod(v.shape)) for v in narrow)
    return {
        "bytes": nbytes(values),
        "quantised_bytes": nbytes(narrow),
        "quantised_weights": weights,
        "bits": 8 * nbytes(narrow) / weights if weights else 8.0 * values[0].dtype.itemsize,
    }


# ------------------------------------------------------------------ speed


def decode_seconds(lm: jaxinf.LM, new: int) -> float:
    prompt = list(range(5, 69))
    start = time.perf_counter()
    lm.generate(prompt, 1, eos=())
    first = time.perf_counter()
    lm.generate(prompt, new, eos=())
    return (time.perf_counter() - first - (first - start)) / (new - 1)


def static_steps(scheme: str) -> dict[str, float]:
    """Seconds of a decode step of Llama-3.1-8B on one chip, by the static model."""
    from jaxinf.aot import plan as plans
    from jaxinf.models import presets

    quantize = None if scheme == "bfloat16" else scheme
    case = plans.Case("llama-3.1-8b", presets.preset("llama-3.1-8b"), batch=1, context=1024, prompt=512)
    found = {}
    for chip in STATIC_CHIPS:
        made = plans.plan(dataclasses.replace(case, quantize=quantize), chip, mesh="tensor=1")
        found[chip] = made.decode.step_seconds
    return found


# ------------------------------------------------------------------ the table


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      scheme: of `jaxinf.compression.quantize`; None: the float32 model, or with `dtype` that one.
      static: the scheme whose program a TPU would run: that of other rows with the same layout.
    """

    label: str
    scheme: str | None
    group: int | None = None
    dtype: str = "float32"
    static: str | None = None


ROWS = (
    Row("float32", None),
    Row("bfloat16", None, dtype="bfloat16", static="bfloat16"),
    Row("int8", "int8", static="int8"),
    Row("fp8 e4m3", "fp8_e4m3", static="fp8_e4m3"),
    Row("fp8 e5m2", "fp8_e5m2", static="fp8_e5m2"),
    Row("w8a8", "w8a8", static="w8a8"),
    Row("smoothquant w8a8", "smoothquant", static="w8a8"),
    Row("llm-int8", "llm-int8"),
    Row("k-means 8 bits", "kmeans8", static="kmeans8"),
    Row("int4, groups of 64", "int4", 64, static="int4"),
    Row("awq, groups of 64", "awq", 64, static="int4"),
    Row("gptq, groups of 64", "gptq", 64, static="int4"),
    Row("nf4", "nf4", static="nf4"),
    Row("mxfp4", "mxfp4", static="mxfp4"),
    Row("k-means 4 bits", "kmeans4", static="kmeans4"),
    Row("ternary", "ternary", static="ternary"),
)


def table(headers: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    for row in [headers, *rows]:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def printed(found: list[dict[str, Any]]) -> None:
    whole, fixed = found[0]["bytes"], "kl_fixed" in found[0]
    headers = ["scheme", "bits", "MB", "of f32", "bits/byte", "KL", *(["fixed"] if fixed else []), "agree"]
    speed, static = "decode" in found[0], any("static" in row for row in found)
    headers += ["tokens/s"] * speed + ["x f32"] * speed + [f"{c[:-2]} ms" for c in STATIC_CHIPS] * static
    lines = []
    for row in found:
        line = [
            row["label"],
            f"{row['bits']:.2f}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['bytes'] / whole:.3f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['kl']:.2e}",
        ]
        line += [f"{row['kl_fixed']:.2e}"] if fixed else []
        line += [f"{100 * row['agreement']:.2f} %"]
        if speed:
            line += [f"{row['decode']:.0f}" if "decode" in row else "-"]
            line += [f"{row['speed']:.2f}" if "speed" in row else "-"]
        if static:
            line += [f"{1e3 * row['static'][c]:.2f}" if "static" in row else "-" for c in STATIC_CHIPS]
        lines.append(line)
    table(headers, lines)


def plotted(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(8, 5))
    for row in found:
        if row["kl"] > 0:
            axes.scatter(row["bits"], row["kl"], marker="x" if row["label"].startswith("qwix") else "o")
            axes.annotate(row["label"], (row["bits"], row["kl"]), textcoords="offset points", xytext=(5, 3))
    axes.set(yscale="log", xlabel="bits a quantised weight, scales included", ylabel="KL to float32, nats a token")
    axes.set_xlim(0, 18)
    axes.grid(alpha=0.3)
    plt.tight_layout()
    plt.savefig(path, dpi=90)


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(FLOAT), help="folder of the wide model (default: the target's)")
    parser.add_argument("--schemes", help="rows by scheme, separated by commas; default: all")
    parser.add_argument("--tokens", type=int, default=16384, help="of held-out text")
    parser.add_argument(
        "--calibration", type=int, default=16384, help="tokens of other text, for the schemes with it"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--no-peer", action="store_true", help="leave qwix out")
    parser.add_argument("--static", action="store_true", help="compile Llama-3.1-8B for one v5e and one v6e")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    asked = None if args.schemes is None else args.schemes.split(",")
    if asked is not None and (unknown := set(asked) - {row.scheme for row in ROWS} - {"bfloat16"}):
        raise SystemExit(f"unknown schemes: {', '.join(sorted(unknown))}")
    rows = [r for r in ROWS if asked is None or r.label == "float32" or (r.scheme or r.dtype) in asked]

    lm = jaxinf.LM.from_pretrained(args.model, dtype="float32")
    text, calibration = Text.held_out(lm, args.tokens), calibration_text(lm, args.calibration)

    found: list[dict[str, Any]] = []
    models: dict[str, jaxinf.LM] = {}
    for row in rows:
        note(row.label)
        model = jaxinf.LM.from_pretrained(args.model, dtype=row.dtype).model
        if row.scheme is not None:
            needs = compression.SCHEMES[row.scheme].calibrated
            more = dict(calibration=calibration) if needs else {}
            model = compression.quantize(model, row.scheme, group=row.group, **more)
        models[row.label] = jaxinf.LM(model, lm.tokenizer)
        found.append({"label": row.label, "scheme": row.scheme or row.dtype, **sizes(model)})
        found[-1] |= accuracy(model, lm.model, text)
        # Each program is mapped in pieces, of which Linux allows a process 65,530.
        jax.clear_caches()
    if not args.no_peer:
        found += peers(lm, text, calibration, found)
    if not args.no_speed:
        speeds(found, models, args.rounds)
    if args.static:
        steps: dict[str, dict[str, float]] = {}
        for row, made in zip(rows, found, strict=False):
            if row.static is not None:
                if row.static not in steps:
                    note(f"compiling Llama-3.1-8B, {row.static}")
                    steps[row.static] = static_steps(row.static)
                made["static"] = steps[row.static]

    name = Path(args.model).name
    print(f"{name}: {text.tokens} held-out tokens; calibrated on {args.calibration} others; {device()}")
    printed(found)
    if args.json:
        facts = {
            "model": name,
            "tokens": text.tokens,
            "calibration": args.calibration,
            "device": device(),
        }
        args.json.write_text(json.dumps({**facts, "jax": jax.__version__, "rows": found}, indent=1) + "\n")
    if args.plot:
        plotted(found, args.plot)


def peers(lm: jaxinf.LM, text: Text, calibration, ours: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same weights by qwix, where it has the method of a row."""
    if quantization_peers.version() is None:
        note("qwix is not installed: its rows are left out")
        return []
    by_scheme, found = {row["scheme"]: row for row in ours}, []
    for (method, bits), scheme in quantization_peers.OURS.items():
        if scheme not in by_scheme:
            continue
        label = f"qwix {quantization_peers.version()}: {by_scheme[scheme]['label']}"
        note(label)
        group = None if bits == 8 else 64
        model = quantization_peers.with_qwix(lm.model, method, bits, group=group, calibration=calibration)
        alike = {name: by_scheme[scheme][name] for name in ("bits", "bytes")}
        found.append({"label": label, "scheme": scheme, **alike, **accuracy(model, lm.model, text)})
        jax.clear_caches()
    return found


def speeds(found: list[dict[str, Any]], models: dict[str, jaxinf.LM], rounds: int) -> None:
    """Decoding by each model, in turn; float32 is the first."""
    new = 64
    for label, lm in models.items():
        note(f"compiling {label}")
        decode_seconds(lm, new)
    times: dict[str, list[float]] = {label: [] for label in models}
    for i in range(rounds):
        note(f"round {i + 1} of {rounds}")
        for label, lm in models.items():
            times[label].append(statistics.median(decode_seconds(lm, new) for _ in range(3)))
    base = times[found[0]["label"]]
    for made in found:
        if made["label"] in times:
            own = times[made["label"]]
            made["decode"] = 1 / statistics.median(own)
            made["speed"] = statistics.median(b / o for b, o in zip(base, own, strict=True))


def device() -> str:
    kind = jax.devices()[0].device_kind
    return f"{kind} ({os.cpu_count()} cores)" if kind == "cpu" else kind


if __name__ == "__main__":
    main()
