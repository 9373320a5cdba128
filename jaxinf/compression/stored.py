"""Checkpoints quantised from folder to folder, one file or one layer at a time."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinf.checkpoint import own
from jaxinf.checkpoint.converting import to_write
from jaxinf.checkpoint.folders import GENERATION, read_json, tokenizer_files
from jaxinf.checkpoint.loading import Opened, as_dtype, open_checkpoint
from jaxinf.checkpoint.orbax import write_orbax
from jaxinf.checkpoint.packing import stored
from jaxinf.checkpoint.parameters import Planned, Slot, abstract, arrays_of, everything, slots
from jaxinf.checkpoint.quantization import Quantization, told_by
from jaxinf.checkpoint.rounding import Rounding
from jaxinf.checkpoint.tensors import Pending, in_shards, open_file, open_tensors, shard_names, write_index
from jaxinf.checkpoint.work import Note, Work, fingerprint, resumed
from jaxinf.compression.calibration import Calibration
from jaxinf.compression.layerwise import Settings, quantize_layer
from jaxinf.compression.schemes import Target, plan, scheme_of
from jaxinf.compression.walking import Walk
from jaxinf.layers import Block
from jaxinf.models import CausalLM
from jaxinf.models.placing import with_arrays
from pallas_kernels.errors import InputError

SHARD_BYTES = 500_000_000
"""Of a file, so that little is lost with a run that ends half-way."""
Progress = Callable[[int, int], None]


def quantize_folder(
    source: str | Path,
    target: str | Path,
    scheme: str = "int8",
    *,
    group: int | None = None,
    rules: Mapping[str, str] | None = None,
    calibration: Calibration | None = None,
    to: Literal["safetensors", "orbax"] = "safetensors",
    dtype: Any = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    note: Note = lambda text: None,
    **settings: Any,
) -> Path:
    """Writes the checkpoint in `source`, of any form that `load` reads, quantised and in this project's form.

    The host has some columns of a matrix at a time, or with a calibrated scheme one layer and the text's hidden
    states. `target` appears whole. A run that ends early leaves `.NAME.unfinished` beside it, with which the next
    one of the same source, scheme and options goes on; another begins anew. The tokenizer's files and
    `generation_config.json` come along.

    Args:
      scheme, group, rules, calibration, settings: as of `quantize`.
      to: how weights are kept. orbax gets them once all are made, and has them all in memory.
      dtype: of what is not quantised: "float32", "bfloat16" or "float16"; None: as it is.
      overwrite: replace a checkpoint that is there.
      shard_bytes: largest safetensors file of several tensors.
      progress: called with (bytes written, bytes in all), or with a calibrated scheme (layers done, all layers).
      note: called with what is to be known: that an earlier run is taken up, or is not.

    Raises:
      CheckpointError, UnsupportedError: as `load`; or `target` exists, or cannot be written, or values are NaN.
      InputError: as `quantize`; a source that is quantised already; or `target` holds `source`.
    """
    source, target = Path(source), Path(target)
    if to not in ("safetensors", "orbax"):
        raise InputError(f'to={to!r} must be "safetensors" or "orbax"')
    if target.resolve() in [source.resolve(), *source.resolve().parents]:
        raise InputError(f"target {target} is or holds source {source}; give a folder beside it")
    how = scheme_of(scheme)
    if how.calibrated and calibration is None:
        raise InputError(f"{scheme} is calibrated with text: give some (`jaxinf quantize --calibration FILE`)")
    chosen = Settings(**settings)
    opened = open_checkpoint(source)
    opened.check_plain()
    dtype = opened.dtype if dtype is None else as_dtype(dtype, f"dtype={dtype!r}")
    targets = plan(abstract(opened.spec, dtype, "list"), scheme, group=group, rules=rules)
    key = {
        "source": fingerprint(source),
        "scheme": scheme,
        "options": [group, dict(rules or {}), str(dtype), shard_bytes, dataclasses.asdict(chosen)],
        "calibration": None if calibration is None or not how.calibrated else _digest(calibration),
    }
    with resumed(target, key, overwrite=overwrite, note=note) as work:
        if how.calibrated:
            assert calibration is not None
            made = _Layerwise(opened, dtype, targets, calibration, chosen, work).write(progress)
        else:
            made = _Rounded(opened, dtype, targets, work, shard_bytes).write(progress)
        quantization = None if made is None else dataclasses.replace(made, scheme=scheme)
        generation = read_json(source / GENERATION) if (source / GENERATION).is_file() else None
        more = {"weights": "orbax"} if to == "orbax" else {}
        if to == "orbax":
            _as_orbax(work.files)
        config = own.config_of(opened.spec, dtype, quantization, **more)
        own.describe(work.files, config, tokenizer_files(source), generation)
    return target


def _digest(calibration: Calibration) -> str:
    tokens = np.ascontiguousarray(calibration.tokens)
    return hashlib.sha256(repr((tokens.shape, calibration.batch)).encode() + tokens.tobytes()).hexdigest()


def _as_orbax(folder: Path) -> None:
    tensors = open_tensors(folder)
    write_orbax(folder, {name: tensors.read(name) for name in tensors})
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.unlink()


class _Rounded:
    """Rounds to the nearest, file by file."""

    def __init__(self, opened: Opened, dtype: Any, targets: Mapping[str, Target | None], work: Work, most: int):
        def rule(parameter: str) -> Rounding | None:
            target = targets[parameter.removesuffix(".kernel")]
            return None if target is None else Rounding(target.format.name, target.group, target.activations)

        self._model, planned = opened.plan_rounded(dtype, "list", rule)
        self._shards, self._work = in_shards(to_write(planned), most), work

    def write(self, progress: Progress | None) -> Quantization | None:
        total, done = sum(t.nbytes for shard in self._shards for t in shard), 0

        def report(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, total)

        names = shard_names(len(self._shards))
        for name, shard in zip(names, self._shards, strict=True):
            self._work.write(name, shard, report)
        _index(self._work, names, self._shards)
        return told_by(self._model)


def _index(work: Work, names: Sequence[str], shards: Sequence[Sequence[Pending]]) -> None:
    if len(names) > 1:
        places = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        write_index(work.files, places, sum(t.nbytes for shard in shards for t in shard))


class _Layerwise:
    """Calibrates layer by layer: a file a layer, before them one of all else."""

    def __init__(
        self,
        opened: Opened,
        dtype: Any,
        targets: Mapping[str, Target | None],
        calibration: Calibration,
        settings: Settings,
        work: Work,
    ):
        self._model, planned = opened.plan(dtype, "list")
        self._plan = {leaf.path: (leaf, read) for leaf, read in planned}
        self._targets, self._settings, self._work = targets, settings, work
        widest = max(
            (leaf.value.shape[-2] for leaf, _ in planned if targets.get(_matrix(leaf.names[0]))), default=1
        )
        self._calibration = calibration.fitted(opened.spec, widest)

    def write(self, progress: Progress | None) -> Quantization | None:
        depth = self._model.spec.depth
        names = shard_names(depth + 1)
        self._work.write(names[0], to_write([p for path, p in self._plan.items() if path[0] != "segments"]))
        hidden: list[np.ndarray] | None = None
        for i in range(depth):
            if not self._work.finished(names[i + 1]):
                hidden = self._hidden(i) if hidden is None else hidden
                block, hidden = quantize_layer(
                    self._block(i), hidden, self._targets, at=f"layers.{i}.", settings=self._settings
                )
                if i + 1 < depth:
                    self._work.write_arrays(_states(i + 1), hidden)
                self._work.write(names[i + 1], list(_pending(block, i)))
            self._work.forget(_states(i))
            if progress is not None:
                progress(i + 1, depth)
        return self._described(names)

    def _hidden(self, layer: int) -> list[np.ndarray]:
        """What a layer is given."""
        if layer > 0:
            return self._work.read_arrays(_states(layer))
        first = {
            path: _read(p) for path, p in self._plan.items() if path[0] in ("embed", "positions", "embed_norm")
        }
        return self._calibration.hidden(with_arrays(self._model, _all(self._model, first)))

    def _block(self, layer: int) -> Block:
        """A layer with its values, alone in memory."""
        abstract_block = Walk(self._model).block(layer)
        graph, state = nnx.split(abstract_block)
        values = {
            p[0].names[0]: _read(p) for p in self._plan.values() if p[0].names[0].startswith(f"layers.{layer}.")
        }
        flat = [(path, variable.replace(values[_name(layer, path)])) for path, variable in nnx.to_flat_state(state)]
        return nnx.merge(graph, nnx.from_flat_state(flat))

    def _described(self, names: Sequence[str]) -> Quantization | None:
        """Writes the index of the files, and says what is in them."""
        places, total = {}, 0
        for name in names:
            tensors = open_file(self._work.files / name)
            places |= dict.fromkeys(tensors, name)
            total += sum(info.nbytes for info in tensors.values())
        write_index(self._work.files, places, total)
        rounds, count = [], 0
        for leaf, _ in self._plan.values():
            target = self._targets.get(_matrix(leaf.names[0]))
            if target is not None:
                count += 1
                # Of experts LLM.int8() rounds the weights alone.
                if target.activations and not (target.method == "llm-int8" and len(leaf.value.shape) > 2):
                    rounds.append(leaf.names[0])
        if not count:
            return None
        return Quantization("mixed", "int8" if len(rounds) == count else tuple(sorted(rounds)) or None)


def _states(layer: int) -> str:
    return f"hidden-{layer}.safetensors"


def _matrix(parameter: str) -> str:
    return parameter.removesuffix(".kernel")


def _name(layer: int, path: Sequence[Any]) -> str:
    return f"layers.{layer}." + ".".join(map(str, path))


def _read(planned: Planned) -> jnp.ndarray:
    leaf, read = planned
    return jnp.asarray(read(everything(leaf.value.shape)))


def _all(model: CausalLM, some: Mapping[tuple[Any, ...], Any]) -> dict[tuple[Any, ...], Any]:
    """All arrays of a model by path, these among them."""
    return {slot.path: some.get(slot.path, slot.value) for slot in slots(model)}


def _pending(block: Block, layer: int) -> Iterator[Pending]:
    """The arrays of a layer as files have them."""
    for path, variable in nnx.to_flat_state(nnx.state(block)):
        slot = Slot(path, (_name(layer, path),), False, variable.get_value())
        for array in arrays_of(slot):
            value = array.value
            host = functools.partial(np.asarray, value)
            yield stored(Pending(array.names[0], np.dtype(value.dtype), tuple(value.shape), host))
