"""Compiled programs of a model in a folder, so that a process need neither trace nor compile them.

A folder holds `programs.json`, the manifest, and a file a program. The manifest says what the programs were
compiled with and for: versions, platform, devices, mesh, flags, the sources of this project, and the model, of
which shapes, dtypes and architecture count; values of weights do not, since programs take them as arguments. Where
anything differs, nothing of the folder is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxinf.aot import executables, trees
from jaxinf.aot.portable import check_portable, exported
from jaxinf.checkpoint.folders import check_target, written_beside
from jaxinf.core import to_record
from jaxinf.models import CausalLM
from jaxinf.models.placing import mesh_of
from pallas_kernels.errors import InputError, UnsupportedError

MANIFEST, PORTABLE, VERSION = "programs.json", "portable", 1
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision")
_ROOT = Path(__file__).parents[2]
_SOURCES = ("pallas_kernels", "sharding", *(f"jaxinf/{r}" for r in ("core", "quant", "cache", "layers", "models")))
"""What programs are traced from, with `jaxinf/generation`."""


class Programs:
    """The programs of a folder. See `use`.

    Raises:
      InputError: it holds no programs.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        path = self._folder / MANIFEST
        try:
            self._manifest = json.loads(path.read_text())
            self._known = {entry["key"]: entry for entry in self._manifest["programs"]}
            if not isinstance(self._manifest["made"], dict):
                raise TypeError("made is no object")
        except FileNotFoundError as e:
            raise InputError(
                f"{self._folder} holds no programs (no {MANIFEST}); `jaxinf compile` makes them"
            ) from e
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path} is no manifest of programs ({type(e).__name__}); make them again") from e
        self._warned = False

    def fits(self, model: CausalLM) -> bool:
        """Whether they are this model's, here; if not, a warning says what differs."""
        now, then = described(model), self._manifest["made"]
        differs = [
            f"{key} was {then.get(key)!r}, is {now[key]!r}" if len(str(now[key])) < 60 else f"{key} changed"
            for key in now
            if then.get(key) != now[key]
        ]
        if self._manifest.get("version") != VERSION:
            differs = [f"the manifest's version is {self._manifest.get('version')!r}, here {VERSION}"]
        if differs:
            self._warn(f"programs of {self._folder} are not used: {'; '.join(differs)}")
        return not differs

    def user(self, model: CausalLM) -> Callable[[str, Any], Any]:
        """From a program's name and its jitted function to what runs it: as saved, else as compiled here."""
        if not self.fits(model):
            return lambda name, program: program
        devices = _devices(model)
        return lambda name, program: _Loaded(self, name, program, devices)

    def load(self, key: str, args: tuple, devices: Sequence[Any]) -> Any:
        """The program of that key, or None where there is none or it cannot be read."""
        entry = self._known.get(key)
        if entry is None:
            self._warn(f"{self._folder} has no program for a call of these sizes and options")
            return None
        try:
            payload = (self._folder / entry["file"]).read_bytes()
            if hashlib.sha256(payload).hexdigest() != entry["sha256"]:
                raise UnsupportedError(f"{entry['file']} is damaged")
            takes = jax.tree.structure((args, {}))
            return executables.load(payload, takes, trees.from_json(json.loads(entry["gives"])), devices)
        except (OSError, KeyError, TypeError, ValueError, UnsupportedError) as e:
            self._warn(f"a program of {self._folder} is not used: {e}")
            return None

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{why}; it is compiled as ever, and `jaxinf compile` saves it anew", stacklevel=3)


class _Loaded:
    """A jitted function that looks among saved programs first."""

    def __init__(self, programs: Programs, name: str, program: Any, devices: Sequence[Any]):
        self._programs, self._name, self._program, self._devices = programs, name, program, devices
        self._found: dict[str, Any] = {}

    def __call__(self, *args: Any, **static: Any) -> Any:
        key = key_of(self._name, args, static)
        if key is None:
            return self._program(*args, **static)
        if key not in self._found:
            self._found[key] = self._programs.load(key, args, self._devices)
        found = self._found[key]
        return self._program(*args, **static) if found is None else found(*args)


class Recorder:
    """Compiles the programs that a model's calls need, and keeps them in a folder.

    portable: platforms for which they are kept as StableHLO too (see `jaxinf.aot.portable`).
    """

    def __init__(self, folder: Path, model: CausalLM, portable: Sequence[str] = ()):
        self._folder, self._model, self._portable = folder, model, tuple(portable)
        self._devices = _devices(model)
        self._made: dict[str, tuple[dict[str, Any], Any]] = {}

    def user(self, name: str, program: Any) -> Any:
        """What runs the jitted function `program` and keeps what it compiles."""

        def call(*args: Any, **static: Any) -> Any:
            key = key_of(name, args, static)
            if key is None:
                raise UnsupportedError(f"{name} has options that cannot be written down: {static}")
            if key not in self._made:
                self._made[key] = self._make(name, key, program, args, static)
            return self._made[key][1](*args)

        return call

    @property
    def programs(self) -> list[dict[str, Any]]:
        """Name, file and bytes of each so far."""
        return [entry for entry, _ in self._made.values()]

    def finish(self) -> None:
        """Writes the manifest."""
        made = {"version": VERSION, "made": described(self._model), "programs": self.programs}
        (self._folder / MANIFEST).write_text(json.dumps(made, indent=1) + "\n")

    def _make(self, name: str, key: str, program: Any, args: tuple, static: Mapping[str, Any]) -> tuple:
        compiled = program.lower(*args, **static).compile()
        payload, file = executables.dump(compiled), f"{name}-{len(self._made)}.bin"
        gives = trees.to_json(compiled.out_tree)
        # Read back at once: a program that this JAX cannot load is not found out at the next start.
        loaded = executables.load(payload, jax.tree.structure((args, {})), trees.from_json(gives), self._devices)
        (self._folder / file).write_bytes(payload)
        entry = dict(name=name, key=key, file=file, bytes=len(payload), gives=json.dumps(gives))
        if self._portable:
            (self._folder / PORTABLE).mkdir(exist_ok=True)
            entry["portable"] = f"{PORTABLE}/{file}"
            (self._folder / entry["portable"]).write_bytes(exported(program, args, static, self._portable))
        return entry | {"sha256": hashlib.sha256(payload).hexdigest()}, loaded


@contextlib.contextmanager
def recording(
    folder: str | Path, model: CausalLM, *, overwrite: bool = False, portable: Sequence[str] = ()
) -> Iterator[Recorder]:
    """A recorder whose folder is written beside and renamed: it is complete or it is not there.

    Raises:
      UnsupportedError: several processes; or a portable form without what it needs.
      CheckpointError: the folder is there, or cannot be written.
    """
    if jax.process_count() > 1:
        raise UnsupportedError("programs over several processes cannot be saved; each would need files of its own")
    if portable:
        check_portable()
    with written_beside(Path(folder), overwrite=overwrite, sign=MANIFEST) as scratch:
        recorder = Recorder(scratch, model, portable)
        yield recorder
        recorder.finish()


def check_folder(folder: str | Path, *, overwrite: bool = False) -> None:
    """Raises what `recording` would raise of its folder, before anything is compiled."""
    check_target(Path(folder), overwrite=overwrite, sign=MANIFEST)


def key_of(name: str, args: tuple, static: Mapping[str, Any]) -> str | None:
    """Equal for calls that one program serves; None where options are no plain values.

    The model's weights, a list and the first argument, are not looked at: `described` holds them.
    """
    plain = {option: list(x) if isinstance(x, tuple) else x for option, x in static.items()}
    if any(not isinstance(x, (bool, int, float, str, type(None))) and x != [] for x in plain.values()):
        return None
    leaves, tree = jax.tree.flatten(args[1:] if args and isinstance(args[0], list) else args)
    shapes = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves]
    text = json.dumps([name, plain, shapes, str(tree)], sort_keys=True)
    return f"{name} {hashlib.sha256(text.encode()).hexdigest()[:32]}"


def described(model: CausalLM) -> dict[str, Any]:
    """What must be equal for a program to be the one that would be compiled here and now."""
    devices = _devices(model)
    device, mesh = devices[0], mesh_of(model)
    return {
        "jax": jax.__version__,
        "jaxlib": _version("jaxlib"),
        "libtpu": _version("libtpu") if device.platform == "tpu" else None,
        "platform": device.platform,
        "platform_version": " ".join(str(device.client.platform_version).split()),
        "device": device.device_kind,
        "processor": _processor() if device.platform == "cpu" else None,
        "devices": [d.id for d in devices],
        "devices_here": jax.device_count(),
        "mesh": None if mesh is None else {axis: n for axis, n in mesh.shape.items() if n > 1},
        "flags": {name: os.environ.get(name) for name in _FLAGS},
        "settings": {name: str(getattr(jax.config, name)) for name in _SETTINGS},
        "model": model_hash(model),
        "sources": _sources(),
    }


def model_hash(model: CausalLM) -> str:
    """A hash of the architecture, and of shape, dtype and partition of every weight; values do not count."""
    leaves = [
        (".".join(map(str, path)), str(leaf.dtype), list(leaf.shape), str(_partition(leaf)))
        for path, variable in nnx.to_flat_state(nnx.state(model))
        for leaf in jax.tree.leaves(variable.get_value())
    ]
    text = json.dumps([to_record(model.spec), model.layout, leaves], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _partition(leaf: Any) -> Any:
    return getattr(getattr(leaf, "sharding", None), "spec", None)


def _devices(model: CausalLM) -> list[Any]:
    mesh = mesh_of(model)
    return [jax.devices()[0]] if mesh is None else list(mesh.devices.flat)


def _sources() -> str:
    """A hash of the code that programs are traced from, and of the tables that steer it."""
    found = hashlib.sha256()
    for room in (*_SOURCES, "jaxinf/generation"):
        for path in sorted((_ROOT / room).rglob("*")):
            if path.suffix in (".py", ".json"):
                found.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _processor() -> str:
    """What a CPU's machine code may use: it is compiled for the processor at hand."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features"))).partition(":")[2]
        features = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:16]
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()} {features}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
