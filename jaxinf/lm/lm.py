"""The user's object: what can be done with a model and its tokenizer (`base.py` says how they come together)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack, overload

from jaxinf.cache import Cache, Kind
from jaxinf.generation import Processor
from jaxinf.lm import programs_folder, scoring
from jaxinf.lm.base import Base
from jaxinf.lm.chat import ChatTemplate, Conversation, Message, check_messages, turn
from jaxinf.lm.completion import Completion, Score
from jaxinf.lm.job import STREAMED, Job, Stream
from jaxinf.lm.request import (
    Options,
    make_request,
    only_one,
    token_lists,
    whole_number,
    window_of,
)
from pallas_kernels.errors import InputError


class LM(Base):
    """A language model that writes, chats and scores.

    Args:
      model: the decoder. Its weights are taken over, not copied.
      tokenizer: None: prompts are token ids and completions have no text.
      generation: the contents of a generation_config.json: "eos_token_id", "do_sample", "temperature", ...; what
        would change answers and is not done here is warned of.
      context: tokens that a prompt and its answer may have together; None: what the model was made for.
      window, sinks: bound the memory of every generation to the latest `window` tokens and the first `sinks`
        (StreamingLLM, Xiao et al. 2024); see `generate`.
      cache: "int8", "fp8" or "int4": what every generation keeps of its past in fewer bits; see `generate`.
      programs: a folder that `save_programs` wrote for this model, dtype, mesh and device. Where it does not fit,
        or a call has other sizes, a warning says so once and programs are compiled as ever. Its machine code is
        run, so it is to be trusted.

    Raises:
      InputError: numbers out of range.
    """

    @overload
    def generate(
        self,
        prompts: str | Sequence[int],
        max_new_tokens: int | None = None,
        *,
        n: Literal[1] = 1,
        **options: Unpack[Options],
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int] | None = None,
        *,
        n: Literal[1] = 1,
        **options: Unpack[Options],
    ) -> list[Completion]: ...
    @overload
    def generate(
        self,
        prompts: Any,
        max_new_tokens: int | Sequence[int] | None = None,
        *,
        n: int = 1,
        **options: Unpack[Options],
    ) -> Any: ...

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int | Sequence[int] | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] | None = None,
        n: int = 1,
        logprobs: bool | int = False,
        logit_bias: Mapping[int, float] | None = None,
        processors: Sequence[Processor] = (),
        eos: int | Sequence[int] | None = None,
        window: int | None = None,
        sinks: int | None = None,
        cache: Kind | None = None,
    ) -> Any:
        """Continues prompts. Rows of different lengths give the tokens that they give alone, up to rounding.

        Args:
          prompts: text, or a flat list of token ids: one prompt; a list of either: several.
          max_new_tokens: for all, or one a prompt; None: generation_config.json's, else 64. The context may end
            an answer earlier.
          temperature, top_k, top_p, min_p, repetition_penalty: see `SamplingParams`. What is not given comes
            from generation_config.json (sampling where it says do_sample), else the answer is greedy. A
            top_k, top_p or min_p without any temperature samples at 1.
          seed: below 2**32. Token t of a row is drawn with `fold_in(key(seed), t)`, so that it depends on no
            other row. An int serves every prompt; a list has one a prompt. Sample i of a prompt uses seed + i.
          stop: text is cut before the first of these strings; None: generation_config.json's, (): none.
          n: answers a prompt. With more than one, each prompt gets a list.
          logprobs: True: log-probabilities of the tokens; a number: of that many alternatives too.
          logit_bias: token id to what is added to its logit.
          processors: pure functions `(logits, Context) -> logits`; each new function object compiles anew.
          eos: ids that end an answer instead of the model's own; (): none.
          window, sinks: remember the latest `window` tokens and the first `sinks` (default 4) alone, where the
            model's layers would remember all. Then prompt and answer may be longer than the context.
          cache: "int8", "fp8" or "int4": keep keys and values in fewer bits, which changes answers a little
            (docs/quantization.md says by how much); None: as the model was loaded.

        Returns:
          A `Completion` for one prompt, a list of them for several. On Ctrl-C, what was written until then.

        Raises:
          InputError: an argument out of range, by name, before anything is compiled.
        """
        request = make_request(
            self._facts,
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            n=n,
            logprobs=logprobs,
            logit_bias=logit_bias,
            processors=processors,
            eos=eos,
            window=window,
            sinks=sinks,
            cache=cache,
        )
        done = Job(request, self.tokenizer, lambda: self._engine.begin(request)).finish()
        if request.samples > 1:
            groups = [done[i : i + request.samples] for i in range(0, len(done), request.samples)]
            return groups[0] if request.single else groups
        return done[0] if request.single else done

    def stream(self, prompt: Any, max_new_tokens: int | None = None, **options: Unpack[Options]) -> Stream:
        """Continues one prompt; an iterator over pieces of text, of whole characters, as they are certain.

        Args: as for `generate`, with one prompt and one answer. The answer as a whole, with its tokens and why
        it ended, is the iterator's `completion` once it is through. Ctrl-C ends it.
        """
        request = make_request(self._facts, prompt, max_new_tokens, **options)
        only_one(request)
        return Stream(Job(request, self.tokenizer, lambda: self._engine.begin(request), **STREAMED))

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 256,
        *,
        template_options: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """The assistant's next message, by the checkpoint's chat template.

        The cache of the latest conversation is kept: what a new call has in common with it from the start on
        is not computed again (`stats.cached_tokens`). Where sliding windows have forgotten what would be
        needed, or angles of long texts depend on their length, the conversation is computed anew.

        Args:
          messages: such as `[{"role": "user", "content": "Hello"}]`, from the conversation's beginning.
          template_options: further variables of the template, such as enable_thinking.
          The others are as for `generate`.

        Raises:
          InputError: no chat template, or messages that it refuses.
        """
        return self._chat(messages, max_new_tokens, template_options, options).finish()[0]

    def stream_chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 256,
        *,
        template_options: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """The assistant's next message as an iterator over pieces of text: `chat` as `stream` gives it.

        A conversation whose stream is left before its end is not kept.
        """
        return Stream(self._chat(messages, max_new_tokens, template_options, options, **STREAMED))

    def _chat(self, messages, max_new_tokens, template_options, options: Options, **pace: Any) -> Job:
        tokens = self.chat_tokens(messages, **(template_options or {}))
        request = make_request(self._facts, tokens, max_new_tokens, **options)
        only_one(request)
        window, sinks, kind = request.window, request.sinks, request.cache

        def new_cache(tokens: int, max_append: int) -> Cache:
            room = max(tokens, min(2 * tokens, self.context))
            return self._engine.new_cache(1, room, window, sinks, kind, max_append)

        def keep(job: Job) -> None:
            if job.batch is not None and job.batch.state is not None:
                held = request.prompts[0] + job.emitted[0][:-1]
                self._conversation = Conversation(job.batch.state.cache, held, window, sinks, kind)

        if self._engine.drafting is not None:  # a drafter reads what it drafts for from the start
            return Job(request, self.tokenizer, lambda: self._engine.begin(request), **pace)
        previous, self._conversation = self._conversation, None
        cache, cached = turn(previous, request, self.spec, new_cache)
        begin = functools.partial(self._engine.begin, request, cache, cached)
        return Job(request, self.tokenizer, begin, cached=cached, ended=keep, **pace)

    def chat_tokens(self, messages: Sequence[Message], **template_options: Any) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next words begin."""
        check_messages(messages)
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise InputError("this model has no chat template; use generate")
        template = ChatTemplate(self.tokenizer.chat_template, self.tokenizer.special)
        return self.tokenizer.encode_chat(template.render(messages, **template_options))

    def score(
        self,
        text: str | Sequence[int],
        *,
        stride: int | None = None,
        window: int | None = None,
        sinks: int | None = None,
    ) -> Score:
        """How well the model predicts a text: log-probabilities, perplexity, bits per byte.

        A text longer than the context is read in overlapping pieces of that length, each token scored once,
        with at least `context - stride` tokens before it (but for the first piece). With a `window` it is read
        once, from start to end, with the bounded memory that `generate` would have.

        Args:
          text: text, or its token ids, at least two tokens.
          stride: tokens from one piece to the next; default: half the context.
          window, sinks: as for `generate`.

        Raises:
          InputError: an empty text, ids or numbers out of range.
        """
        ids, single = token_lists(self._facts, text)
        if not single:
            raise InputError("score takes one text at a time")
        window, sinks = window_of(self._facts, window, sinks)
        table = self.spec.learned_positions
        if window is not None and table is not None and len(ids[0]) - 1 > table:
            raise InputError(f"the text has {len(ids[0])} tokens, but this model has learned {table} positions")
        if window is None:
            logprobs = self._score.windowed(ids[0], self.context, stride, padded=not self._sees_padding)
        else:
            cache = self._engine.new_cache(1, len(ids[0]), window, sinks, self._facts.cache)
            logprobs = self._score.streamed(ids[0], cache)
        size = len(text.encode()) if isinstance(text, str) else None
        bos = None if self.tokenizer is None else self.tokenizer.bos_id
        return scoring.summary(ids[0], logprobs, size, bos, self.spec.vocab)

    def warmup(
        self,
        prompt_tokens: int | Sequence[int] = 64,
        max_new_tokens: int | None = None,
        *,
        batch: int = 1,
        **options: Unpack[Options],
    ) -> None:
        """Compiles what calls of `generate` with these sizes and options will run.

        Args:
          prompt_tokens: length of the prompts, or several lengths.
          batch: prompts a call.
        """
        lengths = prompt_tokens if isinstance(prompt_tokens, (list, tuple)) else [prompt_tokens]
        batch = whole_number("batch", batch, least=1)
        for length in [whole_number("prompt_tokens", length, least=1) for length in lengths]:
            request = make_request(self._facts, [[0] * length] * batch, max_new_tokens, **{"eos": (), **options})
            running = self._engine.begin(request)
            if max(request.limits) > 1:
                running.advance(1)

    def save_programs(
        self,
        folder: str | Path,
        prompt_tokens: int | Sequence[int] = 64,
        max_new_tokens: int | None = None,
        *,
        batch: int | Sequence[int] = 1,
        overwrite: bool = False,
        portable: Sequence[str] = (),
        **options: Unpack[Options],
    ) -> list[dict[str, Any]]:
        """Compiles what calls of `generate` with these sizes and options run, and keeps it in a folder.

        `LM.from_pretrained(..., programs=folder)` then neither traces nor compiles for them. Lengths are bucketed:
        one program serves prompts and answers of similar lengths. `logits` and `score` are not among them.

        Args:
          prompt_tokens, batch: one or several, all combinations of which are compiled.
          overwrite: replace programs that are there.
          portable: platforms ("cpu", "tpu") for which each program is kept as StableHLO too, which other versions
            of JAX can compile (`jaxinf.aot.portable`).

        Returns:
          The programs' entries in the manifest: "name", "file", "bytes", ...
        """

        def warm(programs: programs_folder.User) -> None:
            other = copy.copy(self)
            other._run(self.model, programs)
            for rows in [batch] if isinstance(batch, int) else batch:
                other.warmup(prompt_tokens, max_new_tokens, batch=rows, **options)

        return programs_folder.save(folder, self.model, warm, overwrite=overwrite, portable=portable)

    def __repr__(self) -> str:
        spec = self.spec
        return f"LM({spec.depth} layers of {spec.d_model}, vocabulary {spec.vocab}, context {self.context})"
