"""Arithmetic of the scalar core on 32-bit words, some of which are unknown.

The names here are those that `translate` writes into the code that it makes of a program.
"""

from collections.abc import Callable
from typing import Any, NoReturn


class Undecided(Exception):
    """An unknown value was asked whether it is true."""


class _Unknown:
    """A word that depends on data that nobody gave: whatever is computed from it is unknown too."""

    def _same(self, *_: Any) -> "_Unknown":
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __rand__ = __or__ = __ror__ = _same
    __xor__ = __rxor__ = __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __neg__ = __invert__ = _same
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _same  # type: ignore[assignment]
    __hash__ = object.__hash__

    def __bool__(self) -> NoReturn:
        raise Undecided

    def __repr__(self) -> str:
        return "?"


UNKNOWN = _Unknown()
POINTER = 1 << 50
"""Added to the addresses of operands, so that arithmetic on them is told from arithmetic on words."""
Word = Any  # int | bool | _Unknown

_MASK = 0xFFFFFFFF
_IS_POINTER = POINTER >> 8


def signed(x: Word) -> Word:
    if x is UNKNOWN or x > _IS_POINTER:
        return x
    x &= _MASK
    return x - (1 << 32) if x >> 31 else x


def select(predicate: Word, yes: Word, no: Word) -> Word:
    if predicate is UNKNOWN:
        return yes if yes is no else UNKNOWN
    return yes if predicate else no


def known(*words: Word) -> bool:
    return not any(w is UNKNOWN for w in words)


def shift_left(a: Word, n: Word) -> Word:
    if not known(a, n):
        return UNKNOWN
    return a << n if a > _IS_POINTER else signed(a << (n & 31) & _MASK)


def shift_left_ones(a: Word, n: Word) -> Word:
    return signed((a << (n & 31) | ((1 << (n & 31)) - 1)) & _MASK) if known(a, n) else UNKNOWN


def shift_right(a: Word, n: Word) -> Word:
    return (a & _MASK) >> (n & 31) if known(a, n) else UNKNOWN


def shift_right_signed(a: Word, n: Word) -> Word:
    return a >> min(n, 31) if known(a, n) else UNKNOWN


def least(a: Word, b: Word) -> Word:
    return min(a & _MASK, b & _MASK) if known(a, b) else UNKNOWN


def greatest(a: Word, b: Word) -> Word:
    return max(a & _MASK, b & _MASK) if known(a, b) else UNKNOWN


def divide(a: Word, n: Word, remainder: bool, both: bool) -> list[Word]:
    """What a division leaves in its queue: the quotient first."""
    if known(a, n) and n:
        q, r = map(signed, divmod(a & _MASK, n & _MASK))
    else:
        q, r = UNKNOWN, UNKNOWN
    return [r] if remainder else [q, r] if both else [q]


def pop(queue: Word) -> Word:
    return UNKNOWN if queue is UNKNOWN or not queue else queue.pop(0)


def runs(predicate: Word) -> bool:
    """Whether an instruction under this predicate is taken to run: yes, where that is unknown."""
    return predicate is UNKNOWN or bool(predicate)


def truth(a: Word) -> Word:
    return UNKNOWN if a is UNKNOWN else bool(a)


def not_(a: Word) -> Word:
    return UNKNOWN if a is UNKNOWN else not a


def or_(a: Word, b: Word) -> Word:
    if a is True or b is True:
        return True
    return bool(a) or bool(b) if known(a, b) else UNKNOWN


def and_(a: Word, b: Word) -> Word:
    if a is False or b is False:
        return False
    return bool(a) and bool(b) if known(a, b) else UNKNOWN


def xor_(a: Word, b: Word) -> Word:
    return bool(a) != bool(b) if known(a, b) else UNKNOWN


def nand_(a: Word, b: Word) -> Word:
    return not_(and_(a, b))


def nor_(a: Word, b: Word) -> Word:
    return not_(or_(a, b))


def _unsigned(compare: Callable[[int, int], bool]) -> Callable[[Word, Word], Word]:
    return lambda a, b: compare(a & _MASK, b & _MASK) if known(a, b) else UNKNOWN


compare_eq = _unsigned(lambda a, b: a == b)
compare_ne = _unsigned(lambda a, b: a != b)
compare_lt = _unsigned(lambda a, b: a < b)
compare_le = _unsigned(lambda a, b: a <= b)
compare_gt = _unsigned(lambda a, b: a > b)
compare_ge = _unsigned(lambda a, b: a >= b)
