"""What every test runs under: the CPU as eight devices, no network, no compilation cache."""

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

assert "jax" not in sys.modules, "jax was imported before tests/conftest.py could choose its devices"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Tests compile far longer than they run: half of that is LLVM's optimiser.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)
# A cache kept between runs would hide a compilation that a test counts; tests of the cache name a folder.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

MOST_BYTES = 3 << 30

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=25)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    """What a worker has compiled is given up between modules once it holds much: several share a machine."""
    yield
    statm = Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MOST_BYTES:
        jax.clear_caches()
        gc.collect()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, metavar="N", help="run the first of each N tests of a file")


@pytest.hookimpl(trylast=True)  # after what `-m` and `-k` leave out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seen: Counter[Path] = Counter()
    kept: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        kept[seen[item.path] % config.getoption("--every") == 0].append(item)
        seen[item.path] += 1
    if kept[False]:
        config.hook.pytest_deselected(items=kept[False])
        items[:] = kept[True]
