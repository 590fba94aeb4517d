"""Trials whose workers need CPUs, or GPUs, of their own: how many have room, and who drives them.

Each run of Ray Train reserves them by itself once it runs: were there more than have room, each
could hold a part of what another waits for, for ever. Workers are alike, so that as many trials
have room as the places of all nodes are enough for, whichever worker is put where.

Nor does a run give back what it reserved when its driver is killed, as long as the job lives: what
is to see to it asks Ray's dashboard, which a Ray of one machine does not have. Tune kills the
actors of trials that take long to stop; so another actor drives the runs, and ends them.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ray

from fusionrec.errors import ConfigError

_DEFAULT_CPUS = 2


class Room(NamedTuple):
    """What has room."""

    cpus: int
    """Of a worker."""
    trials: int
    """At a time."""


def room(num_workers: int, cpus: int | None = None, trials: int | None = None) -> Room:
    """How trials of ``num_workers`` workers fit the cluster that this process is connected to.

    A worker takes a GPU, too, where the cluster has any.

    Args:
        num_workers: of a trial.
        cpus: of a worker; by default two, or one where a trial has no room otherwise.
        trials: at a time, at most; by default as many as have room.

    Raises:
        ConfigError: not one trial has room.
    """
    return room_on(ray.nodes(), num_workers, cpus, trials)  # type: ignore[no-untyped-call]


def room_on(
    nodes: Iterable[Mapping[str, Any]],
    num_workers: int,
    cpus: int | None = None,
    trials: int | None = None,
) -> Room:
    """The same of ``nodes``, as ``ray.nodes()`` tells of them."""
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    on_gpus = any(each.get("GPU", 0) >= 1 for each in resources)

    def places(cpus: int) -> int:
        on_each = (
            min(each.get("CPU", 0) // cpus, each.get("GPU", 0) if on_gpus else math.inf)
            for each in resources
        )
        return sum(map(int, on_each))

    if cpus is None:
        cpus = _DEFAULT_CPUS if places(_DEFAULT_CPUS) >= num_workers else 1
    found = places(cpus) // num_workers
    if not found:
        fewer = {c: places(c) for c in range(cpus, 0, -1) if places(c)}
        remedies = [f"num_workers to {most} with cpus = {c}" for c, most in fewer.items()][:1]
        remedies += [f"cpus to {c}" for c, most in fewer.items() if most >= num_workers][:1]
        a_gpu = ", and a GPU," if on_gpus else ""
        raise ConfigError(
            f"a trial of num_workers = {num_workers} with cpus = {cpus}{a_gpu} each would never "
            f"start on this cluster, which has room for {places(cpus)} such workers: "
            f"{'set ' + ', or '.join(remedies) if remedies else 'give it CPUs'}"
        )
    return Room(cpus, min(trials or found, found))


class Runs:
    """The runs of all trials, each in a thread; its methods are called from several."""

    @classmethod
    def actor(cls, trials: int) -> Any:
        """One for so many trials at a time, which goes with the process that calls this."""
        # Of each, a call that waits for what is measured, one for its end, two of workers.
        library: Any = ray  # whose annotations know functions alone
        return library.remote(num_cpus=0, max_concurrency=4 * trials + 4)(cls).remote()

    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}

    def start(self, name: str, fit: Callable[[], object]) -> None:
        """Begin to ``fit``, which waits until its workers are gone."""
        run = self._runs[name] = _Run(fit)
        run.thread.start()

    def say(self, name: str, said: object) -> None:
        """What the workers measured."""
        self._runs[name].said.put(said)

    def hear(self, name: str) -> Any:
        """The next that was said; in the end None, or the error that it ended with."""
        return self._runs[name].said.get()

    def stopped(self, name: str) -> bool:
        """Whether the workers should end."""
        return self._runs[name].stopped.is_set()

    def stop(self, name: str) -> None:
        """End it, and wait until its workers are gone: other trials need their place."""
        run = self._runs[name]
        run.stopped.set()
        run.thread.join()

    def close(self) -> None:
        """End all."""
        runs = list(self._runs)
        for name in runs:
            self._runs[name].stopped.set()
        for name in runs:
            self.stop(name)


class _Run:
    def __init__(self, fit: Callable[[], object]) -> None:
        self.said: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._fit, args=(fit,), daemon=True)

    def _fit(self, fit: Callable[[], object]) -> None:
        ended = None
        try:
            fit()
        except Exception as error:  # told to who waits
            ended = error
        self.said.put(ended)
