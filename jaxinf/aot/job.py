"""A program to compile, by name, so that another process can make it."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from pallas_kernels.errors import InputError
from pallas_kernels.named import Call, Work


@dataclass(frozen=True)
class Steered:
    """An argument whose values steer kernels, and how it lies on a mesh."""

    value: np.ndarray
    sharding: jax.sharding.Sharding

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> np.dtype:
        return self.value.dtype


@dataclass(frozen=True)
class Job:
    """`function(**arguments)` makes a `Call`, or `(fn, args)`, or `(fn, args, Work)`.

    Attributes:
      function: "package.module:name", or "folder/file.py:name". If it takes `devices`, it gets the described
        devices, so that its arguments can carry shardings.
      arguments: JSON values.
      static: what the static model gives: "operations", an `Estimate` of each once; "program", a `Timeline` of the
        whole, loops included; "none".
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    static: Literal["operations", "program", "none"] = "operations"

    def make(self, devices: Sequence[Any] = ()) -> Call:
        """Imports and calls the function.

        Raises:
          InputError: there is no such function, or it gives something else.
        """
        function = _imported(self.function)
        wants = "devices" in inspect.signature(function).parameters
        made = function(**self.arguments, **({"devices": devices} if wants else {}))
        if isinstance(made, Call):
            return made
        if isinstance(made, tuple) and len(made) in (2, 3) and callable(made[0]):
            return Call(made[0], tuple(made[1]), made[2] if len(made) == 3 else Work(0.0, 0.0))
        raise InputError(f"{self.function} gives a {type(made).__name__}, but a Call or (fn, args) is needed.")


def case_job(op: str, case: str, implementation: str = "pallas", blocks: Any = None) -> Job:
    """The job of an op's named case. blocks: the op's `Blocks`, or a mapping of its fields; default: its choice."""
    fields = blocks if blocks is None or isinstance(blocks, Mapping) else vars(blocks)
    arguments = {"op": op, "case": case, "implementation": implementation, "blocks": fields and dict(fields)}
    return Job("jaxinf.aot.cases:call", arguments)


def _imported(name: str) -> Any:
    place, colon, function = name.rpartition(":")
    if not colon:
        raise InputError(f"job={name!r}, but package.module:function or file.py:function is needed.")
    if place.endswith(".py"):
        path = Path(place).resolve()
        key = f"_job_{path.stem}_{hash(str(path)) & 0xFFFFFF:x}"
        if key not in sys.modules:
            spec = importlib.util.spec_from_file_location(key, path)
            if spec is None or spec.loader is None or not path.exists():
                raise InputError(f"job={name!r}, but there is no file {place}.")
            sys.path.insert(0, str(path.parent))
            sys.modules[key] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[key])
        module = sys.modules[key]
    else:
        module = importlib.import_module(place)
    if not hasattr(module, function):
        raise InputError(f"job={name!r}, but {place} has no {function}.")
    return getattr(module, function)
