"""Generation: the pure steps, sampling, the loop on the device, and what turns its tokens into text."""

from jaxinf.generation.loop import PIECE, State, Written, decode, first, generate
from jaxinf.generation.runner import WIDTH, Batch, Runner
from jaxinf.generation.sampling import Context, Controls, Processor, SamplingParams, process, row_keys, sample
from jaxinf.generation.step import decode_step, prefill

__all__ = [
    "PIECE",
    "WIDTH",
    "Batch",
    "Context",
    "Controls",
    "Processor",
    "Runner",
    "SamplingParams",
    "State",
    "Written",
    "decode",
    "decode_step",
    "first",
    "generate",
    "prefill",
    "process",
    "row_keys",
    "sample",
]
