"""Compiles many jobs in processes of their own, so that a fault of the compiler loses one job."""

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinf.aot import topology
from jaxinf.aot.job import Job
from jaxinf.aot.report import Report
from jaxinf.aot.static import dump
from jaxinf.core.record import from_record
from pallas_kernels.errors import JaxinfError, UnsupportedError

TIMEOUT = 300.0


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
      report: None where it was refused.
      kind: why: "vmem", "smem", "hbm" (too large for it), "unsupported", "input", "defect" (an error of ours),
        "crash" or "timeout".
      error: the same as a sentence.
    """

    job: Job
    report: Report | None
    kind: str = ""
    error: str = ""

    def result(self) -> Report:
        """The report.

        Raises:
          JaxinfError: the job was refused; says why.
        """
        if self.report is None:
            raise (UnsupportedError if self.kind in ("unsupported", *_SPACES) else JaxinfError)(self.error)
        return self.report


_SPACES = ("vmem", "smem", "hbm")


def run(
    jobs: Iterable[Job],
    chip: str = "v5e",
    *,
    static: bool = True,
    workers: int = 1,
    timeout: float = TIMEOUT,
    paths: Iterable[str | Path] = (),
    options: str = "",
    keep: str | Path | None = None,
) -> Iterator[Outcome]:
    """Compiles jobs for a slice and yields their outcomes as they come, in any order if workers > 1.

    Args:
      chip: "v5e", ... or "v5e:4x4".
      static: also run the static model, as each job says.
      workers: processes. One holds about 0.5 GiB and keeps one core busy.
      timeout: seconds for one job.
      paths: folders to import jobs from, before all others.
      options: for the compiler (LIBTPU_INIT_ARGS).
      keep: a folder for the compiler's dumps, a folder of which is given to each job in its order: 0, 1, ...

    Raises:
      UnsupportedError: libtpu is not installed.
      InputError: no such chip.
    """
    with Pool(
        chip, static=static, workers=workers, timeout=timeout, paths=paths, options=options, keep=keep
    ) as pool:
        yield from pool.run(jobs)


class Pool:
    """Processes that compile one list of jobs after another: `with Pool(...) as pool: pool.run(jobs)`.

    Takes the arguments of `run`, and raises the same.
    """

    def __init__(
        self,
        chip: str = "v5e",
        *,
        static: bool = True,
        workers: int = 1,
        timeout: float = TIMEOUT,
        paths: Iterable[str | Path] = (),
        options: str = "",
        keep: str | Path | None = None,
    ) -> None:
        where = topology.find(chip)
        topology.compiler()
        folders = [str(p) for p in paths]
        self._open = contextlib.ExitStack()
        self._new = lambda: self._open.enter_context(_Worker(chip, where, static, folders, options))
        self._most, self._timeout, self._keep = max(1, workers), timeout, keep
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Yields the jobs' outcomes as they come, in any order if workers > 1."""
        todo = deque(enumerate(jobs))
        answers: queue.Queue = queue.Queue()
        count = min(self._most, max(1, len(todo)))
        self._workers += [self._new() for _ in range(count - len(self._workers))]
        closing = threading.Event()

        def serve(worker: _Worker) -> None:
            try:
                while not closing.is_set():
                    try:
                        index, job = todo.popleft()
                    except IndexError:
                        return
                    folder = None if self._keep is None else str(Path(self._keep).absolute() / str(index))
                    answers.put(worker.compile(job, self._timeout, folder))
            except BaseException as error:  # handed to the caller, who would wait for ever
                answers.put(error)
            finally:
                answers.put(None)

        serving = self._workers[:count]
        threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in serving]
        for thread in threads:
            thread.start()
        try:
            while count:
                answer = answers.get()
                if answer is None:
                    count -= 1
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    yield answer
        finally:
            closing.set()
            if count:  # whoever stops listening, by Ctrl-C say, does not wait for them
                for worker in serving:
                    worker.kill()
            for thread in threads:
                thread.join()


def compile_one(job: Job, chip: str = "v5e", **options: Any) -> Report:
    """Compiles one job; see `run`.

    Raises:
      JaxinfError: it was refused.
    """
    return next(iter(list(run([job], chip, **options)))).result()


class _Worker:
    """One process, started again after it died."""

    def __init__(self, chip: str, where: topology.Slice, static: bool, paths: list[str], options: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="jaxinf_aot_")
        dumps = os.path.join(self._folder.name, "dumps") if static else None
        if dumps:
            os.mkdir(dumps)
        self._setup = json.dumps({"chip": chip, "dumps": dumps, "paths": paths})
        arguments = f"{dump.flags(dumps) if dumps else ''} {options}".strip()
        here = str(Path(__file__).parents[2])
        python_path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
        self._environment = os.environ | topology.environment(where)
        self._environment |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from a cache leaves no dumps
            "LIBTPU_INIT_ARGS": arguments,
            "PYTHONPATH": python_path,
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        self._log = tempfile.TemporaryFile("w+", dir=self._folder.name)  # noqa: SIM115 (closed with the worker)
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._log.close()
        self._folder.cleanup()

    def compile(self, job: Job, timeout: float, keep: str | None) -> Outcome:
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        task = {"function": job.function, "arguments": dict(job.arguments), "static": job.static, "keep": keep}
        try:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], timeout)[0]:
                self._stop()
                return Outcome(job, None, "timeout", f"the compiler took more than {timeout:.0f} s.")
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = process.wait()
            said = self._said()
            self._stop()
            return Outcome(job, None, "crash", f"the compiler's process ended with code {code}: {said}")
        answer = json.loads(line)
        if "report" in answer:
            return Outcome(job, from_record(Report, answer["report"]))
        return Outcome(job, None, answer["kind"], answer["error"])

    def kill(self) -> None:
        """Ends the process, also while another thread waits for its answer."""
        process = self._process
        if process is not None:
            process.kill()

    def _start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "jaxinf.aot.worker", self._setup]
        self._process = subprocess.Popen(
            command,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        return self._process

    def _said(self) -> str:
        self._log.flush()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read()[-4000:].splitlines() if line.strip()]
        return " ".join(lines[-2:])[:400]

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
