"""From what a user calls a drafter to one, and what drafting with it costs on this device."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinf.cache import Cache
from jaxinf.checkpoint.drafters import is_drafter, load_drafter
from jaxinf.core import to_record
from jaxinf.generation import Runner, SamplingParams, speculative
from jaxinf.generation.speculative import Costs, Drafter, DraftModel, PromptLookup, Speculator
from jaxinf.lm import compilation_cache
from jaxinf.lm.locate import EMBEDDED, locate
from jaxinf.lm.measure import Device
from jaxinf.lm.tokenizer import Tokenizer
from jaxinf.models import CausalLM
from jaxinf.models.drafting import AheadTokens, MedusaHeads
from pallas_kernels.errors import InputError

HEADS = ("medusa", "medusa-chain", "eagle", "eagle-tree")
"""Drafters by heads that ship for the embedded target, and are trained for others by `jaxinf train-drafter`."""

NAMES = ("ngram", "self", "lookahead", *HEADS)
"""Drafters that need no more than their name."""

NewCache = Callable[[int, int], Cache]
"""`(rows, tokens)` to an empty cache of the target, for passes over drafts."""

_PROMPT, _PASSES, _ROUNDS = 64, 24, 5
"""What costs are measured with: a prompt's tokens, passes of a run, and runs of which the median counts."""


def drafter_of(what: Any, target: CausalLM, tokenizer: Tokenizer | None, tokens: int | None) -> Drafter:
    """The drafter that `LM.with_drafter` was given: a `Drafter`, an LM, a model, or a name.

    Raises:
      InputError: nothing of the kind, another vocabulary or tokenizer, heads of another model.
    """
    from jaxinf.lm.lm import LM

    given: dict[str, Any] = {} if tokens is None else dict(tokens=tokens)
    if isinstance(what, Drafter):
        if tokens is not None:
            raise InputError(f"draft_tokens={tokens} is given with a drafter that has its own: set it there")
        return what
    if isinstance(what, LM):
        _same_tokens(what.tokenizer, tokenizer)
        return DraftModel(what.model, limit=what.context, **given)
    if isinstance(what, CausalLM):
        return DraftModel(what, **given)
    if not isinstance(what, (str, Path)):
        raise InputError(
            f"drafter={what!r} must be an LM, a drafter, a folder, a model's name, or one of {', '.join(NAMES)}"
        )
    if what == "ngram":
        return PromptLookup(**given)
    if what == "lookahead":
        return speculative.Lookahead.of(**given)
    if what == "self":
        return speculative.SelfSpeculative.of(target, **given)
    if what in HEADS:
        return heads(str(what), target, **given)
    path = Path(what).expanduser()
    if path.is_dir() and is_drafter(path):
        return heads(path, target, **given)
    if path.is_file() and path.suffix == ".npz":
        return speculative.Retrieval.load(path, tokenizer, **given)
    other = LM.from_pretrained(locate(what), dtype=np.dtype(target.dtype).name)
    return drafter_of(other, target, tokenizer, tokens)


def heads(what: str | Path, target: CausalLM, **given: Any) -> Drafter:
    """The drafter of some heads: one of `HEADS`, or a folder of `jaxinf train-drafter`.

    Raises:
      InputError: they were trained for another model.
      CheckpointError: they cannot be read.
    """
    name = str(what) if what in HEADS else ""
    folder = EMBEDDED / f"stdlib-{name.split('-')[0]}" if name else what
    found = load_drafter(folder, target, dtype=target.dtype)
    given = dict(given, target=found.target)
    if isinstance(found.head, MedusaHeads):
        return speculative.Medusa.of(found.head, () if name == "medusa-chain" else found.ranks, **given)
    if isinstance(found.head, AheadTokens):
        return speculative.PaSS(found.head, **given)
    tree = name == "eagle-tree" and found.head.spec.modules == 1
    return (speculative.EagleTree if tree else speculative.Eagle).of(found.head, found.ranks, **given)


def _same_tokens(ours: Tokenizer | None, targets: Tokenizer | None) -> None:
    """Raises InputError where two tokenizers give other ids."""
    if ours is None or targets is None:
        return
    if ours.vocab_size != targets.vocab_size or any(
        ours.encode(text) != targets.encode(text) for text in (_SAMPLE, _SAMPLE.upper())
    ):
        raise InputError(
            f"the draft model has another tokenizer (of {ours.vocab_size} entries) than the target (of "
            f"{targets.vocab_size}): its tokens would mean other text; take a draft model of the same family"
        )


_SAMPLE = "def quick_sort(items, key=None):\n    return [x for x in items if x < 1024]  # 你好, ça va?\n"


class Drafting:
    """A drafter beside a target, with what drafting costs for each number of rows.

    adaptive, costs: as for `LM.with_drafter`.
    """

    def __init__(self, runner: Runner, drafter: Drafter, *, adaptive: bool, costs: Costs | None):
        self.drafter = drafter if runner.mesh is None else drafter.on(runner.mesh)
        self._speculator = Speculator(runner, self.drafter)
        self._adaptive, self._given = adaptive, costs
        self._costs: dict[int, Costs] = {}
        self._warned = False
        self.spare, self.max_append = self._speculator.spare, self._speculator.max_append

    def serves(self, tokens: int) -> bool:
        """Whether rows of so many tokens can be drafted for; says so once where they cannot."""
        most = self.drafter.context
        if most is None or tokens + self.max_append <= most:
            return True
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"prompt and answer may have {tokens} tokens, but the drafter has a context of {most}, drafts "
                "included: it is not used",
                stacklevel=4,
            )
        return False

    def of_rows(self, rows: int, new_cache: NewCache) -> Speculator:
        """The speculator with what passes of so many rows cost."""
        costs = None
        if self._adaptive:
            if self._given is None and rows not in self._costs:
                self._costs[rows] = costs_of(self._speculator, new_cache, rows)
            costs = self._costs[rows] if self._given is None else self._given
        return self._speculator.with_costs(costs)


def costs_of(speculator: Speculator, new_cache: NewCache, rows: int = 1) -> Costs:
    """What passes take with this pair, in plain steps, for so many rows; measured once and kept in a file.

    What a draft takes whatever its length cannot be told from its verification, and is counted there.

    One compiled loop runs every kind of pass: what it is given for costs decides how much it drafts.

    Args:
      new_cache: `(rows, tokens) -> Cache` for the target.
    """
    path = _costs_file(speculator, rows)
    if path is not None and path.is_file():
        try:
            found = json.loads(path.read_text())
            return Costs(*(float(found[name]) for name in ("verify", "fixed", "token")))
        except (ValueError, KeyError, TypeError, OSError):
            pass  # measured anew
    costs = _measured(speculator, new_cache, rows)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f"{path.name}.{os.getpid()}.part")
            beside.write_text(json.dumps(dict(verify=costs.verify, fixed=costs.fixed, token=costs.token)))
            beside.replace(path)
        except OSError:
            pass  # a cache that cannot be written is done without
    return costs


def _measured(speculator: Speculator, new_cache: NewCache, rows: int) -> Costs:
    depth, vocab = speculator.drafter.depth, speculator.runner.spec.vocab
    limit = _PROMPT + (depth + 1) * (_PASSES + 1)
    random = np.random.default_rng(0)
    # Costs that make the policy take plain steps, whole drafts, drafts of one token.
    ways = {"plain": Costs(1e9), "whole": Costs(0.0, 1e-9, 1e-12), "short": Costs(0.0, 0.0, 1e-6)}
    if not speculator.drafter.steps or depth == 1:
        del ways["short"]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(_ROUNDS + 1):
        for name, costs in ways.items():
            # From other tokens each time: soon after them the target repeats itself, and a mixture that reads the
            # same tokens over and over needs a few of its experts alone.
            batch = speculator.begin(
                random.integers(0, vocab, (rows, _PROMPT)).tolist(),
                new_cache(rows, limit),
                limits=[limit - _PROMPT] * rows,
                params=[SamplingParams()] * rows,
                seeds=[0] * rows,
                eos=(),
            )
            batch.costs = costs
            batch.advance(0)  # the first compiles
            marks = [time.perf_counter()]
            for passes in (0, _PASSES):
                batch.advance(passes)
                marks.append(time.perf_counter())
            call, run = np.diff(marks)
            if turn:
                times[name].append(float(run - call) / int(batch.tally.passes.max()))
    taken = {name: statistics.median(values) for name, values in times.items()}
    whole = taken["whole"] / taken["plain"]
    if "short" not in taken:
        return Costs(verify=whole)
    token = max((taken["whole"] - taken["short"]) / taken["plain"] / (depth - 1), 0.0)
    return Costs(verify=max(whole - token * depth, 0.1), token=token)


def _costs_file(speculator: Speculator, rows: int) -> Path | None:
    """Where costs are kept: named after all that they depend on."""
    compiled = compilation_cache.folder()
    if compiled is None:
        return None
    runner, drafter = speculator.runner, speculator.drafter

    def shapes(weights: Any) -> list[str]:
        return [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(weights)]

    facts = dict(
        jax=jax.__version__,
        device=to_record(Device.at_hand()),
        mesh=None if runner.mesh is None else dict(runner.mesh.shape),
        target=shapes(runner.weights),
        drafter=[type(drafter).__name__, repr(jax.tree.structure(drafter)), shapes(drafter)],
        rows=rows,
    )
    name = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return compiled.parent / "costs" / f"{name}.json"
