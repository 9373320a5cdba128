"""Conversations: the checkpoint's chat template, and the cache kept from one turn to the next."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import jinja2
import jinja2.ext
import jinja2.sandbox

from jaxinf.cache import Cache, Kind
from jaxinf.lm.request import Request
from jaxinf.models import ModelSpec
from pallas_kernels.errors import InputError

Message = Mapping[str, Any]

_TAKE_BACK = 32
"""Tokens of a conversation's end that its cache can take back where windows forget."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it only passes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A jinja2 chat template in a sandbox, with the functions that Hugging Face templates count on."""

    def __init__(self, source: str, special: Mapping[str, str]):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template is not valid jinja2: {error}") from None
        self._special = dict(special)

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The text of a conversation, up to where the assistant's next words begin.

        Raises:
          InputError: messages of the wrong form, or that the template refuses.
        """
        values = {"tools": None, "documents": None, "add_generation_prompt": True, **self._special, **variables}
        try:
            return self._template.render(messages=check_messages(messages), **values)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise InputError(f"the chat template refuses these messages: {error}") from None


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InputError('messages must be a list such as [{"role": "user", "content": "Hello"}], not empty')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f'messages[{i}]={message!r} must be a dictionary with a "role" and its "content"')
    return [dict(message) for message in messages]


@dataclass
class Conversation:
    """The cache of the latest conversation.

    cache: of one row; tokens: what is in it. window, sinks, kind: what it was made with.
    """

    cache: Cache
    tokens: list[int]
    window: int | None
    sinks: int
    kind: Kind | None

    def reusable(self, request: Request, settled: int | None) -> int:
        """How many tokens of the cache a pass over the prompt and what it may add can build on, 0: none.

        The cache may be cut back to where both agree, unless a window has forgotten what lies before; one
        token at least is left for the pass. settled: the model's; beyond it keys have the angles of the pass that
        wrote them, which are not those of a pass over the whole.
        """
        if (self.window, self.sinks, self.kind) != (request.window, request.sinks, request.cache):
            return 0
        prompt, new = request.prompts[0], request.limits[0]
        if settled is not None and max(len(self.tokens) + 1, len(prompt)) > settled:
            return 0
        same = 0
        for ours, theirs in zip(self.tokens, prompt[:-1], strict=False):
            if ours != theirs:
                break
            same += 1
        limit, capacity = self.cache.append_limit, self.cache.capacity
        if limit is not None and len(self.tokens) - same > limit:
            return 0
        if capacity is not None and len(prompt) + new - 1 > capacity:
            return 0
        return same


def turn(
    previous: Conversation | None, request: Request, spec: ModelSpec, new_cache: Callable[[int, int], Cache]
) -> tuple[Cache, int]:
    """The cache that the next answer goes on with, and how many tokens of its prompt are in it.

    previous: its cache is used or given up. new_cache: of (tokens, max_append).
    """
    keep = 0 if previous is None else previous.reusable(request, spec.settled)
    if previous is not None and keep:
        # On a mesh there are more lengths than the conversation's: those of rows that fill up the batch, too.
        return previous.cache.roll_back(jnp.minimum(previous.cache.lengths, keep)), keep
    del previous  # its memory is free before the new cache takes some
    return new_cache(request.tokens, 1 + _TAKE_BACK), 0


def _raise(message: str):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
