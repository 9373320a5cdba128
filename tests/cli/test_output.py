"""Numbers and tables for people."""

import sys

import pytest

from jaxinf.cli import output


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (2**20, "1.00 MiB"), (5 * 2**40, "5.00 TiB")],
)
def test_size(count: int, text: str) -> None:
    assert output.size(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999"), (1000, "1.0 k (1,000)"), (134515008, "134.5 M (134,515,008)")]
)
def test_many(count: int, text: str) -> None:
    assert output.many(count) == text


@pytest.mark.parametrize(("value", "text"), [(0.0123, "12.3 ms"), (1.234, "1.23 s")])
def test_seconds(value: float, text: str) -> None:
    assert output.seconds(value) == text


def test_table() -> None:
    rows = [["name", "size"], ["a", "10"], ["longer", "7"]]
    assert output.table(rows, header=True, right=True) == "\n".join(
        ["name    size", "------  ----", "a         10", "longer     7"]
    )
    assert output.table(rows[1:]) == "a       10\nlonger  7"


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        output.print_json({"x": float("nan")})


def test_progress_in_a_file_is_a_line_a_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("writing") as report:
        for done in range(0, 2049, 64):
            report(done, 2048)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"writing: {tenth * 10} % of 2.00 KiB" for tenth in range(1, 11)]


def test_progress_counts_what_is_not_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("measuring", "runs") as report:
        report(1, 2)
        report(2, 2)
    assert capsys.readouterr().err == "measuring: 1 of 2 runs\nmeasuring: 2 of 2 runs\n"


def test_progress_on_a_terminal_is_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with output.progress("measuring", "runs") as report:
        report(1, 4)
        report(4, 4)
    captured = capsys.readouterr()
    assert "measuring" in captured.err
    assert "4/4" in captured.err
    assert captured.out == ""
