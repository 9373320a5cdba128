"""`jaxinf train-drafter --align`: from two folders and text to a folder that loads, and a table."""

import json
import shutil

import jax
import pytest
from cli.tiny import TOKENIZER, tiny_spec
from flax import nnx

from jaxinf import LM
from jaxinf.checkpoint import load, save
from jaxinf.cli import align
from jaxinf.lm.locate import EMBEDDED
from jaxinf.models import CausalLM

COMMAND = ("--align", "--steps", 3)


@pytest.fixture(scope="module")
def draft(tmp_path_factory, checkpoint):
    model = CausalLM(tiny_spec(), rngs=nnx.Rngs(7))
    folder = tmp_path_factory.mktemp("drafts") / "draft"
    return save(folder, model, tokenizer_files=TOKENIZER.glob("tokenizer*.json"), generation={"eos_token_id": 383})


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "text.py"
    file.write_text("".join(f"def f{i}(x):\n    return x + {i * 37 % 101}\n\n\n" for i in range(600)))
    return file


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, checkpoint, draft, text):
    """The folder of a run, what it printed, and its exit code."""
    out = tmp_path_factory.mktemp("runs") / "out"
    return out, (checkpoint, *COMMAND, "--draft", draft, "--text", text, "--out", out)


def test_it_exports_reports_and_resumes(aligned, run, run_json):
    out, command = aligned
    code, printed, said = run("train-drafter", *command)
    assert code == 0, said
    lines = printed.splitlines()
    assert lines[0].split("  ")[0] == "contexts"
    assert lines[2].startswith("held-out text")
    assert "->" in lines[2]
    found = json.loads((out / "report.json").read_text())
    assert (found["steps"], found["loss"]) == (3, "tvd")
    assert align.table(found).splitlines() == lines[:-1]
    assert LM.from_pretrained(out / "export").generate("def f", 2).tokens
    again = run_json("train-drafter", *command, "--resume")
    assert again["contexts"] == found["contexts"]
    assert again["export"] == str(out / "export")
    assert jax.tree.leaves(load(out / "export").model)[0].dtype == "float32"


def test_what_is_refused(aligned, draft, text, checkpoint, refused, tmp_path):
    command, start = aligned[1], ("train-drafter", checkpoint, *COMMAND)
    assert "--draft" in refused("train-drafter", checkpoint, "--align", "--out", tmp_path)
    assert "nothing to train was named" in refused("train-drafter", checkpoint, "--out", tmp_path)
    assert "--on-policy" in refused("train-drafter", *command, "--on-policy", "2")
    assert "--minutes -1.0 must be above 0" in refused("train-drafter", *command, "--minutes", "-1")
    short = tmp_path / "short.txt"
    short.write_text("def f(): pass")
    assert "give more" in refused(*start, "--draft", draft, "--text", short, "--out", tmp_path / "a")
    short.write_bytes(b"\xff")
    assert "is not UTF-8" in refused(*start, "--draft", draft, "--text", short, "--out", tmp_path / "a")
    message = refused("train-drafter", "stdlib", *COMMAND, "--draft", draft, "--out", tmp_path / "b")
    assert "the draft's vocabulary has 384 tokens and the target's 4096" in message
    other = tmp_path / "other"
    shutil.copytree(draft, other)
    (other / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(*start, "--draft", other, "--text", text, "--out", tmp_path / "c")
    shutil.copyfile(EMBEDDED / "stdlib" / "tokenizer.json", other / "tokenizer.json")
    assert "is not the target's" in refused(*start, "--draft", other, "--text", text, "--out", tmp_path / "c")
