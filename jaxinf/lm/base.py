"""What an `LM` is made of: loading, spreading, rounding, drafting; what there is to know of it."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinf import checkpoint
from jaxinf.cache import Kind, check_kind
from jaxinf.generation import Runner
from jaxinf.generation.speculative import Costs, Drafter
from jaxinf.layers import ExpertChoice, MoESpec
from jaxinf.lm import compilation_cache, fitting, programs_folder, scoring
from jaxinf.lm.chat import Conversation
from jaxinf.lm.defaults import Defaults, not_done
from jaxinf.lm.drafting import Drafting, drafter_of
from jaxinf.lm.engine import Engine
from jaxinf.lm.locate import locate
from jaxinf.lm.request import Facts, context_of, token_lists, window_of
from jaxinf.lm.tokenizer import Tokenizer
from jaxinf.models import CausalLM, ModelSpec
from jaxinf.models.causal_lm import Layout
from jaxinf.models.placing import mesh_for, place_model, unplace
from pallas_kernels.errors import InputError
from sharding.program import LOGITS

if TYPE_CHECKING:
    from jaxinf.lm.lm import LM


class Base:
    """A model, its tokenizer and its defaults; arguments as for `LM`."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer | None = None,
        generation: Mapping[str, Any] | None = None,
        *,
        context: int | None = None,
        window: int | None = None,
        sinks: int | None = None,
        cache: Kind | None = None,
        programs: str | Path | programs_folder.Opened | None = None,
    ):
        compilation_cache.enable()
        self.tokenizer = tokenizer
        spec, generation = model.spec, dict(generation or {})
        if generation.get("eos_token_id") is None and tokenizer is not None:
            generation["eos_token_id"] = tokenizer.eos_id
        if unmet := not_done(generation):
            warnings.warn(
                f"the checkpoint asks for {', '.join(unmet)} when it generates, which is not done here: answers "
                "may differ from those of other libraries",
                stacklevel=2,
            )
        facts = Facts(spec, context_of(spec, context), tokenizer, Defaults.of(generation))
        window, sinks = window_of(facts, window, sinks)
        check_kind("cache", cache)
        self._facts = dataclasses.replace(facts, window=window, sinks=sinks, cache=cache)
        self._run(model, programs_folder.user(programs, model))

    def _run(self, model: CausalLM, programs: programs_folder.User = programs_folder.none) -> None:
        self._runner = Runner(model, programs)
        self._engine = Engine(self._runner, self._facts)
        self._conversation: Conversation | None = None
        self._logits = self._runner.bind(lambda model, tokens: model(tokens), gives=LOGITS)
        self._score = scoring.Scorer(self._runner)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str | None = None,
        layout: Layout | None = None,
        context: int | None = None,
        window: int | None = None,
        sinks: int | None = None,
        cache: Kind | None = None,
        revision: str | None = None,
        mesh: str | Mapping[str, int] | Mesh | None = None,
        quantize: str | None = None,
        programs: str | Path | None = None,
    ) -> Self:
        """Loads an embedded model ("stdlib"), a folder, or a model of the Hugging Face Hub ("owner/name").

        Args:
          dtype: "float32", "bfloat16" or "float16"; None: the checkpoint's own.
          layout: "list" or "stacked"; None: what suits the device.
          context, window, sinks, cache, programs: as for the class.
          revision: branch, tag or commit on the Hub.
          mesh: spread the model over a mesh of devices, as `shard` does; each process then reads what its devices
            hold.
          quantize: "int8", "int4", "w8a8", "nf4", ...: round the matrices of attention and feed-forward layers to
            the nearest while they are read, so that the original is never in memory.

        Raises:
          InputError: an unknown name or scheme (the message says which exist), a number out of range, a model that
            is quantised already and is to be again; on TPUs, a model that cannot fit them.
          CheckpointError: the files are missing, corrupt or not understood.
        """
        compilation_cache.enable()
        check_kind("cache", cache)
        found = None if programs is None else programs_folder.opened(programs)
        folder = locate(name, revision)
        fitting.check(folder, dtype=dtype, mesh=mesh, quantize=quantize)
        loaded = checkpoint.load(folder, dtype=dtype, layout=layout, mesh=mesh, quantize=quantize)
        generation = dict(loaded.generation)
        for key in ("eos_token_id", "bos_token_id"):
            if generation.get(key) is None and loaded.config.get(key) is not None:
                generation[key] = loaded.config[key]
        tokenizer = Tokenizer.from_folder(loaded.folder)
        more: dict[str, Any] = dict(window=window, sinks=sinks, cache=cache, programs=found)
        return cls(loaded.model, tokenizer, generation, context=context, **more)

    def shard(self, mesh: str | Mapping[str, int] | Mesh) -> Self:
        """This model spread over a mesh of devices; answers are the same.

        Args:
          mesh: axes and sizes, such as "data=2,tensor=4", of data, pipeline, sequence, expert, tensor; "auto"; or
            a `jax.sharding.Mesh` with such axes. One smaller than the devices takes the first ones and warns;
            "auto" is as much tensor as divides the model, and data.

        Raises:
          InputError: the mesh needs more devices than there are, or does not divide the model; the message says
            which sizes would.
        """
        other = copy.copy(self)
        other._run(place_model(self.model, mesh_for(self.spec, mesh)))
        return other

    def quantize(self, scheme: str = "int8", **options: Any) -> Self:
        """This model with narrower matrices in its attention and feed-forward layers, by `compression.quantize`.

        Args:
          scheme, options: as there. The weights of this model stay; `from_pretrained(quantize=)` never has both.

        Raises:
          InputError: as there.
          UnsupportedError: parts of the model are with other processes.
        """
        from jaxinf import compression  # its methods are slow to import, and few programs want them

        mesh, other = self.mesh, copy.copy(self)
        model = compression.quantize(unplace(self.model), scheme, **options)
        other._run(model if mesh is None else place_model(model, mesh))
        return other

    def with_drafter(
        self,
        drafter: LM | CausalLM | Drafter | str | Path,
        draft_tokens: int | None = None,
        *,
        adaptive: bool = True,
        costs: Costs | None = None,
    ) -> Self:
        """This model with a drafter: what it writes is the same, in fewer passes (docs/speculative.md).

        Greedy answers are token for token those without it; samples have the same distribution, and where drafts
        are not sampled themselves (n-grams, heads, ...) are also the same tokens for the same seed.

        Args:
          drafter: another LM with the same tokenizer, the name or folder of one, a folder of heads that `jaxinf
            train-drafter` wrote, a datastore of `jaxinf datastore`, a drafter of `jaxinf.generation.speculative`,
            or "ngram", "self", "lookahead", "medusa", "eagle".
          draft_tokens: of a draft at most; None: the drafter's own.
          adaptive: draft as many tokens as pay, by the acceptance seen so far and by what passes cost here, which
            is measured now (some seconds, once for a device: it is kept in a file) and for each other number of
            rows when it first comes. False: always draft in full; then equal seeds give equal samples everywhere.
          costs: used instead of measuring.

        Raises:
          InputError: another vocabulary or tokenizer, heads of another model, a draft length out of range.
          UnsupportedError: the drafter cannot serve this model or mesh.
        """
        other = copy.copy(self)
        found = drafter_of(drafter, self.model, self.tokenizer, draft_tokens)
        drafting = Drafting(self._runner, found, adaptive=adaptive, costs=costs)
        other._engine = dataclasses.replace(self._engine, drafting=drafting)
        other._conversation = None
        other._engine.measure_drafting()
        return other

    @property
    def drafter(self) -> Drafter | None:
        """What drafts; None: every token is a pass."""
        drafting = self._engine.drafting
        return None if drafting is None else drafting.drafter

    @property
    def mesh(self) -> Mesh | None:
        """Over which the model is spread; None: one device."""
        return self._runner.mesh

    @property
    def spec(self) -> ModelSpec:
        """The architecture."""
        return self._facts.spec

    @property
    def model(self) -> CausalLM:
        """The decoder; it shares its weights with this object."""
        return self._runner.model

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._facts.context

    @property
    def eos(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self._facts.defaults.eos

    def logits(self, tokens: Any) -> jax.Array:
        """Logits of whole sequences: int `[B, T]` -> float32 `[B, T, V]`.

        Raises:
          InputError: ids out of range or not integers, or T beyond the context.
        """
        rows, single = token_lists(self._facts, tokens)
        if single or len({len(row) for row in rows}) != 1:
            raise InputError("tokens must be [B, T]: a list of rows of one length")
        length = len(rows[0])
        if length > self.context:
            raise InputError(f"tokens has {length} columns, but the context is {self.context}")
        # Padding on the right changes no earlier token, unless experts choose among all of them.
        padded = length if self._sees_padding else min(-(-length // 64) * 64, max(length, self.context))
        batch = np.zeros((len(rows) + -len(rows) % self._runner.row_ways, padded), np.int32)
        batch[: len(rows), :length] = rows
        return self._logits(batch)[: len(rows), :length, : self.spec.vocab]

    @property
    def _sees_padding(self) -> bool:
        return any(
            isinstance(x.ffn, MoESpec) and isinstance(x.ffn.router, ExpertChoice) for x in self.spec.layers()
        )
