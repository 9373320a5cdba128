"""The user's object, `LM`: a model with its tokenizer, and what it returns."""

from jaxinf.lm.completion import Completion, Score, Stats
from jaxinf.lm.job import Stream
from jaxinf.lm.lm import LM
from jaxinf.lm.locate import embedded, locate
from jaxinf.lm.tokenizer import Tokenizer

__all__ = ["LM", "Completion", "Score", "Stats", "Stream", "Tokenizer", "embedded", "locate"]
