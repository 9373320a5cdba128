"""The command's parser, its verbs, and what errors and signals become."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from jaxinf.cli import interrupts
from jaxinf.cli.device import DeviceError

OK, FAILED, BAD_INPUT, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141

VERBS = {
    "generate": "write text with a model, token by token",
    "info": "describe a model without loading its weights",
    "convert": "rewrite a checkpoint in this project's form",
    "quantize": "rewrite a checkpoint with its matrices stored narrower",
    "bench": "measure prefill, decoding and memory on this device",
    "plan": "say whether a model fits a slice of TPUs, on which mesh, and how fast",
    "compile": "save a model's compiled programs for later starts",
    "tune": "search a kernel's block sizes through the TPU compiler",
    "datastore": "turn text into a file that drafts are looked up in",
    "train-drafter": "train what drafts for a model: heads of its own, or an aligned draft model",
}
"""Each verb is a module of this package (a dash is an underscore there) with `configure(parser)` and `run(args) ->
exit code`."""

EPILOG = """\
examples:
  jaxinf generate 'def quicksort(items):'
  jaxinf info stdlib
  jaxinf bench stdlib --batch 1,8

exit codes: 0 done, 1 the run failed (disk, memory, device), 2 bad arguments or a bad checkpoint,
3 what was planned does not fit, 130 interrupted, 141 the reader of the output went away
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"jaxinf: {message}; see `{self.prog} --help`\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments (default: the process's) and returns its exit code."""
    if argv is not None:
        return _guarded(argv)
    _collect_less()
    interrupts.keep()
    code = _guarded(sys.argv[1:])
    if code == INTERRUPTED:
        _leave(code)
    return code


def _guarded(arguments: Sequence[str]) -> int:
    try:
        return _run(arguments)
    except SystemExit as leave:  # argparse: --help, --version and usage errors
        return leave.code if isinstance(leave.code, int) else OK
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted")
    except BrokenPipeError:
        _drop_stdout()
        return PIPE_CLOSED
    except Exception as error:
        known = _known(error)
        if known is None:
            raise
        return _fail(*known)


def _run(arguments: Sequence[str]) -> int:
    parser = Parser(prog="jaxinf", description="Language-model inference in JAX.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"jaxinf {_version(arguments)}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    # The options before a verb take no values, so the first word is the verb.
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == chosen:
            _module(name).configure(verb)
    args = parser.parse_args(arguments)
    _prepare_streams()
    _quiet()
    code = _module(args.verb).run(args)
    sys.stdout.flush()
    return code


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"jaxinf.cli.{verb.replace('-', '_')}")


def _version(arguments: Sequence[str]) -> str:
    if "--version" not in arguments:
        return ""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("jaxinf")
    except PackageNotFoundError:
        return "(not installed)"


def _collect_less() -> None:
    """Spares a process of its own most garbage collection.

    Importing JAX and tracing make a million objects that live to the end: going through them again and again, and
    once more at exit, took a quarter of the time to a first token.
    """
    gc.set_threshold(100_000, 50, 50)
    atexit.register(gc.freeze)


def _prepare_streams() -> None:
    """A terminal that cannot show a character shows a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _quiet() -> None:
    """Keeps what JAX and its platforms say about themselves off the terminal, unless asked for."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not os.environ.get("JAX_LOGGING_LEVEL"):
        logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    warnings.formatwarning = lambda message, *_, **__: f"jaxinf: {message}\n"
    if not sys.warnoptions:
        for module in ("jax", "jaxlib", "flax", "orbax"):
            warnings.filterwarnings("ignore", module=rf"{module}\b")


def _known(error: Exception) -> tuple[int, str] | None:
    """Exit code and message of an error that is no defect of this program."""
    # Here, since importing it loads jax, which answering --help must not wait for.
    from pallas_kernels.errors import CheckpointError, JaxinfError

    if isinstance(error, JaxinfError):
        # A checkpoint that the system would not read or write is a failed run; all else was asked for wrongly.
        cause = error.__cause__
        refused = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
        return FAILED if isinstance(error, CheckpointError) and refused else BAD_INPUT, str(error)
    if isinstance(error, DeviceError):
        return FAILED, str(error)
    if isinstance(error, OSError) and error.errno is not None:
        of = "" if error.filename is None else f"{error.filename}: "
        return FAILED, f"{of}{error.strerror or error}"
    if isinstance(error, MemoryError):
        return FAILED, "out of memory; take a smaller model, batch or dtype"
    if "RESOURCE_EXHAUSTED" in str(error) or "Out of memory allocating" in str(error):  # what XLA raises
        return FAILED, "the device is out of memory; take a smaller model, batch or dtype"
    return None


def _fail(code: int, message: str) -> int:
    print(f"jaxinf: {' '.join(message.split())}", file=sys.stderr)
    return code


def _leave(code: int) -> NoReturn:
    """Ends the process at once: what the device still computes would outlive what Python takes down on its way."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _drop_stdout() -> None:
    """Lets what is still buffered go nowhere: the interpreter would meet the closed pipe again as it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
