"""A model over two processes of four emulated devices each: the tokens of one process with one device."""

from pathlib import Path

import numpy as np
import pytest
from processes import together

from jaxinf import LM

GOLDENS = Path(__file__).parents[1] / "goldens"
PROMPTS = [[1, 2, 3, 4, 5], [7, 8], [9, 3, 1]]

RUNS = """
from jaxinf import LM
folder, *meshes = arguments
prompts = [[1, 2, 3, 4, 5], [7, 8], [9, 3, 1]]
found = {}
for mesh in meshes:
    lm = LM.from_pretrained(folder, mesh=mesh, dtype="float32")
    greedy = [out.tokens for out in lm.generate(prompts, 32, eos=())]
    drawn = [out.tokens for out in lm.generate(prompts, 8, eos=(), temperature=1.0, seed=3)]
    logits = hosts.fetch(lm.logits([prompts[0]])).tolist()
    found[mesh] = [greedy, drawn, logits, lm.score(prompts[0]).logprobs.tolist()]
tell(**found)
"""

CASES = {"llama": ["pipeline=2,sequence=2,tensor=2"], "mixtral": ["data=2,expert=2,tensor=2"]}


@pytest.mark.parametrize("case", CASES)
def test_the_same_tokens_as_one_process(case: str, tmp_path: Path) -> None:
    lm = LM.from_pretrained(GOLDENS / case, dtype="float32")
    greedy = [out.tokens for out in lm.generate(PROMPTS, 32, eos=())]
    drawn = [out.tokens for out in lm.generate(PROMPTS, 8, eos=(), temperature=1.0, seed=3)]
    first, second = together(RUNS, tmp_path, (str(GOLDENS / case), *CASES[case]))
    assert first == second
    for mesh, (its_greedy, its_drawn, logits, scores) in first.items():
        assert its_greedy == greedy, mesh
        assert its_drawn == drawn, mesh
        np.testing.assert_allclose(logits, lm.logits([PROMPTS[0]]), atol=1e-4, err_msg=mesh)
        np.testing.assert_allclose(scores, lm.score(PROMPTS[0]).logprobs, atol=1e-4, err_msg=mesh)
