"""Speculative decoding: drafters, the rules of acceptance, and the loop that holds them together."""

from jaxinf.generation.speculative.accept import Accepted, Judge, by_equality, by_rejection, by_threshold, residual
from jaxinf.generation.speculative.ahead import PaSS
from jaxinf.generation.speculative.big_little import BigLittle
from jaxinf.generation.speculative.datastore import Datastore, tokenizer_hash
from jaxinf.generation.speculative.draft_model import DraftModel
from jaxinf.generation.speculative.draft_tree import DraftTree
from jaxinf.generation.speculative.drafter import MOST_NODES, Draft, Drafter, Verified, View, ancestors
from jaxinf.generation.speculative.eagle import Eagle
from jaxinf.generation.speculative.eagle_tree import EagleTree
from jaxinf.generation.speculative.lookahead import Lookahead
from jaxinf.generation.speculative.loop import decode, read_piece
from jaxinf.generation.speculative.medusa import Medusa, best_paths, chain_paths, expected_tokens
from jaxinf.generation.speculative.ngram import PromptLookup
from jaxinf.generation.speculative.policy import Costs, Policy
from jaxinf.generation.speculative.retrieval import Retrieval
from jaxinf.generation.speculative.self_speculative import SelfSpeculative, Skips, find_skips
from jaxinf.generation.speculative.speculation import Speculation, Tally, begin
from jaxinf.generation.speculative.speculator import SpeculativeBatch, Speculator

__all__ = [
    "MOST_NODES",
    "Accepted",
    "BigLittle",
    "Costs",
    "Datastore",
    "Draft",
    "DraftModel",
    "DraftTree",
    "Drafter",
    "Eagle",
    "EagleTree",
    "Judge",
    "Lookahead",
    "Medusa",
    "PaSS",
    "Policy",
    "PromptLookup",
    "Retrieval",
    "SelfSpeculative",
    "Skips",
    "Speculation",
    "SpeculativeBatch",
    "Speculator",
    "Tally",
    "Verified",
    "View",
    "ancestors",
    "begin",
    "best_paths",
    "by_equality",
    "by_rejection",
    "by_threshold",
    "chain_paths",
    "decode",
    "expected_tokens",
    "find_skips",
    "read_piece",
    "residual",
    "tokenizer_hash",
]
