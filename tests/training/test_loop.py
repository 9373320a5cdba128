"""The loop learns, stops and goes on as if it had not stopped."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, QKNormSpec, RopeSpec, TokenChoice
from jaxinf.models import ModelSpec, Segment
from jaxinf.training.data import Batches, Documents
from jaxinf.training.loop import Network, Trainer, TrainSpec, plot_loss, write_log
from jaxinf.training.optimizer import OptimizerSpec, make_optimizer, scaled_update
from pallas_kernels.errors import CheckpointError, InputError

TEXT = b"def f(x):\n    return x + 1\n\n\nclass A:\n    def g(self):\n        return self.x\n" * 12


def model_spec(width: int = 32) -> ModelSpec:
    def layer(window, ffn):
        attention = AttentionSpec(2, 1, 8, rope=RopeSpec(8), window=window, qk_norm=QKNormSpec())
        return LayerSpec(attention, ffn)

    layers = (layer(8, FFNSpec(32)), layer(None, MoESpec(2, 16, TokenChoice(top_k=1))))
    return ModelSpec(128, width, (Segment(layers),), 32, tied=True)


def batches(batch: int = 4, context: int = 32) -> Batches:
    rows = [np.frombuffer(b"\0" + TEXT[i:], np.uint8).astype(np.uint16) for i in (0, 200, 500)]
    starts = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    return Batches(Documents(np.concatenate(rows), starts, int(starts[-1])), batch=batch, context=context, seed=0)


RECIPE = TrainSpec(
    batch=4, context=32, steps=24, phases=((0.3, 16),), optimizer=OptimizerSpec(0.05, 0.02, warmup=0.1)
)


@pytest.fixture(scope="module")
def whole() -> Trainer:
    trainer = Trainer(model_spec(), RECIPE, batches())
    trainer.run()
    return trainer


def test_it_learns(whole):
    losses = [r.loss for r in whole.records]
    assert len(losses) == 24
    assert losses[0] == pytest.approx(np.log(128), rel=0.15)
    assert losses[-1] < 0.5 * losses[0]
    assert whole.progress() == 1.0
    assert all(0.9 < r.balance < 2.1 for r in whole.records)


def test_resumed_is_bitwise_the_same(whole, tmp_path):
    first = Trainer(model_spec(), RECIPE, batches(), tmp_path)
    assert not first.resume()
    first.run(until=9)
    first.close()
    second = Trainer(model_spec(), RECIPE, batches(), tmp_path)
    assert second.resume()
    assert second.step == 9
    second.run()
    second.close()
    for path, value in whole.params.items():
        np.testing.assert_array_equal(np.asarray(second.params[path]), np.asarray(value), err_msg=path)
    for a, b in zip(jax.tree.leaves(whole.opt_state), jax.tree.leaves(second.opt_state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert [r.loss for r in second.records] == [r.loss for r in whole.records]


def test_ctrl_c_saves(tmp_path):
    def stop(record):
        if record.step == 3:
            raise KeyboardInterrupt

    trainer = Trainer(model_spec(), RECIPE, batches(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(on_step=stop)
    trainer.close()
    other = Trainer(model_spec(), RECIPE, batches(), tmp_path)
    assert other.resume()
    assert other.step == 3
    other.close()
    wider = Trainer(model_spec(width=48), RECIPE, batches(), tmp_path)
    with pytest.raises(CheckpointError, match="does not fit"):
        wider.resume()
    wider.close()


def test_the_clock_can_end_a_run():
    trainer = Trainer(model_spec(), replace(RECIPE, steps=10_000), batches())
    trainer.seconds = 59.9
    trainer.run(minutes=1.0)
    assert trainer.step < 10_000
    assert trainer.progress(1.0) == 1.0


def test_a_network_is_its_module():
    network = Network(model_spec())
    params = network.init(0)
    assert sum(x.size for x in params.values()) == sum(np.prod(s) for s in network.shapes.values())
    tokens = jnp.arange(16, dtype=jnp.int32).reshape(1, 16)
    logits, _ = jax.jit(lambda p: network.model(p).train_logits(tokens))(params)
    loss, (nats, uneven) = jax.jit(lambda p: network.loss(p, tokens, 0.5))(params)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)
    # The loss reads all tokens but the last; attention is causal, so that changes nothing before.
    np.testing.assert_allclose(nats, -picked.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, nats + 0.5 * uneven, rtol=1e-6)


def test_muon_treats_each_expert_by_itself():
    key = jax.random.key(0)
    stacked = jax.random.normal(key, (3, 8, 4))
    spec = OptimizerSpec(matrix_rate=1.0, clip=1e9)

    def update(gradients):
        params = jax.tree.map(jnp.zeros_like, gradients)
        optimizer = make_optimizer(spec, {path: x.shape for path, x in params.items()})
        return scaled_update(optimizer, gradients, optimizer.init(params), params, jnp.float32(0.5))[0]

    together = update({"experts/up": stacked})["experts/up"]
    for i in range(3):
        alone = update({"query/kernel": stacked[i]})["query/kernel"]
        np.testing.assert_allclose(together[i], alone, atol=1e-5)
        spectrum = jnp.linalg.svd(alone, compute_uv=False)
        assert np.all((spectrum > 0.25) & (spectrum < 0.65))


def test_mismatched_batches_are_refused():
    with pytest.raises(InputError, match="do not match"):
        Trainer(model_spec(), RECIPE, batches(batch=2))


def test_log_and_plot(whole, tmp_path):
    write_log(whole.records, tmp_path / "log.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 25))
    pytest.importorskip("matplotlib")
    assert plot_loss(whole.records, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
