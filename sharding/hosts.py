"""Runs over several processes, on one host or many: how they start, how they end, and arrays that go in and out."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pallas_kernels.errors import InputError
from sharding.roll_call import RollCall

TIMEOUT, SILENCE = 300.0, 60.0


@dataclass(frozen=True)
class Run:
    """A run over several processes.

    Attributes:
      process: this one's number. hosts: the names of all processes' hosts.
    """

    process: int
    hosts: tuple[str, ...]

    @property
    def processes(self) -> int:
        return len(self.hosts)


_roll: RollCall | None = None
_run: Run | None = None


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: float = TIMEOUT,
    silence: float = SILENCE,
    on_loss: Callable[[str], None] | None = None,
) -> Run:
    """Joins this process with the others of its run, before anything else of JAX is used.

    Then `jax.devices()` are the devices of all processes, and every process runs the same program. Between CPUs
    collectives go through gloo.

    A process that dies ends the others at once, one that falls silent after `silence` seconds: each prints who it
    was and exits with code 1, for a program over all of them would wait forever.

    Args:
      coordinator: "host:port" of process 0; that port and the next one are used. The three default to the variables
        JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, then to what JAX finds out by itself: on TPU
        VMs, GKE, Slurm and Open MPI. Where there is nothing of that, this process is alone.
      processes: how many there are. process: this one's number, from 0.
      timeout: seconds within which all must be there, and at the end must end.
      silence: seconds without a sign after which a process counts as lost.
      on_loss: called from a thread, with a sentence, instead of ending the process.

    Raises:
      ProcessError: some process did not come in time, or is of another run; the message names it.
      InputError: started twice or too late, or not all three are known.
    """
    global _roll, _run
    if _run is not None:
        raise InputError("start was called before; a process is part of one run")
    known = _known(coordinator, processes, process, timeout)
    host = socket.gethostname()
    if known is None:
        _run = Run(0, (host,))
        return _run
    (name, port), processes, process = known
    if _in_use():
        raise InputError("start must come before JAX's devices and arrays are used for the first time")
    me = dict(process=process, processes=processes, host=host, jax=jax.__version__)
    roll = RollCall((name, port + 1), me, on_loss or _end, silence)
    hosts = roll.gather(timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if "jax_enable_preemption_service" in jax.config.values:
        jax.config.update("jax_enable_preemption_service", False)  # it would catch and drop SIGTERM
    jax.distributed.initialize(
        f"{name}:{port}",
        processes,
        process,
        initialization_timeout=max(1, int(timeout)),
        # Ours come first, since they name the process.
        heartbeat_timeout_seconds=int(max(100, 2 * silence)),
        shutdown_timeout_seconds=max(1, int(timeout)),
    )
    _roll, _run = roll, Run(process, hosts)
    _leave_at_exit(roll, timeout)
    return _run


def _known(
    coordinator: str | None, processes: int | None, process: int | None, timeout: float
) -> tuple[tuple[str, int], int, int] | None:
    """What is given, else what the environment says; None: nothing says anything, or there is one process."""

    def number(name: str) -> int | None:
        text = os.environ.get(name)
        if text is not None and not text.isdecimal():
            raise InputError(f"{name}={text!r} must be a whole number")
        return None if text is None else int(text)

    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = number("JAX_NUM_PROCESSES") if processes is None else processes
    process = number("JAX_PROCESS_ID") if process is None else process
    if None in (coordinator, processes, process):
        coordinator, processes, process = _found(coordinator, processes, process, timeout)
    given = dict(coordinator=coordinator, processes=processes, process=process)
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3 or (processes == 1 and process in (0, None)):
        return None
    if missing:
        raise InputError(f"{', '.join(missing)} must be given too: nothing else here says what it is")
    assert coordinator is not None
    assert processes is not None
    assert process is not None
    if processes < 1 or not 0 <= process < processes:
        raise InputError(f"process={process} must be from 0 to processes - 1, with processes={processes}")
    name, _, port = coordinator.rpartition(":")
    if not name or not port.isdecimal() or not 0 < int(port) < 65535:
        raise InputError(f'coordinator={coordinator!r} must be "host:port", of process 0')
    return (name.strip("[]"), int(port)), processes, process


def _found(coordinator: str | None, processes: int | None, process: int | None, timeout: float) -> tuple:
    """What JAX finds out by itself about where it runs."""
    try:
        from jax._src.clusters import ClusterEnv
    except ImportError:  # it has no public name
        return coordinator, processes, process
    detect = ClusterEnv.auto_detect_unset_distributed_params
    return detect(coordinator, processes, process, None, None, int(timeout))[:3]


def _in_use() -> bool:
    """Whether this process has devices already, which it then cannot share."""
    if jax.distributed.is_initialized():
        return True
    try:
        from jax._src.xla_bridge import backends_are_initialized
    except ImportError:  # it has no public name, and JAX refuses by itself, only later
        return False
    return backends_are_initialized()


def _end(what: str) -> None:
    print(f"jaxinf: {what}; this process ends, since a program over all of them cannot go on", file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)


def _leave_at_exit(roll: RollCall, timeout: float) -> None:
    """Tells the others how this process ends. Runs before JAX's own shutdown, which waits for all."""
    failure: list[str] = []
    before = sys.excepthook

    def failed(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        failure.append(f"{kind.__name__}: {error}"[:500])
        before(kind, error, trace)

    def leave() -> None:
        stay = roll.leave(failure[0] if failure else None, timeout)
        if failure or stay:
            if stay:
                print(f"jaxinf: {stay}; all must run the same program", file=sys.stderr)
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(1)

    sys.excepthook = failed
    atexit.register(leave)


def fetch(tree: Any) -> Any:
    """Arrays over the devices of all processes, whole on this one as numpy arrays. All processes must call it.

    What this process has whole is not sent.
    """
    from jax.experimental import multihost_utils

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return jax.device_get(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(one, tree)
