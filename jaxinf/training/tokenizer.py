"""The byte-level BPE of the embedded models (Sennrich et al. 2016; bytes as in GPT-2).

Two ways of cutting the text before merging were compared at 4096 tokens, in bytes per token on the held-out
text: words, numbers and runs of signs apart, 3.33; pieces without inner blanks ("self.assertEqual(" is one
piece), 3.82. The second stands. Line breaks with the indentation that follows are one piece in both.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from pallas_kernels.errors import CheckpointError

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"

# Line breaks and indentation; a piece without blanks and the blank before it; other blanks.
PIECES = r"(?:\r?\n)+[ \t]*|[ ]?[^\s]+|\s+"


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of `<|endoftext|>`."""
    token = tokenizer.token_to_id(END_OF_TEXT)
    if token is None:
        raise CheckpointError(f"the tokenizer has no {END_OF_TEXT}: use the one that was trained with the model")
    return token


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A tokenizer of exactly `vocabulary` tokens where the texts are rich enough; `<|endoftext|>` is token 0.

    There is no normaliser, and every byte is a token, so that any text survives a round trip.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
