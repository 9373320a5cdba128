"""Text to tokens and back, from the files of a checkpoint."""

from __future__ import annotations

import abc
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.errors import CheckpointError, InputError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer(abc.ABC):
    """One face for both kinds of file.

    bos_id, eos_id: ids of the tokens that begin and end a text; None: there are none.
    special: names such as "bos_token" to the token's text, for chat templates.
    chat_template: jinja2 source, or None.
    """

    bos_id: int | None
    eos_id: int | None
    special: dict[str, str]
    chat_template: str | None

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer | None:
        """The tokenizer in a checkpoint's folder (tokenizer.json, else tokenizer.model), or None.

        Raises:
          CheckpointError: a file that cannot be read.
        """
        folder = Path(folder)
        settings = _settings(folder)
        if (path := folder / "tokenizer.json").is_file():
            return JsonTokenizer(path, settings)
        if (path := folder / "tokenizer.model").is_file():
            return PieceTokenizer(path, settings)
        return None

    @abc.abstractmethod
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the tokens that the tokenizer's own rules put before or behind a text if asked for."""

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a rendered chat template, in which special tokens are written out."""
        return self.encode(text, add_special_tokens=False)

    @abc.abstractmethod
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text; bytes that are no UTF-8 become U+FFFD."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Entries, added tokens included."""

    @abc.abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """The id of a token given by its text."""

    def _configure(self, settings: dict[str, Any]) -> None:
        self.special = settings["special"]
        self.chat_template = settings["chat_template"]
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")

    def _special_id(self, name: str) -> int | None:
        token = self.special.get(name)
        return None if token is None else self.token_to_id(token)


class JsonTokenizer(Tokenizer):
    """tokenizer.json, with the special tokens that its own post-processor adds."""

    def __init__(self, path: str | Path, settings: dict[str, Any] | None = None):
        from tokenizers import Tokenizer as Fast

        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"{path} is no tokenizer that this version of tokenizers reads: {error}"
            ) from None
        self._fast.no_padding()
        self._fast.no_truncation()
        self._configure(settings or _settings(Path(path).parent))

    def encode(self, text, add_special_tokens=True):
        return self._fast.encode(_checked(text), add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens=True):
        return self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @property
    def vocab_size(self):
        return self._fast.get_vocab_size(with_added_tokens=True)

    def token_to_id(self, token):
        return self._fast.token_to_id(token)


class PieceTokenizer(Tokenizer):
    """tokenizer.model of sentencepiece, with the added tokens and bos rules of tokenizer_config.json."""

    def __init__(self, path: str | Path, settings: dict[str, Any] | None = None):
        try:
            import sentencepiece
        except ImportError:
            raise InputError(
                f"{path} needs sentencepiece, which is not installed: pip install 'jaxinf[sentencepiece]'"
            ) from None
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{path} is no sentencepiece model: {error}") from None
        settings = settings or _settings(Path(path).parent)
        self._added: dict[str, int] = settings["added"]
        self._added_text = {number: text for text, number in self._added.items()}
        # The special ones among the added tokens, which decoding may leave out.
        self._hidden = settings["added_special"] | {
            number for text in settings["special"].values() if (number := self._added.get(text)) is not None
        }
        self._add_bos, self._add_eos = settings["add_bos"], settings["add_eos"]
        self._configure(settings)
        if self.bos_id is None and self._pieces.bos_id() >= 0:
            self.bos_id = self._pieces.bos_id()
        if self.eos_id is None and self._pieces.eos_id() >= 0:
            self.eos_id = self._pieces.eos_id()

    def encode(self, text, add_special_tokens=True):
        ids = self._encode(_checked(text), self._added)
        if add_special_tokens and self._add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if add_special_tokens and self._add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def encode_chat(self, text):
        named = {name: number for name in self.special.values() if (number := self.token_to_id(name)) is not None}
        return self._encode(_checked(text), self._added | named)

    def _encode(self, text: str, whole: dict[str, int]) -> list[int]:
        """Ids of `text`, in which the tokens `whole` stand for themselves."""
        if not whole:
            return self._pieces.encode(text)
        # Longest first, so that of two tokens with a common beginning the longer is found.
        pattern = "(" + "|".join(map(re.escape, sorted(whole, key=len, reverse=True))) + ")"
        ids: list[int] = []
        for part in re.split(pattern, text):
            if part in whole:
                ids.append(whole[part])
            elif part:
                ids += self._pieces.encode(part)
        return ids

    def decode(self, ids, skip_special_tokens=True):
        text: list[str] = []
        run: list[int] = []

        def end_run() -> None:
            if run:
                text.append(self._pieces.decode(run))
                run.clear()

        for number in ids:
            own = number < self._pieces.vocab_size() and number not in self._added_text
            control = own and self._pieces.is_control(number)
            if own and not control:
                run.append(number)
                continue
            if skip_special_tokens and (control or number in self._hidden):
                continue
            end_run()
            text.append(self._pieces.id_to_piece(number) if own else self._added_text.get(number, ""))
        end_run()
        return "".join(text)

    @property
    def vocab_size(self):
        return max([self._pieces.vocab_size(), *(number + 1 for number in self._added_text)])

    def token_to_id(self, token):
        if token in self._added:
            return self._added[token]
        number = self._pieces.piece_to_id(token)
        return number if number != self._pieces.unk_id() or token == self._pieces.id_to_piece(number) else None


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"a {type(text).__name__} was given where text is needed")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start} of the text, {text[error.start]!r}, is half of a surrogate pair, which bytes "
            "that are not UTF-8 become on the way in; give valid Unicode"
        ) from None
    return text


def _settings(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json and the files beside it say."""
    try:
        return _parsed(folder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"tokenizer_config.json in {folder}, or a file of the tokenizer beside it, holds what no tokenizer's "
            f"settings hold: {error}; download it again"
        ) from None


def _parsed(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "tokenizer_config.json")
    special = _read_json(folder / "special_tokens_map.json") | config
    named = {name: _content(special[name]) for name in _SPECIAL if special.get(name)}

    added = {text: int(number) for text, number in _read_json(folder / "added_tokens.json").items()}
    hidden = set()
    for number, entry in (config.get("added_tokens_decoder") or {}).items():
        added[_content(entry)] = int(number)
        if isinstance(entry, dict) and entry.get("special"):
            hidden.add(int(number))

    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        by_name = {entry["name"]: entry["template"] for entry in template}
        template = by_name.get("default", next(iter(by_name.values()), None))
    if (path := folder / "chat_template.jinja").is_file():
        template = path.read_text(encoding="utf-8")
    elif template is None:
        template = _read_json(folder / "chat_template.json").get("chat_template")
    if not isinstance(template, str | None):
        raise TypeError(f"chat_template={template!r}")
    return dict(
        special=named,
        added=added,
        added_special=hidden,
        chat_template=template,
        add_bos=config.get("add_bos_token", True),
        add_eos=config.get("add_eos_token", False),
    )


def _content(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value
