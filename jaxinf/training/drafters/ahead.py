"""What look-ahead tokens learn: only their embeddings; the target stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinf.models import CausalLM
from jaxinf.models.drafting import AheadSpec, AheadTokens
from jaxinf.training.drafters.tasks import Report, Task
from pallas_kernels.errors import InputError


@dataclass(frozen=True)
class PassTask(Task):
    """Cross entropy at look-ahead token i with the target's own distribution i places on, weighed by `decay ** i`.

    The paper (section 3.2) has the text's own next tokens in place of that distribution.

    A draft's step 0 is what the target says after the latest token, and true; step i comes of look-ahead token i.
    What a report calls tokens a pass are tokens a verification; the passes that draft are as many again.
    """

    spec: AheadSpec
    decay: float = 0.8

    def build(self, seed):
        return AheadTokens(self.spec, rngs=nnx.Rngs(seed))

    @property
    def depth(self):
        return self.spec.tokens + 1

    def drafts(self, head: AheadTokens, target: CausalLM, rows, steps):
        batch, total = rows.shape
        columns, ahead = self.depth, head.embed[...]
        # Windows must forget nothing, since drafts begin at every place of what was read.
        cache = target.init_cache(batch, total + columns, max_append=total + columns)
        _, cache, _ = target.hidden(rows, cache, fresh=True)
        assert cache is not None

        def draft(cache, place):
            given = jnp.pad(jax.lax.dynamic_slice_in_dim(rows, place, 1, axis=1), ((0, 0), (0, columns - 1)))
            hidden, after, _ = target.hidden(given, cache.roll_back(jnp.full((batch,), place)), ahead=ahead)
            assert after is not None
            return after, hidden

        # In order: the next draft's own tokens are written over this one's look-ahead.
        _, found = jax.lax.scan(draft, cache, jnp.arange(total))
        # The draft that began at c - s had its latest token at c - s + 1.
        return [jnp.roll(found[:, :, s].swapaxes(0, 1), s - 1, axis=1)[:, :-1] for s in range(steps)]

    def loss(self, head: AheadTokens, target: CausalLM, rows, steps):
        count, total = self.spec.tokens, rows.shape[1] - 1
        if total <= count:
            raise InputError(f"rows of {total} tokens are too short for {count} look-ahead tokens")
        text = jnp.pad(rows[:, : total - count], ((0, 0), (0, count)))
        hidden, _, _ = target.hidden(text, ahead=head.embed[...])
        true, _, _ = target.hidden(rows[:, :-1])
        wanted = jax.lax.stop_gradient(target.logits(true[:, -count:]))
        logits, scores = target.logits(hidden[:, -count:]), jax.nn.log_softmax(wanted)
        apart = jnp.exp(scores) * (scores - jax.nn.log_softmax(logits))
        apart = jnp.sum(jnp.where(jnp.isfinite(scores), apart, 0.0), -1)
        same = jnp.argmax(logits, -1) == jnp.argmax(wanted, -1)
        loss = jnp.float32(0)
        report: Report = {}
        for i in range(count):
            report[f"kl_{i + 1}"], report[f"top1_{i + 1}"] = jnp.mean(apart[:, i]), jnp.mean(same[:, i])
            loss += self.decay**i * report[f"kl_{i + 1}"]
        return loss, report
