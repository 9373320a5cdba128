"""32-bit arithmetic with unknowns, against Python's integers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinf.aot.static import scalars
from jaxinf.aot.static.scalars import POINTER, UNKNOWN

words = st.integers(-(2**31), 2**31 - 1)
shifts = st.integers(0, 31)


def wrapped(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


@given(words, shifts)
def test_shifts_wrap_at_32_bits(a: int, n: int) -> None:
    assert scalars.shift_left(a, n) == wrapped(a * 2**n)
    assert scalars.shift_left_ones(a, n) == wrapped(a * 2**n + 2**n - 1)
    assert scalars.shift_right(a, n) == a % 2**32 // 2**n
    assert scalars.shift_right_signed(a, n) == a // 2**n


@given(st.integers(0, 2**32 - 1), shifts)
def test_an_unsigned_word_is_shifted_like_the_signed_one(a: int, n: int) -> None:
    assert scalars.shift_left(a, n) == wrapped(a * 2**n)


@given(words, words)
def test_unsigned_comparisons_and_extremes(a: int, b: int) -> None:
    assert scalars.compare_lt(a, b) == (a % 2**32 < b % 2**32)
    assert scalars.compare_ge(a, b) == (a % 2**32 >= b % 2**32)
    assert scalars.least(a, b) == min(a % 2**32, b % 2**32)


def test_division_queues_the_quotient_first() -> None:
    queue = scalars.divide(17, 5, remainder=False, both=True)
    assert [scalars.pop(queue), scalars.pop(queue)] == [3, 2]
    assert scalars.divide(17, 5, remainder=True, both=False) == [2]
    assert scalars.pop(scalars.divide(17, 0, remainder=True, both=False)) is UNKNOWN


def test_the_unknown_spreads() -> None:
    for value in (UNKNOWN + 1, 1 - UNKNOWN, UNKNOWN < 3, 3 * UNKNOWN, scalars.shift_left(UNKNOWN, 2)):
        assert value is UNKNOWN
    assert scalars.select(UNKNOWN, 1, 2) is UNKNOWN
    assert scalars.not_(UNKNOWN) is UNKNOWN


def test_what_is_certain_stays_so() -> None:
    assert scalars.or_(UNKNOWN, True) is True
    assert scalars.and_(False, UNKNOWN) is False
    assert scalars.nor_(UNKNOWN, True) is False
    assert scalars.select(True, 1, UNKNOWN) == 1


def test_an_unknown_has_no_truth() -> None:
    with pytest.raises(scalars.Undecided):
        bool(UNKNOWN)
    assert scalars.runs(UNKNOWN)


def test_a_pointer_keeps_its_tag() -> None:
    assert scalars.shift_left(POINTER + 8, 4) == (POINTER + 8) << 4
    assert scalars.signed(POINTER + 8) == POINTER + 8
