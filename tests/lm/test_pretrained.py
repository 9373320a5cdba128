"""From names to models, and the cache of compiled programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import TOKENIZERS, model, spec

import jaxinf
from jaxinf import checkpoint
from jaxinf.lm import compilation_cache, locate
from pallas_kernels.errors import CheckpointError, InputError

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a tokenizer and several eos ids."""
    files = [TOKENIZERS / "byte_level" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    where = tmp_path_factory.mktemp("models") / "tiny"
    generation = {"eos_token_id": [1, 5], "do_sample": True, "temperature": 0.5}
    return checkpoint.save(where, model(spec(vocab=384)), tokenizer_files=files, generation=generation)


def test_a_folder_comes_with_tokenizer_and_defaults(folder: Path) -> None:
    lm = jaxinf.LM.from_pretrained(folder, context=100)
    assert (lm.spec, lm.context, lm.eos) == (spec(vocab=384), 100, (1, 5))
    assert lm.model.dtype == np.float32
    assert "2 layers of 32" in repr(lm)
    by_default = lm.generate("def f", 6, seed=3)
    assert by_default.tokens == lm.generate("def f", 6, seed=3, temperature=0.5).tokens
    assert by_default.tokens != lm.generate("def f", 6, temperature=0.0).tokens
    assert by_default.text
    assert jaxinf.LM.from_pretrained(str(folder), dtype="bfloat16", layout="stacked").model.dtype == "bfloat16"


def test_settings_that_are_not_done_are_named_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    asks = tmp_path / "asks"
    checkpoint.convert(folder, asks)
    (asks / "generation_config.json").write_text('{"num_beams": 4, "max_new_tokens": 3}')
    command = [sys.executable, "-m", "jaxinf", "generate", "def f", "--model", str(asks)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    warned, counts = done.stderr.splitlines()
    assert warned.startswith(
        "jaxinf: the checkpoint asks for num_beams=4 when it generates, which is not done here"
    )
    assert counts.startswith("3 tokens")


def test_a_published_checkpoint_gives_its_greedy_tokens() -> None:
    from safetensors.numpy import load_file

    golden = load_file(GOLDENS / "llama" / "golden.safetensors")
    lm = jaxinf.LM.from_pretrained(GOLDENS / "llama")
    config = json.loads((GOLDENS / "llama" / "config.json").read_text())
    assert lm.eos == (config["eos_token_id"],)
    tokens, lengths = golden["tokens"], golden["prompt_lengths"]
    np.testing.assert_allclose(lm.logits(tokens), golden["logits"], atol=1e-4)
    prompts = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
    assert [c.tokens for c in lm.generate(prompts, 24, eos=())] == golden["greedy"].tolist()


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "./missing", "", Path("owner/name")])
def test_unknown_names_say_which_exist(name) -> None:
    with pytest.raises(InputError, match="embedded models are") as caught:
        locate(name)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(InputError, match="is a file"):
        locate(folder / "config.json")


def test_without_a_network_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot be reached"):
        locate("jaxinf-tests/no-such-model")


def test_embedded_models_are_found_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxinf.lm import locate as module_function
    from jaxinf.lm.base import locate as used

    assert module_function is used
    monkeypatch.setattr(sys.modules["jaxinf.lm.locate"], "EMBEDDED", folder.parent)
    assert locate("tiny") == folder
    with pytest.raises(InputError, match="embedded models are tiny;"):
        locate("other")


class TestCompilationCache:
    def test_where_it_lies(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        for value, where in {
            "": tmp_path / "jaxinf" / "compiled",
            "1": tmp_path / "jaxinf" / "compiled",
            "0": None,
            "off": None,
            str(tmp_path / "mine"): tmp_path / "mine",
        }.items():
            monkeypatch.setenv(compilation_cache.SWITCH, value)
            assert compilation_cache.folder() == where
        monkeypatch.delenv(compilation_cache.SWITCH)
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert compilation_cache.folder() == Path.home() / ".cache" / "jaxinf" / "compiled"

    @pytest.mark.parametrize("switch", ["on", "off", "own"])
    def test_it_is_on_once_a_model_is_built(self, switch: str, tmp_path: Path) -> None:
        code = """
import sys, jax, jax.numpy as jnp
own, kept = sys.argv[1] == "own", sys.argv[2]
if own:
    jax.config.update("jax_compilation_cache_dir", kept)
jax.jit(lambda x: x + 1)(1)  # JAX has looked for its cache before
from jaxinf.lm import compilation_cache
assert own or jax.config.jax_compilation_cache_dir is None
compilation_cache.enable()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4))).block_until_ready()
"""
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        unset = ("JAX_ENABLE_COMPILATION_CACHE", "XLA_FLAGS")
        env = {k: v for k, v in os.environ.items() if k not in unset}
        env[compilation_cache.SWITCH] = "0" if switch == "off" else str(ours)
        subprocess.run(
            [sys.executable, "-c", code, switch, str(theirs)], env=env, check=True, cwd=Path(__file__).parents[2]
        )
        filled = {path.name for path in (ours, theirs) if path.is_dir() and list(path.iterdir())}
        assert filled == {"on": {"ours"}, "off": set(), "own": {"theirs"}}[switch]

    def test_a_folder_that_cannot_be_made_is_no_error(self, monkeypatch, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv(compilation_cache.SWITCH, str(tmp_path / "file" / "below"))
        before = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_enable_compilation_cache", True)
        try:
            compilation_cache.enable()
        finally:
            jax.config.update("jax_enable_compilation_cache", False)
        assert jax.config.jax_compilation_cache_dir == before
