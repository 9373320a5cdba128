"""Who takes part in a run over several processes, whether all came, and who is still there.

JAX's own service ends processes too, but without a word of whom it misses, or after minutes. Here every process
keeps a connection to process 0, over which both say again and again that they are alive: one that dies closes it at
once, one whose machine is gone falls silent. Messages are lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pallas_kernels.errors import ProcessError

_LONGEST = 1 << 16
"""Bytes of a message."""
_PATIENCE = 2.0
"""Seconds that the others get to hear of a loss before process 0 goes too."""


class Connection:
    """Messages to and from one process."""

    def __init__(self, sock: socket.socket):
        sock.settimeout(5.0)
        self.sock, self.heard = sock, time.monotonic()
        self.open, self.left, self.name = True, False, ""
        self._buffer = b""
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """One that is gone is found when it is listened to."""
        with contextlib.suppress(OSError), self._lock:
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come, once something has; None: the other side is gone, or speaks something else."""
        try:
            chunk = self.sock.recv(_LONGEST)
        except OSError:
            return None
        if not chunk:
            return None
        self.heard = time.monotonic()
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        fine = len(self._buffer) < _LONGEST and all(isinstance(message, dict) for message in messages)
        return messages if fine else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()


class RollCall:
    """This process's part of a run, process 0's or another's.

    Args:
      address: of process 0.
      me: this process's "process", "processes", "host" and what else must be equal in all of them.
      on_loss: called once with a sentence when another process is lost; from a thread.
      silence: seconds without a sign after which a process counts as lost.
    """

    def __init__(
        self, address: tuple[str, int], me: Mapping[str, Any], on_loss: Callable[[str], None], silence: float
    ):
        self._address, self._me, self._on_loss, self._silence = address, dict(me), on_loss, silence
        self.process, self.processes = int(me["process"]), int(me["processes"])
        self._others: dict[int, Connection] = {}
        """By process; all of them in process 0, process 0 in the others."""
        self._leaving = False
        self._done, self._all_left = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def gather(self, timeout: float) -> tuple[str, ...]:
        """Waits until all processes are there, and returns their hosts.

        Raises:
          ProcessError: some did not come within `timeout` seconds, or are part of another run; it names them.
        """
        end = time.monotonic() + timeout
        try:
            hosts = self._call(end, timeout) if self.process == 0 else self._answer(end, timeout)
        except ProcessError as e:
            for other in self._others.values():
                other.send(error=str(e))
                other.close()
            raise
        self._thread = threading.Thread(target=self._watch, name="roll call", daemon=True)
        self._thread.start()
        return hosts

    def close(self) -> None:
        """Ends this process's part without a word."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        for other in self._others.values():
            other.close()

    def leave(self, failure: str | None, timeout: float) -> str | None:
        """Says that this process ends, and waits until all do: None, or who does not within `timeout` seconds.

        failure: why it ends, where that is an error; then nobody is waited for.
        """
        self._leaving = True
        for other in self._others.values():
            other.send(failed=failure) if failure else other.send(bye=True)
        if failure:
            self._stop()
            return None
        if self.process == 0:
            self._end_together()
        if self._all_left.wait(timeout) or self._done.is_set():
            self._done.set()
            return None
        here = _list([self._named(i) for i, other in self._others.items() if not other.left])
        what = f"{self._named(self.process)} ended, but {here} did not within {timeout:g} s"
        for other in self._others.values():
            other.send(lost=what)
        self._stop()
        return what

    def _stop(self) -> None:
        """Ends the watch, and gives the others time to hear why."""
        self._done.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE)
        self._until_heard()

    # --- who is there

    def _call(self, end: float, timeout: float) -> tuple[str, ...]:
        try:
            server = socket.create_server(("", self._address[1]), backlog=1024)
        except OSError as e:
            raise ProcessError(
                f"process 0 cannot listen at port {self._address[1]} for the other processes ({e.strerror}); give "
                "another port for the coordinator, such that it and the next one are free"
            ) from e
        strangers: dict[socket.socket, Connection] = {}
        try:
            with server:
                while len(self._others) < self.processes - 1:
                    members = {other.sock: i for i, other in self._others.items()}
                    ready = _ready([server, *strangers, *members], end - time.monotonic())
                    if not ready:
                        raise ProcessError(self._missing(timeout))
                    for sock in ready:
                        if sock is server:
                            new = Connection(server.accept()[0])
                            strangers[new.sock] = new
                        elif sock in strangers:
                            messages = strangers[sock].receive()
                            if messages and "process" in messages[0]:
                                self._admit(strangers.pop(sock), messages[0])
                            elif messages != []:
                                strangers.pop(sock).close()
                        elif self._others[members[sock]].receive() is None:  # it came and went
                            self._others.pop(members[sock]).close()
        finally:
            for stranger in strangers.values():
                stranger.close()
        hosts = (str(self._me["host"]), *(self._others[i].name for i in range(1, self.processes)))
        for other in self._others.values():
            other.send(hosts=hosts)
        return hosts

    def _missing(self, timeout: float) -> str:
        missing = [str(i) for i in range(1, self.processes) if i not in self._others]
        here = _list([self._named(i) for i in sorted({0, *self._others})])
        which = f"process{'' if len(missing) == 1 else 'es'} {_list(missing)} of {self.processes}"
        return (
            f"{which} did not come within {timeout:g} s; there is {here} alone: see that the same program was "
            "started for each"
        )

    def _admit(self, connection: Connection, its: Mapping[str, Any]) -> None:
        process, connection.name = its["process"], str(its.get("host"))
        theirs = f"process {process} (on {connection.name})"
        differ = [key for key in self._me if key not in ("process", "host") and its.get(key) != self._me[key]]
        twin = {0: self._me["host"], **{i: other.name for i, other in self._others.items()}}.get(process)
        if differ:
            key = differ[0]
            wrong = f"{theirs} has {key}={its.get(key)}, process 0 has {key}={self._me[key]}; all must agree"
        elif twin is not None:
            wrong = (
                f"the processes on {twin} and {connection.name} both are process {process} of {self.processes}; "
                "give each its own number"
            )
        elif process not in range(self.processes):
            wrong = f"{theirs} is none of {self.processes}, which are counted from 0"
        else:
            self._others[process] = connection
            return
        connection.send(error=wrong)
        connection.close()
        raise ProcessError(wrong)

    def _answer(self, end: float, timeout: float) -> tuple[str, ...]:
        host, port = self._address
        while True:
            try:
                sock = socket.create_connection(self._address, timeout=max(0.1, min(5.0, end - time.monotonic())))
                break
            except OSError as e:
                if time.monotonic() > end - 0.5:
                    raise ProcessError(
                        f"process 0 was not reached at {host}:{port} within {timeout:g} s ({e}); see that it runs "
                        "and that nothing between the hosts blocks the port"
                    ) from e
                time.sleep(0.2)
        coordinator = Connection(sock)
        coordinator.send(**self._me)
        self._others = {0: coordinator}
        # Process 0 knows who is missing: it gets a little longer to say so.
        while _ready([sock], end + 1.0 - time.monotonic()):
            messages = coordinator.receive()
            if messages is None:
                raise ProcessError(f"process 0 at {host}:{port} ended before all processes were there")
            for message in messages:
                if "error" in message:
                    raise ProcessError(str(message["error"]))
                if "hosts" in message:
                    coordinator.name = message["hosts"][0]
                    return tuple(message["hosts"])
        raise ProcessError(
            f"process 0 at {host}:{port} still waited for other processes after {timeout:g} s; it names them"
        )

    # --- who is still there

    def _watch(self) -> None:
        every = self._silence / 4
        said = time.monotonic()
        while not self._done.is_set():
            ready = _ready([other.sock for other in self._others.values() if other.open], min(every, 0.5))
            now = time.monotonic()
            for process, other in self._others.items():
                lost = None
                if other.sock in ready:
                    lost = self._heard(process, other.receive())
                elif not other.left and now - other.heard > self._silence:
                    lost = f"{self._named(process)} has given no sign for {self._silence:g} s"
                if lost is not None:
                    return self._lost(lost)
            if now - said >= every:
                said = now
                for other in self._others.values():
                    other.send(beat=True)

    def _heard(self, process: int, messages: Iterable[Mapping[str, Any]] | None) -> str | None:
        """Takes in what a process said, and returns the loss that it tells of."""
        other = self._others[process]
        if messages is None:
            other.open = False
            return None if other.left else f"{self._named(process)} died"
        for message in messages:
            if "failed" in message:
                return f"{self._named(process)} ended with {message['failed']}"
            if "lost" in message:
                return str(message["lost"])
            if "bye" in message:
                other.left = True
                if self.process == 0:
                    self._end_together()
            if "end" in message:
                self._all_left.set()
        return None

    def _end_together(self) -> None:
        """Process 0 lets all end, once all want to."""
        if self._leaving and all(other.left for other in self._others.values()):
            for other in self._others.values():
                other.send(end=True)
            self._all_left.set()

    def _lost(self, what: str) -> None:
        if self._done.is_set():  # it goes by itself
            return
        self._done.set()
        if self.process == 0:
            for other in self._others.values():
                other.send(lost=what)
            self._until_heard()
        self._on_loss(what)

    def _until_heard(self) -> None:
        """Gives the others time to hear why this process goes, before its connections and JAX's service end."""
        end = time.monotonic() + _PATIENCE
        there = {other.sock: other for other in self._others.values() if other.open}
        while there and time.monotonic() < end:
            for sock in _ready(there, 0.1):
                messages = there[sock].receive()
                if messages is None or any("lost" in message for message in messages):
                    del there[sock]

    def _named(self, process: int) -> str:
        other = self._others.get(process)
        host = self._me["host"] if process == self.process else other.name if other is not None else ""
        return f"process {process}" + (f" (on {host})" if host else "")


def _ready(sockets: Iterable[socket.socket], timeout: float) -> list[socket.socket]:
    """Those of the sockets that have something to say, within `timeout` seconds."""
    with selectors.DefaultSelector() as selector:
        for sock in sockets:
            selector.register(sock, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(max(0.0, timeout))]  # pyright: ignore[reportReturnType]


def _list(names: list[str], most: int = 16) -> str:
    if len(names) > most:
        return ", ".join(names[:most]) + f" and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
