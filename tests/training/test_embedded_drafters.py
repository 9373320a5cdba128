"""The heads that ship with the embedded target: whose they are, how large, and what they foresee."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxinf import checkpoint
from jaxinf.checkpoint.drafters import load_drafter
from jaxinf.generation.speculative import best_paths, expected_tokens
from jaxinf.lm.locate import EMBEDDED, embedded
from jaxinf.training.corpus import read_held_out
from jaxinf.training.data import Documents
from jaxinf.training.drafters.run import HeadRecipe, assess, probes
from jaxinf.training.drafters.tasks import EagleTask, MedusaTask

DATA = Path(__file__).parents[1] / "data"
KINDS = ("medusa", "eagle")


def test_folders():
    assert {f"stdlib-{kind}" for kind in KINDS} <= {path.name for path in EMBEDDED.iterdir()}
    assert embedded() == ["stdlib", "stdlib-draft", "stdlib-draft-aligned"]
    files = [f for kind in KINDS for f in (EMBEDDED / f"stdlib-{kind}").iterdir()]
    assert sum(f.stat().st_size for f in files) <= 4e6
    target = checkpoint.load(EMBEDDED / "stdlib").model
    for kind in KINDS:
        made = load_drafter(EMBEDDED / f"stdlib-{kind}", target)
        assert made.kind == kind
        assert made.ranks[0][0] > made.ranks[0][1] > made.ranks[0][5]


@pytest.fixture(scope="module")
def target():
    return checkpoint.load(DATA / "bfloat16" / "stdlib", dtype="float32").model


@pytest.fixture(scope="module")
def probe(target):
    files = read_held_out(DATA / "stdlib_heldout.xz")
    tokenizer = Tokenizer.from_file(str(EMBEDDED / "stdlib" / "tokenizer.json"))
    held_out = Documents.encode([data.decode() for data in files.values()], tokenizer).tokens.astype(np.int32)
    return probes(target, held_out, HeadRecipe("eagle", probe=64).fitted(target.spec))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "first", "chain"), [("eagle", 0.7, 2.5), ("medusa", 0.15, 1.1)])
def test_they_foresee_what_the_target_writes(target, probe, kind, first, chain):
    made = load_drafter(EMBEDDED / f"stdlib-{kind}", target, dtype="float32")
    task = (MedusaTask if kind == "medusa" else EagleTask)(made.head.spec)
    found = assess(task, made.head, target, *probe)
    assert found["agreement"]["1"][0] > first
    assert found["tokens_per_pass"]["4"] > chain
    # What is stored with the heads, measured on other prompts, says about the same.
    assert made.ranks[0][0] == pytest.approx(found["agreement"]["1"][0], abs=0.08)
    assert expected_tokens(made.ranks, best_paths(made.ranks)) > chain
