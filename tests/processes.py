"""Python programs run as several processes with four emulated devices each, as hosts of a slice run them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

START = """
import json, pathlib, sys
from sharding import hosts
timeout, told, *arguments = sys.argv[1:]
run = hosts.start(timeout=float(timeout), silence=10)
def tell(**values):
    pathlib.Path(told).write_text(json.dumps(values))
"""
"""Gloo writes to stdout as it likes, so what a program finds goes to a file."""


def port() -> int:
    """One that is free, as is the next."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("localhost", 0))
            found = first.getsockname()[1]
            try:
                second.bind(("localhost", found + 1))
            except (OSError, OverflowError):
                continue
            return found


def start(
    program: str,
    process: int,
    *,
    at: int,
    timeout: float = 60,
    arguments: tuple[str, ...] = (),
    told: Path | None = None,
) -> subprocess.Popen:
    """The program after `hosts.start`, as one of two processes, with `run`, `arguments` and `tell` there."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{at}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(process),
        "XLA_FLAGS": " ".join([*flags, "--xla_force_host_platform_device_count=4"]),
    }
    command = [sys.executable, "-c", START + program, str(timeout), str(told), *arguments]
    pipes: dict = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=env, **pipes)


def finish(process: subprocess.Popen, within: float = 240) -> tuple[int, str, str]:
    """`(exit code, stdout, stderr)`; a process that hangs is killed, and fails the test."""
    try:
        out, err = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still there after {within} s:\n{out}\n{err}") from None
    return process.returncode, out, err


def together(program: str, folder: Path, arguments: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """What each of two processes tells; neither may fail."""
    at = port()
    told = [folder / f"{i}.json" for i in range(2)]
    both = [start(program, i, at=at, arguments=arguments, told=told[i]) for i in range(2)]
    for code, out, err in [finish(process) for process in both]:
        assert code == 0, out + err
    return [json.loads(path.read_text()) for path in told]
