"""Drafting heads as a folder: `drafter.json` and `model.safetensors`.

    {"jaxinf_drafter": {"version": 1, "kind": "eagle", "dtype": "bfloat16", "target": fingerprint, "spec": {...},
                        "ranks": [[0.7, 0.1, ...], ...]}}

There is no `config.json`: such a folder is no model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinf.checkpoint import packing
from jaxinf.checkpoint.folders import read_json, write_json, written_beside
from jaxinf.checkpoint.own import OwnNames
from jaxinf.checkpoint.parameters import fill, planned, slots
from jaxinf.checkpoint.quantization import Quantization, as_stored
from jaxinf.checkpoint.tensors import Pending, open_tensors, write
from jaxinf.core import from_record, to_record
from jaxinf.models import CausalLM
from jaxinf.models.drafting import (
    AheadSpec,
    AheadTokens,
    EagleHead,
    EagleSpec,
    MedusaHeads,
    MedusaSpec,
    fingerprint,
)
from pallas_kernels.errors import CheckpointError, InputError

FILE, KEY, VERSION = "drafter.json", "jaxinf_drafter", 1
KINDS = ("medusa", "eagle", "mtp", "pass")
Heads = MedusaHeads | EagleHead | AheadTokens
_FORMS: dict[str, tuple[Any, Any]] = {"medusa": (MedusaSpec, MedusaHeads), "pass": (AheadSpec, AheadTokens)}
Ranks = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Drafting:
    """Heads in memory.

    target: fingerprint of the model that they draft for.
    ranks: by step of a draft whose earlier tokens were right, how often the target's greedy token stood first,
      second, ... among the candidates; (): not measured.
    """

    head: Heads
    target: str
    ranks: Ranks = ()

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if isinstance(self.head, MedusaHeads):
            return "medusa"
        if isinstance(self.head, AheadTokens):
            return "pass"
        return "eagle" if self.head.spec.modules == 1 else "mtp"

    def check(self, target: CausalLM) -> None:
        """
        Raises:
          InputError: the heads were trained for another model.
        """
        if (found := fingerprint(target)) != self.target:
            raise InputError(
                f"these {self.kind} heads were trained for another model (of fingerprint {self.target[:12]}, where "
                f"this one's is {found[:12]}): take heads for this one, or train some with `jaxinf train-drafter`"
            )


def is_drafter(folder: str | Path) -> bool:
    """Whether a folder holds drafting heads."""
    return (Path(folder) / FILE).is_file()


def save_drafter(folder: str | Path, drafting: Drafting, *, overwrite: bool = False) -> Path:
    """Writes a folder that `load_drafter` reads back bit for bit; it is complete or untouched.

    Raises:
      CheckpointError: the folder exists, or cannot be written.
    """
    folder, head = Path(folder), drafting.head
    record: dict[str, Any] = {"version": VERSION, "kind": drafting.kind, "dtype": str(head.dtype)}
    record |= {"target": drafting.target, "spec": to_record(head.spec)}
    if drafting.ranks:
        record["ranks"] = [[round(x, 4) for x in step] for step in drafting.ranks]
    with written_beside(folder, overwrite=overwrite, sign=FILE) as scratch:
        write_json(scratch / FILE, {KEY: record})
        write(scratch, [_pending(slot) for slot in slots(_as_model(head))])
    return folder


def _pending(slot) -> Pending:
    value = slot.value
    return packing.stored(
        Pending(slot.names[0], np.dtype(value.dtype), tuple(value.shape), lambda: np.asarray(value))
    )


def load_drafter(folder: str | Path, target: CausalLM | None = None, *, dtype=None) -> Drafting:
    """The heads in a folder.

    Args:
      target: the model that they are to draft for; None: any.
      dtype: of all that is not quantised; None: as stored.

    Raises:
      CheckpointError: there are no heads, they are of a version or kind that this build does not know, or tensors
        are missing or of other shapes.
      InputError: they were trained for another model.
    """
    folder = Path(folder)
    at = folder / FILE
    if not at.is_file():
        raise CheckpointError(f"{folder} has no {FILE}, so it holds no drafting heads; give a folder that does")
    record = read_json(at).get(KEY)
    if not isinstance(record, dict) or record.get("version") != VERSION:
        version = json.dumps(record.get("version") if isinstance(record, dict) else record)
        raise CheckpointError(f"{at} is version {version} of this format; this build reads {VERSION}")
    if record.get("kind") not in KINDS:
        raise CheckpointError(f"{at} names the kind {record.get('kind')!r}; known are {', '.join(KINDS)}")
    if unknown := sorted(set(record) - {"version", "kind", "dtype", "target", "spec", "ranks"}):
        raise CheckpointError(f"{at} has keys that are not understood: {', '.join(unknown)}")
    described, make = _FORMS.get(record["kind"], (EagleSpec, EagleHead))
    try:
        spec = from_record(described, record.get("spec"))
        stored = jnp.dtype(record.get("dtype", ""))
        ranks = tuple(tuple(map(float, step)) for step in record.get("ranks", ()))
    except (InputError, TypeError, ValueError) as e:
        raise CheckpointError(f"{at} does not describe drafting heads: {e}") from e
    dtype = stored if dtype is None else jnp.dtype(dtype)
    head = nnx.eval_shape(lambda: make(spec, rngs=nnx.Rngs(0), dtype=dtype))
    tensors, names = packing.Unpacked(open_tensors(folder)), OwnNames()
    model = as_stored(_as_model(head), tensors, names.source, Quantization("mixed"), str(folder))
    plan = planned(model, tensors, names.source, ignorable=names.ignorable, at=str(folder))
    filled: Any = fill(model, plan)
    made = Drafting(filled, str(record.get("target")), ranks)
    if made.kind != record["kind"]:
        raise CheckpointError(f"{at} names the kind {record['kind']!r}, but what it describes is {made.kind}")
    if target is not None:
        made.check(target)
    return made


def _as_model(head: Heads) -> Any:
    """Heads have parameters by path as models do, and none in segments."""
    return head


def rank_table(found: np.ndarray, most: int = 16) -> Ranks:
    """The `ranks` of a `Drafting` from int `[..., depth]`, where negative entries do not count."""
    steps = [x[x >= 0] for x in np.moveaxis(found, -1, 0)]
    return tuple(tuple(float(np.mean(x == r)) for r in range(most)) for x in steps)
