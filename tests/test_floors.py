"""The import floors: a module imports from floors below its own, and else only what pyproject.toml declares."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    "pallas_kernels": 0,
    "sharding": 1,
    "jaxinf.core": 2,
    "jaxinf.quant": 3,
    "jaxinf.cache": 4,
    "jaxinf.layers": 5,
    "jaxinf.models": 6,
    "jaxinf.checkpoint": 7,
    "jaxinf.generation": 8,
    "jaxinf.training": 9,
    "jaxinf.compression": 10,
    "jaxinf.aot": 11,
    "jaxinf.lm": 12,
    "jaxinf.serving": 13,
    "jaxinf.cli": 14,
    "jaxinf": 14,  # the public face, jaxinf/__init__.py
    "jaxinf.__main__": 15,
}
PACKAGES = ("pallas_kernels", "sharding", "jaxinf")
ARRAYS_ONLY = {"pallas_kernels": {"jax", "numpy"}, "sharding": {"jax", "numpy"}}
"""Packages that may import these libraries alone."""
DISTRIBUTIONS = {"orbax": "orbax-checkpoint"}
"""Import names that differ from the name on the index."""
OPTIONAL = {"sentencepiece", "matplotlib", "flatbuffers"}
"""Libraries of extras, to be imported inside a function that needs them."""


def declared() -> set[str]:
    """Import names of the dependencies that pyproject.toml lists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {line.split(">")[0].strip() for line in project["dependencies"]}
    return names | {module for module, name in DISTRIBUTIONS.items() if name in names}


def room_of(module: str) -> str | None:
    """The room a module of this project stands in, or None if it stands in none."""
    parts = module.split(".")
    if parts[0] != "jaxinf":
        return parts[0]
    room = ".".join(parts[:2])
    return room if room in FLOORS else None


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, root: Path) -> Iterator[tuple[int, str, bool]]:
    """Line, module and whether it runs with the module, of every import, those by a literal name included."""
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    later = {id(child) for function in functions for child in ast.walk(function)}
    package = module_name(path, root).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        top = id(node) not in later
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name]), top
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            yield node.lineno, node.args[0].value, top


def violations(root: Path) -> list[str]:
    """A sentence for each import that the floors forbid, in all Python files of the packages under `root`."""
    libraries = declared()
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            name = module_name(path, root)
            room = "jaxinf" if name == "jaxinf" else room_of(name)
            if room is None:
                found.append(f"{name} stands in no room: add it to a room of FLOORS")
                continue
            for line, target, top in imports(path, root):
                where = f"{path.relative_to(root)}:{line}"
                head = target.split(".")[0]
                if head in PACKAGES:
                    other = room_of(target) or "jaxinf"
                    if other != room and FLOORS[other] >= FLOORS[room]:
                        floors = f"{room} (floor {FLOORS[room]}) imports {other} ({FLOORS[other]})"
                        found.append(f"{where}: {floors}")
                elif head not in sys.stdlib_module_names:
                    allowed = ARRAYS_ONLY.get(package, libraries if top else libraries | OPTIONAL)
                    if head not in allowed:
                        found.append(f"{where}: {room} imports {head}, which is not among its libraries")
    return found


def test_every_import_goes_down() -> None:
    assert violations(ROOT) == []


def test_every_package_is_there() -> None:
    assert all(list((ROOT / package).rglob("*.py")) for package in PACKAGES)


def test_design_and_wheel_agree_on_packages() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert sorted(wheel["packages"]) == sorted(PACKAGES)


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("pallas_kernels/op/api.py", "import sharding", "pallas_kernels (floor 0) imports sharding (1)"),
        ("pallas_kernels/op/api.py", "import flax.nnx", "imports flax"),
        ("sharding/mesh.py", "from jaxinf.core import types", "sharding (floor 1) imports jaxinf.core (2)"),
        ("jaxinf/core/types.py", "from .. import models", "jaxinf.core (floor 2) imports jaxinf.models (6)"),
        ("jaxinf/core/types.py", "from ..models.spec import X", "imports jaxinf.models (6)"),
        ("jaxinf/core/types.py", "def f():\n    import jaxinf.lm", "core/types.py:2: jaxinf.core"),
        (
            "jaxinf/core/types.py",
            "import importlib\nimportlib.import_module('jaxinf.lm')",
            "imports jaxinf.lm",
        ),
        ("jaxinf/core/__init__.py", "from .. import LM", "jaxinf.core (floor 2) imports jaxinf (14)"),
        ("jaxinf/cli/main.py", "from jaxinf import LM", "jaxinf.cli (floor 14) imports jaxinf (14)"),
        ("jaxinf/core/types.py", "if True:\n    import torch", "imports torch"),
        ("jaxinf/core/types.py", "def f():\n    import torch", "imports torch"),
        ("jaxinf/core/types.py", "try:\n    import matplotlib\nexcept ImportError:\n    pass", "matplotlib"),
        ("jaxinf/basement/x.py", "", "jaxinf.basement.x stands in no room"),
        ("jaxinf/stray.py", "", "jaxinf.stray stands in no room"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    found = violations(tmp_path)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("pallas_kernels/op/api.py", "import math\nimport jax.numpy as jnp\nfrom .reference import op"),
        ("pallas_kernels/op/api.py", "from ..errors import InputError\nfrom pallas_kernels import errors"),
        ("jaxinf/models/causal.py", "from jaxinf.layers import norm\nimport sharding\nimport flax"),
        ("jaxinf/models/causal.py", "from . import spec\nfrom jaxinf import core\nimport orbax.checkpoint"),
        ("jaxinf/lm/tokenizer.py", "def f():\n    import sentencepiece"),
        ("jaxinf/__init__.py", "def __getattr__(name):\n    from jaxinf.lm import LM"),
        ("jaxinf/__main__.py", "from jaxinf.cli import main"),
    ],
)
def test_an_allowed_import_passes(tmp_path: Path, file: str, text: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert violations(tmp_path) == []


def test_the_public_face_is_lazy() -> None:
    code = (
        "import sys, jaxinf\n"
        "heavy = {'jax', 'flax', 'numpy', 'orbax', 'optax', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'import jaxinf imports {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
