"""Marks of tests that compile for TPUs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from jaxinf.aot import topology

compiles = [
    pytest.mark.compile,
    pytest.mark.skipif(
        not topology.available(), reason='the TPU compiler is not installed: pip install "jaxinf[tpu]"'
    ),
]
"""The `pytestmark` of a module."""

PATHS = (Path(__file__).parent,)
"""Where the compiler's process finds modules that tests share."""


def needs_compiler(test: Callable) -> Callable:
    """The same for one test."""
    for mark in compiles:
        test = mark(test)
    return test
