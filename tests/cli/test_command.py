"""The command as a whole: help, usage errors, what errors and signals become, and what is not imported."""

import argparse
import errno
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from jaxinf.cli import command, main
from jaxinf.cli.device import DeviceError, open_device, silenced_stderr
from pallas_kernels.errors import CheckpointError, InputError, UnsupportedError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("verb", command.VERBS)
def test_every_verb_has_help_with_an_example(run, verb: str) -> None:
    code, out, err = run(verb, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: jaxinf {verb}")
    assert f"examples:\n  jaxinf {verb} " in out
    assert "--json" in out


def test_help_names_the_verbs_and_the_exit_codes(run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    words = " ".join(out.split())
    assert all(f" {verb} {summary} " in words for verb, summary in command.VERBS.items())
    assert "exit codes: 0 done, 1" in out


def test_version(run) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("jaxinf ")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "VERB"),
        (["compose"], "'compose'"),
        (["generate"], "PROMPT"),
        (["generate", "x", "--temperature", "warm"], "--temperature: invalid float value: 'warm'"),
        (["generate", "x", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["generate", "x", "--temp", "1"], "--temp"),
        (["bench", "x", "--batch", "1,zwei"], "'1,zwei' must be whole numbers of at least 1"),
        (["bench", "x", "--batch", "0"], "'0' must be whole numbers"),
        (["bench", "x", "--new", "0"], "'0' must be a whole number of at least 1"),
        (["convert", "a", "b", "--to", "gguf"], "'gguf'"),
    ],
)
def test_wrong_usage_is_one_sentence(refused, arguments: list[str], complaint: str) -> None:
    said = refused(*arguments)
    assert complaint in said
    assert "--help`" in said


def refusal(number: int) -> CheckpointError:
    error = CheckpointError("cannot write x")
    error.__cause__ = OSError(number, "text")
    return error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("top_k=0 must be\nat least 1"), 2, "jaxinf: top_k=0 must be at least 1\n"),
        (UnsupportedError("no such maths"), 2, "jaxinf: no such maths\n"),
        (CheckpointError("x has no config.json"), 2, "jaxinf: x has no config.json\n"),
        (refusal(errno.ENOSPC), 1, "jaxinf: cannot write x\n"),
        (refusal(errno.ENOENT), 2, "jaxinf: cannot write x\n"),
        (DeviceError("JAX cannot start"), 1, "jaxinf: JAX cannot start\n"),
        (MemoryError(), 1, "jaxinf: out of memory; take a smaller model, batch or dtype\n"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), 1, "jaxinf: the device is out of memory; take a smaller"),
        (RuntimeError("INTERNAL: Out of memory allocating 9 bytes."), 1, "jaxinf: the device is out of memory;"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 1, "jaxinf: a/b: Permission denied\n"),
        (KeyboardInterrupt(), 130, "jaxinf: interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_what_errors_become(run, monkeypatch: pytest.MonkeyPatch, error, code: int, said: str) -> None:
    _verb_that(monkeypatch, error)
    got, out, err = run("info")
    assert (got, out) == (code, "")
    assert err.startswith(said) if said else err == ""


def test_a_defect_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    _verb_that(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def _verb_that(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    module = types.SimpleNamespace(configure=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "jaxinf.cli.info", module)


def test_platforms_are_silent_while_a_device_opens(capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    import jax

    def devices() -> None:
        os.write(2, b"WARNING: could not determine the accelerator\n")

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.delenv("JAX_LOGGING_LEVEL", raising=False)
    open_device()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"
    monkeypatch.setenv("JAX_LOGGING_LEVEL", "DEBUG")
    open_device()
    assert "accelerator" in capfd.readouterr().err


def test_stderr_is_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="inside"), silenced_stderr():
        raise ValueError("inside")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_a_device_that_cannot_be_used_is_one_sentence(refused, checkpoint: Path, monkeypatch) -> None:
    import jax

    def devices() -> None:
        raise RuntimeError("Unable to initialize backend 'tpu':\nin use by process 7")

    monkeypatch.setattr(jax, "devices", devices)
    said = refused("generate", "x", "--model", checkpoint, code=1)
    assert "cannot start on this machine: Unable to initialize backend 'tpu': in use by process 7" in said


def test_help_loads_no_library() -> None:
    code = (
        "import sys\n"
        "from jaxinf.cli import main\n"
        "from jaxinf.cli.command import VERBS\n"
        "assert all(main([*verb, '--help']) == 0 for verb in [[], *([v] for v in VERBS)])\n"
        "heavy = {'jax', 'flax', 'numpy', 'orbax', 'tokenizers', 'rich', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'help imports {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jaxinf", "compose"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("jaxinf: argument VERB: invalid choice: 'compose'")
