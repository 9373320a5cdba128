"""Who decides block sizes: the call, the tuned table, the heuristic; and the tables that ship."""

import dataclasses
import datetime
from typing import Any

import pytest
from tpu_compiler import needs_compiler

from jaxinf.aot import cases, tuning
from pallas_kernels import chips, tuned
from pallas_kernels.errors import InputError
from pallas_kernels.grouped_matmul import blocks as grouped
from pallas_kernels.ragged_paged_attention import blocks as ragged

CHIP = chips.find("v6e")
PROBLEM = grouped.Problem(256, 512, 1024, 4, "bfloat16", "bfloat16")
HEURISTIC = grouped.heuristic(PROBLEM, CHIP)
TUNED = grouped.Blocks(256, 256, 512, 64, 32)
EXPLICIT = grouped.Blocks(128, 128, 512, 32, 32)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A tuned table of grouped_matmul with one entry."""
    entry = {"blocks": dataclasses.asdict(TUNED)}
    tables = {"v6e": {grouped.bucket(PROBLEM): entry}}
    monkeypatch.setattr(tuned, "table", lambda op: {"grouped_matmul": tables}.get(op, {}))
    return entry


def choose(problem: Any = PROBLEM, explicit: Any = None, chip: str = "v6e", op: str = "grouped_matmul") -> Any:
    return tuned.choose(op, grouped, problem, chips.find(chip), explicit)


@pytest.mark.usefixtures("table")
def test_precedence() -> None:
    assert len({HEURISTIC, TUNED, EXPLICIT}) == 3
    assert choose(explicit=EXPLICIT) == EXPLICIT
    assert choose() == TUNED
    assert choose(op="quantized_matmul") == HEURISTIC
    assert choose(chip="v5e") == grouped.heuristic(PROBLEM, chips.find("v5e"))
    other = dataclasses.replace(PROBLEM, inner=1024)
    assert choose(other) == grouped.heuristic(other, CHIP)


@pytest.mark.usefixtures("table")
def test_an_entry_that_does_not_suit_another_shape_of_its_bucket() -> None:
    fewer = dataclasses.replace(PROBLEM, rows=200)
    assert grouped.bucket(fewer) == grouped.bucket(PROBLEM)
    assert grouped.refusals(fewer, TUNED) != []
    assert choose(fewer) == grouped.heuristic(fewer, CHIP)


def test_an_entry_that_does_not_fit(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "budget", lambda chip: grouped.vmem_bytes(PROBLEM, TUNED) - 1)
    assert choose() == HEURISTIC
    with pytest.raises(InputError, match="VMEM"):
        choose(explicit=TUNED)


def test_what_is_chosen_can_be_observed() -> None:
    with tuned.observe() as choices:
        choose(explicit=EXPLICIT)
    assert [(c.op, c.problem, c.blocks) for c in choices] == [("grouped_matmul", PROBLEM, EXPLICIT)]


def test_pages_that_do_not_divide() -> None:
    problem = ragged.Problem(
        8, 4, 2, 128, 128, 8, 16, 64, 256, "bfloat16", "bfloat16", latent=False, scaled=False, return_lse=False
    )
    assert ragged.refusals(problem, ragged.heuristic(problem, CHIP)) == []
    wrong = ragged.refusals(problem, ragged.Blocks(q=12, q_tile=8, pages=3, keys=128, keys_one=96))
    assert [reason.split("=")[0] for reason in wrong] == ["keys", "keys_one", "keys", "q_tile"]


ENTRIES = [
    (op, chip, bucket) for op in cases.ops() for chip, buckets in tuned.table(op).items() for bucket in buckets
]


def test_tables_ship() -> None:
    """JSON files in the packages, which the wheel takes along."""
    assert {op for op, _, _ in ENTRIES} != set()
    for op, chip, bucket in ENTRIES:
        entry = tuned.table(op)[chip][bucket]
        assert chips.find(chip).name == chip
        assert cases.blocks_of(op).Blocks(**entry["blocks"])
        assert entry["case"] in cases.models(op)
        assert entry["ms"] > 0
        assert entry["compiler"].startswith("libtpu")
        datetime.date.fromisoformat(entry["date"])


@needs_compiler
@pytest.mark.parametrize(("op", "chip", "bucket"), ENTRIES)
def test_a_shipped_entry_is_what_its_case_runs_with(op: str, chip: str, bucket: str) -> None:
    entry, module = tuned.table(op)[chip][bucket], cases.blocks_of(op)
    problem = tuning.problem_of(op, cases.call(op, entry["case"]), chip)
    assert module.bucket(problem) == bucket
    assert tuned.choose(op, module, problem, chips.find(chip)) == module.Blocks(**entry["blocks"])
