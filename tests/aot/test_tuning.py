"""The search of block sizes: ranking, the table it writes, and a small search through the compiler."""

import json
from pathlib import Path

import pytest
from tpu_compiler import needs_compiler

from jaxinf.aot import tuning
from jaxinf.aot.tuning import Search, Trial
from pallas_kernels.errors import InputError, UnsupportedError

_TIMES = ((1, 900, 1.0), (2, 500, 1.02), (3, 100, 2.0))
FAST, TIED, SLOW = (Trial({"m": m}, vmem, ms / 1e3) for m, vmem, ms in _TIMES)
REFUSED = Trial({"m": 4}, 50, error="the compiler refuses it")


def search(*trials: Trial, **changes: object) -> Search:
    given: dict = {
        "op": "an_op",
        "case": "a-case",
        "chip": "v6e",
        "bucket": "bfloat16-m64",
        "compiler": "libtpu 1",
        "candidates": 4,
        "trials": trials,
        "skipped": (),
        "heuristic": {"m": 3},
    }
    return Search(**(given | changes))


def test_of_equal_times_the_one_with_less_vmem_is_best() -> None:
    found = search(FAST, TIED, SLOW, REFUSED)
    assert found.best == TIED
    assert found.heuristic_seconds == 2e-3
    entry = found.entry()
    assert (entry["blocks"], entry["ms"], entry["compiler"]) == ({"m": 2}, 1.02, "libtpu 1")


@pytest.mark.parametrize(("heuristic", "pays"), [(1, False), (2, False), (3, True), (4, True)])
def test_an_entry_pays_where_the_heuristic_is_slower_or_does_not_compile(heuristic: int, pays: bool) -> None:
    assert search(FAST, TIED, SLOW, REFUSED, heuristic={"m": heuristic}).pays == pays


def test_nothing_that_compiles() -> None:
    found = search(REFUSED)
    assert found.best is None
    assert not found.pays
    with pytest.raises(UnsupportedError, match="no block sizes of an_op compile"):
        found.entry()


def test_a_table_is_added_to(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    tuning.write(path, [search(FAST)])
    tuning.write(path, [search(SLOW, chip="v5e"), search(SLOW, bucket="a")])
    tuning.write(path, [search(TIED)])
    table = json.loads(path.read_text())
    assert {chip: {b: e["blocks"]["m"] for b, e in entries.items()} for chip, entries in table.items()} == {
        "v5e": {"bfloat16-m64": 3},
        "v6e": {"a": 3, "bfloat16-m64": 2},
    }
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize("text", ["not json", "[]", '{"v6e": []}'])
def test_a_table_that_is_none_is_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(InputError, match="name another file"):
        tuning.write(path, [search(FAST)])
    assert path.read_text() == text


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot add"):
        tuning.write(tmp_path / "no" / "tuned.json", [search(FAST)])


def test_the_walk_begins_beside_the_start_and_follows_the_best() -> None:
    grid = [{"m": m, "n": n} for m in (1, 2, 4, 8, 16) for n in (1, 2, 4)]
    walk = tuning._Walk({tuple(b.values()): b for b in grid}, {"m": 4, "n": 2})
    first = walk.next({}, 6)
    assert first[0] == {"m": 4, "n": 2}
    steps = [abs([1, 2, 4, 8, 16].index(b["m"]) - 2) + abs([1, 2, 4].index(b["n"]) - 1) for b in first]
    assert steps[:5] == [0, 1, 1, 1, 1]
    assert steps[5] > 1
    trials = {tuple(b.values()): Trial(b, 0, 1.0 if b == {"m": 8, "n": 2} else 2.0) for b in first[:5]}
    then = walk.next(trials, 3)
    assert all(abs([1, 2, 4, 8, 16].index(b["m"]) - 3) + abs([1, 2, 4].index(b["n"]) - 1) == 1 for b in then)


@needs_compiler
def test_a_small_search(tmp_path: Path) -> None:
    seen = []
    found = tuning.tune(
        "quantized_matmul",
        "smollm-135m-576x1536-32-rows-int8",
        "v6e",
        budget=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(found.trials) == 3
    assert found.trials[0].seconds == min(t.seconds for t in found.trials if t.seconds)
    assert found.heuristic in [t.blocks for t in found.trials]
    assert seen[0] == (0, 3)
    assert seen[-1] == (3, 3)
    assert found.bucket.startswith("bfloat16")
    assert found.best is not None
    tuning.write(tmp_path / "tuned.json", [found])


@needs_compiler
def test_a_call_without_a_kernel_has_nothing_to_search() -> None:
    from pallas_kernels.named import Call, Work

    with pytest.raises(UnsupportedError, match="no kernel"):
        tuning.problem_of("flash_attention", Call(lambda: 0, (), Work(0, 0)), "v5e")
