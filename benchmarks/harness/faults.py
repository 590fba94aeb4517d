"""The faults of ``make chaos``: what is done to a running endpoint, and what it is held to."""

from __future__ import annotations

import os
import select
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from benchmarks.harness import actors
from benchmarks.harness.experiment import Damage, Happening, Scene, percentiles
from benchmarks.harness.processes import DEGRADED, LoadProcess
from fusionrec.bundles.manifest import MANIFEST
from fusionrec.bundles.store import BundleStore
from fusionrec.client import Client
from fusionrec.errors import RequestFailed, ServingError
from fusionrec.fusion.model import LAMBDARANK, Fusion

SPIKE = 2.0
"""How much higher the p99 may be during a swap than before it."""
SWAP_S = 2.0
"""Time from the order that counts as the swap at least: a flip may be over between two requests."""
SLOW_S, SLOW_PERIOD_S, SLOW_SHARE = 8.0, 0.2, 0.05
"""A slow stage runs for a twentieth of each fifth of a second: about twenty times slower. With ten,
a fifth of the load that it can bear was still answered within the default deadline."""
QUIET_S = 3.0
"""Time without an error after which an overload counts as over."""

END_S = 30.0
"""Patience with a process that was killed."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens to an endpoint."""

    name: str
    do: Callable[[Scene], Damage]
    """Does it."""
    breaches: Callable[[Happening], list[str]]
    """What of its promises the endpoint has broken."""
    marks: tuple[str, ...] = (DEGRADED,)


def stage_replica(deployment: str) -> Fault:
    """SIGKILL of one replica of a stage: nobody sees an error."""

    def do(_: Scene) -> Damage:
        return _kill(actors.find().replicas[deployment][:1])

    return Fault(f"SIGKILL of one {deployment.lower()}", do, _nobody_notices)


def controller() -> Fault:
    """SIGKILL of the Serve controller: nobody sees an error."""
    return Fault(
        "SIGKILL of the controller", lambda _: _kill(actors.find().controller), _nobody_notices
    )


def gateway() -> Fault:
    """SIGKILL of one gateway: at most what it was working on fails, and not for our client."""
    return Fault(
        "SIGKILL of one gateway",
        lambda _: _kill(actors.find().replicas["Gateway"][:1]),
        _only_what_was_in_flight,
    )


def proxy(name: str) -> Fault:
    """SIGKILL of what accepts connections: likewise; until it is back, they are turned away."""

    def do(scene: Scene) -> Damage:
        damage = _kill(actors.find().proxies)
        return replace(damage, recovered=lambda: damage.recovered() and _answers(scene))

    return Fault(f"SIGKILL of the proxy ({name})", do, _only_what_it_had)


def every_reranker() -> Fault:
    """SIGKILL of all rerankers: answers without them, no errors."""
    return Fault(
        "SIGKILL of all rerankers",
        lambda _: _kill(actors.find().replicas["Reranker"]),
        _degraded_rather_than_failed,
    )


def slow_reranker() -> Fault:
    """All rerankers twenty times slower for a while: answers without them, no errors."""

    def do(_: Scene) -> Damage:
        rerankers = actors.find().replicas["Reranker"]
        slow = threading.Thread(target=_slow_down, args=(rerankers,))
        slow.start()
        return _begun(lambda: not slow.is_alive() and actors.at_full_strength())

    return Fault("slow rerankers", do, _degraded_rather_than_failed)


def swap(store: BundleStore, spike: float = SPIKE) -> Fault:
    """Another bundle becomes current: no error, no spike, and all answers from it in the end.

    Args:
        store: what the endpoint serves from.
        spike: how much higher the p99 may be meanwhile than before.
    """
    old = store.current().name
    new = another_bundle(store)

    def do(scene: Scene) -> Damage:
        damage = _begun(lambda: _answers(scene, new))
        store.promote(new, "chaos")
        return damage

    return Fault("swap of the bundle", do, partial(_smooth, spike), (DEGRADED, old, new))


def rollback(store: BundleStore, old: str) -> Fault:
    """The bundle of before a swap becomes current again: likewise."""
    new = store.current().name

    def do(scene: Scene) -> Damage:
        damage = _begun(lambda: _answers(scene, old))
        store.rollback()
        return damage

    return Fault("rollback of the bundle", do, partial(_smooth, SPIKE), (DEGRADED, new, old))


def overload(capacity: float, burst_s: float, bound_s: float) -> Fault:
    """A burst of three times what the endpoint can do: 503 or an answer in bounded time.

    Args:
        capacity: requests/s that it can do.
        burst_s: length of the burst.
        bound_s: p99 that accepted requests are held to.
    """
    burst: list[LoadProcess] = []

    def do(scene: Scene) -> Damage:
        process = LoadProcess(
            url=f"{scene.address}/v1/recommend",
            requests=scene.requests,
            connections=512,
            rate=3 * capacity,
            duration_s=burst_s,
            timeout_s=scene.timeout_s,
        )
        burst.append(process)
        process.await_start()
        ends = time.monotonic() + burst_s
        return _begun(lambda: time.monotonic() > ends and _answers_whole(scene))

    def breaches(seen: Happening) -> list[str]:
        found = []
        [sent] = [process.result() for process in burst]
        for result in (seen.result, sent):
            strange = set(result.counts) - {200, 503}
            if strange:
                found.append(f"outcomes beside 200 and 503: {sorted(strange)}")
        accepted_ms = np.concatenate([seen.during_ms(), sent.latencies_ms()])
        _, p99 = percentiles(accepted_ms)
        if not len(accepted_ms):
            found.append("nothing was accepted")
        elif p99 > bound_s * 1e3:
            found.append(f"p99 of what is accepted is {p99:.0f} ms")
        if seen.recovery_s is None:
            found.append("no recovery")
        return found

    return Fault(f"overload, {3 * capacity:.0f} requests/s", do, breaches)


def await_full_strength(patience_s: float) -> None:
    """Wait until every replica runs.

    Raises:
        ServingError: they do not within ``patience_s``.
    """
    deadline = time.monotonic() + patience_s
    while not actors.at_full_strength():
        if time.monotonic() > deadline:
            raise ServingError(f"the endpoint is not at full strength after {patience_s:.0f} s")
        time.sleep(0.2)


def another_bundle(store: BundleStore) -> str:
    """Add a bundle that differs from the current one in its weights; returns its id."""
    pipeline = store.directory / ".another"
    shutil.rmtree(pipeline, ignore_errors=True)
    shutil.copytree(store.current(), pipeline, copy_function=os.link)
    try:
        (pipeline / MANIFEST).unlink()
        shutil.rmtree(pipeline / LAMBDARANK, ignore_errors=True)  # it is tied to the weights
        fusion = Fusion.load(pipeline / "fusion.json")
        scales = {name: scale * 1.01 for name, scale in fusion.scales.items()}
        fusion.model_copy(update={"scales": scales}).save(pipeline / "fusion.json")
        return store.add(pipeline).id
    finally:
        shutil.rmtree(pipeline)


def _begun(recovered: Callable[[], bool]) -> Damage:
    """Of what begins now and ends nothing."""
    now = time.monotonic()
    return Damage(now, now, recovered)


def _kill(pids: Sequence[int]) -> Damage:
    """SIGKILL, and wait until all of their threads are gone and their sockets closed."""
    assert pids, "there is nothing to kill"
    gone = set(pids)
    with ExitStack() as stack:
        handles = [_handle(pid, stack) for pid in pids]
        began_s = time.monotonic()
        for handle in handles:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        for handle in handles:
            ended, _, _ = select.select([handle], [], [], END_S)
            assert ended, f"{pids} go on after SIGKILL"
        done_s = time.monotonic()
    return Damage(
        began_s, done_s, lambda: not gone & actors.find().all() and actors.at_full_strength()
    )


def _handle(pid: int, stack: ExitStack) -> int:
    """A file that can be read when the process has ended, whoever waits for it."""
    handle = os.pidfd_open(pid)
    stack.callback(os.close, handle)
    return handle


def _slow_down(pids: Sequence[int]) -> None:
    until = time.monotonic() + SLOW_S
    try:
        while time.monotonic() < until:
            _signal(pids, signal.SIGSTOP)
            time.sleep(SLOW_PERIOD_S * (1 - SLOW_SHARE))
            _signal(pids, signal.SIGCONT)
            time.sleep(SLOW_PERIOD_S * SLOW_SHARE)
    finally:
        _signal(pids, signal.SIGCONT)


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        if actors.is_alive(pid):
            with suppress(ProcessLookupError):  # it ends just now
                os.kill(pid, number)


def _answers(scene: Scene, bundle: str | None = None) -> bool:
    """Whether the endpoint answers, and does so from ``bundle`` where that is given."""
    with Client(scene.address, retries=0) as client:
        try:
            return client.bundle().bundle == bundle or bundle is None
        except RequestFailed:
            return False


def _answers_whole(scene: Scene) -> bool:
    with Client(scene.address, retries=0, timeout_s=QUIET_S) as client:
        try:
            return not client.recommend(k=1).degraded
        except RequestFailed:
            return False


def _common(seen: Happening) -> list[str]:
    found = []
    if seen.recovery_s is None:
        found.append("not at full strength in time")
    if seen.client_failures:
        found.append(f"{len(seen.client_failures)} calls of the client failed")
    return found


def _nobody_notices(seen: Happening) -> list[str]:
    return [f"{seen.errors} errors"] * (seen.errors > 0) + _common(seen)


def _only_what_was_in_flight(seen: Happening) -> list[str]:
    failed = seen.errors_not_in_flight()
    return [f"{failed} errors of requests that were not in flight"] * (failed > 0) + _common(seen)


def _only_what_it_had(seen: Happening) -> list[str]:
    """As above, beside what finds no proxy, or a new one that knows no routes yet."""
    failed = seen.errors_not_in_flight(seen.turned_away())
    return [f"{failed} errors of requests that were not in flight"] * (failed > 0) + _common(seen)


def _degraded_rather_than_failed(seen: Happening) -> list[str]:
    found = _nobody_notices(seen)
    if not seen.result.marked(0):
        found.append("no answer was degraded: nothing was shown")
    return found


def _smooth(spike: float, seen: Happening) -> list[str]:
    found = _nobody_notices(seen)
    (_, before), _, _ = seen.latencies_ms()
    _, during = percentiles(seen.during_ms(at_least_s=SWAP_S))
    if not during <= spike * before:  # nor where one of them is not a number
        found.append(f"p99 {during:.0f} ms during, {before:.0f} ms before")
    records = seen.result.records
    last = records[records["due"] == records["due"].max()]["marks"]
    if not (last & 0b100).all():
        found.append("the last answer is not from the new bundle")
    if seen.result.marked(1) + seen.result.marked(2) != len(seen.result.answered):
        found.append("answers from neither bundle, or from both")
    return found
