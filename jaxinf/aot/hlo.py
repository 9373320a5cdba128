"""Reads the text of a compiled program (`executable.as_text()`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-<>]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s*(?:ROOT )?%(\S+) = (.*)$")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|branch_computations|true_computation|false_computation)=")
_NAME = re.compile(r"%([\w.\-<>]+)")


@dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
      shape: of its result, as text; of several, a tuple's.
      opcode: "fusion", "while", "copy-start", ...
      rest: everything after the opcode.
    """

    name: str
    shape: str
    opcode: str
    rest: str

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names."""
        return tuple(_NAME.findall(_balanced(self.rest)))

    def called(self, key: str) -> str | None:
        """The computation after `key=`, such as "body"."""
        found = re.search(rf"\b{key}=%?([\w.\-<>]+)", self.rest)
        return found[1] if found else None

    @property
    def branches(self) -> tuple[str, ...]:
        """The computations that a conditional chooses from."""
        if found := re.search(r"branch_computations=\{([^}]*)\}", self.rest):
            return tuple(_NAME.findall(found[1]))
        both = (self.called("true_computation"), self.called("false_computation"))
        return tuple(name for name in both if name)


Computations = dict[str, list[str]]
"""The lines of each computation, in the order in which they run."""


def computations(text: str) -> tuple[Computations, str]:
    """`(all computations, the name of the one that is the program)`."""
    found: Computations = {}
    lines: list[str] = []
    entry = ""
    for line in text.splitlines():
        if m := _HEAD.match(line):
            lines = found.setdefault(m[2], [])
            entry = m[2] if m[1] else entry
        else:
            lines.append(line)
    return found, entry


def instructions(lines: list[str]) -> list[Instruction]:
    """The instructions of a computation."""
    found = []
    for line in lines:
        if not (m := _LINE.match(line)):
            continue
        name, text = m[1], m[2]
        end = len(_balanced(text[1:])) + 2 if text.startswith("(") else text.find(" ")
        shape, call = text[:end], text[end:].lstrip()
        opcode, parenthesis, rest = call.partition("(")
        if parenthesis:
            found.append(Instruction(name, shape, opcode, rest))
    return found


def _balanced(text: str) -> str:
    """The text up to the parenthesis that closes what was open before it."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[:i]
    return text


def trips(line: str, found: Computations) -> int | None:
    """Trips of the loop in this line: as the compiler says, or as its condition does, if it counts up from 0."""
    if m := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(m[1])
    if m := re.search(r"condition=%?([\w.\-<>]+)", line):
        condition = "\n".join(found.get(m[1], ()))
        test = re.search(r"ROOT .* compare\(.*?, %?([\w.\-]+)\), direction=LT", condition)
        limit = test and re.search(rf"%{re.escape(test[1])} = s32\[\]\S* constant\((\d+)\)", condition)
        return int(limit[1]) if limit else None
    return None


def times(found: Computations) -> dict[str, int]:
    """How often each computation runs, from the trip counts that the compiler knows; other loops count once."""
    callers: dict[str, list[tuple[str, int]]] = {}
    for name, lines in found.items():
        for line in lines:
            count = trips(line, found) or 1
            for m in _CALLED.finditer(line):
                rest = line[m.end() :]
                names = re.match(r"\{([^}]*)\}", rest) or re.match(r"(%?[\w.\-<>]+)", rest)
                for callee in re.findall(r"[\w.\-<>]+", names[1]) if names else ():
                    callers.setdefault(callee, []).append((name, count if m.group().startswith("body") else 1))
    known: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in known:
            known[name] = 1  # HLO has no recursion
            known[name] = sum(of(caller) * count for caller, count in callers.get(name, ())) or 1
        return known[name]

    return {name: of(name) for name in found}
