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
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fusionrec.bundles.store import BundleStore
from fusionrec.data.histories import FloatArray, Histories
from fusionrec.errors import BundleError
from fusionrec.fusion.model import Fused

if TYPE_CHECKING:  # who deploys the stages need not import torch; their replicas do, in Held
    from fusionrec.serving.pipeline import Pipeline

T = TypeVar("T")


class Held:
    """The part of a pipeline that a replica holds, by bundle id."""

    def __init__(self, stage: str, bundles: str, bundle: str, threads: int) -> None:
        """Verify ``bundle`` of the folder ``bundles``, load what ``stage`` needs and warm up.

        Raises:
            BundleCorrupt: nothing of it is loaded.
        """
        self._stage = stage
        self._store = BundleStore(Path(bundles))
        self._pipelines: dict[str, Pipeline] = {}
        self._worker = ThreadPoolExecutor(1, f"{stage}-model")
        self._worker.submit(self._load, bundle, threads).result()

    def _load(self, bundle: str, threads: int) -> None:
        from fusionrec.serving.pipeline import Pipeline, Stage

        self._store.verify(bundle)
        stage = Stage(self._stage)
        pipeline = Pipeline.load(self._store.path(bundle), stages=frozenset({stage}))
        self._pipelines[bundle] = pipeline
        if "torch" in sys.modules:  # only where a model was loaded
            # Ray gives a replica with a fraction of a CPU one thread: say what is meant instead.
            sys.modules["torch"].set_num_threads(threads)
        # The first call of a model takes many times as long as the next: nobody should wait for it.
        first = Histories.of([[0]], texts=["warm up"])
        if stage is Stage.EMBEDDER:
            pipeline.embed(first)
        elif stage is Stage.RETRIEVER:
            pipeline.retrieve(first)
        elif pipeline.reranker is not None:
            pipeline.rerank_scores(first, np.zeros((1, 1), dtype=np.int32))

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
        self._held = Held("embedder", bundles, bundle, threads)

    async def embed(self, bundle: str, histories: Histories) -> FloatArray | None:
        """[B, D] vectors; None where the bundle has no encoder."""
        return await self._held.run(bundle, lambda pipeline: pipeline.embed(histories).vectors)


class Retriever:
    """Candidates of all sources, fused."""

    def __init__(self, bundles: str, bundle: str, threads: int) -> None:
        self._held = Held("retriever", bundles, bundle, threads)

    async def retrieve(self, bundle: str, histories: Histories) -> Fused:
        """B histories × C candidates, best first."""
        return await self._held.run(bundle, lambda pipeline: pipeline.retrieve(histories))


class Reranker:
    """The cross-encoder over the top of the fused list."""

    def __init__(self, bundles: str, bundle: str, threads: int) -> None:
        self._held = Held("reranker", bundles, bundle, threads)

    async def rerank(self, bundle: str, histories: Histories, fused: Fused) -> Fused:
        """The same candidates with one more term, sorted again."""
        return await self._held.run(bundle, lambda pipeline: pipeline.rerank(histories, fused))
