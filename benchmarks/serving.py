"""``make bench-serving``: the endpoint beside the bare pipeline and two ways to serve it.

(a) the bare pipeline in a loop, (b) one hand-written FastAPI process with micro-batching, (c) the
obvious composition on Ray Serve, (d) the endpoint; on the same two bundles, the same distinct
requests and the same cores, one after the other in every repetition. ``docs/benchmarks.md`` says
how and why.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from benchmarks.harness import report
from benchmarks.harness.application import STAGES, write_application
from benchmarks.harness.machine import describe
from benchmarks.harness.material import PLAIN, RERANKED, two_bundles, write_requests
from benchmarks.harness.processes import DEGRADED, Running, load, spent, system
from benchmarks.harness.report import Sample
from benchmarks.load import Arrivals, Result
from fusionrec.bundles.store import BundleStore
from fusionrec.config import JobConfig, parse
from fusionrec.errors import ServingError
from jobs.entry import run

PATIENCE_S = 120
"""No request is given up, or answered without a stage, before that."""
TOP_RATE = 800
"""Requests/s that the file of requests lasts for."""
MAX_BATCH = 32
SETTLING_S = 10.0
"""After its first answer, until a system has nothing left to do of its start."""
LEAST = 150
"""Requests of a loop at least, for its rate and its percentiles, as far as time allows."""
LONGER = 4
"""Times that a loop may be longer for that."""


class ServingBenchmark(JobConfig):
    """Measure the endpoint beside its peers."""

    bundles: Path | None = None
    """Folder of bundles; by default a pipeline is made from the synthetic catalogue."""
    out: Path = Path("artifacts/benchmarks")
    """Where bundles, requests, logs and the report go."""
    connections: tuple[int, ...] = Field(default=(1, 8, 32, 128), min_length=1)
    """Concurrent connections to measure at."""
    replicas: tuple[int, ...] = Field(default=(1, 2, 4), min_length=1)
    """Replicas of each stage of the endpoint; more than there are cores are left out."""
    kinds: tuple[str, ...] = (PLAIN, RERANKED)
    """Bundles: plain, reranked."""
    systems: str = "abcd"
    """Which of the four to measure."""
    repetitions: int = Field(default=3, ge=1)
    """Rounds over all systems."""
    duration_s: float = Field(default=6.0, gt=0)
    """Seconds of each loop; up to four times as many where few requests are answered in them."""
    share: float = Field(default=0.8, gt=0, lt=1)
    """Rate of the open loop, as a share of what the closed loop reached."""
    arrivals: Arrivals = Arrivals.CONSTANT
    """How the open loop's requests come: constant or poisson."""
    seed: int = Field(default=0, ge=0)
    """Of the requests."""
    quick: bool = False
    """One round of 1 and 32 connections, in a few minutes: whether it works, not how fast."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to serve a bundle."""

    letter: str
    name: str
    module: str
    arguments: tuple[object, ...]


def contenders(config: ServingBenchmark, folder: Path) -> list[Contender]:
    """Every system in the order of a round; the variants of (a) come from :func:`bare`."""
    cores = len(os.sched_getaffinity(0))
    peer, obvious = "benchmarks.peers.fastapi_batched", "benchmarks.peers.obvious"
    found = [Contender("b", f"FastAPI, 1 × {cores} threads", peer, ("--threads", cores))]
    if cores > 1 and not config.quick:
        found.append(Contender("b", f"FastAPI, {cores} × 1 thread", peer, ("--workers", cores)))
    for replicas in {1, 1 if config.quick else cores}:
        words = ("--replicas", replicas, "--threads", max(1, cores // replicas))
        found.append(Contender("c", f"obvious, {replicas} a stage", obvious, words))
    for replicas, both in itertools.product(config.replicas, (False, True)):
        if replicas <= cores:
            file = write_application(
                folder / f"recommend-{replicas}{'-two' if both else ''}.yaml",
                dict.fromkeys(STAGES, replicas),
                {"stage_timeout_s": PATIENCE_S},
                PATIENCE_S,
                model_threads=max(1, cores // replicas),
                lone_model_threads=cores,
                embed_in_retriever=both,
            )
            name = f"endpoint, {replicas} a {'stage of two' if both else 'stage'}"
            found.append(Contender("d", name, "serve_apps.run", ("--application", file)))
    return [each for each in found if each.letter in config.systems]


def bare(
    config: ServingBenchmark, kind: str, bundles: Path, requests: Path, repetition: int
) -> Iterator[Sample]:
    """(a): one thread; all cores as threads of one process; all cores as processes."""
    cores = len(os.sched_getaffinity(0))
    variants = {"1 thread": (1, 1)}
    if cores > 1:
        variants |= {f"{cores} threads": (1, cores), f"{cores} processes": (cores, 1)}
    for name, (workers, threads) in variants.items():
        for connections in config.connections:
            if connections < workers:
                continue  # as many requests under way as the others have
            settings = {
                "bundles": bundles,
                "requests": requests,
                "batch": min(MAX_BATCH, math.ceil(connections / workers)),
                "workers": workers,
                "threads": threads,
                "duration-s": config.duration_s,
            }
            words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
            command = [sys.executable, "-m", "benchmarks.peers.bare", *words]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
            if done.returncode:
                raise ServingError("the bare pipeline failed: its reason stands above")
            found = json.loads(done.stdout.splitlines()[-1])
            p50, p95, p99 = np.percentile(found["batch_ms"], (50, 95, 99))
            yield Sample(
                kind=kind,
                letter="a",
                system=f"bare, {name}",
                connections=connections,
                repetition=repetition,
                rate=found["rate"],
                offered=found["rate"],
                p50_ms=p50,
                p95_ms=p95,
                p99_ms=p99,
                cpu_ms_by={"bare": found["cpu_ms"]},
                generator_us=0.0,
                failed=0,
                degraded=0,
                rss_mib=0.0,
            )


class Round:
    """One system, up and measured at every number of connections."""

    def __init__(self, config: ServingBenchmark, requests: Path, running: Running) -> None:
        self._config = config
        self._requests = requests
        self._running = running
        self._used = 0
        """Requests sent so far: none is sent twice to the same process."""
        time.sleep(SETTLING_S)
        before = running.cpu()
        time.sleep(config.duration_s)
        self._idle = sum(spent(before, running.cpu()).values()) / config.duration_s

    def _load(self, connections: int, duration_s: float, rate: float | None = None) -> Result:
        result = load(
            self._running.url,
            self._requests,
            marks=(DEGRADED,),
            first=self._used,
            connections=connections,
            duration_s=duration_s,
            rate=rate,
            arrivals=self._config.arrivals,
            timeout_s=PATIENCE_S,
            headers=[f"x-request-timeout-seconds: {PATIENCE_S}"],
            seed=self._config.seed,
        )
        self._used += len(result.records)
        return result

    def _enough_s(self, rate: float) -> float:
        """How long a loop takes in which so many requests a second are answered."""
        shortest = self._config.duration_s
        return min(max(shortest, LEAST / rate), LONGER * shortest) if rate else shortest

    def measure(self, contender: Contender, kind: str, connections: int, number: int) -> Sample:
        """Warm up, find the capacity, then ask at a share of it."""
        config = self._config
        warm = self._load(connections, config.duration_s / 4)
        before = self._running.cpu()
        closed = self._load(connections, self._enough_s(warm.rate))
        each_ms = 1e3 / max(1, len(closed.answered))
        cpu_ms_by = {
            name: seconds * each_ms for name, seconds in spent(before, self._running.cpu()).items()
        }
        capacity = closed.capacity(connections)
        if not capacity:
            raise ServingError(f"{contender.name} answered nothing: {dict(closed.counts)}")
        rate = capacity * config.share
        opened = self._load(connections, self._enough_s(rate), rate)
        p50, p95, p99 = np.percentile(opened.latencies_ms(), (50, 95, 99))
        return Sample(
            kind=kind,
            letter=contender.letter,
            system=contender.name,
            connections=connections,
            repetition=number,
            rate=capacity,
            offered=rate,
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            cpu_ms_by=cpu_ms_by,
            generator_us=opened.cpu_s / len(opened.records) * 1e6,
            failed=sum(len(r.records) - len(r.answered) for r in (closed, opened)),
            degraded=closed.marked(0) + opened.marked(0),
            rss_mib=self._running.rss_mib(),
            idle=self._idle,
        )


def measure(config: ServingBenchmark, kind: str, store: BundleStore) -> Iterator[Sample]:
    """All rounds on one bundle."""
    seconds = len(config.connections) * config.duration_s * (1.25 + config.share)
    requests = config.out / f"requests-{kind}.jsonl"
    write_requests(store.current(), requests, math.ceil(seconds * TOP_RATE), config.seed)
    for repetition in range(config.repetitions):
        if "a" in config.systems:
            for sample in bare(config, kind, store.directory, requests, repetition):
                _say(sample)
                yield sample
        for contender in contenders(config, config.out):
            log = config.out / f"{contender.letter}.log"
            words = ("--bundles", store.directory, *contender.arguments)
            with system(contender.module, *words, log=log) as running:
                one = Round(config, requests, running)
                for connections in config.connections:
                    sample = one.measure(contender, kind, connections, repetition)
                    _say(sample)
                    yield sample


def _say(sample: Sample) -> None:
    sys.stdout.write(
        f"{sample.kind:9} {sample.letter} {sample.system:24} {sample.connections:4} connections: "
        f"{sample.rate:7.1f}/s, p50 {sample.p50_ms:6.1f} ms, p99 {sample.p99_ms:6.1f} ms, "
        f"{sample.cpu_ms:5.1f} ms CPU, failed {sample.failed}, degraded {sample.degraded}\n"
    )
    sys.stdout.flush()


def main() -> None:
    """Parse, make bundles, measure, report; exit status 1 where a claim does not hold."""
    config = parse(ServingBenchmark)
    if config.quick:
        quick = {"connections": (1, 32), "repetitions": 1, "duration_s": 3.0, "replicas": (1, 2)}
        config = config.model_copy(update=quick)
    config.out.mkdir(parents=True, exist_ok=True)
    machine = describe()
    stores = two_bundles(config.bundles, config.out)
    samples = [sample for kind in config.kinds for sample in measure(config, kind, stores[kind])]
    path, claims = report.write(config.out, samples, machine, config)
    sys.stdout.write(f"\n{path.read_text(encoding='utf-8')}\nreport: {path}\n")
    sys.exit(0 if report.keepers(claims) or not claims else 1)


if __name__ == "__main__":
    run(main)
