"""From a recipe's name to a checkpoint: prepare the corpus, train, export, evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from jaxinf import checkpoint
from jaxinf.models import dequantize
from jaxinf.training.corpus import read_held_out, read_part
from jaxinf.training.data import Batches, Documents
from jaxinf.training.evaluate import bits_per_byte, xz_bits_per_byte
from jaxinf.training.loop import Trainer, plot_loss, write_log
from jaxinf.training.recipes import RECIPES, Recipe
from jaxinf.training.rounding import B158, BITNET, Rounding, finish_qat, in_bfloat16
from jaxinf.training.tokenizer import end_of_text, train_tokenizer
from pallas_kernels.errors import CheckpointError, InputError

EMBEDDED = Path(__file__).parents[1] / "embedded"
HELD_OUT = Path("tests", "data", "stdlib_heldout.xz")  # in a checkout of the project
TOKENIZER = "tokenizer.json"


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`."""
    if name not in RECIPES:
        raise InputError(f"there is no recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def prepare(folder: Path, source: Path | None = None) -> Documents:
    """The encoded training split; made in `folder` with its tokenizer unless it lies there.

    Args:
      folder: of `tokenizer.json` and the encoded corpus.
      source: the Lib folder of Python 3.11.7; None: of the running interpreter.
    """
    if (folder / TOKENIZER).is_file() and (folder / "tokens.npy").is_file():
        return Documents.load(folder)
    texts = [data.decode("utf-8") for data in read_part("train", source).values()]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts)
    documents = Documents.encode(texts, tokenizer)
    documents.save(folder)
    beside = folder / f"{TOKENIZER}.part"
    tokenizer.save(str(beside))
    beside.replace(folder / TOKENIZER)
    return documents


def train(
    name: str,
    *,
    out: Path,
    data: Path,
    steps: int | None = None,
    minutes: float | None = None,
    resume: bool = False,
    source: Path | None = None,
    console: Console | None = None,
    rounding: Rounding | None = None,
    start: str | None = None,
    rate: float | None = None,
) -> Path:
    """Train a recipe and export it; see `python -m jaxinf.training --help`.

    Args:
      rounding: train for matrices that are stored so, and export them so.
      start: a model to go on from, by name or folder; None: with a rounding the embedded model of that name, else
        fresh parameters, as "none" says too.
      rate: multiplies the recipe's peak rates; None: 1, or a quarter where a trained model goes on in more than
        two bits: b1.58 has to find other weights, the wider formats those nearby.

    Returns:
      The exported folder, `out/export`; the log and the loss plot lie in `out`.

    Raises:
      CheckpointError: `out` holds checkpoints and `resume` is false.
      InputError: the model to start from is no such model, or the rounding does not fit it.
    """
    recipe = find_recipe(name)
    if start is None:
        start = "none" if rounding is None else name
    if rate is None:
        rate = 1.0 if start == "none" or (rounding is not None and rounding.format == "ternary") else 0.25
    if not rate > 0:
        raise InputError(f"rate={rate} must be above 0")
    console = Console(stderr=True) if console is None else console
    if not resume and any((out / "checkpoints").glob("*")):
        raise CheckpointError(f"{out} holds the checkpoints of an earlier run: pass --resume, or another --out")
    console.print(f"corpus and tokenizer in {data}")
    documents = prepare(data, source)
    peak = recipe.train.optimizer
    peak = replace(peak, matrix_rate=rate * peak.matrix_rate, other_rate=rate * peak.other_rate)
    spec = replace(recipe.train, rounding=rounding, optimizer=peak)
    spec = spec if steps is None else replace(spec, steps=steps)
    batches = Batches(documents, batch=spec.batch, context=spec.context, seed=spec.seed)
    begin = None if start == "none" else dequantize(checkpoint.load(locate(start), dtype="float32").model)
    trainer = Trainer(recipe.model, spec, batches, out, start=begin)
    try:
        if resume and trainer.resume():
            console.print(f"resumed at step {trainer.step}")
        size = sum(x.size for x in trainer.params.values())
        console.print(
            f"{name}: {size:,} parameters, {spec.steps} steps of {spec.batch * spec.context} tokens, "
            f"{batches.per_epoch} steps an epoch"
        )
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("compiling", total=1.0)
            recent: list[float] = []

            def show(record):
                recent.append(record.seconds)
                del recent[:-20]
                passed = recent[-1] - recent[0]
                rate = f"{record.tokens * (len(recent) - 1) / passed:,.0f} tokens/s" if passed > 0 else ""
                text = f"step {record.step} loss {record.loss:.3f} {rate}"
                bar.update(task, completed=record.progress, description=text)

            trainer.run(minutes=minutes, on_step=show)
        write_log(trainer.records, out / "log.jsonl")
        if not plot_loss(trainer.records, out / "loss.png"):
            console.print("no loss plot: matplotlib is not installed")
        exported = export(trainer, data / TOKENIZER, out / "export")
    finally:
        trainer.close()
    console.print(f"exported to {exported}")
    return exported


def export(trainer: Trainer, tokenizer_file: Path, folder: Path) -> Path:
    """Write the trained parameters as a folder that the library loads: in bfloat16, and rounded where the training
    was for that."""
    end = end_of_text(Tokenizer.from_file(str(tokenizer_file)))
    model, rounding = trainer.network.model(trainer.params), trainer.train.rounding
    if rounding is not None:
        model = finish_qat(model)
    return checkpoint.save(
        folder,
        in_bfloat16(model),
        tokenizer_files=[tokenizer_file],
        generation={"bos_token_id": end, "eos_token_id": end},
        overwrite=True,
        scheme=None if rounding is None else B158 if rounding == BITNET else "qat",
    )


def locate(model: str) -> Path:
    """The folder of an embedded model, or the folder given."""
    if (EMBEDDED / model / "config.json").is_file():
        return EMBEDDED / model
    if Path(model).is_dir():
        return Path(model)
    raise InputError(f"there is no model {model!r}: give {', '.join(RECIPES)} or the folder of a checkpoint")


def held_out_text(file: Path | None = None, source: Path | None = None) -> dict[str, bytes]:
    """The held-out files: from `file`, else as shipped with the tests, else from the standard library."""
    if file is not None:
        return read_held_out(file)
    return read_held_out(HELD_OUT) if HELD_OUT.is_file() else read_part("heldout", source)


def evaluate(
    model: str,
    files: dict[str, bytes],
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float | int | str]:
    """Bits per byte of a model and of xz over the same files, as a flat record.

    Weights are read in float32, whatever they are stored in.
    """
    folder = locate(model)
    loaded = checkpoint.load(folder, dtype="float32")
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    documents = Documents.encode((data.decode("utf-8") for data in files.values()), tokenizer)
    context = context or loaded.model.spec.context
    bits = bits_per_byte(loaded.model, documents, context=context, stride=stride, progress=progress)
    xz = xz_bits_per_byte(b"".join(files.values()))
    return {
        "model": model,
        "files": len(files),
        "bytes": documents.bytes,
        "tokens": len(documents.tokens),
        "bits_per_byte": bits,
        "xz_bits_per_byte": xz,
        "below_xz": 1 - bits / xz,
    }


def as_json(record: dict[str, float | int | str]) -> str:
    """One line of JSON."""
    return json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()})
