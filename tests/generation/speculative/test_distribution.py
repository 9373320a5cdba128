"""Drafting changes no distribution: three tokens of a vocabulary of twelve, counted against all that may come."""

from functools import cache

import numpy as np
import pytest
from generation.speculative.drafters import DRAFTERS, fits
from generation.speculative.laws import DEPTH, LEVEL, SAMPLES, SETTINGS, Counter, chi_square, seeds_of, small

QUICK = ("draft model", "drawn tree")
SEEDS = 5


@cache
def counter_of(layers: int) -> Counter:
    return Counter(small(layers), list(SETTINGS.values()))


@pytest.fixture(scope="module")
def counter() -> Counter:
    return counter_of(1)


def check(counter: Counter, name: str, seeds: list[int], samples: int) -> None:
    if not fits(name, counter.target):
        counter = counter_of(2)
    drafter = DRAFTERS[name](counter.target, 1, DEPTH)
    for seed in seeds:
        found, worst, (accepted, offered) = counter(name, drafter, seed, samples)
        assert worst < 1e-4, "log-probabilities are the target's"
        assert 0.05 * offered < accepted < 0.95 * offered, "some stand, some fall"
        for setting, row, law in zip(SETTINGS, found, counter.laws, strict=True):
            chance = chi_square(row, law)
            assert chance > LEVEL / (SEEDS * len(SETTINGS) * len(DRAFTERS)), (setting, seed, chance)


@pytest.mark.parametrize("name", QUICK)
def test_a_few_continuations(counter: Counter, name: str) -> None:
    check(counter, name, seeds_of(f"test_a_few_continuations {name}", 1), SAMPLES // 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTERS)
def test_continuations_come_as_often_as_they_should(counter: Counter, name: str) -> None:
    check(counter, name, seeds_of(f"test_continuations_come_as_often_as_they_should {name}", SEEDS), SAMPLES)


def test_the_settings_differ(counter: Counter) -> None:
    assert [np.count_nonzero(law) for law in counter.laws[:2]] == [12**3, 5**3]
    for law in counter.laws:
        assert abs(law.sum() - 1) < 1e-9
    assert len({law.argmax() for law in counter.laws}) <= len(counter.laws)
    for one in range(len(counter.laws)):
        for other in range(one):
            assert np.abs(counter.laws[one] - counter.laws[other]).sum() > 0.1


def test_chi_square_is_the_known_one() -> None:
    """At the 5 % points that tables give for 1, 10 and 1000 degrees of freedom."""
    law = np.asarray([0.5, 0.5])
    half = 3.841459**0.5 * 5  # (d^2 / 50) * 2 of 100 counts
    assert chi_square(np.asarray([50 + half, 50 - half]), law) == pytest.approx(0.05, rel=1e-3)
    for freedom, point in ((10, 18.307038), (1000, 1074.679449)):
        cells = freedom + 1
        moved = (point * 1000 * freedom / cells) ** 0.5
        counts = np.full(cells, 1000.0) - moved / freedom
        counts[0] = 1000 + moved
        assert chi_square(counts, np.full(cells, 1 / cells)) == pytest.approx(0.05, rel=1e-2)
    assert chi_square(np.asarray([99, 1]), np.asarray([1.0, 0.0])) == 0.0
