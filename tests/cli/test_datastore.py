"""`jaxinf datastore`: from files to a store that a drafter takes."""

from pathlib import Path

import numpy as np
import pytest

from jaxinf.checkpoint import read_spec
from jaxinf.generation.speculative import Datastore, Retrieval
from jaxinf.lm.tokenizer import Tokenizer
from pallas_kernels.errors import InputError


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    (tmp_path / "src" / "deep").mkdir(parents=True)
    (tmp_path / "src" / "a.py").write_text("def a(): return 1\n")
    (tmp_path / "src" / "deep" / "b.py").write_text("def b(): return 2\n")
    (tmp_path / "src" / "c.bin").write_bytes(b"\xff\xfe\xff")
    np.save(tmp_path / "ids.npy", np.asarray([5, 6, 7]))
    return [tmp_path / "src", tmp_path / "ids.npy"]


def test_files_become_a_store(run, run_json, checkpoint: Path, sources: list[Path], tmp_path: Path) -> None:
    out, tokenizer = tmp_path / "store.npz", Tokenizer.from_folder(checkpoint)
    assert tokenizer is not None
    code, said, err = run("datastore", *sources, "--glob", "*.py", "--model", checkpoint, "--out", out)
    assert code == 0, err
    assert "reading: 100 % of " in err
    assert "sorting: " in err
    texts = ["def a(): return 1\n", "def b(): return 2\n"]
    ids = [*(tokenizer.encode(text, add_special_tokens=False) for text in texts), [5, 6, 7]]
    assert said.startswith(f"{out}: {sum(map(len, ids))} tokens of 3 files, ")
    store = Datastore.load(out)
    assert store.tokens.tolist() == [token for text in ids for token in (*text, -1)]
    assert (store.vocab, store.order) == (read_spec(checkpoint).vocab, 32)
    assert Retrieval.load(out, tokenizer, tokens=3).vocab == store.vocab

    given = ("datastore", sources[1], "--model", checkpoint, "--out", out, "--order", 4)
    assert run_json(*given, "--overwrite")["tokens"] == 3
    assert Datastore.load(out).order == 4


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    class Other:
        vocab_size = 4

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [1]

    path = Datastore.build([[1, 2]], 4, tokenizer="another").save(tmp_path / "store.npz")
    with pytest.raises(InputError, match="another tokenizer"):
        Retrieval.load(path, Other())


def test_bad_input(run, refused, checkpoint: Path, sources: list[Path], tmp_path: Path) -> None:
    def says(*given: object, out: object = tmp_path / "store.npz") -> str:
        return refused("datastore", *given, "--model", checkpoint, "--out", out)

    assert "must end in .npz" in says(*sources, out=tmp_path / "store")
    assert "no file or folder" in says(tmp_path / "nowhere")
    assert "give another --glob" in says(sources[0], "--glob", "*.txt")
    assert "c.bin is not UTF-8" in says(sources[0], "--glob", "*.bin")
    vocab = read_spec(checkpoint).vocab
    np.save(tmp_path / "ids.npy", np.asarray([vocab]))
    code, _, err = run("datastore", sources[1], "--model", checkpoint, "--out", tmp_path / "store.npz")
    assert (code, f"the vocabulary is 0 to {vocab - 1}" in err) == (2, True)
    (tmp_path / "ids.npy").write_bytes(b"nothing")
    assert "no array of token ids" in says(sources[1])
    (tmp_path / "store.npz").write_bytes(b"")
    assert "--overwrite" in says(*sources)
