"""Operations that the compiler scheduled once for several equal ones: only the first of them is in its dump."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from jaxinf.aot import hlo
from jaxinf.aot.static.report import Operation

_NOISE = re.compile(r", metadata=\{[^}]*\}|, frontend_attributes=\{.*?\}(?=,|$)|, sharding=\{[^}]*\}")
_NAME = re.compile(r"%[\w.\-<>]+")
_BODY = re.compile(r'"body":"([^"]*)"')


class Twins:
    """Finds the schedule of an instruction: its own, or that of an equal one."""

    def __init__(self, found: hlo.Computations, operations: Mapping[str, Operation]) -> None:
        self._found = found
        self._operations = operations
        self._shapes: dict[str, str] = {}
        self._texts: dict[str, str] = {}
        known = []
        for lines in found.values():
            for i in hlo.instructions(lines):
                self._shapes[i.name] = i.shape
                if i.name in operations:
                    known.append(i)
        self._known = {self._key(i): operations[i.name] for i in reversed(known)}
        self.used: dict[str, Operation] = {}

    def find(self, i: hlo.Instruction) -> Operation | None:
        """What the static model says of it, or None."""
        operation = self._operations.get(i.name)
        if operation is None and i.opcode not in ("parameter", "constant", "get-tuple-element", "tuple", "bitcast"):
            operation = self._known.get(self._key(i))
        if operation is not None:
            self.used[operation.name] = operation
        return operation

    def _key(self, i: hlo.Instruction) -> tuple:
        """Equal for operations that compute the same from arrays that lie alike."""
        body = _BODY.search(i.rest)
        called = self._text(i.called("calls") or "")
        kind = re.search(r"kind=(\w+)", i.rest)
        operands = tuple(self._shapes.get(name, "") for name in i.operands)
        extra = "" if body or called else _attributes(i)
        return i.opcode, i.shape, operands, kind and kind[1], called, body and _hash(body[1]), extra

    def _text(self, name: str) -> str:
        """A computation without its names."""
        if name not in self._texts:
            numbers: dict[str, str] = {}
            text = _NOISE.sub(
                "", "\n".join(re.sub(r", backend_config=.*", "", l) for l in self._found.get(name, ()))
            )
            canonical = _NAME.sub(lambda m: numbers.setdefault(m[0], f"%{len(numbers)}"), text)
            self._texts[name] = _hash(canonical) if canonical else ""
        return self._texts[name]


def _attributes(i: hlo.Instruction) -> str:
    """What an operation without a body does, besides its operands."""
    rest = i.rest[len(", ".join(i.operands)) :]
    return re.sub(r", backend_config=.*", "", _NOISE.sub("", _NAME.sub("", rest)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
