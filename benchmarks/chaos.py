"""``make chaos``: what users notice when parts of the endpoint die, hang or are replaced.

An endpoint with two replicas of everything is asked at a constant rate while one fault after the
other happens to it: SIGKILL of a replica of each stage, of the controller, of a gateway and of the
proxy, slow rerankers, a swap of the bundle and back, a burst of three times what it can do. With
HAProxy and with Serve's own proxy where both are asked for. Exit status 1 where a promise is
broken. ``docs/benchmarks.md`` says how to read the table.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from benchmarks.harness.machine import describe, today
from benchmarks.harness.material import RERANKED, two_bundles, write_requests
from benchmarks.harness.processes import free_port, load
from benchmarks.harness.tables import table
from fusionrec.bundles.store import BundleStore
from fusionrec.config import JobConfig, parse
from fusionrec.errors import ServingError
from jobs.entry import run
from serve_apps.ingress import SWITCH, prepare_ingress, stop_haproxy

if TYPE_CHECKING:  # Ray reads the environment when it is imported: see measure
    from benchmarks.harness.experiment import Scene
    from benchmarks.harness.faults import Fault

REQUESTS = 30_000
REPLICAS = 2
CONNECTIONS = 8
"""Of the closed loop that says what the endpoint can do; few: more would wait past deadlines."""
COLUMNS = (
    "fault",
    "requests/s",
    "sent",
    "outcomes",
    "5xx",
    "in flight",
    "client calls",
    "client failures",
    "degraded",
    "p50 / p99 before, ms",
    "during",
    "after",
    "last error after, s",
    "full strength after, s",
    "promises",
)


class ChaosConfig(JobConfig):
    """Break parts of an endpoint under load and count what users notice."""

    bundles: Path | None = None
    """Folder of bundles; by default a pipeline is made from the synthetic catalogue."""
    out: Path = Path("artifacts/benchmarks")
    """Where bundles, requests and the report go."""
    proxies: tuple[Literal["haproxy", "python"], ...] = ("haproxy", "python")
    """Proxies to run behind; behind the second, only gateway and proxy are killed."""
    only: str = ""
    """Faults to run: those whose name contains this."""
    rate: float | None = Field(default=None, gt=0)
    """Requests/s of the pinger; by default a fifth of what it answers in a closed loop."""
    client_rate: float | None = Field(default=None, gt=0)
    """Calls/s of our client, one after the other; by default three quarters of the pinger's."""
    before_s: float = Field(default=10.0, gt=0)
    """Seconds of load before a fault."""
    after_s: float = Field(default=8.0, gt=0)
    """Seconds of load after recovery."""
    patience_s: float = Field(default=90.0, gt=0)
    """Longest recovery."""
    accepted_s: float = Field(default=6.0, gt=0)
    """Bound of the p99 of accepted requests under overload: the default deadline and a little."""
    seed: int = Field(default=0, ge=0)
    """Of the requests."""
    quick: bool = False
    """Short loads and, unless bundles are given, models of one layer: whether the harness works."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table, ready to be sent between processes."""

    cells: tuple[str, ...]
    broken: bool


def measure(config: ChaosConfig, proxy: str) -> list[Row]:
    """All faults behind one proxy, in a process whose Ray has read the environment afresh.

    Raises:
        ServingError: the process ended early; its reason stands above.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(config, proxy, sender))
    process.start()
    sender.close()
    rows = []
    while True:
        try:
            rows.append(receiver.recv())
        except EOFError:
            break
    process.join()
    if process.exitcode:
        raise ServingError(f"the faults behind {proxy} were not all tried")
    return rows


def _measure(config: ChaosConfig, proxy: str, out: Connection) -> None:
    try:
        run(lambda: _send(_rows(config, proxy), out))
    finally:
        stop_haproxy()


def _send(rows: Iterator[Row], out: Connection) -> None:
    for row in rows:
        sys.stdout.write(f"{' | '.join(row.cells)}\n")
        sys.stdout.flush()
        out.send(row)


def _rows(config: ChaosConfig, proxy: str) -> Iterator[Row]:
    os.environ[SWITCH] = str(int(proxy == "haproxy"))
    if prepare_ingress() != (proxy == "haproxy"):
        raise ServingError("there is no HAProxy here: leave it out of --proxies")
    from ray import serve

    from benchmarks.harness import faults
    from benchmarks.harness.application import STAGES, write_application
    from benchmarks.harness.experiment import Scene, counted, observe
    from jobs import cluster
    from serve_apps.deploy import start

    store = two_bundles(config.bundles, config.out, tiny=config.quick)[RERANKED]
    requests = config.out / "requests-chaos.jsonl"
    write_requests(store.current(), requests, REQUESTS, config.seed)
    application = write_application(
        config.out / "recommend-chaos.yaml",
        dict.fromkeys((*STAGES, "Gateway"), REPLICAS),
        embed_in_retriever=False,  # every stage can be lost by itself
    )
    with cluster.start():
        address = start(store.directory, free_port(), config=application)
        rate, client_rate = _rates(config, f"{address}/v1/recommend", requests)
        scene = Scene(
            address=address,
            requests=requests,
            rate=rate,
            client_rate=client_rate,
            before_s=config.before_s,
            after_s=config.after_s,
            patience_s=config.patience_s,
        )
        for fault in _faults(config, proxy, store, scene):
            if config.only not in fault.name:
                continue
            seen = observe(scene, fault.do, fault.marks)
            broken = fault.breaches(seen)
            cells = (
                fault.name,
                f"{rate:.1f} + {client_rate:.1f}",
                str(len(seen.result.records)),
                ", ".join(f"{name}: {n}" for name, n in seen.counts.items()),
                str(seen.server_errors),
                str(seen.in_flight),
                str(seen.client_calls),
                f"{len(seen.client_failures)} {counted(seen.client_failures)}".strip(),
                str(seen.result.marked(0)),
                *(f"{p50:.0f} / {p99:.0f}" for p50, p99 in seen.latencies_ms()),
                _seconds(seen.last_error_s),
                _seconds(seen.recovery_s),
                "kept" if not broken else "**broken**: " + "; ".join(broken),
            )
            yield Row(cells, bool(broken))
            faults.await_full_strength(config.patience_s)
        serve.shutdown()  # type: ignore[no-untyped-call]


def _rates(config: ChaosConfig, url: str, requests: Path) -> tuple[float, float]:
    """Requests/s of pinger and client: what is asked for, or a share of what is possible here."""
    rate = config.rate
    if rate is None:
        rate = load(url, requests, connections=CONNECTIONS, duration_s=5).rate / 5
    return rate, config.client_rate or 0.75 * rate


def _faults(config: ChaosConfig, proxy: str, store: BundleStore, scene: Scene) -> Iterator[Fault]:
    """In an order in which the worst comes last; each is made when the one before is over."""
    from benchmarks.harness import faults
    from benchmarks.harness.application import STAGES

    if proxy == config.proxies[0]:
        yield from map(faults.stage_replica, STAGES)
        yield faults.controller()
        yield faults.slow_reranker()
        yield faults.every_reranker()
        before = store.current().name
        yield faults.swap(store)
        if store.current().name != before:
            yield faults.rollback(store, before)
    yield faults.gateway()
    yield faults.proxy(proxy)
    if proxy == config.proxies[0]:
        url = f"{scene.address}/v1/recommend"
        closed = load(url, config.out / "requests-chaos.jsonl", connections=64, duration_s=5)
        yield faults.overload(closed.rate, 10.0, config.accepted_s)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def write(config: ChaosConfig, rows: Sequence[Row], machine: str) -> Path:
    """The report; returns its path."""
    path = config.out / f"chaos-{today()}.md"
    quick = "Short loads, models of one layer (--quick). "
    if config.bundles is not None:
        quick = "Short loads (--quick). "
    size = quick if config.quick else ""
    path.write_text(
        f"# Faults under load, {today()}\n\n{machine}\n\n{size}Two replicas of gateway, embedder, "
        "retriever and reranker. *Requests/s*: of the pinger, without retries, and at most of the "
        f"client, with its retries. Proxies: {', '.join(config.proxies)}.\n\n"
        + table(COLUMNS, [row.cells for row in rows]),
        encoding="utf-8",
    )
    return path


def main() -> None:
    """Parse, break, report; exit status 1 where a promise was broken."""
    config = parse(ChaosConfig)
    if config.quick:
        config = config.model_copy(update={"before_s": 4.0, "after_s": 3.0})
    config.out.mkdir(parents=True, exist_ok=True)
    machine = describe()
    rows = [row for proxy in config.proxies for row in measure(config, proxy)]
    path = write(config, rows, machine)
    sys.stdout.write(f"\n{path.read_text(encoding='utf-8')}\nreport: {path}\n")
    sys.exit(int(any(row.broken for row in rows)))


if __name__ == "__main__":
    run(main)
