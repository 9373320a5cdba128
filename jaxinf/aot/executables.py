"""Executables as bytes, and back without running what a file says.

`jax.experimental.serialize_executable` keeps an executable within a pickle, and a pickle can name any function to
be called. Here one is read with the names that such a pickle has (shapes, shardings, layouts) and no others. The
machine code inside is code all the same: saved programs are to be trusted as a shared library is.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import serialize_executable

from pallas_kernels.errors import UnsupportedError

_NAMES = {
    "jax": {"P"},
    "jax._src.core": {"ManualAxisType", "MemorySpace", "ShapedArray"},
    "jax._src.interpreters.pxla": {"AllArgsInfo", "UnloadedMeshExecutable"},
    "jax._src.layout": {"Layout"},
    "jax._src.linear_util": {"DebugInfo"},
    "jax._src.memory": {"Space"},
    "jax._src.mesh": {"AbstractDevice", "AbstractMesh", "AxisType", "Mesh", "_unpicke_mesh"},
    "jax._src.named_sharding": {"_unpickle_named_sharding"},
    "jax._src.partition_spec": {"unpickle_pspec"},
    "jax._src.sharding_impls": {"_unpickle_single_device_sharding"},
    "jax._src.stages": {"ArgInfo"},
    "jaxlib._jax": {"DeviceList"},
    "ml_dtypes": {"bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct"},
}
"""What JAX 0.8.1 and 0.10.2 were seen to name, on CPUs and for TPUs."""

_UNKNOWN = "this version of JAX keeps executables in a form that is not known here"


def dump(compiled: jax.stages.Compiled) -> bytes:
    """An executable as bytes, without the structure of its arguments and results. To be called before it is run.

    Raises:
      UnsupportedError: its platform or this version of JAX cannot.
    """
    try:
        payload, *_ = serialize_executable.serialize(compiled)
    except (AttributeError, TypeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as e:
        raise UnsupportedError(f"this program cannot be saved: {' '.join(str(e).split())[:200]}") from e
    return payload


def load(payload: bytes, takes: Any, gives: Any, devices: Sequence[Any]) -> jax.stages.Compiled:
    """The executable, to be called as the one that was saved.

    Args:
      takes: the structure of `(args, {})`; gives: that of its results.
      devices: that it runs on, as many as it was compiled for.

    Raises:
      UnsupportedError: the bytes are damaged, name what no executable has, or come from another JAX.
    """
    try:
        client = devices[0].client
        unloaded, infos, no_kwargs = _reader()(io.BytesIO(payload), client, list(devices)).load()
        infos = jax.tree.unflatten(takes, infos)
        return jax.stages.Compiled(unloaded.load(), [], infos, gives, no_kwargs=no_kwargs)
    except UnsupportedError:
        raise
    except Exception as e:  # of whatever kind: what is read is not known to be whole
        raise UnsupportedError(f"{_UNKNOWN} ({type(e).__name__}: {' '.join(str(e).split())[:200]})") from e


def _reader() -> Any:
    base = getattr(serialize_executable, "_JaxPjrtUnpickler", None)
    if base is None:
        raise UnsupportedError(_UNKNOWN)

    class Reader(base):
        def find_class(self, module: str, name: str) -> Any:
            if name not in _NAMES.get(module, ()):
                raise UnsupportedError(f"a saved program names {module}.{name}, which no executable needs")
            return super().find_class(module, name)

    return Reader
