"""A plan as JSON and as a picture."""

import json
from pathlib import Path

import pytest
from plan_cases import case

from jaxinf.aot.plan import compare, planner, report
from jaxinf.core import from_record
from jaxinf.models import ModelSpec
from pallas_kernels.errors import InputError, UnsupportedError


def test_the_document() -> None:
    made = planner.plan(case("llama-3.1-8b", quantize="int8"), "v5e-4", compiled=False)
    document = json.loads(json.dumps(report.document(made), allow_nan=False))
    assert document["model"] == "llama-3.1-8b"
    assert document["tpu"] == "v5e-4"
    assert document["mesh"] == made.mesh
    assert document["fits"] is True
    assert set(document["per_chip_bytes"]) == {"weights", "cache", "temporaries", "peak", "hbm"}
    assert {"step_seconds", "tokens_per_second", "bound"} <= set(document["decode"])
    assert {"seconds", "bound"} <= set(document["prefill"])
    assert {"kind", "axis", "bytes", "chips", "times", "sent", "seconds"} == set(document["collectives"][0])
    assert document["slice"]["topology"] == "2x2"
    assert document["decode"]["witness"] == "arithmetic"
    assert from_record(ModelSpec, document["spec"]) == made.case.spec


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = compare(case("qwen3-8b"), ["v5e-4", "v6e-1"], compiled=False)
    report.picture(made, tmp_path / "memory.svg")
    drawn = (tmp_path / "memory.svg").read_text()
    assert "<svg" in drawn
    with pytest.raises(InputError, match="png"):
        report.picture(made, tmp_path / "memory.doc")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    made = compare(case(), ["v5e-4"], compiled=False)
    with pytest.raises(UnsupportedError, match=r"jaxinf\[notebooks\]"):
        report.picture(made, tmp_path / "memory.svg")
