"""`jaxinf bench`, and the measuring behind it."""

import json
from pathlib import Path

import jax
import pytest

from jaxinf.generation import Runner
from jaxinf.lm.measure import Device, measure, random_model
from pallas_kernels.errors import InputError

SIZES = ("--prompt", 5, "--new", 3, "--repeats", 1)


def test_a_table_for_people(run, checkpoint: Path) -> None:
    code, out, err = run("bench", checkpoint, "--batch", "1,2", *SIZES)
    assert code == 0, err
    assert "float32, weights the checkpoint's" in out
    assert "on cpu (" in out
    head, _, one, two = out.split("\n\n")[1].splitlines()
    assert head.split()[:2] == ["batch", "prefill"]
    assert (one.split()[0], two.split()[0]) == ("1", "2")
    assert "batch 2: 2 of 2 runs" in err


def test_random_weights_from_a_config(run_json, checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text((checkpoint / "config.json").read_text())
    got = run_json("bench", config, "--batch", "2", "--dtype", "bfloat16", *SIZES)
    assert (got["weights"], got["dtype"]) == ("random", "bfloat16")
    assert got["device"]["platform"] == "cpu"
    assert got["device"]["jax"] == jax.__version__
    (one,) = got["results"]
    assert (one["batch"], one["prompt"], one["new"], one["repeats"]) == (2, 5, 3, 1)
    assert one["prefill_tokens_per_second"] == pytest.approx(2 * 5 / one["prefill_seconds"])
    assert one["decode_tokens_per_second"] == pytest.approx(2 * 2 / one["decode_seconds"])
    assert one["peak_host_bytes"] > one["weights_bytes"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [(["--prompt", 60, "--new", 8], "the context is 64"), (["--prompt", 80, "--new", 1], "the context is 64")],
)
def test_sizes_beyond_the_context(refused, checkpoint: Path, flags: list, complaint: str) -> None:
    assert complaint in refused("bench", checkpoint, "--repeats", 1, *flags)


def test_one_new_token_has_no_decode_rate(run_json, checkpoint: Path) -> None:
    (one,) = run_json("bench", checkpoint, "--prompt", 4, "--new", 1, "--repeats", 1)["results"]
    assert one["decode_tokens_per_second"] is None
    assert one["decode_seconds"] == 0


@pytest.mark.parametrize("layout", ["list", "stacked"])
def test_a_random_model_has_the_parameters_of_a_real_one(checkpoint: Path, layout) -> None:
    from jaxinf.checkpoint import load

    real = load(checkpoint, layout=layout).model
    made = random_model(real.spec, "bfloat16", layout)
    shapes = [x.shape for x in jax.tree.leaves(real)]
    assert [x.shape for x in jax.tree.leaves(made)] == shapes
    assert {str(x.dtype) for x in jax.tree.leaves(made)} == {"bfloat16"}
    again = random_model(real.spec, "bfloat16", layout)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(again), strict=True))
    matrices = [x for x in jax.tree.leaves(made) if x.ndim > 1 + (layout == "stacked")]
    assert len({float(x.ravel()[0]) for x in matrices}) > 1


def test_bytes_are_those_of_the_arrays(checkpoint: Path) -> None:
    from jaxinf.checkpoint import load

    model = load(checkpoint).model
    runner = Runner(model)
    seen: list[tuple[int, int]] = []
    got = measure(
        runner, batch=3, prompt=4, new=2, repeats=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert got.weights_bytes == sum(x.nbytes for x in jax.tree.leaves(model))
    held = runner.new_cache(3, 5, limit=model.spec.context)
    assert got.cache_bytes == sum(x.nbytes for x in jax.tree.leaves(held))
    assert got.prefill_seconds > 0
    assert got.first_token_seconds > 0
    assert got.decode_seconds > 0


def test_measure_refuses_numbers_below_one(checkpoint: Path) -> None:
    from jaxinf.checkpoint import load

    runner = Runner(load(checkpoint).model)
    with pytest.raises(InputError, match="repeats=0 must be at least 1"):
        measure(runner, batch=1, prompt=1, new=1, repeats=0)


def test_the_device_is_jax_s_first() -> None:
    device = Device.at_hand()
    assert (device.platform, device.kind) == ("cpu", jax.devices()[0].device_kind)
    assert device.cores is not None
    assert device.cores >= 1


def test_json_is_one_document(run, checkpoint: Path) -> None:
    _, out, _ = run("bench", checkpoint, *SIZES, "--json")
    assert set(json.loads(out)) == {"model", "dtype", "weights", "device", "results"}
