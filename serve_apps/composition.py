"""A batch on its way through the stages, and the answers that it ends in.

A batch is one unit: one call per stage and replica, awaited before the next stage is called, then
scattered again. A stage that is down, or too slow for what is left of the time, is left out of the
answer and named in ``degraded``; without the retriever there is no answer, and the client is told
to come back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial

import numpy as np

from fusionrec.data.histories import FloatArray, Histories, IntArray
from fusionrec.fusion.model import Fused
from fusionrec.serving.schemas import RecommendResponse
from fusionrec.serving.service import Trace
from serve_apps.api import Unavailable
from serve_apps.batch import Batch, Job, Jobs, milliseconds
from serve_apps.batching import Entry
from serve_apps.cache import VectorCache
from serve_apps.calls import Circuit, Stage, StageDown
from serve_apps.metrics import Metrics
from serve_apps.sparing import Sparing
from serve_apps.stages import Found
from serve_apps.tracing import Tracer

logger = logging.getLogger("ray.serve")

_EMBED_SHARE = 0.5
"""Of the time that is left, what the embedder may take: the sources without text need the rest."""
_SAME_PACE = 0.8
"""Requests of a batch whose times left differ by no more than this factor wait for the same."""
_FAIR = 0.4
"""Of what a request with the default time leaves to the embedder, what it must have been given to
have failed: with less, the caller was in a hurry, or had waited long for a place."""


class Composition:
    """The stages of one gateway, put together. Lives in one event loop."""

    def __init__(
        self,
        embed: Stage | None,
        retrieve: Stage,
        rerank: Stage,
        *,
        timeout_s: float,
        stage_timeout_s: float,
        vector_cache: int,
        metrics: Metrics,
        tracer: Tracer | None,
    ) -> None:
        """Compose three stages.

        Args:
            embed: text vectors of histories; None where the retriever makes them.
            retrieve: fused candidates.
            rerank: scores of the top of the lists.
            timeout_s: of a request that names none.
            stage_timeout_s: a stage that takes longer has failed.
            vector_cache: text vectors that are kept.
            metrics: told of every batch.
            tracer: makes the spans of sampled ones.
        """
        self._embed = embed
        self._retrieve = retrieve
        self._rerank = rerank
        circuits = {stage.name: stage.circuit for stage in (retrieve, rerank)}
        self._circuits = {"embed": Circuit() if embed is None else embed.circuit, **circuits}
        self._stage_timeout_s = stage_timeout_s
        # Where the retriever embeds, it has to retrieve afterwards, in the stage's own time.
        self._embed_limit_s = stage_timeout_s * (_EMBED_SHARE if embed is None else 1)
        self._fair_s = _FAIR * min(self._embed_limit_s, _EMBED_SHARE * timeout_s)
        self._cache = VectorCache(vector_cache)
        self._metrics = metrics
        self._log = Sparing(logger)
        self._tracer = tracer
        self.last_stage: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered while a batch is reranked; set by whoever sends the batches."""
        self.came_up = False
        """Whether every stage has answered once."""

    @property
    def left_alone(self) -> list[str]:
        """Stages that failed too often, and have not answered since."""
        return [stage for stage, circuit in self._circuits.items() if circuit.is_open]

    async def answer(self, entries: Jobs) -> None:
        """Answer a batch; requests for different bundles travel apart."""
        by_bundle: defaultdict[str, list[Entry[Job, RecommendResponse]]] = defaultdict(list)
        for entry in entries:
            by_bundle[entry.question.bundle.id].append(entry)
        if len(by_bundle) == 1:
            await self._answer(entries)
        else:
            await asyncio.gather(*(self._answer(part) for part in by_bundle.values()))

    async def _answer(self, entries: Jobs) -> None:
        batch = Batch.of(entries)
        try:
            await self._embed_all(batch)
            await self._finish(batch)
        finally:
            for part in batch.ahead:  # by now all of it is answered, or nobody waits
                part.cancel()
        trace, outcome = batch.trace, batch.outcome
        self.came_up = self.came_up or not trace.degraded
        self._metrics.observe_batch(
            len(entries),
            trace.timings_ms,
            waited_ms=[(batch.started - entry.since) * 1e3 for entry in entries],
            degraded=outcome.without,
            num_reranked=outcome.num_reranked,
        )
        if self._tracer is not None:
            self._tracer.record_batch(
                [entry.question.span for entry in entries],
                size=len(entries),
                bundle=batch.bundle.id,
                seconds=time.monotonic() - batch.started,
                timings_ms=trace.timings_ms,
                degraded=dict.fromkeys((*trace.degraded, *outcome.without)),
            )

    async def _finish(self, batch: Batch) -> None:
        """What comes after the embedder.

        Raises:
            Unavailable: the retriever is down.
        """
        await self._read(batch, await self._retrieved(batch))

    async def _embed_all(self, batch: Batch) -> None:
        """Give the histories their text vectors, or say which of them the retriever is to make.

        Where the embedder is down, only those that are known already.
        """
        if not batch.bundle.embeds:
            return
        histories = batch.histories
        keys = self._cache.keys(batch.bundle.id, histories)
        known = [self._cache.get(key) for key in keys]
        unknown = [row for row, vector in enumerate(known) if vector is None]
        self._metrics.count_cache(
            hits=len(keys) - len(unknown), misses=sum(keys[row] is not None for row in unknown)
        )
        batch.histories = _with_known(histories, known)
        if not unknown:
            return
        if self._embed is None:
            if self._circuits["embed"].admit():
                batch.missing[unknown] = True
            else:
                self._degrade(batch.trace, "embed", StageDown("embed"))
            return
        asked = histories if len(unknown) == len(keys) else histories.take(np.array(unknown))
        started = time.monotonic()
        try:
            with self._hurried_ahead(batch) as wait_s:
                vectors: FloatArray = await self._embed.call(
                    len(asked),
                    lambda start, stop: (batch.bundle.id, asked.slice(start, stop)),
                    np.concatenate,
                    wait_s,
                    hurried=wait_s < self._fair_s,
                )
        except Exception as error:
            self._degrade(batch.trace, "embed", error)
            return
        finally:
            batch.trace.timings_ms["embed"] = milliseconds(time.monotonic() - started)
        for row, vector in zip(unknown, vectors, strict=True):
            known[row] = vector
            self._cache.put(keys[row], vector)
        batch.histories = _with_known(histories, known)

    @contextmanager
    def _hurried_ahead(self, batch: Batch) -> Iterator[float]:
        """Around the wait for new text vectors: how many seconds the most patient may wait.

        Others go on without, each when its own time for that is over: who is in a hurry costs
        nobody else a vector.
        """
        paces = _paces(batch.entries)
        wait_s = min(paces[0][0], self._embed_limit_s)
        loop = asyncio.get_running_loop()
        timers = [
            loop.call_later(share_s, self._go_ahead, batch, rows)
            for share_s, rows in paces[1:]
            if share_s < wait_s
        ]
        try:
            yield wait_s
        finally:
            for timer in timers:
                timer.cancel()

    def _go_ahead(self, batch: Batch, rows: Sequence[int]) -> None:
        rows = [row for row in rows if not batch.entries[row].done]
        if not rows:
            return

        async def finish() -> None:
            with suppress(Unavailable):  # the others may still be answered, and these with them
                await self._finish(batch.part(rows, without="embed"))

        batch.ahead.append(asyncio.ensure_future(finish()))

    async def _retrieved(self, batch: Batch) -> Fused:
        """The fused candidates, after the ``missing`` text vectors.

        Raises:
            Unavailable: the retriever is down.
        """
        bundle, histories, missing = batch.bundle, batch.histories, batch.missing
        requests = batch.questions.requests
        # All of them where some are filtered out here: nobody knows how many will be left.
        depth = None
        if all(request.filters is None for request in requests):
            depth = max(bundle.rerank_top, *(request.k for request in requests))
        started = time.monotonic()
        embed_s = 0.0
        try:
            if self._embed is not None:
                return await self._retrieve.call(
                    len(histories),
                    lambda start, stop: (bundle.id, histories.slice(start, stop), depth),
                    Fused.join,
                    self._stage_timeout_s,
                )
            embeds = bool(missing.any())
            with self._hurried_ahead(batch) if embeds else nullcontext(0.0) as wait_s:
                found = await self._retrieve.call(
                    len(histories),
                    lambda start, stop: (
                        bundle.id,
                        histories.slice(start, stop),
                        depth,
                        missing[start:stop],
                        wait_s,
                    ),
                    Found.join,
                    self._stage_timeout_s,
                )
            if embeds:
                embed_s = found.embed_s
                hurried = wait_s <= found.embed_s and wait_s < self._fair_s
                self._remember(batch, found, failed=not hurried)
            return found.fused
        except Exception as error:
            self._log.warning("stage %s failed, no answer: %r", "retrieve", error)
            raise Unavailable from error
        finally:
            batch.trace.timings_ms["retrieve"] = milliseconds(time.monotonic() - started - embed_s)

    def _remember(self, batch: Batch, found: Found, *, failed: bool) -> None:
        """Keep the ``missing`` vectors that the retriever made; without any, it has failed."""
        batch.trace.timings_ms["embed"] = milliseconds(found.embed_s)
        if found.vectors is None:
            if failed:
                self._circuits["embed"].failed()
            batch.trace.degraded.append("embed")
            return
        self._circuits["embed"].succeeded()
        made = batch.histories.take(np.nonzero(batch.missing)[0])
        keys = self._cache.keys(batch.bundle.id, made)
        for key, vector in zip(keys, found.vectors, strict=True):
            self._cache.put(key, vector)

    async def _read(self, batch: Batch, fused: Fused) -> None:
        """Rerank where that helps and there is time for it; answer everybody."""
        entries, trace = batch.entries, batch.trace
        weights = batch.bundle.service.rerank_weights(batch.histories)
        helped = (weights > 0) & batch.bundle.reranks
        for row in np.nonzero(~helped)[0].tolist():
            batch.give(row, fused, trace, reranked=False)
        waiting = [row for row in np.nonzero(helped)[0].tolist() if not entries[row].done]
        rows = np.array(waiting, dtype=np.intp)
        if not len(rows):
            return
        without = Trace(trace.timings_ms, [*trace.degraded, "rerank"])

        def late(row: int) -> RecommendResponse:
            self._metrics.count_degraded(without.degraded)
            return batch.answer(row, fused, without, reranked=False)

        expected_s = self._rerank.expected_s(len(rows))
        in_time = np.array([entries[row].remaining > expected_s for row in rows.tolist()])
        for row in rows[~in_time].tolist():
            batch.give(row, fused, without, reranked=False)
        rows = rows[in_time]
        if not len(rows):
            return
        for row in rows.tolist():
            entries[row].fallback = partial(late, row)
        started = time.monotonic()
        try:
            with self.last_stage():
                reranked = await self._reranked(batch, fused, rows, weights)
        except Exception as error:
            self._degrade(trace, "rerank", error)
            for row in rows.tolist():
                batch.give(row, fused, trace, reranked=False)
            return
        trace.timings_ms["rerank"] = milliseconds(time.monotonic() - started)
        for row in rows.tolist():
            batch.give(row, reranked, trace, reranked=True)

    async def _reranked(
        self, batch: Batch, fused: Fused, rows: IntArray, weights: FloatArray
    ) -> Fused:
        bundle = batch.bundle
        asked, items = batch.histories.take(rows), fused.items[rows, : bundle.rerank_top]
        scores: FloatArray = await self._rerank.call(
            len(rows),
            lambda start, stop: (bundle.id, asked.slice(start, stop), items[start:stop]),
            np.concatenate,
            self._stage_timeout_s,
        )
        return fused.reranked(rows, weights[rows, None] * scores)

    def _degrade(self, trace: Trace, stage: str, error: Exception) -> None:
        trace.degraded.append(stage)
        self._log.warning("stage %s failed, answering without it: %r", stage, error)


def _with_known(histories: Histories, known: Sequence[FloatArray | None]) -> Histories:
    """With vectors where they are ``known``, zeros elsewhere; as they are where none is."""
    found = [vector for vector in known if vector is not None]
    if not found:
        return histories
    vectors = np.zeros((len(known), len(found[0])), dtype=found[0].dtype)
    vectors[[vector is not None for vector in known]] = found
    return histories.with_vectors(vectors)


def _paces(entries: Jobs) -> list[tuple[float, list[int]]]:
    """Seconds that requests leave to the embedder, and the rows of those who leave about as many.

    The most patient first. Each pace has the seconds of its most patient request.
    """
    shares_s = [max(_EMBED_SHARE * entry.remaining, 0) for entry in entries]
    paces: list[tuple[float, list[int]]] = []
    for row in sorted(range(len(entries)), key=shares_s.__getitem__, reverse=True):
        if not paces or shares_s[row] < _SAME_PACE * paces[-1][0]:
            paces.append((shares_s[row], []))
        paces[-1][1].append(row)
    return paces
