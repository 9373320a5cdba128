"""Tensors in safetensors files: mapped for reading, streamed for writing, never held all at once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinf.checkpoint.pages import MappedFile
from pallas_kernels.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Largest file that `write` makes of several tensors."""

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000
_ALIGN = 64
"""Tensors at multiples of this many bytes become arrays on a CPU without a copy."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """Byte of the file at which the data start."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint, by name; `read` brings in the values of one."""

    def __init__(self, infos: Mapping[str, TensorInfo]):
        self._infos = dict(infos)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def read(self, name: str) -> np.ndarray:
        raise NotImplementedError

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """`read(name)[index]`, without bringing in more where that is possible."""
        values = self.read(name)[index]
        self.expect(name, values)
        return values

    def expect(self, name: str, view: np.ndarray) -> None:
        """Tells that of a tensor that was read this view is going to be touched, and perhaps no more."""


class MappedTensors(Tensors):
    """Tensors of safetensors files, mapped: their bytes are paged in when touched."""

    def __init__(self, infos: Mapping[str, TensorInfo]):
        super().__init__(infos)
        self._files: dict[Path, MappedFile] = {}

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of its file."""
        info = self._infos[name]
        if info.file not in self._files:
            self._files.setdefault(info.file, MappedFile(info.file))  # one for all threads that read
        data = self._files[info.file].data[info.start : info.start + info.nbytes]
        return data.view(info.dtype).reshape(info.shape)

    def expect(self, name: str, view: np.ndarray) -> None:
        if view.nbytes < self._infos[name].nbytes:
            self._files[self._infos[name].file].expect(view)


def open_tensors(folder: Path) -> Tensors:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises:
      CheckpointError: neither is there, a file is truncated or corrupt, or the index names what is not there.
    """
    if (folder / SINGLE).is_file():
        return MappedTensors(_header(folder / SINGLE))
    if (folder / INDEX).is_file():
        return MappedTensors(_indexed(folder))
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickled weights only ({_some(pickles)}), which can run code when read: convert them "
            "where you trust them, with safetensors.torch.save_file(torch.load(file, weights_only=True), "
            f"'{SINGLE}'), or take the safetensors form of the checkpoint"
        )
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    found = f"; it holds {_some(others)} but no index that says what is where" if others else ""
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{found}")


def open_file(path: Path) -> Tensors:
    """The tensors of one safetensors file.

    Raises:
      CheckpointError: it is truncated or corrupt.
    """
    return MappedTensors(_header(path))


def _indexed(folder: Path) -> dict[str, TensorInfo]:
    path = folder / INDEX
    try:
        places = json.loads(path.read_text())["weight_map"]
        files = sorted(set(places.values()))
        plain = all(isinstance(f, str) and Path(f).name == f for f in files)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path} is not an index of tensors: {e!r}") from e
    if not plain:
        raise CheckpointError(f"{path} names files outside its folder: {_some(map(str, files))}")
    if absent := [f for f in files if not (folder / f).is_file()]:
        raise CheckpointError(f"{path} names files that are not there: {_some(absent)}; download them again")
    headers = {f: _header(folder / f) for f in files}
    if lost := [f"{name} ({f})" for name, f in places.items() if name not in headers[f]]:
        raise CheckpointError(f"{path} names tensors that its files do not hold: {_some(lost)}")
    return {name: headers[f][name] for name, f in places.items()}


def _header(path: Path) -> dict[str, TensorInfo]:
    def bad(why: str) -> CheckpointError:
        return CheckpointError(f"{path} is not a whole safetensors file: {why}; download or make it again")

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise bad(f"its header would take {length} bytes of {size}")
        text = file.read(length)
    try:
        record = json.loads(text)
        record.pop("__metadata__", None)
        entries = [(n, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in record.items()]
        whole = all(isinstance(v, int) and v >= 0 for _, _, shape, a, b in entries for v in (*shape, a, b))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise bad(f"its header does not parse ({type(e).__name__})") from e
    if not whole:
        raise bad("its header holds sizes that are no sizes")
    infos, data = {}, size - 8 - length
    for name, code, shape, begin, end in entries:
        if code not in _DTYPES:
            raise CheckpointError(f"{path}: {name} has dtype {code}; known: {', '.join(_DTYPES)}")
        info = TensorInfo(path, _DTYPES[code], shape, 8 + length + begin)
        if info.nbytes != end - begin:
            raise bad(f"{name} of shape {list(shape)} has {end - begin} bytes")
        if end > data:
            raise bad(f"{name} ends at byte {end} of {data}, so the file is truncated")
        infos[name] = info
    return infos


@dataclass(frozen=True)
class Pending:
    """A tensor to be written: known by shape before its values are asked for."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    value: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    folder: Path,
    tensors: Iterable[Pending],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes `model.safetensors`, or shards and their index where one file would pass `shard_bytes`.

    Args:
      progress: called after each tensor with the bytes written and the bytes in all.
    """
    tensors = list(tensors)
    shards = in_shards(tensors, shard_bytes)
    total, done = sum(t.nbytes for t in tensors), 0
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        for written in write_file(folder / name, shard):
            done += written
            if progress is not None:
                progress(done, total)
    if len(shards) > 1:
        write_index(folder, {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}, total)


def write_index(folder: Path, places: Mapping[str, str], total: int) -> None:
    """Which file has which tensor, and the bytes of all."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, tensors: Sequence[Pending]) -> Iterator[int]:
    """A safetensors file, tensor by tensor: the bytes of each as it is written. It is on the disk at the end."""
    # Odd sizes last: what stands before them stays aligned, and in its order, in which it is made with least work.
    odd = [t for t in tensors if t.nbytes % _ALIGN]
    tensors = [t for t in tensors if t.nbytes % _ALIGN == 0] + sorted(odd, key=lambda t: -t.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "jaxinf"}}
    at = 0
    for t in tensors:
        if t.dtype not in _CODES:
            raise CheckpointError(
                f"{t.name}: dtype {t.dtype} cannot be stored; known: {', '.join(map(str, _CODES))}"
            )
        header[t.name] = {
            "dtype": _CODES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [at, at + t.nbytes],
        }
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            value = np.ascontiguousarray(t.value())
            if value.shape != t.shape or value.dtype != t.dtype:
                raise AssertionError(f"{t.name}: {value.dtype}{value.shape}, {t.dtype}{t.shape} was announced")
            file.write(value.reshape(-1).view(np.uint8).data)
            yield t.nbytes
        file.flush()
        os.fsync(file.fileno())


def in_shards(tensors: Sequence[Pending], limit: int) -> list[list[Pending]]:
    """Tensors in files of at most so many bytes, or one tensor."""
    shards: list[list[Pending]] = [[]]
    size = 0
    for t in tensors:
        if shards[-1] and size + t.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += t.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """Names of so many files of one checkpoint."""
    if count == 1:
        return [SINGLE]
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
