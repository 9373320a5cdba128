"""What training with rounding gains over rounding what was trained, at the same bits, on held-out text.

    nice -n 15 python benchmarks/qat.py                      (an hour of two cores, most of it training)
    python benchmarks/qat.py --steps 2 --windows 4 --json -  (a quick look)
    python benchmarks/qat.py --train int4                    (only that training; a later call goes on from it)

From the draft in bfloat16 (`tests/data/bfloat16`) three trainings go on, on the same batches: in float32, with
int4 weights in groups of 64, and with BitNet b1.58's layers (ternary weights, inputs rounded to bytes). What was
trained with rounding stands beside the original and the one trained on in float32, both rounded to the nearest. The
held-out text is read in windows of the model's context that move by half of it:
  bits/byte  what the model needs for the text
  KL         mean of KL(float32 || model) a token, in nats, from the original and from that trained on
  agree      tokens whose most likely one is that of the original
  weights    bits a rounded weight takes, scales included
A call that is stopped goes on from its last checkpoint; trainings that are done are scored as they are. Needs the
training text (see `python -m jaxinf.training --help`).
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from jaxinf import checkpoint
from jaxinf.models import CausalLM
from jaxinf.quant import QTensor, nbytes
from jaxinf.training import run
from jaxinf.training.corpus import read_held_out
from jaxinf.training.data import Batches, Documents
from jaxinf.training.evaluate import windows
from jaxinf.training.loop import Network, Trainer
from jaxinf.training.optimizer import OptimizerSpec
from jaxinf.training.rounding import BITNET, Rounding, finish_qat, start_qat
from pallas_kernels.errors import JaxinfError

ROOT = Path(__file__).parents[1]
INT4 = Rounding("int4", 64)
RUNS: dict[str, tuple[Rounding | None, OptimizerSpec]] = {
    "float32": (None, OptimizerSpec(0.005, 0.0015, warmup=0.05)),
    "int4": (INT4, OptimizerSpec(0.005, 0.0015, warmup=0.05)),
    "b1.58": (BITNET, OptimizerSpec(0.02, 0.006, warmup=0.05)),
}


def trained(
    name: str, steps: int, minutes: float | None, original: CausalLM, documents: Documents, out: Path
) -> tuple[CausalLM, dict]:
    """The model that a run ends with, and what the run was."""
    rounding, optimizer = RUNS[name]
    recipe = run.find_recipe("stdlib-draft")
    spec = dataclasses.replace(recipe.train, steps=steps, optimizer=optimizer, rounding=rounding, seed=1)
    batches = Batches(documents, batch=spec.batch, context=spec.context, seed=spec.seed)
    trainer = Trainer(recipe.model, spec, batches, out / f"{name}-{steps}", start=original)

    def show(record) -> None:
        if record.step % 10 == 0:
            recent = np.mean([r.loss for r in trainer.records[-10:]])
            print(
                f"  {name}: step {record.step} ({record.progress:.0%}), loss {recent:.4f}, {record.seconds:.0f} s",
                flush=True,
            )

    try:
        trainer.resume()
        trainer.run(minutes=minutes, on_step=show, checkpoint_minutes=2.0)
    finally:
        trainer.close()
    model = trainer.network.model(trainer.params)
    about = {
        "steps": trainer.step,
        "tokens": trainer.step * spec.batch * spec.context,
        "peak rates": [optimizer.matrix_rate, optimizer.other_rate],
        "last loss": float(np.mean([r.loss for r in trainer.records[-10:]])),
        "seconds": trainer.seconds,
    }
    return model if rounding is None else finish_qat(model), about


def nearest(model: CausalLM, rounding: Rounding) -> CausalLM:
    return finish_qat(start_qat(model, rounding))


def weight_bits(model: CausalLM) -> float:
    values = [v.get_value() for _, v in nnx.to_flat_state(nnx.state(model))]
    stored = [v for v in values if isinstance(v, QTensor)]
    return 8 * sum(map(nbytes, stored)) / sum(math.prod(v.shape) for v in stored) if stored else 32.0


@jax.jit
def log_probabilities(model: CausalLM, rows: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(model(rows[:, :-1]))


@jax.jit
def compared(model: CausalLM, rows: jax.Array, references: list[jax.Array], scored: jax.Array) -> jax.Array:
    """Sums over the tokens scored: nats, KL from each reference, agreement with the first."""
    own = log_probabilities(model, rows)
    nats = -jnp.take_along_axis(own, rows[:, 1:, None], -1)[..., 0]
    kl = [jnp.sum(jnp.exp(p) * (p - own), -1) for p in references]
    agree = jnp.argmax(own, -1) == jnp.argmax(references[0], -1)
    return jnp.stack([jnp.sum(of, where=scored) for of in (nats, *kl, agree.astype(jnp.float32))])


def score(models: dict[str, CausalLM], references: list[str], documents: Documents, limit: int | None) -> dict:
    """Bits a byte, KL from each reference and agreement with the first, of each model."""
    tokens, context = documents.tokens.astype(np.int32), next(iter(models.values())).spec.context
    plan = windows(len(tokens) - 1, context, context // 2)
    if limit is not None and limit < len(plan):
        plan = [plan[i * len(plan) // limit] for i in range(limit)]
    sums, count, batch = {name: np.zeros(2 + len(references)) for name in models}, 0, 4
    for at in range(0, len(plan), batch):
        part = plan[at : at + batch]
        part += [(0, context)] * (batch - len(part))
        starts, firsts = np.array(part).T
        rows, scored = tokens[starts[:, None] + np.arange(context + 1)], np.arange(context) >= firsts[:, None]
        count += int(scored.sum())
        given = [log_probabilities(models[name], rows) for name in references]
        for name, model in models.items():
            sums[name] += np.asarray(compared(model, rows, given, jnp.asarray(scored)), np.float64)
        if at // batch % 10 == 0:
            print(f"  scored {at + batch} of {len(plan)} windows", file=sys.stderr, flush=True)
    # The whole text has its own bytes; of a part, those of an average token.
    size = documents.bytes * count / (len(tokens) - 1)
    found = {}
    for name, (nats, *kl, agree) in sums.items():
        found[name] = {"bits_per_byte": nats / math.log(2) / size, "agree": agree / count}
        found[name] |= {f"kl_from_{of}": value / count for of, value in zip(references, kl, strict=True)}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'model':<44} {'weights':>8} {'bits/byte':>10} {'KL original':>12} {'KL trained on':>14} {'agree':>8}"
    lines = [head, "-" * len(head)]
    for r in rows:
        lines.append(
            f"{r['model']:<44} {r['weight_bits']:8.3f} {r['bits_per_byte']:10.4f} {r['kl_from_original']:12.5f} "
            f"{r['kl_from_trained_on']:14.5f} {r['agree']:8.2%}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="updates of each training (default: 300)")
    parser.add_argument("--minutes", type=float, help="end each training after this long at most, its rate at 0")
    parser.add_argument("--train", choices=RUNS, help="only this training, no table")
    parser.add_argument("--windows", type=int, help="held-out windows to score, evenly spread (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/qat"), help="checkpoints of the trainings")
    parser.add_argument("--data", type=Path, default=Path("runs/corpus"), help="tokenizer and encoded corpus")
    parser.add_argument("--source", type=Path, help="Lib folder of Python 3.11.7 (default: this interpreter's)")
    parser.add_argument("--json", default=str(ROOT / "benchmarks/results/qat.json"), help="file; -: none")
    args = parser.parse_args(argv)
    try:
        folder = ROOT / "tests" / "data" / "bfloat16" / "stdlib-draft"
        loaded = checkpoint.load(folder, dtype="float32").model
        network = Network(loaded.spec)
        original = network.model(network.params_of(loaded))
        documents = run.prepare(args.data, args.source)
        if (
            Tokenizer.from_file(str(folder / run.TOKENIZER)).to_str()
            != Tokenizer.from_file(str(args.data / run.TOKENIZER)).to_str()
        ):
            parser.error(f"the tokenizer in {args.data} is not the draft model's; give --data another folder")
        if args.train:
            trained(args.train, args.steps, args.minutes, original, documents, args.out)
            return 0
        runs = {name: trained(name, args.steps, args.minutes, original, documents, args.out) for name in RUNS}
        files = read_held_out(ROOT / run.HELD_OUT)
    except JaxinfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    texts = [data.decode("utf-8") for data in files.values()]
    held_out = Documents.encode(texts, Tokenizer.from_file(str(folder / run.TOKENIZER)))
    on = runs["float32"][0]
    models = {
        "original": original,
        "trained_on": on,
        "int4 group 64, original, to nearest": nearest(original, INT4),
        "int4 group 64, trained on, to nearest": nearest(on, INT4),
        "int4 group 64, trained with rounding": runs["int4"][0],
        "ternary, bytes in, original, to nearest": nearest(original, BITNET),
        "ternary, bytes in, trained on, to nearest": nearest(on, BITNET),
        "ternary, bytes in, trained with rounding": runs["b1.58"][0],
    }
    found = score(models, ["original", "trained_on"], held_out, args.windows)
    names = {"original": "float32, original", "trained_on": "float32, trained on"}
    rows = [
        {"model": names.get(name, name), "weight_bits": weight_bits(models[name]), **what}
        for name, what in found.items()
    ]
    print(table(rows))
    if args.json != "-":
        record = {
            "model": "stdlib-draft",
            "witness": f"measured on {jax.devices()[0].platform}, jax {jax.__version__}",
            "minutes": args.minutes,
            "windows": args.windows,
            "held_out_bytes": held_out.bytes,
            "trainings": {name: about for name, (_, about) in runs.items()},
            "rows": rows,
        }
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
