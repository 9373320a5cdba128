"""Loading takes as much memory of its own as the model, not more: files are mapped, not read in."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinf.checkpoint import convert, load, streaming

D, WIDTH, VOCAB, DEPTH = 512, 2048, 1024, 4
PARAMETERS = VOCAB * D + DEPTH * (4 * D * D + 3 * D * WIDTH + 2 * D) + D

# Prints by how much the anonymous memory of the process grew at most, sampled while it loads.
WATCH = """
import gc, json, sys, threading, time
from jaxinf.checkpoint import load

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

load(sys.argv[1])  # imports, first allocations, and what tracing keeps
grown = []
for folder, options in json.loads(sys.argv[2]):
    gc.collect()
    before, most, done = anonymous(), 0, threading.Event()
    def watch():
        global most
        while not done.is_set():
            most = max(most, anonymous())
            time.sleep(0.0005)
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load(folder, **options)
    done.set()
    watcher.join()
    grown.append(max(most, anonymous()) - before)
    del model
print(json.dumps(grown))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random float16 weights in two shards."""
    folder = tmp_path_factory.mktemp("llama")
    random = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32).astype(np.float16)

    shards: list[dict[str, np.ndarray]] = [{"model.embed_tokens.weight": weights(VOCAB, D)}, {}]
    shards[1]["model.norm.weight"] = weights(D)
    for i in range(DEPTH):
        at, shard = f"model.layers.{i}.", shards[i % 2]
        shard.update({f"{at}self_attn.{n}_proj.weight": weights(D, D) for n in "qkvo"})
        shard.update({f"{at}mlp.{n}_proj.weight": weights(WIDTH, D) for n in ("gate", "up")})
        shard[f"{at}mlp.down_proj.weight"] = weights(D, WIDTH)
        shard[f"{at}input_layernorm.weight"] = weights(D)
        shard[f"{at}post_attention_layernorm.weight"] = weights(D)
    places = {}
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"part{i}.safetensors")
        places.update(dict.fromkeys(shard, f"part{i}.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": D,
        "intermediate_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 8,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_stays_near_the_models_size(published: Path, tmp_path: Path) -> None:
    ours = convert(published, tmp_path / "ours", dtype="float32")
    small = Path(__file__).parents[1] / "goldens" / "llama"
    loads = [
        (str(published), {"dtype": "float32"}),
        (str(published), {"dtype": "float32", "layout": "stacked"}),
        (str(published), {}),
        (str(ours), {}),
        (str(published), {"dtype": "float32", "mesh": "tensor=8"}),
        (str(published), {"dtype": "float32", "mesh": "data=2,tensor=4", "layout": "stacked"}),
    ]
    command = [sys.executable, "-c", WATCH, str(small), json.dumps(loads)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    converted, stacked, transposed, mapped, split, twice = json.loads(done.stdout)
    size = PARAMETERS * jnp.dtype("float32").itemsize
    slack = 6e6
    # The lower bounds only prove that the watch saw the load: what an earlier one gave back may be taken again.
    assert 0.5 * size < converted < 1.1 * size + slack
    assert 0.5 * size < stacked < 1.1 * size + slack
    assert 0.1 * size < transposed < 0.55 * size + slack
    # Our own files lie as the arrays do, so a CPU's arrays are the file's pages.
    assert mapped < 0.05 * size + slack
    # A CPU's devices share the host's memory, and what several of them hold is there once: beside the model there
    # is about the largest tensor, of [vocabulary or width, d].
    largest = WIDTH * D * jnp.dtype("float32").itemsize
    for grown in (split, twice):
        assert 0.5 * size < grown < size + largest + slack


def test_of_a_stack_the_host_has_a_layer_at_a_time(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on accelerators, whose memory is not the host's."""
    options: Any = {"dtype": "float32", "layout": "stacked", "mesh": "tensor=8"}
    peaks = []
    for by_layer in (True, False):
        monkeypatch.setattr(streaming, "_by_layer", lambda nbytes, mesh, by_layer=by_layer: by_layer)
        load(published, **options)  # compiles
        tracemalloc.start()
        load(published, **options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    largest = WIDTH * D * jnp.dtype("float32").itemsize
    assert peaks[0] < 2 * largest + 2e6
    assert peaks[1] > DEPTH * largest, "whole stacks are seen where the host has them"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_rounded_while_read_the_original_is_never_there(published: Path) -> None:
    options = {"dtype": "float32", "quantize": "int8", "layout": "list"}
    small = Path(__file__).parents[1] / "goldens" / "llama"
    command = [sys.executable, "-c", WATCH, str(small), json.dumps([(str(published), options)])]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    (grown,) = json.loads(done.stdout)
    original = PARAMETERS * jnp.dtype("float32").itemsize
    narrow = original // 4 + VOCAB * D * 3
    assert narrow < grown < 0.8 * original, "with the programs that round, whose compilation takes most"
