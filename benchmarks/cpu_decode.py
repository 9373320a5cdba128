"""Prefill and decode on a CPU: this library beside transformers on the same checkpoint, in one run.

    python benchmarks/cpu_decode.py [--rounds 3] [--json out.json]      (extra: bench)

Four tables:
  1. a Llama-shaped checkpoint of 134.5 M random parameters (30 layers, 576 wide, 9 query and 3 KV heads, as
     SmolLM2-135M), float32 and bfloat16, through `LM.generate` and through transformers' `generate`; and the
     float32 one with the matrices of its layers in int8 beside its own float32;
  2. what a mixture of experts costs beside the dense model of its active size;
  3. the matrix products of one decode step and of one prefill of that model, all layers and the head, with weights
     stored in float32, bfloat16 and int8 (one scale a column), activations in float32;
  4. from a cold process to the first token of the embedded model, with and without the compilation cache, and
     how long `jaxinf --help` takes.

Each figure comes from processes of their own, run in turn round after round, so that a slow minute of the
machine meets all alike; the tables give medians and, beside them, ratios within a round. Greedy, batch 1,
prompt 128, 64 new tokens. prefill = prompt / time of a call for 1 token; decode = 63 / (time of a call for
64 - time of a call for 1). What bounds decoding is memory: the weights are read once a token.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT, NEW, REPEATS = 128, 64, 3
SHAPE = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)


def prompt_ids() -> list[int]:
    return [(7919 * i + 13) % SHAPE["vocab_size"] for i in range(PROMPT)]


def timed(call) -> dict:
    """Prefill and decode tokens/s of `call(new_tokens)`: medians over a few calls, compilation left out."""
    call(1), call(NEW)
    first, whole = [], []
    for _ in range(REPEATS):
        for n, seconds in ((1, first), (NEW, whole)):
            start = time.perf_counter()
            call(n)
            seconds.append(time.perf_counter() - start)
    one, many = statistics.median(first), statistics.median(whole)
    return dict(prefill=PROMPT / one, decode=(NEW - 1) / (many - one))


# ------------------------------------------------------------------ workers, each in a process of its own


def make_checkpoint(folder: str) -> dict:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model.to(dtype).save_pretrained(Path(folder) / name)
    return dict(parameters=sum(p.numel() for p in model.parameters()))


def worker_transformers(folder: str, dtype: str) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(Path(folder) / dtype, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt_ids()])

    def call(n: int) -> None:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
        assert out.shape[1] == PROMPT + n

    return timed(call)


def worker_jaxinf(folder: str, dtype: str) -> dict:
    import jaxinf

    if dtype == "int8":
        return time_lm(jaxinf.LM.from_pretrained(str(Path(folder) / "float32"), quantize="int8"))
    return time_lm(jaxinf.LM.from_pretrained(str(Path(folder) / dtype)))


def time_lm(lm) -> dict:
    ids = prompt_ids()

    def call(n: int) -> None:
        out = lm.generate(ids, max_new_tokens=n, temperature=0.0, eos=())
        assert len(out.tokens) == n

    return timed(call)


def worker_mixture(kind: str) -> dict:
    """A model whose feed-forward parts are 8 experts of which 2 serve a token, or one as wide as those 2."""
    import jax.numpy as jnp
    from flax import nnx

    from jaxinf import LM
    from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, RopeSpec, TokenChoice
    from jaxinf.models import CausalLM, ModelSpec, fold

    width = SHAPE["intermediate_size"]
    ffn = FFNSpec(2 * width) if kind == "dense" else MoESpec(8, width, TokenChoice(top_k=2))
    layer = LayerSpec(AttentionSpec(9, 3, 64, rope=RopeSpec(64)), ffn)
    spec = ModelSpec(SHAPE["vocab_size"], SHAPE["hidden_size"], fold([layer] * 8), 2048, tied=True)
    return time_lm(LM(CausalLM(spec, rngs=nnx.Rngs(0), param_dtype=jnp.float32)))


def worker_weights(dtype: str) -> dict:
    """Steps a second through every matrix of the model, one after another, for one row and for a prompt."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import quantized_matmul

    wide, inner, kv = SHAPE["hidden_size"], SHAPE["intermediate_size"], 64 * SHAPE["num_key_value_heads"]
    layer = [(wide, wide), (wide, kv), (wide, kv), (wide, wide), (wide, inner), (wide, inner), (inner, wide)]
    shapes = layer * SHAPE["num_hidden_layers"] + [(wide, SHAPE["vocab_size"])]
    # Stored [out, in], as checkpoints have them.
    weights = []
    for i, (n, m) in enumerate(shapes):
        drawn = jax.random.normal(jax.random.key(i), (m, n)) / n**0.5
        if dtype == "int8":
            scale = jnp.max(jnp.abs(drawn), axis=1) / 127
            weights.append((jnp.round(drawn / scale[:, None]).astype(jnp.int8), scale))
        else:
            weights.append((drawn.astype(dtype), None))

    @jax.jit
    def step(x, weights):
        # Each product takes the last one's leading columns, so that none can be left out or reordered.
        for (w, scale), (n, _) in zip(weights, shapes, strict=True):
            x = jnp.pad(x, ((0, 0), (0, max(0, n - x.shape[1]))))[:, :n]
            x = quantized_matmul(x, w, scale, transpose=True)
        return x.sum()

    def rate(rows: int, steps: int) -> float:
        x = jnp.ones((rows, wide))
        step(x, weights).block_until_ready()
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            step(x, weights).block_until_ready()
            times.append(time.perf_counter() - start)
        return 1 / statistics.median(times)

    return dict(decode=rate(1, 30), prefill=rate(PROMPT, 5))


def run_worker(*arguments: str) -> dict:
    out = subprocess.run(
        [sys.executable, __file__, "--worker", *arguments], capture_output=True, text=True, check=False
    )
    if out.returncode:
        raise SystemExit(f"worker {' '.join(arguments)} failed:\n{out.stderr[-2000:]}")
    return json.loads(out.stdout.strip().splitlines()[-1])


# ------------------------------------------------------------------ tables


def in_rounds(rounds: int, cases: list[tuple[str, ...]], progress) -> list[list[dict]]:
    """`results[case][round]`, the cases taking turns."""
    results: list[list[dict]] = [[] for _ in cases]
    for r in range(rounds):
        for i, case in enumerate(cases):
            progress(f"round {r + 1} of {rounds}: {' '.join(Path(c).name for c in case)}")
            results[i].append(run_worker(*case))
    return results


def against(ours: list[dict], theirs: list[dict], what: str) -> float:
    """The median over rounds of our rate divided by theirs in the same round."""
    return statistics.median(a[what] / b[what] for a, b in zip(ours, theirs, strict=True))


def peers(rounds: int, progress) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        progress("making the checkpoint")
        run_worker("checkpoint", folder)
        cases = [(lib, folder, dtype) for dtype in ("float32", "bfloat16") for lib in ("transformers", "jaxinf")]
        cases.append(("jaxinf", folder, "int8"))
        results = in_rounds(rounds, cases, progress)
    rows = []
    for (library, _, dtype), runs in zip(cases, results, strict=True):
        theirs = results[cases.index(("transformers", cases[0][1], "float32" if dtype == "int8" else dtype))]
        f32 = results[cases.index((library, cases[0][1], "float32"))]
        rows.append(
            dict(
                library=library,
                dtype=dtype,
                **{w: statistics.median(r[w] for r in runs) for w in ("prefill", "decode")},
                prefill_ratio=against(runs, theirs, "prefill"),
                decode_ratio=against(runs, theirs, "decode"),
                decode_over_own_float32=against(runs, f32, "decode"),
            )
        )
    return rows


def mixtures(rounds: int, progress) -> list[dict]:
    cases = [("mixture", kind) for kind in ("dense", "experts")]
    dense, experts = in_rounds(rounds, cases, progress)
    return [
        dict(
            model=name,
            **{w: statistics.median(r[w] for r in runs) for w in ("prefill", "decode")},
            prefill_ratio=against(runs, dense, "prefill"),
            decode_ratio=against(runs, dense, "decode"),
        )
        for name, runs in (("dense, 3072 wide", dense), ("8 experts of 1536, 2 active", experts))
    ]


def weights(rounds: int, progress) -> list[dict]:
    dtypes = ("float32", "bfloat16", "int8")
    results = in_rounds(rounds, [("weights", dtype) for dtype in dtypes], progress)
    return [
        dict(
            weights=dtype,
            **{f"{w}_steps/s": statistics.median(r[w] for r in runs) for w in ("decode", "prefill")},
            decode_ratio=against(runs, results[0], "decode"),
            prefill_ratio=against(runs, results[0], "prefill"),
        )
        for dtype, runs in zip(dtypes, results, strict=True)
    ]


def cold_start(rounds: int, progress) -> list[dict]:
    command = [sys.executable, "-m", "jaxinf"]
    generate = [*command, "generate", "def fibonacci(n):", "--max-new-tokens", "1"]

    def seconds(arguments: list[str], cache: str) -> float:
        start = time.perf_counter()
        env = os.environ | {"JAXINF_COMPILATION_CACHE": cache}
        subprocess.run(arguments, env=env, check=True, capture_output=True)
        return time.perf_counter() - start

    times: dict[str, list[float]] = {"no cache": [], "warm cache": [], "--help": []}
    with tempfile.TemporaryDirectory() as folder:
        seconds(generate, folder)
        for r in range(rounds):
            progress(f"round {r + 1} of {rounds}: cold start")
            times["no cache"].append(seconds(generate, "0"))
            times["warm cache"].append(seconds(generate, folder))
            times["--help"].append(seconds([*command, "--help"], "0"))
    return [
        dict(
            what=what,
            seconds=statistics.median(t),
            over_no_cache=statistics.median(a / b for a, b in zip(t, times["no cache"], strict=True)),
        )
        for what, t in times.items()
    ]


def show(title: str, rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(v if isinstance(v, str) else f"{v:.2f}" for v in row.values()))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("peers", "mixtures", "weights", "cold"), help="one table of the four")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, *rest = args.worker
        workers = dict(
            checkpoint=make_checkpoint,
            transformers=worker_transformers,
            jaxinf=worker_jaxinf,
            mixture=worker_mixture,
            weights=worker_weights,
        )
        print(json.dumps(workers[kind](*rest)))
        return

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    tables = dict(
        peers=("tokens/s; ratios to transformers at the same dtype (int8: at float32)", peers),
        mixtures=("tokens/s; ratios to the dense model", mixtures),
        weights=("matrix products alone; ratios to float32", weights),
        cold=("seconds from process start to the end of a call for one token", cold_start),
    )
    figures = {}
    for name, (title, make) in tables.items():
        if args.only in (None, name):
            figures[name] = make(args.rounds, progress)
            show(title, figures[name])
    if args.json:
        beside = args.json.with_suffix(".part")
        beside.write_text(json.dumps(figures, indent=1) + "\n")
        beside.replace(args.json)


if __name__ == "__main__":
    main()
