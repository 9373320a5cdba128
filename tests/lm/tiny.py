"""Tiny random models and tokenizers for the tests of generation and LM."""

from __future__ import annotations

import json
from pathlib import Path

import jax
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, RopeSpec
from jaxinf.models import CausalLM, ModelSpec, Segment

TEXT = [
    "def f(x):\n    return x + 1\n",
    "class A:\n    def g(self, y):\n        return y * 2\n",
    "naïve café — 北京 🙂 straße",
    "for i in range(10):\n    print(i)\n",
]


def spec(*, vocab: int = 64, window: int | None = None, repeats: int = 1, context: int = 512, **attention) -> ModelSpec:
    """Two layers a repeat; with a window, the first of them slides."""

    def layer(window):
        rope = attention.get("rope", RopeSpec(8))
        rest = {k: v for k, v in attention.items() if k != "rope"}
        return LayerSpec(AttentionSpec(4, 2, 8, rope=rope, window=window, **rest), FFNSpec(32))

    return ModelSpec(vocab, 32, (Segment((layer(window), layer(None)), repeats),), context)


def model(spec: ModelSpec, *, layout="list", seed: int = 0, gain: float = 4.0) -> CausalLM:
    """Random weights, drawn wide enough that greedy tokens depend on the whole prompt."""
    made = CausalLM(spec, rngs=nnx.Rngs(seed), layout=layout)
    graph, state = nnx.split(made)
    return nnx.merge(graph, jax.tree.map(lambda x: x * gain if x.ndim > 1 else x, state))


def write_tokenizer(folder: Path, *, vocab: int = 300, bos: bool = False, template: str | None = None) -> Path:
    """A byte-level BPE with the special tokens <s>, </s>, <|user|> and <|assistant|>."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(TEXT, trainer)
    if bos:
        fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
