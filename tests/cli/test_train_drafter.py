"""`jaxinf train-drafter --kind`: from a folder and text to heads that load, and a table."""

import json

import pytest

from jaxinf.checkpoint import load
from jaxinf.checkpoint.drafters import load_drafter

SMALL = ("--steps", 2, "--batch", 2, "--context", 32, "--continuations", 4)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "text.py"
    file.write_text("".join(f"def f{i}(x):\n    return x + {i * 37 % 101}\n\n\n" for i in range(400)))
    return file


def test_it_exports_reports_and_resumes(run, run_json, refused, checkpoint, text, tmp_path):
    out = tmp_path / "out"
    command = ("train-drafter", checkpoint, "--kind", "medusa", "--heads", 2, *SMALL, "--text", text, "--out", out)
    code, printed, said = run(*command)
    assert code == 0, said
    lines = printed.splitlines()
    assert lines[0].split() == ["token", "ahead", "among", "1", "among", "2", "among", "4", "among", "8"]
    assert [line.split()[0] for line in lines[2:4]] == ["1", "2"]
    assert "tokens a pass with chains of 1, 2" in lines[4]
    found = json.loads((out / "report.json").read_text())
    made = load_drafter(out / "export", load(checkpoint).model)
    assert (made.kind, found["steps"], len(made.ranks)) == ("medusa", 2, 2)
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2]
    assert "pass --resume" in refused(*command)
    again = run_json(*command, "--resume")
    assert again["agreement"] == found["agreement"]
    assert again["export"] == str(out / "export")


def test_what_is_refused(refused, checkpoint, text, tmp_path):
    start = ("train-drafter", checkpoint, "--out", tmp_path / "out", "--text", text)
    assert "nothing to train was named: give --kind medusa|eagle|mtp" in refused(*start)
    assert "two things to train were named" in refused(*start, "--kind", "eagle", "--align")
    assert "invalid choice: 'hydra'" in refused(*start, "--kind", "hydra")
    assert "--steps 0 must be above 0" in refused(*start, "--kind", "eagle", "--steps", 0)
    assert "--continuations -1 must be at least 0" in refused(*start, "--kind", "eagle", "--continuations", -1)
    assert "'int5'" in refused(*start, "--kind", "eagle", "--format", "int5")
    assert "there is no model" in refused("train-drafter", "nothing", "--out", tmp_path, "--kind", "eagle")
    short = tmp_path / "short.txt"
    short.write_text("x = 1")
    assert "give more" in refused(*start[:4], "--text", short, "--kind", "eagle", *SMALL)
    assert not (tmp_path / "out" / "export").exists()
