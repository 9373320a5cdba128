"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pallas_kernels.errors import CheckpointError

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@contextlib.contextmanager
def written_beside(folder: Path, *, overwrite: bool, sign: str = CONFIG) -> Iterator[Path]:
    """A new folder to write in, which takes the name `folder` once the block ends well and is deleted otherwise.

    sign: a file without which a folder that is there is not replaced.

    Raises:
      CheckpointError: `folder` is there already and `overwrite` is false, or it is no such folder; or the disk
        is full or refuses to be written.
    """
    folder = folder.absolute()
    _check_target(folder, overwrite, sign)
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
        scratch.chmod(0o777 & ~_umask())
        yield scratch
        put_in_place(scratch, folder)
    except OSError as e:
        why = "the disk is full" if e.errno in (errno.ENOSPC, errno.EDQUOT) else (e.strerror or str(e))
        raise CheckpointError(f"cannot write {folder}: {why}; nothing was left behind") from e
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def check_target(folder: Path, *, overwrite: bool, sign: str = CONFIG) -> None:
    """Raises what `written_beside` would raise before it starts."""
    _check_target(folder.absolute(), overwrite, sign)


def _check_target(folder: Path, overwrite: bool, sign: str) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give the name of a folder")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{folder} exists already; give another name, or overwrite=True to replace it")
    if not (folder / sign).is_file():
        what = "checkpoint" if sign == CONFIG else "folder of this kind"
        raise CheckpointError(f"{folder} is no {what} (no {sign}), so it is not replaced; give another name")


def put_in_place(scratch: Path, folder: Path) -> None:
    """Gives a finished folder its name; one that had it is gone then."""
    if not folder.exists():
        os.rename(scratch, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    try:
        os.rename(folder, old)  # onto an empty folder
        try:
            os.rename(scratch, folder)
        except OSError:
            os.rename(old, folder)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in a checkpoint folder."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
