"""Memory of `jaxinf quantize` on a synthetic bfloat16 checkpoint, and a run that is killed half-way.

    python benchmarks/quantize_memory.py [--gigabytes 2] [--scheme int8] [--folder DIR]

Anonymous memory is the kernel's RssAnon, asked for every 10 ms: pages of mapped files are not in it, since the
system takes them back as it likes. What the same command takes for a tiny checkpoint is the interpreter's own.
Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parents[1]
D, FFN, VOCAB, HEADS = 2048, 8192, 32000, 16
MATRICES = {
    "self_attn.q_proj": (D, D),
    "self_attn.k_proj": (D // 4, D),
    "self_attn.v_proj": (D // 4, D),
    "self_attn.o_proj": (D, D),
    "mlp.gate_proj": (FFN, D),
    "mlp.up_proj": (FFN, D),
    "mlp.down_proj": (D, FFN),
}


def shapes(layers: int, shrink: int = 1) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.norm.weight": (D // shrink,)}
    for name in ("model.embed_tokens", "lm_head"):
        found[f"{name}.weight"] = (VOCAB // shrink, D // shrink)
    for i in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{norm}.weight"] = (D // shrink,)
        for module, shape in MATRICES.items():
            found[f"model.layers.{i}.{module}.weight"] = tuple(n // shrink for n in shape)
    return found


def synthesise(folder: Path, layers: int, shrink: int = 1) -> Path:
    """A Llama of random weights, written tensor by tensor."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": D // shrink,
        "intermediate_size": FFN // shrink,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 4,
        "num_hidden_layers": layers,
        "vocab_size": VOCAB // shrink,
        "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    header, at, some = {}, 0, np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(ml_dtypes.bfloat16)
    for name, shape in shapes(layers, shrink).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i, shape in enumerate(shapes(layers, shrink).values()):
            file.write(np.resize(np.roll(some, 7919 * i), shape).tobytes())
    return folder


def anonymous(process: int) -> int:
    """Bytes of anonymous memory that a process has."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def run(source: Path, target: Path, options: list[str], *, kill_at: int | None = None) -> dict[str, float]:
    """`jaxinf quantize`: its highest anonymous memory in bytes, and its seconds.

    kill_at: percent of its progress at which it is killed.
    """
    command = [sys.executable, "-m", "jaxinf", "quantize", str(source), str(target), *options]
    began, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said)
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            if kill_at is not None and f": {kill_at} %" in _read(said):
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.01)
        text = _read(said)
    expected = -signal.SIGKILL if kill_at is not None else 0
    if process.returncode != expected:
        raise SystemExit(f"exit code {process.returncode}:\n{text}")
    return {"peak": peak, "seconds": round(time.monotonic() - began, 1), "resumed": "going on with" in text}


def _read(file) -> str:
    file.seek(0)
    return file.read()


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    parser.add_argument("--kill", action="store_true", help="kill a second run half-way, and complete it")
    args = parser.parse_args()
    each = sum(2 * int(np.prod(s)) for s in shapes(1).values()) - 2 * sum(
        int(np.prod(s)) for s in shapes(0).values()
    )
    layers = max(1, round((args.gigabytes * 1e9 - 4 * VOCAB * D) / each))
    with tempfile.TemporaryDirectory(dir=args.folder) as at:
        options = ["--scheme", args.scheme]
        tiny, large = synthesise(Path(at) / "tiny", 1, 16), synthesise(Path(at) / "large", layers)
        own = run(tiny, Path(at) / "tiny-out", options)
        whole = run(large, Path(at) / "out", options)
        report = {
            "scheme": args.scheme,
            "source_bytes": (large / "model.safetensors").stat().st_size,
            "largest_tensor_bytes": max(2 * int(np.prod(s)) for s in shapes(1).values()),
            "written_bytes": sum(path.stat().st_size for path in (Path(at) / "out").iterdir()),
            "seconds": whole["seconds"],
            "peak_bytes": whole["peak"],
            "interpreter_bytes": own["peak"],
            "beyond_interpreter_bytes": whole["peak"] - own["peak"],
        }
        if args.kill:
            killed = Path(at) / "killed"
            run(large, killed, options, kill_at=50)
            report["there_after_kill"] = killed.exists()
            again = run(large, killed, options)
            report["resumed"] = again["resumed"]
            report["seconds_of_second_run"] = again["seconds"]
            report["same_files"] = digests(killed) == digests(Path(at) / "out")
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
