"""Marks of tests that compile for TPUs."""

from pathlib import Path

import pytest

from jaxinf.aot import topology

needs_compiler = pytest.mark.skipif(
    not topology.available(), reason='the TPU compiler is not installed: pip install "jaxinf[tpu]"'
)

PATHS = (Path(__file__).parent,)
"""Where the compiler's process finds modules that tests share."""
