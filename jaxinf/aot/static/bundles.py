"""Reads the compiler's dump of one operation: its bundles (VLIW words, one a cycle) and how they use the units.

The dump read is the one after register allocation, in which the empty bundles that the hardware spends waiting for
a result still stand. The compiler's final dump drops them: it counts instructions, not cycles.
"""

import os
import re
from dataclasses import dataclass, field

from jaxinf.aot.static.machine import Machine

VALUE = re.compile(r"%(?:[spv]m?)?(\d+)(?:_((?:s|p|v|vm)\d+))?")
"""A value in single assignment form (its number) and, where shown, the register that holds it."""

UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE", "SALU")

_LABEL = re.compile(r"/\*(\w+)=\*/")
_KEPT = re.compile(r"/\* (?:[^*]*:: )?(kRem|kDivAndRem|core id)(?: ::[^*]*)? \*/")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*>*\s*\{(.*)\}\s*$")
_BRANCH = re.compile(r"sbr\.rel\s*(?:\((!?%\w+)\))?.*target bundleno = (\d+).*?(?:region = (\d+))?\s*$")
_BUNDLES_FILE = "packed-bundles-post-ra.txt"
_USE_FILE = "_hlo-static-per-bundle-utilization.txt"


@dataclass(frozen=True)
class Branch:
    predicate: str | None  # None: always taken
    target: int
    region: int  # the compiler's number; -1: none


@dataclass(frozen=True)
class Use:
    """Units at work: `rows[bundle][name]` of `capacity[name]`. A matrix unit counts while it is held."""

    capacity: dict[str, int] = field(default_factory=dict)
    rows: list[dict[str, int]] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> "Use":
        lines = text.splitlines()
        # One compiler counts the matrix unit's products, another product and weight pushes, in separate columns.
        names = ["MXU" if name == "MATMUL" else name for name in re.split(r",\s*", lines[1].strip())]

        def numbers(line: str) -> dict[str, int]:
            return dict(zip(names, map(int, line.split()), strict=True))

        return cls(numbers(lines[2]), [numbers(line) for line in lines[4:] if line.strip()])


@dataclass
class Program:
    """The bundles of one operation, each a list of instructions."""

    name: str
    machine: Machine
    bundles: list[list[str]]
    use: Use = field(default_factory=Use)
    final: int = 0  # bundles of the final dump

    def __post_init__(self) -> None:
        self.branches: dict[int, Branch] = {}
        self.definitions: dict[str, str] = {}  # number of a scalar value -> its instruction
        self.spills: dict[str, str] = {}  # spill slot -> value stored
        for bundle, instructions in enumerate(self.bundles):
            for text in instructions:
                if found := _BRANCH.search(text):
                    predicate, target, region = found.groups()
                    self.branches[bundle] = Branch(predicate, int(target), int(region or -1))
                if found := re.match(r"%[sp](\d+)\w* = (.*)", text):
                    self.definitions[found[1]] = found[2]
                if found := re.search(r"sst \[smem:\[#(\w+_spill)\]\] (%\w+)", text):
                    self.spills[found[1]] = found[2]
        self.by_core = any(text.endswith("core id") for instructions in self.bundles for text in instructions)
        self.macs = [sum(map(self._macs, instructions)) for instructions in self.bundles]

    @classmethod
    def parse(cls, name: str, text: str, machine: Machine) -> "Program":
        body = strip_comments(text.split("= control target key end", 1)[-1])
        found = filter(None, map(_BUNDLE.match, body.splitlines()))
        return cls(name, machine, [[i.strip() for i in m[2].split(";;") if i.strip()] for m in found])

    @property
    def n(self) -> int:
        return len(self.bundles)

    def _macs(self, instruction: str) -> int:
        """Multiply-adds that an instruction starts."""
        found = re.search(r"\bvmatmul\w*((?:\.\w+)*)", instruction)
        if not found:
            return 0
        chip = self.machine.chip
        if ".f32" in found[1]:
            return chip.macs * self.machine.held32
        narrow = re.search(r"\.(s8|u8|f8\w*|s4|x8)", found[1]) and chip.int8 > chip.bf16
        return chip.macs * self.machine.held * (2 if narrow else 1)


def strip_comments(text: str) -> str:
    """Drops the comments, which nest, and keeps labels such as `/*size=*/` as `size=`."""
    text = _KEPT.sub(r" \1", _LABEL.sub(r"\1=", text))
    kept, depth, start = [], 0, 0
    for mark in re.finditer(r"/\*|\*/", text):
        if mark.group() == "/*":
            if depth == 0:
                kept.append(text[start : mark.start()])
            depth += 1
        elif depth:
            depth -= 1
            start = mark.end()
    kept.append(text[start:] if depth == 0 else "")
    return "".join(kept)


def load(folder: str, file: str, machine: Machine) -> Program:
    """The program of one bundle dump in `folder`, with what the dumps beside it say about its units."""
    name = re.sub(rf"^\d+-(.*)-\d+-{re.escape(_BUNDLES_FILE)}$", r"\1", file)
    with open(os.path.join(folder, file)) as stream:
        program = Program.parse(name, stream.read(), machine)
    stem = file.removesuffix(f"-{_BUNDLES_FILE}").rsplit("-", 1)[0] + "-"
    for other in os.listdir(folder):
        if other.startswith(stem) and other.endswith(_USE_FILE):
            with open(os.path.join(folder, other)) as stream:
                use = Use.parse(stream.read())
            if other.endswith("pre-delay" + _USE_FILE):
                program.use = use
            elif other.endswith("final" + _USE_FILE):
                program.final = len(use.rows)
    return program


def programs(folder: str, machine: Machine) -> list[Program]:
    """All operations with bundles in a dump folder, in the order of their files."""
    files = [f for f in sorted(os.listdir(folder)) if f.endswith("-" + _BUNDLES_FILE)]
    own = [f for f in files if "schedule-analysis" not in f and not re.search(r"-(TLP|<late-\w+>)-\d", f)]
    return [p for p in (load(folder, f, machine) for f in own) if p.bundles]
