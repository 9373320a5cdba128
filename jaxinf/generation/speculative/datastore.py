"""Text that drafts are looked up in: its tokens, and a suffix array over them, in one file.

A file is a numpy archive (.npz) of `tokens` and `suffixes`, int32, and `about`, JSON as bytes:

    {"jaxinf_datastore": 1, "vocab": 8192, "tokenizer": "sha256 ..." or null, "order": 32}
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from pallas_kernels.errors import CheckpointError, InputError

KEY, VERSION = "jaxinf_datastore", 1
ORDER = 32
"""By how many tokens suffixes are sorted: no query together with what follows it is longer."""
END = -1
"""Stands behind every text, so that nothing matches or is drafted across it."""

_SAMPLE = "def quick_sort(items, key=None):\n    return [x for x in items if x < 1024]  # 你好, ça va?\n"


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


def tokenizer_hash(tokenizer: Encoder) -> str:
    """sha256 of what a tokenizer makes of a sample, and of how many entries it has."""
    ids = [tokenizer.encode(text, False) for text in (_SAMPLE, _SAMPLE.upper())]
    return hashlib.sha256(json.dumps([tokenizer.vocab_size, ids]).encode()).hexdigest()


@dataclass(frozen=True)
class Datastore:
    """Texts of tokens.

    tokens: int32 `[M]`, the texts, each with `END` behind it.
    suffixes: int32 `[M]`, places in `tokens`, sorted by the `order` tokens from there on; past the end is `END`.
    vocab: entries of the vocabulary. tokenizer: its `tokenizer_hash`; None: unknown.
    """

    tokens: np.ndarray
    suffixes: np.ndarray
    vocab: int
    tokenizer: str | None = None
    order: int = ORDER

    @classmethod
    def build(
        cls,
        texts: Iterable[Sequence[int] | np.ndarray],
        vocab: int,
        *,
        tokenizer: str | None = None,
        order: int = ORDER,
        progress: Callable[[int, int], None] | None = None,
    ) -> Datastore:
        """The store of some texts of token ids. progress: called with `(rounds of sorting done, of how many)`.

        Raises:
          InputError: no text, or ids outside the vocabulary.
        """
        parts = []
        for text in texts:
            ids = np.asarray(text)
            if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise InputError(f"a text of shape {ids.shape} and dtype {ids.dtype} must be token ids [T]")
            if ids.size and not 0 <= ids.min() <= ids.max() < vocab:
                raise InputError(
                    f"a text has the ids {ids.min()} to {ids.max()}; the vocabulary is 0 to {vocab - 1}"
                )
            if ids.size:
                parts += [ids.astype(np.int32), np.asarray([END], np.int32)]
        if not parts:
            raise InputError("a datastore needs a text of one token or more")
        tokens = np.concatenate(parts)
        if len(tokens) >= 2**31:
            raise InputError(f"{len(tokens)} tokens are too many for 32-bit places: make several datastores")
        return cls(tokens, sorted_suffixes(tokens, order, progress), vocab, tokenizer, order)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the store to a file that is whole or absent.

        Raises:
          InputError: the file is there.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise InputError(f"{path} is there already; give another name, or overwrite it")
        about = {KEY: VERSION, "vocab": self.vocab, "tokenizer": self.tokenizer, "order": self.order}
        told = np.frombuffer(json.dumps(about).encode(), np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with beside.open("wb") as file:
                np.savez(file, about=told, tokens=self.tokens, suffixes=self.suffixes)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Datastore:
        """A store as `save` wrote it.

        Raises:
          CheckpointError: it cannot be read, is of another version, or its arrays contradict each other.
        """
        path = Path(path)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                if missing := {"about", "tokens", "suffixes"} - {*archive.files}:
                    raise CheckpointError(f"{path} has no {', '.join(sorted(missing))}, so it is no datastore")
                about = json.loads(archive["about"].tobytes())
                tokens, suffixes = archive["tokens"], archive["suffixes"]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path} cannot be read as a datastore: {error}") from error
        if not isinstance(about, dict) or about.get(KEY) != VERSION:
            found = about.get(KEY) if isinstance(about, dict) else about
            raise CheckpointError(f"{path} is version {found!r} of this format; this build reads {VERSION}")
        store = cls(tokens, suffixes, about.get("vocab", 0), about.get("tokenizer"), about.get("order", 0))
        store._validate(path)
        return store

    def _validate(self, path: Path) -> None:
        def wrong(what: str) -> CheckpointError:
            return CheckpointError(f"{path} is damaged: {what}; build it again with `jaxinf datastore`")

        for name in ("vocab", "order"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise wrong(f"{name}={value!r} is no count")
        if self.tokenizer is not None and not isinstance(self.tokenizer, str):
            raise wrong(f"tokenizer={self.tokenizer!r} is no hash")
        tokens, suffixes = self.tokens, self.suffixes
        for name, x in (("tokens", tokens), ("suffixes", suffixes)):
            if x.dtype != np.int32 or x.ndim != 1 or not x.size:
                raise wrong(f"{name} are {x.dtype}{list(x.shape)}, where int32 [M] is meant")
        if tokens.shape != suffixes.shape:
            raise wrong(f"there are {tokens.size} tokens and {suffixes.size} suffixes")
        if tokens.min() < END or tokens.max() >= self.vocab or tokens[-1] != END:
            raise wrong(f"tokens are not all within a vocabulary of {self.vocab}")
        if suffixes.min() < 0 or suffixes.max() >= tokens.size or np.bincount(suffixes).max() != 1:
            raise wrong("suffixes are not every place once")
        if np.any(np.diff(tokens[suffixes]) < 0):
            raise wrong("suffixes are not sorted")


def sorted_suffixes(
    tokens: np.ndarray, order: int, progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """int32 `[M]`: places in `tokens` by the `order` tokens from there on, equal ones by place.

    Prefix doubling (Manber and Myers 1993, SIAM J. Comput. 22): ranks by n tokens give those by 2 n, until `order`
    or until all differ.
    """
    size, rank, known = len(tokens), tokens.astype(np.int64) - END, 1
    rounds = max(order - 1, 0).bit_length()
    found = np.argsort(rank, kind="stable")
    for i in range(rounds):
        step = min(known, order - known)
        key = rank * (int(rank.max()) + 1)
        key[:-step] += rank[step:]  # past the end stands END, whose rank is the lowest
        found = np.argsort(key, kind="stable")
        ordered = key[found]
        rank[found] = np.concatenate([[0], np.cumsum(ordered[1:] != ordered[:-1])])
        known += step
        if progress is not None:
            progress(i + 1, rounds)
        if int(rank.max()) == size - 1:
            break
    return found.astype(np.int32)
