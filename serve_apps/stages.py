"""The stages that hold a part of the pipeline: plain classes; recommend.py wraps them.

Every call names the bundle that it wants and carries a whole batch, or the part of one that falls
to this replica. Where its delivery is the lone one under way, its model may have all cores.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from fusionrec.data.histories import BoolArray, CodeArray, FloatArray, Histories
from fusionrec.fusion.model import Fused
from serve_apps.delivery import Delivery
from serve_apps.held import Held
from serve_apps.sparing import Sparing

if TYPE_CHECKING:  # who deploys the stages need not import torch; their replicas do, in Held
    from fusionrec.serving.pipeline import Pipeline

logger = logging.getLogger("ray.serve")

_RERANK_ROWS = 4
"""Histories reranked between two looks at whether their askers are still there."""
SHARED = Delivery()
"""Of a call beside others, by default."""


class Embedder:
    """Text vectors of histories."""

    def __init__(
        self, bundles: str, bundle: str | None, threads: int, lone_threads: int | None = None
    ) -> None:
        self._held = Held("embedder", bundles, bundle, threads, lone_threads)

    async def hold(self, bundles: Sequence[str]) -> list[str]:
        """See :meth:`Held.hold`."""
        return await self._held.hold(bundles)

    async def embed(
        self, bundle: str, histories: Histories, *, delivery: Delivery = SHARED
    ) -> FloatArray | None:
        """[B, D] vectors; None where the bundle has no encoder."""
        return await self._held.run(
            bundle, lambda pipeline: pipeline.embed(histories).vectors, lone=delivery.lone
        )


class Retriever:
    """Candidates of all sources, fused."""

    def __init__(
        self, bundles: str, bundle: str | None, threads: int, lone_threads: int | None = None
    ) -> None:
        self._held = Held("retriever", bundles, bundle, threads, lone_threads)

    async def hold(self, bundles: Sequence[str]) -> list[str]:
        """See :meth:`Held.hold`."""
        return await self._held.hold(bundles)

    async def retrieve(
        self, bundle: str, histories: Histories, depth: int | None, *, delivery: Delivery = SHARED
    ) -> Fused:
        """B histories × C candidates, best first; the first ``depth`` where it is a number."""
        return await self._held.run(
            bundle, lambda pipeline: pipeline.retrieve(histories).head(depth), lone=delivery.lone
        )


@dataclass(frozen=True, slots=True)
class Found:
    """What a retriever that embeds has found for B histories, M of which it made vectors for."""

    fused: Fused
    vectors: FloatArray | None
    """[M, D]; None where that failed, or took too long."""
    embed_s: float = 0.0
    """How long that took."""

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Parts of a batch; without vectors where one part has none."""
        vectors = [part.vectors for part in parts if part.vectors is not None]
        made = [each for each in vectors if len(each)]
        whole = np.concatenate(made) if made else np.empty((0, 0), dtype=np.float32)
        return cls(
            Fused.join([part.fused for part in parts]),
            whole if len(vectors) == len(parts) else None,
            max(part.embed_s for part in parts),
        )


class EmbeddingRetriever:
    """Embedder and retriever in one replica: one call less, where one machine holds both anyway.

    What needs no new vectors has a thread of its own: a text model that hangs does not hold it up.
    """

    def __init__(
        self, bundles: str, bundle: str | None, threads: int, lone_threads: int | None = None
    ) -> None:
        self._held = Held("retriever", bundles, bundle, threads, lone_threads, embeds=True)
        self._log = Sparing(logger)

    async def hold(self, bundles: Sequence[str]) -> list[str]:
        """See :meth:`Held.hold`."""
        return await self._held.hold(bundles)

    async def retrieve(
        self,
        bundle: str,
        histories: Histories,
        depth: int | None,
        missing: BoolArray,
        timeout_s: float,
        *,
        delivery: Delivery = SHARED,
    ) -> Found:
        """As :meth:`Retriever.retrieve`, after the vectors that are ``missing`` [B].

        Where they are not there after ``timeout_s``, without them.
        """

        def find(pipeline: Pipeline) -> Fused:
            return pipeline.retrieve(histories).head(depth)

        if not missing.any():
            fused = await self._held.run(bundle, find, lone=delivery.lone, spare=True)
            return Found(fused, np.empty((0, 0), dtype=np.float32))
        embedded, abandoned = threading.Event(), threading.Event()

        def embed_and_find(pipeline: Pipeline) -> Found | None:
            made, asked, began = None, histories, time.monotonic()
            try:
                made = pipeline.embed(histories.take(np.nonzero(missing)[0])).vectors
                asked = _filled(histories, missing, made)
            except Exception as error:  # the sources that need no text go on
                self._log.warning("%s, retrieving without them: %r", "no text vectors", error)
            embedded.set()
            if abandoned.is_set():
                return None
            embed_s = time.monotonic() - began
            return Found(pipeline.retrieve(asked).head(depth), made, embed_s)

        work = asyncio.ensure_future(self._held.run(bundle, embed_and_find, lone=delivery.lone))
        try:
            await asyncio.wait([work], timeout=timeout_s)
            if work.done() or embedded.is_set():
                answer = await work
                if answer is not None:
                    return answer
        finally:
            abandoned.set()
            work.cancel()
        self._log.warning("%s after %.3g s, retrieving without them", "no text vectors", timeout_s)
        fused = await self._held.run(bundle, find, lone=delivery.lone, spare=True)
        return Found(fused, None, timeout_s)


def _filled(histories: Histories, missing: BoolArray, made: FloatArray | None) -> Histories:
    """The histories with the vectors that were ``missing`` [B] in their places."""
    if made is None:
        return histories
    vectors = np.zeros((len(histories), made.shape[1]), dtype=made.dtype)
    if histories.vectors is not None:
        vectors[:] = histories.vectors
    vectors[missing] = made
    return histories.with_vectors(vectors)


class Reranker:
    """The cross-encoder over the top of the fused list."""

    def __init__(
        self, bundles: str, bundle: str | None, threads: int, lone_threads: int | None = None
    ) -> None:
        self._held = Held("reranker", bundles, bundle, threads, lone_threads)

    async def hold(self, bundles: Sequence[str]) -> list[str]:
        """See :meth:`Held.hold`."""
        return await self._held.hold(bundles)

    async def rerank(
        self, bundle: str, histories: Histories, items: CodeArray, *, delivery: Delivery = SHARED
    ) -> FloatArray:
        """[B, R] scores of ``items`` [B, R] from 0 to 1.

        A few histories at a time: when the call is cancelled the rest is not done.
        """
        parts = []
        for start in range(0, len(histories), _RERANK_ROWS):
            stop = min(start + _RERANK_ROWS, len(histories))
            rows, top = histories.slice(start, stop), items[start:stop]

            def score(
                pipeline: Pipeline, rows: Histories = rows, top: CodeArray = top
            ) -> FloatArray:
                return pipeline.rerank_scores(rows, top)

            parts.append(await self._held.run(bundle, score, lone=delivery.lone))
        return np.concatenate(parts)
