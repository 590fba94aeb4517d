"""The three stages that hold a part of the pipeline: plain classes; recommend.py wraps them.

Every call names the bundle that it wants and carries a whole batch. Model code runs in the one
worker thread of a replica, so that its event loop stays free for health checks and cancellation;
more throughput comes from more replicas.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from fusionrec.bundles.store import BundleStore
from fusionrec.data.histories import FloatArray, Histories
from fusionrec.errors import BundleError
from fusionrec.serving.pipeline import Fused, Pipeline, Stage

T = TypeVar("T")


class Held:
    """The part of a pipeline that a replica holds, by bundle id."""

    def __init__(self, stage: Stage, bundles: str, bundle: str, threads: int) -> None:
        """Verify the bundle ``bundle`` of the folder ``bundles`` and load what ``stage`` needs.

        Raises:
            BundleCorrupt: nothing of it is loaded.
        """
        self._stage = stage
        self._store = BundleStore(Path(bundles))
        self._pipelines: dict[str, Pipeline] = {}
        self._worker = ThreadPoolExecutor(1, f"{stage}-model")
        self._worker.submit(self._load, bundle, threads).result()

    def _load(self, bundle: str, threads: int) -> None:
        self._store.verify(bundle)
        path = self._store.path(bundle)
        self._pipelines[bundle] = Pipeline.load(path, stages=frozenset({self._stage}))
        if "torch" in sys.modules:  # only where a model was loaded
            # Ray gives a replica with a fraction of a CPU one thread: say what is meant instead.
            sys.modules["torch"].set_num_threads(threads)

    async def run(self, bundle: str, work: Callable[[Pipeline], T]) -> T:
        """Apply ``work`` to the pipeline of ``bundle`` in the worker thread.

        Raises:
            BundleError: the replica does not hold this bundle.
        """
        pipeline = self._pipelines.get(bundle)
        if pipeline is None:
            raise BundleError(f"this {self._stage} does not hold bundle {bundle}")
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, pipeline)


class Embedder:
    """Text vectors of histories."""

    def __init__(self, bundles: str, bundle: str, threads: int) -> None:
        self._held = Held(Stage.EMBEDDER, bundles, bundle, threads)

    async def embed(self, bundle: str, histories: Histories) -> FloatArray | None:
        """[B, D] vectors; None where the bundle has no encoder."""
        return await self._held.run(bundle, lambda pipeline: pipeline.embed(histories).vectors)


class Retriever:
    """Candidates of all sources, fused."""

    def __init__(self, bundles: str, bundle: str, threads: int) -> None:
        self._held = Held(Stage.RETRIEVER, bundles, bundle, threads)

    async def retrieve(self, bundle: str, histories: Histories) -> Fused:
        """B histories × C candidates, best first."""
        return await self._held.run(bundle, lambda pipeline: pipeline.retrieve(histories))


class Reranker:
    """The cross-encoder over the top of the fused list."""

    def __init__(self, bundles: str, bundle: str, threads: int) -> None:
        self._held = Held(Stage.RERANKER, bundles, bundle, threads)

    async def rerank(self, bundle: str, histories: Histories, fused: Fused) -> Fused:
        """The same candidates with one more term, sorted again."""
        return await self._held.run(bundle, lambda pipeline: pipeline.rerank(histories, fused))
