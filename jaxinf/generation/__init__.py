"""Generation: the pure steps, sampling, the loop on the device, and what turns its tokens into text."""

from jaxinf.generation.loop import PIECE, State, Written, decode, first, generate
from jaxinf.generation.row import FinishReason, Row
from jaxinf.generation.runner import WIDTH, Batch, Runner
from jaxinf.generation.sampling import Context, Controls, Processor, SamplingParams, process, row_keys, sample
from jaxinf.generation.score import target_logprobs
from jaxinf.generation.step import decode_step, prefill
from jaxinf.generation.stream import Detokenizer, StopStrings

__all__ = [
    "PIECE",
    "WIDTH",
    "Batch",
    "Context",
    "Controls",
    "Detokenizer",
    "FinishReason",
    "Processor",
    "Row",
    "Runner",
    "SamplingParams",
    "State",
    "StopStrings",
    "Written",
    "decode",
    "decode_step",
    "first",
    "generate",
    "prefill",
    "process",
    "row_keys",
    "sample",
    "target_logprobs",
]
