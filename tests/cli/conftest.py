"""A tiny random checkpoint with a tokenizer, and the command run in this process."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from cli.tiny import TOKENIZER, tiny_spec
from flax import nnx

from jaxinf.checkpoint import save
from jaxinf.cli import main
from jaxinf.models import CausalLM


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    graph, state = nnx.split(CausalLM(tiny_spec(), rngs=nnx.Rngs(0)))
    # Drawn wide enough that greedy tokens are not all one.
    model = nnx.merge(graph, jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, state))
    return save(folder, model, tokenizer_files=TOKENIZER.glob("tokenizer*.json"), generation={"eos_token_id": 383})


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`run("info", folder)` -> exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def run_json(run) -> Callable[..., dict]:
    def call(*arguments: object) -> dict:
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture
def refused(run) -> Callable[..., str]:
    """The one sentence on stderr of a command that must fail with `code`."""

    def call(*arguments: object, code: int = 2) -> str:
        got, out, err = run(*arguments)
        assert got == code, err
        assert out == ""
        assert err.startswith("jaxinf: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return call
