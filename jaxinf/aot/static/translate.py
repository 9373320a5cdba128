"""Turns basic blocks of scalar instructions into Python functions.

Values in single assignment form live in `E["123"]`; `E["@s24"]` mirrors the register, which is what a phi reads.
`t` is the time in cycles. Vector instructions leave nothing: only their bundles are counted.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxinf.aot.static import scalars
from jaxinf.aot.static.bundles import VALUE, Program

_TWO = {
    "sadd": "({0}+{1})",
    "ssub": "({0}-{1})",
    "smul": "({0}*{1})",
    "sand": "({0}&{1})",
    "sor": "({0}|{1})",
    "sxor": "({0}^{1})",
    "sshll": "shift_left({0},{1})",
    "sshllo": "shift_left_ones({0},{1})",
    "sshrl": "shift_right({0},{1})",
    "sshra": "shift_right_signed({0},{1})",
    "smin": "least({0},{1})",
    "smax": "greatest({0},{1})",
}
_PREDICATES = {"por": "or_", "pand": "and_", "pxor": "xor_", "pnand": "nand_", "pnor": "nor_"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_WRITTEN = re.compile(r"%[sp]\d")


@dataclass(frozen=True)
class Block:
    run: Callable[..., Any]  # (E, memory) -> whether its branch is taken
    end: int  # one past its last bundle
    branch: int | None  # the bundle of its branch


class Translator:
    """Makes the blocks of one program, as one core runs it."""

    def __init__(self, program: Program, core: int = 0) -> None:
        self._program = program
        self._core = core
        self._allocations: dict[str, int] = {}
        phis = r"%\w+?_((?:s|p)\d+) = sphi"
        texts = (text for instructions in program.bundles for text in instructions)
        self._read_by_phi = {found[1] for found in (re.match(phis, text) for text in texts) if found}
        after = program.machine.delay + 1
        self._leaders = {0} | {b.target for b in program.branches.values()} | {b + after for b in program.branches}

    def block(self, start: int) -> Block:
        """The block that begins at bundle `start`; a branch is taken only after its delay slots."""
        program = self._program
        end, branch, stop = start, None, program.n
        while end < stop:
            if branch is None and end in program.branches:
                branch, stop = end, min(program.n, end + program.machine.delay + 1)
            end += 1
            if branch is None and end in self._leaders:
                break
        predicate = None if branch is None else program.branches[branch].predicate
        lines = []
        for bundle in range(start, end):
            now, phis = [], []
            for instruction in program.bundles[bundle]:
                (phis if "= sphi" in instruction else now).extend(self._translate(instruction, bundle - start))
            if bundle == branch and predicate:  # read before the delay slots
                now.insert(0, f"taken={self._value(predicate)}")
            lines += phis + now
        lines += [f"E['t']=t+{end - start}", f"return {'taken' if predicate else True}"]
        source = "def block(E,memory):\n t=E['t']\n " + "\n ".join(lines)
        names: dict[str, Any] = dict(vars(scalars))
        exec(source, names)  # source made here, of a schedule that this machine's compiler wrote
        return Block(names["block"], end, branch)

    def _value(self, token: str) -> str:
        token = token.strip()
        bare = token.lstrip("!")
        if found := VALUE.match(bare):
            source = f"E.get('{found[1]}',UNKNOWN)"
        elif bare.startswith("["):
            source = self._address(bare)
        elif found := re.match(r"\$?(-?(?:0x[0-9a-f]+|\d+))", bare):
            source = str(scalars.signed(int(found[1], 0)))
        else:
            source = "UNKNOWN"
        return f"not_({source})" if token.startswith("!") else source

    def _address(self, text: str) -> str:
        parts = []
        for part in text.strip().strip("[]").split("+"):
            part = part.strip().strip("[]")
            if found := re.match(r"#(allocation\d+\w*|\w+)", part):
                parts.append(str(self._allocation(found[1])))
            else:
                parts.append(self._value(part))
        return "(" + "+".join(parts) + ")"

    def _allocation(self, name: str) -> int:
        return self._allocations.setdefault(name, (len(self._allocations) + 1) << 32)

    def _origin(self, token: str, pattern: str, depth: int = 5) -> str | None:
        """The first match of `pattern` in the token or in the instructions that it comes from."""
        found = re.search(pattern, token)
        if found or not depth:
            return found and found[1]
        program = self._program
        sources = [program.definitions.get(number, "") for number, _ in VALUE.findall(token)]
        sources += [program.spills.get(slot, "") for slot in re.findall(r"#(\w+_spill)", token)]
        return next((o for o in (self._origin(s, pattern, depth - 1) for s in sources) if o), None)

    def _flag(self, token: str) -> str:
        """Source of two arguments: a flag's address, and its semaphore's number where the code shows it."""
        name = self._origin(token, r"(?:^\[|sflag|smov).*#(allocation\d+)\b")
        return f"{self._value(token)},{self._allocation(name) >> 32 if name else None}"

    def _translate(self, instruction: str, offset: int) -> list[str]:
        """Source lines for one instruction, `offset` bundles into its block."""
        found = re.match(r"(%\S+) = (.*)$", instruction)
        target, body = (found[1], found[2]) if found else ("", instruction)
        op, _, rest = body.partition(" ")
        scalar = bool(_WRITTEN.match(target))
        if op.startswith("v") and not scalar and not op.startswith("vsync"):
            return []
        rest = re.sub(r"\[thread:\$\d+\]", "", rest).strip()
        condition = ""
        if (found := re.match(r"\((!?%\w+)\)\s*,?\s*(.*)$", rest, re.S)) and op != "sbr.rel":
            condition, rest = f"if runs({self._value(found[1])}): ", found[2]
        items = [item for item in re.split(r",\s*", rest) if item]
        if op == "dma.done.wait":
            size = self._value(items[1]) if len(items) > 1 else 0
            return [f"{condition}t+=memory.wait(t+{offset},{self._flag(items[0])},{size})"]
        if op.startswith("dma."):
            return [f"{condition}memory.copy(t+{offset},{self._copy(op, rest)})"]
        if op == "sst":
            return self._store(rest)
        if op == "vsyncadd":  # a copy done by vector code tells so itself
            return [f"{condition}memory.signal(t+{offset},{self._flag(items[0])},{self._value(items[1])})"]
        number = VALUE.match(target)
        if op.startswith("sdivrem") and number:
            a, n = map(self._value, items[:2])
            kind = f"{'kRem' in rest},{'kDivAndRem' in rest}"
            return [f"{condition}E['{number[1]}']=divide({a},{n},{kind})"]
        if not scalar or number is None:
            return []
        mirror = f"E['@{number[2]}']=" if number[2] in self._read_by_phi else ""
        return [f"{condition}E['{number[1]}']={mirror}{self._expression(op, rest, number)}"]

    def _copy(self, op: str, rest: str) -> str:
        fields = dict(re.findall(r"(\w+)=(\[[^\]]*\]|[^,\s]+)", rest))

        def space(key: str) -> str:
            kind = r"(?:scalar_lea|int_to_ptr|operand)\.(hbm|vmem|smem)"
            return self._origin(fields.get(key, ""), kind) or "vmem"

        source, target = op[4:].split("_to_") if "_to_" in op else (space("src"), space("dst"))
        words = self._value(fields["smem"]) if target == "smem" and "smem" in fields else "None"
        origin = self._value(fields.get(source, "0")) if source in ("hbm", "vmem") else "None"
        flag = self._flag(fields.get("dst_syncflagno", "0"))
        size = self._value(fields.get("size_in_granules", "0"))
        outer = {"src": source, "dst": target}
        side = next((key for key, kind in outer.items() if kind == "hbm"), "src")
        stride = self._value(fields.get(f"{side}_stride", "0"))
        steps = self._value(fields.get("steps_per_stride", "0"))
        return f"{source!r},{target!r},{size},{flag},{words},{origin},{stride},{steps}"

    def _store(self, rest: str) -> list[str]:
        found = re.match(
            r"\[smem:(\[.*?\])\]\s*(?:\((!?%\w+)\),)?\s*(.*)$", rest
        )  # a predicate follows the address
        if not found:
            return []
        address, value = self._address(found[1]), self._value(found[3])
        if found[2]:
            value = f"select({self._value(found[2])},{value},memory.load({address}))"
        return [f"memory.store({address},{value})"]

    def _expression(self, op: str, rest: str, number: re.Match[str]) -> str:
        args = [a for a in re.split(r",\s*", re.sub(r"(?:predicate|on_true|on_false)=", "", rest)) if a]
        name = op.split(".")[0]
        if op == "sphi":
            return f"E.get('@{number[2]}',UNKNOWN)"
        if name == "smov":  # `smov (p, old), new` is new where p; a sole predicate was split off before
            if found := re.match(r"\((!?%\w+),\s*([^)]*)\),\s*(.*)$", rest):
                return f"select({self._value(found[1])},{self._value(found[3])},{self._value(found[2])})"
            return self._value(args[0])
        if op == "spop.drf":
            return f"pop({self._value(args[0])})"
        if op == "scalar_select":
            return f"select({','.join(map(self._value, args[:3]))})"
        if op == "sld":
            if rest.endswith("core id"):
                return str(self._core)
            found = re.match(r"\[smem:(\[.*?\])\]", rest)
            return f"memory.load({self._address(found[1])})" if found else "UNKNOWN"
        if op.startswith("inlined_call_operand"):
            found = re.search(r"index: (\d+), kind: (\w+)", rest)
            place = f"{'<no' in op},{op.endswith('.sflag')}"
            return f"memory.operand({found[1]},{found[2]!r},{place})" if found else "UNKNOWN"
        if op.startswith("scalar_lea"):
            return "(" + "+".join(map(self._value, args)) + ")"
        if op.startswith("int_to_ptr"):
            return self._value(rest.split()[-1])
        if name == "pmov":
            return f"truth({self._value(args[0])})"
        if name == "scmp":
            _, comparison, kind, *_ = op.split(".")
            a, b = map(self._value, args[:2])
            return f"compare_{comparison}({a},{b})" if kind.startswith("u") else f"({a}{_COMPARE[comparison]}{b})"
        if op == "pneg":
            return f"not_({self._value(args[0])})"
        if op in _PREDICATES:
            return f"{_PREDICATES[op]}({self._value(args[0])},{self._value(args[1])})"
        if name in _TWO and len(args) > 1:
            return _TWO[name].format(self._value(args[0]), self._value(args[1]))
        return "UNKNOWN"
