"""`jaxinf generate`."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinf.lm import LM

PROMPT = "def f(x):"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lm(checkpoint: Path) -> LM:
    return LM.from_pretrained(checkpoint)


@pytest.fixture(autouse=True)
def loaded_once(lm: LM, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model is loaded, and its programs compiled, once a module; other names load as they do."""
    real = LM.from_pretrained

    def load(name, *, dtype=None, **options):
        return lm if str(name) == str(checkpoint) and dtype is None else real(name, dtype=dtype, **options)

    monkeypatch.setattr(LM, "from_pretrained", load)


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_text_on_stdout_counts_on_stderr(run, checkpoint: Path, lm: LM) -> None:
    code, out, err = run("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", 12)
    want = lm.generate(PROMPT, 12)
    assert code == 0
    assert out.rstrip("\n") == want.text.rstrip("\n")
    assert re.fullmatch(r"12 tokens, first after [\d.]+ m?s, [\d.]+ tokens/s \(length\)\n", err)


def test_json_is_the_completion(run_json, checkpoint: Path, lm: LM) -> None:
    got = run_json("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", 5)
    want = lm.generate(PROMPT, 5)
    assert got["prompt"] == PROMPT
    (answer,) = got["completions"]
    assert (answer["text"], answer["tokens"], answer["finish_reason"]) == (want.text, want.tokens, "length")
    assert answer["new_tokens"] == 5
    assert answer["prompt_tokens"] == want.stats.prompt_tokens
    assert 0 < answer["first_token_seconds"] <= answer["seconds"]


def test_a_dash_reads_stdin_as_it_is(run_json, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, "né\n".encode())
    got = run_json("generate", "-", "--model", checkpoint, "--max-new-tokens", 1)
    assert got["prompt"] == "né\n"


def test_sampling_options_reach_the_model(run_json, checkpoint: Path, lm: LM) -> None:
    sampling = dict(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=3)
    flags = [str(x) for name, value in sampling.items() for x in (f"--{name.replace('_', '-')}", value)]
    got = run_json("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", 8, *flags, "--n", 2)
    want = lm.generate(PROMPT, 8, n=2, **sampling)
    assert [answer["tokens"] for answer in got["completions"]] == [answer.tokens for answer in want]
    assert want[0].tokens != want[1].tokens != lm.generate(PROMPT, 8).tokens


def test_several_answers_are_numbered(run, checkpoint: Path, lm: LM) -> None:
    code, out, err = run(
        "generate", PROMPT, "--model", checkpoint, "--max-new-tokens", 3, "--n", 2, "--seed", 1, "--temperature", 1
    )
    texts = [answer.text for answer in lm.generate(PROMPT, 3, n=2, seed=1, temperature=1.0)]
    assert code == 0
    first, second = (text if text.endswith("\n") else f"{text}\n" for text in texts)
    assert out == f"--- 1 of 2\n{first}--- 2 of 2\n{second}"
    assert err.startswith("6 tokens")


def test_stop_strings_and_echo(run, checkpoint: Path, lm: LM) -> None:
    whole = lm.generate(PROMPT, 12).text
    stop = whole[3:5]
    code, out, err = run(
        "generate",
        PROMPT,
        "--model",
        checkpoint,
        "--max-new-tokens",
        12,
        "--stop",
        "never",
        "--stop",
        stop,
        "--echo",
    )
    assert code == 0
    assert out.rstrip("\n") == (PROMPT + whole[: whole.index(stop)]).rstrip("\n")
    assert err.endswith("(stop)\n")


def test_a_window_goes_past_the_context(run_json, refused, checkpoint: Path) -> None:
    sizes = ("--model", checkpoint, "--max-new-tokens", 70)
    got = run_json("generate", PROMPT, *sizes, "--window", 16, "--sinks", 2)
    assert got["completions"][0]["new_tokens"] == 70
    assert "window" in refused("generate", PROMPT, *sizes, "--sinks", 2)


def test_a_narrow_cache(run_json, checkpoint: Path, lm: LM) -> None:
    sizes = ("--model", checkpoint, "--max-new-tokens", 8)
    got = run_json("generate", PROMPT, *sizes, "--cache", "int8")
    assert got["completions"][0]["tokens"] == lm.generate(PROMPT, 8, cache="int8").tokens


def test_chat_uses_the_template(run_json, checkpoint: Path, lm: LM) -> None:
    got = run_json("generate", "hello", "--chat", "--model", checkpoint, "--max-new-tokens", 4)
    want = lm.chat([{"role": "user", "content": "hello"}], 4)
    (answer,) = got["completions"]
    assert (answer["tokens"], answer["prompt_tokens"]) == (want.tokens, want.stats.prompt_tokens)


def test_dtype(run_json, checkpoint: Path) -> None:
    got = run_json("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", 1, "--dtype", "bfloat16")
    want = LM.from_pretrained(checkpoint, dtype="bfloat16").generate(PROMPT, 1)
    assert got["completions"][0]["tokens"] == want.tokens


def test_ctrl_c_keeps_what_was_written(run, checkpoint: Path, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxinf.generation import Batch

    real, calls = Batch.advance, []

    def advance(self, *arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments)
        return real(self, *arguments)

    monkeypatch.setattr(Batch, "advance", advance)
    code, out, err = run("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", 50)
    monkeypatch.undo()
    assert code == 130
    assert out.strip()
    assert lm.generate(PROMPT, 50).text.startswith(out.rstrip("\n").rstrip("\ufffd"))
    assert err.endswith("(interrupted)\n")


def test_ctrl_c_in_a_process_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    endless = shutil.copytree(checkpoint, tmp_path / "endless")
    (endless / "generation_config.json").write_text('{"eos_token_id": 383, "suppress_tokens": [383]}')
    command = [sys.executable, "-m", "jaxinf", "generate", PROMPT, "--model", str(endless)]
    command += ["--window", "16", "--max-new-tokens", "1000000000"]
    # Tests that were started in the background ignore Ctrl-C, and what they start would inherit that.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, ours)
    with process:
        assert process.stdout is not None
        seen = b""
        while len(seen) < 40:  # it writes
            seen += process.stdout.read1(64)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert (seen + out).endswith(b"\n")
    assert re.fullmatch(rb"\d+ tokens, first after .* \(interrupted\)\n", err)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--temperature", "nan"], "temperature=nan must be"),
        (["--temperature", "-1"], "temperature=-1.0 must be"),
        (["--top-p", "2"], "top_p=2.0 must be above 0 and at most 1"),
        (["--top-p", "0"], "top_p=0.0 must be above 0 and at most 1"),
        (["--top-k", "0"], "top_k=0 must be"),
        (["--max-new-tokens", "0"], "max_new_tokens=0 must be"),
        (["--n", "0"], "n=0 must be"),
        (["--seed", "-1"], "seed=-1 must be"),
        (["--stop", ""], "stop="),
        (["--window", "0"], "window=0 must be"),
    ],
)
def test_numbers_out_of_range(refused, checkpoint: Path, flags: list[str], complaint: str) -> None:
    assert complaint in refused("generate", PROMPT, "--model", checkpoint, *flags)


def test_empty_prompt(refused, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the prompt is empty" in refused("generate", "", "--model", checkpoint)
    stdin(monkeypatch, b"")
    assert "the prompt is empty" in refused("generate", "-", "--model", checkpoint)


def test_stdin_that_is_no_text(refused, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"def \xff")
    assert "stdin is not UTF-8 text" in refused("generate", "-", "--model", checkpoint)


def test_a_prompt_longer_than_the_context(refused, checkpoint: Path) -> None:
    assert "the context is 64" in refused("generate", "return " * 64, "--model", checkpoint)


def test_an_unknown_model_says_which_exist(refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxinf.lm import locate

    for name in ("stdlib", "stdlib-draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.setattr(sys.modules[locate.__module__], "EMBEDDED", tmp_path)
    said = refused("generate", PROMPT, "--model", "stdlob")
    assert "'stdlob'" in said
    assert "stdlib, stdlib-draft" in said


def test_folders_that_are_no_checkpoint(refused, checkpoint: Path, tmp_path: Path) -> None:
    def check(folder: Path, complaint: str) -> None:
        assert complaint in refused("generate", PROMPT, "--model", folder)

    empty = tmp_path / "empty"
    empty.mkdir()
    check(empty, "has no config.json")

    config = (checkpoint / "config.json").read_text()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(config)
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    check(pickled, "pickle")

    corrupt = tmp_path / "corrupt"
    corrupt.mkdir()
    (corrupt / "config.json").write_text(config)
    weights = (checkpoint / "model.safetensors").read_bytes()
    (corrupt / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    check(corrupt, "truncated")
    (corrupt / "model.safetensors").write_bytes(b"not a checkpoint at all")
    check(corrupt, "model.safetensors")
    (corrupt / "config.json").write_text("{")
    check(corrupt, "cannot be read as JSON")


def test_a_model_without_a_tokenizer(refused, checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    assert "tokenizer" in refused("generate", PROMPT, "--model", bare)


def test_json_keeps_letters(run, checkpoint: Path) -> None:
    _, out, _ = run("generate", "naïve", "--model", checkpoint, "--max-new-tokens", 1, "--json")
    assert "naïve" in out
    assert json.loads(out)["prompt"] == "naïve"


def test_a_drafter_writes_the_same_in_fewer_passes(run, run_json, checkpoint: Path, lm: LM) -> None:
    want = lm.generate(PROMPT, 30)
    got = run_json("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", 30, "--draft", "ngram")
    (answer,) = got["completions"]
    assert answer["tokens"] == want.tokens
    assert answer["tokens_per_pass"] >= 1
    assert answer["passes"] <= 30
    code, _, err = run("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", 30, "--draft", "ngram")
    assert code == 0
    assert re.search(r"[\d.]+ tokens a pass", err)


def test_a_draft_length_needs_a_drafter(run, checkpoint: Path) -> None:
    code, _, err = run("generate", PROMPT, "--model", checkpoint, "--draft-tokens", 3)
    assert code != 0
    assert "--draft-tokens 3 is for a drafter: name one with --draft" in err
    code, _, err = run("generate", PROMPT, "--model", checkpoint, "--draft", "nosuch")
    assert code != 0
    assert "there is no model 'nosuch'" in err
