"""Which model a head was trained for."""

from __future__ import annotations

import hashlib
import json

import jax.numpy as jnp
import numpy as np

from jaxinf.core import to_record
from jaxinf.models.causal_lm import CausalLM

ROWS = 64


def fingerprint(model: CausalLM) -> str:
    """64 hexadecimal digits of a model: sha256 over its spec and some rows of its embedding table.

    `ROWS` rows at most, evenly spaced, as bits of bfloat16: quantised forms of a model keep its table, and forms in
    wider dtypes round back to it, so that they all agree. So does a model on a mesh of one process.
    """
    spec = json.dumps(to_record(model.spec), sort_keys=True, separators=(",", ":"))
    rows = np.linspace(0, model.spec.vocab - 1, min(ROWS, model.spec.vocab)).astype(np.int32)
    table = jnp.take(model.embed.table[...], rows, axis=0).astype(jnp.bfloat16)
    return hashlib.sha256(spec.encode() + np.asarray(table).view(np.uint16).tobytes()).hexdigest()
