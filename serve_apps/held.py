"""What a replica of a stage holds: its part of each bundle that gateways ask for.

Model code runs in the one worker thread of a replica, so that its event loop stays free for health
checks and cancellation; more throughput comes from more replicas. What can do without a text model
in the same replica has a spare thread, and another bundle is loaded beside those that are held in
one of its own, while these go on answering.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fusionrec.allocator import keep_memory
from fusionrec.bundles.store import BundleStore
from fusionrec.data.histories import Histories
from fusionrec.errors import BundleCorrupt, BundleError
from fusionrec.residence import read_in
from serve_apps.devices import hide_unassigned_gpus

if TYPE_CHECKING:  # who deploys the stages need not import torch; their replicas do, in Held
    from fusionrec.serving.pipeline import Pipeline

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

_LOADING_NICENESS = 5
"""Linux gives a thread of this niceness a third of the time of one that answers requests."""
_TURN = Path(tempfile.gettempdir()) / f"fusionrec-loading-{os.getuid()}"
"""A file that the replica which loads a bundle has locked."""
_IN_USE_S = 5.0
"""A bundle that was asked for so recently is in use."""


class BundleNotHeld(BundleError):
    """This replica does not hold the bundle that is asked for; another one may."""


class Held:
    """The part of each bundle that a replica holds, by bundle id."""

    def __init__(
        self,
        stage: str,
        bundles: str,
        bundle: str | None,
        threads: int,
        lone_threads: int | None,
        *,
        embeds: bool = False,
    ) -> None:
        """Verify the bundle of the folder ``bundles``, load what ``stage`` needs and warm up.

        Args:
            stage: name of the stage.
            bundles: folder of a bundle store.
            bundle: id; by default the one that is current now.
            threads: of the model.
            lone_threads: of the model for a batch that has the cores to itself; by default as many.
            embeds: whether to hold the embedder's part as well.

        Raises:
            BundleCorrupt: nothing of it is loaded.
        """
        keep_memory()
        hide_unassigned_gpus()
        self._stage = stage
        self._embeds = embeds
        self._threads = threads
        self._lone_threads = lone_threads or threads
        self._store = BundleStore(Path(bundles))
        self._pipelines: dict[str, Pipeline] = {}
        self._used: dict[str, float] = {}
        """When a bundle was asked for last."""
        self._loading: dict[str, asyncio.Future[Pipeline]] = {}
        self._worker = ThreadPoolExecutor(1, f"{stage}-model")
        self._spare = ThreadPoolExecutor(1, f"{stage}-spare")
        self._loader = ThreadPoolExecutor(1, f"{stage}-loader", step_back)
        first, pipeline = self._worker.submit(load_first, self._store, bundle, self._load).result()
        self._pipelines[first] = pipeline

    async def hold(self, bundles: Sequence[str]) -> list[str]:
        """Load those of ``bundles`` that are not held yet, let go of others that nobody uses.

        Work under way keeps what it has begun with. A gateway that is behind with its swaps may
        still answer from a bundle that this one needs no longer: it goes the next time.

        Returns:
            The ids that are held.

        Raises:
            BundleCorrupt: one cannot be used; what was held before still is.
        """
        for bundle in bundles:
            if bundle not in self._pipelines:
                # For others who wait for it, it goes on when this call is given up.
                self._pipelines[bundle] = await asyncio.shield(self._loaded(bundle))
        idle = time.monotonic() - _IN_USE_S
        for bundle in set(self._pipelines) - set(bundles):
            if self._used.get(bundle, -math.inf) <= idle:
                del self._pipelines[bundle]
                self._used.pop(bundle, None)
        return list(self._pipelines)

    async def run(
        self,
        bundle: str,
        work: Callable[[Pipeline], T],
        *,
        lone: bool = False,
        spare: bool = False,
    ) -> T:
        """Apply ``work`` to the pipeline of ``bundle`` in the worker thread.

        Args:
            bundle: id.
            work: with the models' threads set.
            lone: whether no other batch is under way.
            spare: whether in the spare thread instead, which waits for no language model.

        Raises:
            BundleNotHeld: the replica does not hold this bundle.
        """
        pipeline = self._pipelines.get(bundle)
        if pipeline is None:
            raise BundleNotHeld(f"this {self._stage} does not hold bundle {bundle}")
        self._used[bundle] = time.monotonic()
        threads = self._lone_threads if lone else self._threads

        def do() -> T:
            _set_threads(threads)
            return work(pipeline)

        thread = self._spare if spare else self._worker
        return await asyncio.get_running_loop().run_in_executor(thread, do)

    def _loaded(self, bundle: str) -> asyncio.Future[Pipeline]:
        """The pipeline of a bundle, loaded once for all gateways that ask for it meanwhile."""
        loading = self._loading.get(bundle)
        if loading is None:
            loop = asyncio.get_running_loop()
            loading = loop.run_in_executor(self._loader, self._load_in_turn, bundle)
            self._loading[bundle] = loading
            loading.add_done_callback(lambda _: self._loading.pop(bundle))
        return loading

    def _load_in_turn(self, bundle: str) -> Pipeline:
        """One replica of a machine after the other: together they would slow all answers down."""
        # Nobody else's file, wherever a link in a folder of all users leads.
        file = os.open(_TURN, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # given back with the file, also by a killed process
            return self._load(bundle)
        finally:
            os.close(file)

    def _load(self, bundle: str) -> Pipeline:
        from fusionrec.serving.pipeline import Pipeline, Stage

        self._store.verify(bundle)
        stage = Stage(self._stage)
        stages = frozenset({stage, Stage.EMBEDDER} if self._embeds else {stage})
        pipeline = Pipeline.load(self._store.path(bundle), stages=stages)
        if stage is Stage.RETRIEVER:
            read_in(self._store.path(bundle))
        _set_threads(self._threads)
        # The first call of a model takes many times as long as the next: nobody should wait for it.
        first = Histories.of([[0]], texts=["warm up"])
        if Stage.EMBEDDER in stages:
            first = pipeline.embed(first)
        if stage is Stage.RETRIEVER:
            pipeline.retrieve(first)
        elif stage is Stage.RERANKER and pipeline.reranker is not None:
            pipeline.rerank_scores(first, np.zeros((1, 1), dtype=np.int32))
        return pipeline


def load_first(store: BundleStore, bundle: str | None, load: Callable[[str], T]) -> tuple[str, T]:
    """The id of the bundle to begin with, and what ``load`` makes of it.

    Where the current one is damaged, that is the one before: who is in service already refuses the
    damaged one too, and goes on with what it has.

    Args:
        store: where the bundles are.
        bundle: id; None for the current one.
        load: called with an id.

    Raises:
        BundleError: neither can be used.
    """
    if bundle is not None:
        return bundle, load(bundle)
    current, *earlier = [promoted.bundle for promoted in reversed(store.history())] or [
        store.current().name
    ]
    try:
        return current, load(current)
    except BundleCorrupt:
        if not earlier:
            raise
        logger.exception("the current bundle is damaged, loading the one before it")
        return earlier[0], load(earlier[0])


def _set_threads(number: int) -> None:
    """Of the models that this thread calls; Ray gives a replica with a part of a CPU one."""
    torch = sys.modules.get("torch")  # only where a model was loaded
    if torch is not None and torch.get_num_threads() != number:
        torch.set_num_threads(number)


def step_back() -> None:
    """Give way to the thread that answers requests; Linux counts niceness by thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOADING_NICENESS)
