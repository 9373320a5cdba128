"""Generation with caches in fewer bits: the same words, and by how much likelihoods move."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.lm import LM
from jaxinf.training.corpus import read_held_out
from pallas_kernels.errors import InputError

PROMPT = "def quicksort(items):"
GREEDY = dict(max_new_tokens=64, temperature=0.0, eos=())
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM.from_pretrained("stdlib", dtype="float32")


@pytest.fixture(scope="module")
def floats(lm) -> list[int]:
    return lm.generate(PROMPT, **GREEDY).tokens


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=SLOW)])
def test_the_same_64_tokens(lm, floats, kind: str) -> None:
    assert lm.generate(PROMPT, **GREEDY, cache=kind).tokens == floats


def log_likelihoods(lm: LM, kind: str | None, tokens: np.ndarray) -> jax.Array:
    """Of all next tokens, read in two passes: the second finds the first's keys in the cache."""

    def read(model, tokens, cache, fresh):
        hidden, cache, _ = model.hidden(tokens, cache, fresh=fresh)
        return jax.nn.log_softmax(model.logits(hidden)), cache

    read = jax.jit(read, static_argnames="fresh", donate_argnames="cache")
    model, half = lm.model, tokens.shape[1] // 2
    cache = model.init_cache(*tokens.shape, kind=kind)
    first, cache = read(model, tokens[:, :half], cache, fresh=True)
    second, _ = read(model, tokens[:, half:], cache, fresh=False)
    return jnp.concatenate([first, second], axis=1)


# Of the largest divergence, and the least agreement, that are measured (docs/quantization.md) a margin of two.
MOST = dict(int8=3e-4, fp8=4e-3, int4=2.5e-2)
LEAST = dict(int8=0.98, fp8=0.95, int4=0.85)


@pytest.fixture(scope="module")
def held_out(lm) -> np.ndarray:
    text = b"".join(read_held_out(Path(__file__).parents[1] / "data" / "stdlib_heldout.xz").values())
    assert lm.tokenizer is not None
    ids = lm.tokenizer.encode(text[:20_000].decode(errors="replace"))
    return np.asarray(ids[: 4 * 384], np.int32).reshape(4, 384)


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=SLOW), pytest.param("int4", marks=SLOW)])
def test_divergence_on_held_out_text(lm, held_out, kind: str) -> None:
    want, got = (log_likelihoods(lm, name, held_out) for name in (None, kind))
    divergence = float(jnp.sum(jnp.exp(want) * (want - got), -1).mean())
    same = float((want.argmax(-1) == got.argmax(-1)).mean())
    print(f"{kind}: {divergence:.2e} nats a token, the same likeliest token at {same:.2%}")
    assert 0 < divergence < MOST[kind]
    assert same > LEAST[kind]


@pytest.mark.slow
def test_samples_and_windows(lm) -> None:
    options = dict(max_new_tokens=8, temperature=0.9, cache="int8")
    two = lm.generate(PROMPT, n=2, **options)
    assert [x.tokens for x in two] == [lm.generate(PROMPT, seed=seed, **options).tokens for seed in (0, 1)]
    assert len(lm.generate(PROMPT, 40, temperature=0.0, eos=(), window=16, cache="int8").tokens) == 40


def test_a_kind_for_every_generation(lm, monkeypatch) -> None:
    narrow, made = LM(lm.model, lm.tokenizer, cache="int8"), []

    def spy(*args, kind, **options):
        made.append(kind)
        raise KeyError

    monkeypatch.setattr(narrow._runner, "new_cache", spy)
    for options in ({}, {"cache": "fp8"}):
        with pytest.raises(KeyError):
            narrow.generate(PROMPT, 8, **options)
    with pytest.raises(KeyError):
        narrow.score(PROMPT, window=8)
    assert made == ["int8", "fp8", "int8"]


def test_kinds_that_do_not_exist(lm) -> None:
    with pytest.raises(InputError, match="cache='int7' must be 'int8', 'fp8', 'int4', or None"):
        lm.generate(PROMPT, cache="int7")
    with pytest.raises(InputError, match="cache='q4'"):
        LM.from_pretrained("stdlib", cache="q4")
