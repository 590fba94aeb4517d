"""Processes of a benchmark: systems under test and the load generator, and what CPU they take."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import numpy as np
import psutil

from benchmarks.load import STARTED, Result
from fusionrec.errors import ServingError
from serve_apps.ingress import free_ports

ROOT = Path(__file__).resolve().parents[2]
START_S = 300.0
"""Patience with a system that starts: Ray, four replicas and their models."""
STOP_S = 60.0
DEGRADED = '"degraded":["'
"""In an answer that lacks a stage."""
ENDED = "ended"
"""In place of the kind of a process that is no more."""

Cpu: TypeAlias = dict[tuple[int, float], tuple[str, float]]
"""A process, by its number and birth → what it is, and CPU seconds, user and system, with those of
its children that it has waited for."""


@dataclass(frozen=True, slots=True)
class Running:
    """A system that answers."""

    url: str
    """Where its requests go."""
    pid: int

    def cpu(self) -> Cpu:
        """What the system's processes have taken so far."""
        root = psutil.Process(self.pid)
        found: Cpu = {}
        for process in (root, *root.children(recursive=True)):
            try:
                times, identity = process.cpu_times(), (process.pid, process.create_time())
            except psutil.NoSuchProcess:
                continue
            try:
                kind = kind_of(process.cmdline())
            except psutil.NoSuchProcess:  # it has ended, and nobody has waited for it
                kind = ENDED
            seconds = times.user + times.system + times.children_user + times.children_system
            found[identity] = kind, seconds
        return found

    def rss_mib(self) -> float:
        """Resident memory of the system's processes; shared pages count in each."""
        root = psutil.Process(self.pid)
        total = 0
        for process in (root, *root.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total / 2**20


def spent(before: Cpu, after: Cpu) -> dict[str, float]:
    """CPU seconds between two looks, by kind of process: the later one, for Ray renames its own.

    A process that ended counts with its parent, where that has waited for it, as a whole; what was
    known of it before is therefore taken off, under ``ended``.
    """
    found: defaultdict[str, float] = defaultdict(float)
    for identity, (kind, seconds) in after.items():
        found[kind] += seconds - before.get(identity, (kind, 0.0))[1]
    for identity in before.keys() - after.keys():
        found[ENDED] -= before[identity][1]
    return dict(found)


def kind_of(words: Sequence[str]) -> str:
    """What a process is, by its command line: a deployment of Serve, an actor or a program."""
    if not words:
        return ENDED
    name = words[0].split()[0]
    if name.startswith("ray::"):
        return name.split(":")[-1].split(".")[0]  # a method may follow, while it runs
    if not Path(name).name.startswith("python"):
        return Path(name).name
    program = [word for word in words[1:] if not word.startswith("-")]
    return Path(program[0]).name if program else Path(name).name


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    [port] = free_ports(1)
    return port


@contextmanager
def system(module: str, *arguments: object, log: Path) -> Iterator[Running]:
    """``python -m module … --port PORT``, from its first answer until the end of the block.

    Raises:
        ServingError: it ended or did not answer; ``log`` says why.
    """
    port = free_port()
    words = [*map(str, arguments), "--port", str(port)]
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        running = Running(f"http://127.0.0.1:{port}/v1/recommend", process.pid)
        _await_answer(process, running.url, log)
        yield running
    finally:
        if process.poll() is None:
            process.terminate()  # SIGINT is ignored by what a shell put in the background
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _await_answer(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            answer = httpx.post(url, json={"k": 1}, timeout=60)
            if answer.is_success and not answer.json()["degraded"]:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise ServingError(f"{' '.join(map(str, process.args))} did not come up: see {log}")  # type: ignore[arg-type]


class LoadProcess:
    """The load generator at work, in a process of its own."""

    def __init__(self, **settings: Any) -> None:
        """Start it; ``settings`` are those of ``benchmarks.load.LoadConfig`` but ``out``."""
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._out = folder / "records.npy"
        plain = {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in settings.items()}
        (folder / "load.json").write_text(json.dumps({**plain, "out": str(self._out)}))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load", "--config", str(folder / "load.json")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self._stdout = self._process.stdout

    def await_start(self) -> None:
        """Until all connections are there.

        Raises:
            ServingError: they could not be made.
        """
        if self._stdout.readline().strip() != STARTED:
            self.result()

    def stop(self) -> None:
        """Let it send nothing more; the answers to what it has sent are awaited."""
        self._process.terminate()

    def result(self) -> Result:
        """Wait for its end.

        Raises:
            ServingError: it failed; its reason is on standard error.
        """
        output = self._stdout.read()
        with self._folder:
            if self._process.wait():
                raise ServingError("the load generator failed: its reason stands above")
            records = np.load(self._out, allow_pickle=False)
        self._stdout.close()
        return Result(records, float(json.loads(output.splitlines()[-1])["cpu_s"]))


def load(url: str, requests: Path, marks: Sequence[str] = (), **settings: Any) -> Result:
    """Run the load generator to its end."""
    return LoadProcess(url=url, requests=requests, marks=list(marks), **settings).result()
