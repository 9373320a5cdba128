"""Runs over two processes of four emulated devices each."""

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from processes import finish, port, start, together
from safetensors.numpy import load_file

from jaxinf.checkpoint import save
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, RopeSpec
from jaxinf.models import CausalLM, ModelSpec, Segment
from pallas_kernels.errors import InputError, ProcessError
from sharding import hosts
from sharding.roll_call import RollCall

SUM = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from sharding import meshes, program
mesh = meshes.make("data=2,tensor=4")
x = program.put(mesh, np.arange(16, dtype=np.float32).reshape(4, 4), P("data", "tensor"))
total = jax.jit(program.over(mesh, lambda x: jax.lax.psum(x, ("data", "tensor")), (P("data", "tensor"),), P()))(x)
tell(
    process=[run.process, run.processes], devices=[jax.device_count(), jax.local_device_count()],
    x=hosts.fetch({"x": x})["x"].tolist(), total=hosts.fetch(total).tolist(),
    mine=sorted(s.index[0].start or 0 for s in x.addressable_shards),
)
"""


def test_one_program_runs_on_the_devices_of_both(tmp_path: Path) -> None:
    whole = [[4.0 * i + j for j in range(4)] for i in range(4)]
    found = together(SUM, tmp_path)
    assert [f["process"] for f in found] == [[0, 2], [1, 2]]
    for process, f in enumerate(found):
        assert f["devices"] == [8, 4]
        assert f["x"] == whole
        assert sum(map(sum, f["total"])) == 120
        assert f["mine"] == [2 * process] * 4, "the data axis runs over the processes"


@pytest.mark.parametrize("here", [0, 1])
def test_a_process_that_never_comes_is_named(here: int) -> None:
    code, _, err = finish(start("", here, at=port(), timeout=2))
    assert code != 0
    said = err.splitlines()[-1]
    if here == 0:
        assert "ProcessError: process 1 of 2 did not come within 2 s; there is process 0 (on " in said
    else:
        assert "ProcessError: process 0 was not reached at localhost:" in said


DIES = """
import jax, os, signal, time
from jax.sharding import PartitionSpec as P
from sharding import meshes, program
mesh = meshes.make("tensor=8")
add = jax.jit(program.over(mesh, lambda x: jax.lax.psum(x, "tensor"), (P(),), P()))
x = program.put(mesh, 1.0, P())
for i in range(10**6):
    jax.block_until_ready(add(x))
    if i == 20 and run.process == int(arguments[1]):
        if arguments[0] == "raises":
            raise ValueError("no luck")
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("how", "who"), [("dies", 1), ("dies", 0), ("raises", 1), ("raises", 0)])
def test_a_process_that_is_lost_ends_the_other_which_names_it(how: str, who: int) -> None:
    at = port()
    both = [start(DIES, i, at=at, arguments=(how, str(who))) for i in range(2)]
    ended = [finish(process) for process in both]
    lost, left = ended[who], ended[1 - who]
    assert lost[0] == (-signal.SIGKILL if how == "dies" else 1)
    if how == "raises":
        assert left[0] == 1
        assert f"jaxinf: process {who} (on {socket.gethostname()}) ended with ValueError: no luck" in left[2]
    elif who == 1:
        assert left[0] == 1
        assert f"jaxinf: process 1 (on {socket.gethostname()}) died" in left[2]
    else:  # JAX notices as soon as we do that its service is gone; it calls process 0 the leader
        assert left[0] in (1, -signal.SIGABRT)
        assert "process 0 (on " in left[2] or "leader" in left[2]


READS = """
from jaxinf.checkpoint import load
from jaxinf.checkpoint.tensors import MappedTensors
touched, expect = {}, MappedTensors.expect
def note(self, name, view):
    touched[name] = touched.get(name, 0) + view.nbytes
    expect(self, name, view)
MappedTensors.expect = note
counts = []
model = load(arguments[0], mesh=arguments[1], layout="stacked", progress=lambda *at: counts.append(at)).model
tell(touched=touched, progress=counts[-1], embed=hosts.fetch(model.embed.table[...]).tolist())
"""
LAYER = LayerSpec(AttentionSpec(8, 2, 4, rope=RopeSpec(4)), FFNSpec(16))


@pytest.mark.parametrize("mesh", ["tensor=8", "pipeline=2,tensor=4"])
def test_each_process_reads_what_its_devices_hold(mesh: str, tmp_path: Path) -> None:
    model = CausalLM(ModelSpec(31, 16, (Segment((LAYER,), 2),), 64), rngs=nnx.Rngs(0))
    folder = save(tmp_path / "model", model)
    stored = load_file(folder / "model.safetensors")
    both = together(READS, tmp_path, (str(folder), mesh))
    shares: dict[str, list[float]] = {}
    for found in both:
        assert found["progress"][0] == found["progress"][1]
        np.testing.assert_array_equal(np.asarray(found["embed"])[:31], stored["embed.table"])
        for name, tensor in stored.items():
            shares.setdefault(name, []).append(found["touched"].get(name, 0) / tensor.nbytes)
    if mesh == "tensor=8":
        assert shares.pop("embed.table") == [16 / 31, 15 / 31]
        assert shares.pop("head.kernel") == [16 / 31, 15 / 31]
        for name, share in shares.items():
            assert share == [1, 1] if "norm" in name else share == [0.5, 0.5], name
    else:
        for name, share in shares.items():
            assert share == ([1, 0] if "layers.0" in name else [0, 1] if "layers.1" in name else [1, 1]), name


@pytest.fixture
def gather() -> Iterator[Callable[..., tuple[str, ...] | ProcessError]]:
    """A process's part of a roll call: what its `gather` gives."""
    rolls = []

    def one(process: int, at: int, *, losses=None, timeout: float = 10.0, silence: float = 60.0, **me):
        record = {"process": process, "processes": 2, "host": f"host{process}", "jax": "1", **me}
        roll = RollCall(("localhost", at), record, [].append if losses is None else losses.append, silence)
        rolls.append(roll)
        try:
            return roll.gather(timeout)
        except ProcessError as e:
            return e

    yield one
    for roll in rolls:
        roll.close()


def side_by_side(*calls: Callable[[], Any]) -> list[Any]:
    found: list[Any] = [None] * len(calls)

    def one(i: int) -> None:
        found[i] = calls[i]()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"process": 1, "processes": 3}, "process 1 (on host1) has processes=3, process 0 has processes=2"),
        ({"process": 1, "jax": "2"}, "process 1 (on host1) has jax=2, process 0 has jax=1"),
        ({"process": 2, "processes": 2}, "process 2 (on host2) is none of 2"),
    ],
)
def test_processes_of_other_runs_are_named_on_both_sides(gather, second: dict, said: str) -> None:
    at = port()
    for error in side_by_side(lambda: gather(0, at), lambda: gather(at=at, **second)):
        assert isinstance(error, ProcessError)
        assert said in str(error)


def test_two_processes_with_one_number_are_named(gather) -> None:
    at = port()
    calls = [(0, "zero"), (1, "a"), (1, "b")]
    found = side_by_side(*[lambda i=i, host=host: gather(i, at, processes=3, host=host) for i, host in calls])
    for error in found:
        assert re.search("the processes on (a and b|b and a) both are process 1 of 3", str(error))


def test_who_came_is_told_of_who_did_not(gather) -> None:
    at = port()
    found = side_by_side(
        lambda: gather(0, at, timeout=1.5, processes=4), lambda: gather(2, at, timeout=5, processes=4)
    )
    came = "there is process 0 (on host0) and process 2 (on host2) alone"
    for error in found:
        assert f"processes 1 and 3 of 4 did not come within 1.5 s; {came}" in str(error)


def connected(at: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection(("localhost", at))
        except ConnectionRefusedError:
            time.sleep(0.05)


def test_one_that_falls_silent_is_named_after_the_stated_time(gather) -> None:
    at = port()
    losses: list[str] = []

    def mute() -> socket.socket:
        sock = connected(at)
        hello = {"process": 1, "processes": 2, "host": "mute", "jax": "1"}
        sock.sendall(json.dumps(hello).encode() + b"\n")
        return sock

    hosts, sock = side_by_side(lambda: gather(0, at, losses=losses, silence=1.0), mute)
    assert hosts == ("host0", "mute")
    with sock:
        while not losses:
            time.sleep(0.05)
    assert losses == ["process 1 (on mute) has given no sign for 1 s"]


def test_what_is_no_process_of_the_run_is_passed_over(gather) -> None:
    at = port()

    def others() -> tuple[str, ...]:
        with connected(at) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert sock.recv(100) == b""
        return gather(1, at)

    assert side_by_side(lambda: gather(0, at), others) == [("host0", "host1")] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(coordinator="a:1", processes=2), "process must be given too"),
        (dict(coordinator="a:1", processes=2, process=2), "process=2 must be from 0 to processes - 1"),
        (dict(coordinator="a", processes=2, process=1), 'must be "host:port"'),
        (dict(coordinator="a:65535", processes=2, process=1), 'must be "host:port"'),
    ],
)
def test_bad_arguments(given: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hosts.start(**given)


def test_after_the_first_use_of_jax_it_is_too_late() -> None:
    jax.devices()
    with pytest.raises(InputError, match="start must come before"):
        hosts.start("localhost:1234", 2, 0)


def test_one_process_needs_no_others(monkeypatch) -> None:
    monkeypatch.setattr(hosts, "_run", None)
    run = hosts.start(processes=1, process=0)
    assert (run.process, run.processes) == (0, 1)
    with pytest.raises(InputError, match="start was called before"):
        hosts.start()
    monkeypatch.setattr(hosts, "_run", None)
    assert os.environ.get("JAX_COORDINATOR_ADDRESS") is None
    assert hosts.start().processes == 1
