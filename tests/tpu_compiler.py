"""What tests share that compile for TPUs: their marks, and a model of published shapes with fewer layers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxinf.aot import topology
from jaxinf.models import ModelSpec, presets

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


def few_layers(repeats: int) -> ModelSpec:
    spec = presets.preset("llama-3.1-8b")
    return dataclasses.replace(spec, segments=(dataclasses.replace(spec.segments[0], repeats=repeats),), vocab=4096)
