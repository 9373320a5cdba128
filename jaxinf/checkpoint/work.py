"""A folder that is made file by file, over several runs if need be, and appears whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxinf.checkpoint.folders import check_target, put_in_place, read_json
from jaxinf.checkpoint.tensors import Pending, open_file, write_file
from pallas_kernels.errors import CheckpointError, JaxinfError

MANIFEST, LOCK, FILES = "manifest.json", "lock", "files"
Note = Callable[[str], None]
"""Called with a sentence for people."""


class Work:
    """What is done of a folder. `files`: where its files are made."""

    def __init__(self, folder: Path, key: Mapping[str, Any]):
        self._folder, self._key = folder, dict(key)
        self._done: dict[str, int] = {}
        self.files = folder / FILES

    def resume(self, note: Note) -> None:
        """Takes over what an earlier run has finished, if it was to make the same; clears the folder if not."""
        manifest = self._folder / MANIFEST
        found = {}
        if manifest.is_file():
            with contextlib.suppress(CheckpointError):
                found = read_json(manifest)
        if found.get("key") == self._key:
            whole = {name: size for name, size in found["done"].items() if self._size(name) == size}
            self._done = whole
            if whole:
                note(f"going on with {self._folder.name}: {len(whole)} files are there")
        elif found:
            old = found.get("key", {})
            other = [k for k in self._key if old.get(k) != self._key[k]]
            note(f"{self._folder.name} was begun with another {', '.join(other) or 'version'}; starting anew")
        for path in self.files.iterdir() if self.files.is_dir() else []:
            if path.name not in self._done:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.files.mkdir(exist_ok=True)
        self._record()

    def finished(self, name: str) -> bool:
        return name in self._done

    def forget(self, name: str) -> None:
        """Deletes a file that is not to stay."""
        if self._done.pop(name, None) is not None:
            self._record()
            (self.files / name).unlink()

    def write(self, name: str, tensors: Sequence[Pending], progress: Callable[[int], None] | None = None) -> None:
        """A safetensors file, unless an earlier run has finished it. progress: called with bytes that are done."""
        if not self.finished(name):
            part = self.files / f"{name}.part"
            for size in write_file(part, tensors):
                if progress is not None:
                    progress(size)
            self._finish(part, name)
        elif progress is not None:
            progress(sum(t.nbytes for t in tensors))

    def write_arrays(self, name: str, arrays: Sequence[np.ndarray]) -> None:
        """Arrays that a later run may go on with (`read_arrays`)."""
        tensors = [Pending(str(i), a.dtype, a.shape, lambda a=a: a) for i, a in enumerate(arrays)]
        self.forget(name)
        self.write(name, tensors)

    def read_arrays(self, name: str) -> list[np.ndarray]:
        """What `write_arrays` wrote."""
        found = open_file(self.files / name)
        return [np.array(found.read(str(i))) for i in range(len(found))]

    def _finish(self, part: Path, name: str) -> None:
        os.replace(part, self.files / name)
        _sync(self.files)
        self._done[name] = self._size(name)
        self._record()

    def _size(self, name: str) -> int:
        path = self.files / name
        return path.stat().st_size if path.is_file() else -1

    def _record(self) -> None:
        part = self._folder / f"{MANIFEST}.part"
        with part.open("w", encoding="utf-8") as file:
            json.dump({"key": self._key, "done": self._done}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._folder / MANIFEST)
        _sync(self._folder)


@contextlib.contextmanager
def resumed(target: Path, key: Mapping[str, Any], *, overwrite: bool, note: Note) -> Iterator[Work]:
    """The work on a folder, which takes the name `target` once the block ends well, and is kept otherwise.

    Args:
      key: what it is made of and how, by names that `note` may say; work with another key is begun anew.

    What ends in an error of this project is not kept: it would end so again.

    Raises:
      CheckpointError: as `folders.written_beside`; or another process is at work on it.
    """
    target = target.absolute()
    check_target(target, overwrite=overwrite)
    folder = target.parent / f".{target.name}.unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("w") as lock:
            _take(lock, folder)
            work = Work(folder, json.loads(json.dumps(key)))
            work.resume(note)
            with _cleared_if_hopeless(folder):
                yield work
            _sync(work.files)
            put_in_place(work.files, target)
            _sync(target.parent)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as e:
        why = "the disk is full" if e.errno in (errno.ENOSPC, errno.EDQUOT) else (e.strerror or str(e))
        raise CheckpointError(
            f"cannot write {target}: {why}; what is done is kept in {folder} for the next run"
        ) from e


@contextlib.contextmanager
def _cleared_if_hopeless(folder: Path) -> Iterator[None]:
    """Keeps nothing of work that would fail again."""
    try:
        yield
    except JaxinfError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _take(lock: Any, folder: Path) -> None:
    """Fails where another process works in the folder; the system lets go when it ends, however it does."""
    try:
        import fcntl
    except ImportError:  # not on this system
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"another process is at work in {folder}; wait for it, or end it") from None


def _sync(folder: Path) -> None:
    """Has what a folder lists reach the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fingerprint(folder: Path) -> str:
    """Changes when a file of a checkpoint does: of configs the contents, of weights sizes and times."""
    digest = hashlib.sha256()
    for path in _files(folder):
        stat = path.stat()
        told = path.read_bytes() if path.suffix == ".json" and stat.st_size < 1 << 26 else b""
        record = (str(path.relative_to(folder)), stat.st_size, 0 if told else stat.st_mtime_ns)
        digest.update(repr(record).encode() + told)
    return digest.hexdigest()


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
