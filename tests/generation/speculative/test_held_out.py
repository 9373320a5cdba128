"""The embedded pair on text it has not seen: two hundred prompts, greedy, drafted and plain."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation.speculative.runs import hosted

import jaxinf
from jaxinf.generation import Runner, SamplingParams
from jaxinf.generation.speculative import Costs, Drafter, DraftModel, DraftTree, Lookahead, PromptLookup
from jaxinf.training.corpus import read_held_out

pytestmark = pytest.mark.slow

HELD_OUT = Path(__file__).parents[2] / "data" / "stdlib_heldout.xz"
PROMPTS, ROWS, NEW = 200, 25, 40


@cache
def models(dtype: str) -> tuple[Runner, jaxinf.CausalLM]:
    target, small = (jaxinf.LM.from_pretrained(name, dtype=dtype) for name in ("stdlib", "stdlib-draft"))
    return Runner(target.model), small.model


@cache
def prompts() -> list[list[int]]:
    """Of 8 to 96 tokens, from places all over the held-out files."""
    tokenizer = jaxinf.LM.from_pretrained("stdlib").tokenizer
    assert tokenizer is not None
    text = list(read_held_out(HELD_OUT).values())
    draw = np.random.default_rng(0)
    found = []
    while len(found) < PROMPTS:
        ids = tokenizer.encode(text[draw.integers(len(text))][:20_000].decode(errors="ignore"))
        length = int(draw.integers(8, 97))
        if len(ids) > length:
            start = int(draw.integers(len(ids) - length))
            found.append(ids[start : start + length])
    return found


DRAFTERS = {
    "stdlib-draft": lambda small: (DraftModel(small, tokens=4), None),
    "stdlib-draft, adaptive": lambda small: (DraftModel(small, tokens=6), Costs(1.3, 0.0, 0.2)),
    "stdlib-draft, trees": lambda small: (DraftTree(small, (3, 2, 1)), None),
    "ngram": lambda small: (PromptLookup(tokens=6), None),
    "ngram, adaptive": lambda small: (PromptLookup(tokens=6), Costs(1.4)),
    "lookahead": lambda small: (Lookahead(), None),
}


def continued(dtype: str, drafter: Drafter, costs) -> tuple[list[list[int]], float]:
    """Tokens of all prompts, and the tokens that a pass gave."""
    runner, _ = models(dtype)
    rows, passes, written = [], 0, 0
    for i in range(0, PROMPTS, ROWS):
        some = prompts()[i : i + ROWS]
        got, batch = hosted(runner, drafter, some, [NEW] * ROWS, steps=64, costs=costs)
        rows += got
        passes += batch.tally.passes.sum()
        written += sum(len(row) - 1 for row in got)
    return rows, written / passes


@cache
def plain(dtype: str) -> list[list[int]]:
    runner, _ = models(dtype)
    rows = []
    for i in range(0, PROMPTS, ROWS):
        some = prompts()[i : i + ROWS]
        cache = runner.new_cache(ROWS, max(map(len, some)) + NEW)
        batch = runner.begin(some, cache, limits=[NEW] * ROWS, params=[SamplingParams()] * ROWS, seeds=[0] * ROWS)
        parts = [batch.written]
        while not batch.finished.all():
            parts.append(batch.advance(64))
        rows += [
            [x for part in parts for x in part.tokens[row, : part.counts[row]].tolist()] for row in range(ROWS)
        ]
    return rows


@pytest.mark.parametrize("name", DRAFTERS)
def test_float32_answers_are_the_same(name: str) -> None:
    drafter, costs = DRAFTERS[name](models("float32")[1])
    rows, tokens = continued("float32", drafter, costs)
    assert rows == plain("float32")
    assert tokens > 1.05


ROUNDING = 1 / 32
"""In bfloat16 a pass over several tokens sums in another order than one over a single token, and with the embedded
model its logits differ by up to about this. So where the two likeliest tokens are nearer to each other than twice
that, either may be taken, as happens to plain decoding in batches of other sizes; from there on the answers are
different texts. Elsewhere they are the same."""


@pytest.mark.parametrize("name", ["stdlib-draft", "stdlib-draft, trees", "ngram"])
def test_bfloat16_answers_part_only_at_ties(name: str) -> None:
    runner, small = models("bfloat16")
    drafter, costs = DRAFTERS[name](small)
    rows, _ = continued("bfloat16", drafter, costs)
    want = plain("bfloat16")
    logits = jax.jit(lambda model, tokens, at: model(tokens)[0, at])
    parted, exact = [], 0
    for prompt, got, old in zip(prompts(), rows, want, strict=True):
        if got == old:
            exact += 1
            continue
        at = next(i for i, (a, b) in enumerate(zip(got, old, strict=True)) if a != b)
        known = [*prompt, *old[:at]]
        padded = jnp.asarray([known + [0] * (96 + NEW - len(known))], jnp.int32)
        scores = np.asarray(logits(runner.model, padded, len(known) - 1), np.float32)
        best = np.sort(scores)[-1]
        parted.append((best - scores[got[at]], best - scores[old[at]]))
    assert exact > 0.6 * PROMPTS
    assert np.max(parted, initial=0.0) < 2 * ROUNDING, "both were among the likeliest"
