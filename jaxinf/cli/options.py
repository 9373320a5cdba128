"""Options and argument types that several verbs share."""

from __future__ import annotations

import argparse

DTYPES = ("float32", "bfloat16", "float16")
CACHES = ("int8", "fp8", "int4")


def add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help=f"dtype of weights and activations (default: {default})")


def add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", choices=CACHES, help="keep keys and values in fewer bits (default: as --dtype)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout, for programs")


def counts(text: str) -> list[int]:
    """Whole numbers of at least 1, separated by commas."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers of at least 1, such as 1,8")
    return values


def count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value
