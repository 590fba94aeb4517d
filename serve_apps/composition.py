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
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fusionrec.data.histories import BoolArray, FloatArray, Histories, IntArray
from fusionrec.fusion.model import Fused
from fusionrec.serving.schemas import RecommendRequest, RecommendResponse
from fusionrec.serving.service import Questions, Trace
from serve_apps.api import Unavailable
from serve_apps.batching import Entry
from serve_apps.cache import VectorCache
from serve_apps.calls import Circuit, Stage, StageDown
from serve_apps.metrics import Metrics
from serve_apps.stages import Found
from serve_apps.swap import Loaded
from serve_apps.tracing import Tracer

logger = logging.getLogger("ray.serve")

_EMBED_SHARE = 0.5
"""Of the time that is left, what the embedder may take: the sources without text need the rest."""


@dataclass(slots=True)
class Job:
    """One request, and the bundle that answers it."""

    request: RecommendRequest
    bundle: Loaded
    span: Any = None
    """Of its trace, where there is one."""


Jobs = Sequence[Entry[Job, RecommendResponse]]
Reply = Callable[..., RecommendResponse]
"""Makes the answer to one row; see :meth:`Composition._reply`."""


class Composition:
    """The stages of one gateway, put together. Lives in one event loop."""

    def __init__(
        self,
        embed: Stage | None,
        retrieve: Stage,
        rerank: Stage,
        *,
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
        self._cache = VectorCache(vector_cache)
        self._metrics = metrics
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
        started = time.monotonic()
        bundle = entries[0].question.bundle
        trace = Trace()
        questions = bundle.service.ask([entry.question.request for entry in entries])
        embedded, missing = await self._embedded(bundle, questions.histories, entries, trace)
        fused = await self._retrieved(bundle, embedded, missing, entries, trace)
        without: Counter[str] = Counter()
        reply = partial(self._reply, bundle, questions, entries, started, without)
        rows = await self._read(bundle, embedded, fused, entries, trace, reply)
        self.came_up = self.came_up or not trace.degraded
        self._metrics.observe_batch(
            len(entries),
            trace.timings_ms,
            waited_ms=[(started - entry.since) * 1e3 for entry in entries],
            degraded=without,
            num_reranked=rows,
        )
        if self._tracer is not None:
            self._tracer.record_batch(
                [entry.question.span for entry in entries],
                size=len(entries),
                bundle=bundle.id,
                seconds=time.monotonic() - started,
                timings_ms=trace.timings_ms,
                degraded=trace.degraded,
            )

    async def _embedded(
        self, bundle: Loaded, histories: Histories, entries: Jobs, trace: Trace
    ) -> tuple[Histories, BoolArray]:
        """The histories with their text vectors, and [B] which of them the retriever is to make.

        With the vectors that are known already where the embedder is down.
        """
        nothing = np.zeros(len(histories), dtype=np.bool_)
        if not bundle.embeds:
            return histories, nothing
        keys = self._cache.keys(bundle.id, histories)
        known = [self._cache.get(key) for key in keys]
        unknown = [row for row, vector in enumerate(known) if vector is None]
        self._metrics.count_cache(
            hits=len(keys) - len(unknown), misses=sum(keys[row] is not None for row in unknown)
        )
        if unknown and self._embed is None:
            if not self._circuits["embed"].admit():
                self._degrade(trace, "embed", StageDown("embed"))
                return _with_known(histories, known), nothing
            missing = nothing.copy()
            missing[unknown] = True
            return _with_known(histories, known), missing
        if unknown and self._embed is not None:
            asked = histories if len(unknown) == len(keys) else histories.take(unknown)
            started = time.monotonic()
            try:
                vectors: FloatArray = await self._embed.call(
                    len(asked),
                    lambda start, stop: (bundle.id, asked.slice(start, stop)),
                    np.concatenate,
                    min(self._stage_timeout_s, _embed_share(entries)),
                )
            except Exception as error:
                self._degrade(trace, "embed", error)
                return _with_known(histories, known), nothing
            finally:
                trace.timings_ms["embed"] = milliseconds(time.monotonic() - started)
            for row, vector in zip(unknown, vectors, strict=True):
                known[row] = vector
                self._cache.put(keys[row], vector)
        return histories.with_vectors(np.stack([v for v in known if v is not None])), nothing

    async def _retrieved(
        self,
        bundle: Loaded,
        histories: Histories,
        missing: BoolArray,
        entries: Jobs,
        trace: Trace,
    ) -> Fused:
        """The fused candidates, after the ``missing`` text vectors.

        Raises:
            Unavailable: the retriever is down.
        """
        requests = [entry.question.request for entry in entries]
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
            # Of the stage's own time, too: it has to retrieve afterwards.
            budget_s = _EMBED_SHARE * self._stage_timeout_s
            timeout_s = min(budget_s, _embed_share(entries))
            found = await self._retrieve.call(
                len(histories),
                lambda start, stop: (
                    bundle.id,
                    histories.slice(start, stop),
                    depth,
                    missing[start:stop],
                    timeout_s,
                ),
                Found.join,
                self._stage_timeout_s,
            )
            if missing.any():
                embed_s = found.embed_s
                asked = histories.take(np.nonzero(missing)[0])
                # A client that is in a hurry says nothing of the model.
                hurried = found.embed_s >= timeout_s and timeout_s < budget_s
                self._remember(bundle, asked, found, trace, failed=not hurried)
            return found.fused
        except Exception as error:
            logger.error("stage retrieve failed, no answer: %r", error)
            raise Unavailable from error
        finally:
            trace.timings_ms["retrieve"] = milliseconds(time.monotonic() - started - embed_s)

    def _remember(
        self, bundle: Loaded, histories: Histories, found: Found, trace: Trace, *, failed: bool
    ) -> None:
        """Keep the vectors of ``histories`` that the retriever made; without any, it has failed."""
        trace.timings_ms["embed"] = milliseconds(found.embed_s)
        if found.vectors is None:
            if failed:
                self._circuits["embed"].failed()
            trace.degraded.append("embed")
            return
        self._circuits["embed"].succeeded()
        for key, vector in zip(self._cache.keys(bundle.id, histories), found.vectors, strict=True):
            self._cache.put(key, vector)

    async def _read(
        self,
        bundle: Loaded,
        histories: Histories,
        fused: Fused,
        entries: Jobs,
        trace: Trace,
        reply: Reply,
    ) -> int:
        """Rerank where that helps and there is time for it; answer everybody.

        Returns:
            How many answers the reranker had a part in.
        """
        weights = bundle.service.rerank_weights(histories)
        helped = (weights > 0) & bundle.reranks
        for row in np.nonzero(~helped)[0].tolist():
            reply(row, fused, trace, reranked=False)
        rows = np.nonzero(helped)[0]
        if not len(rows):
            return 0
        without = Trace(trace.timings_ms, [*trace.degraded, "rerank"])

        def late(row: int) -> RecommendResponse:
            self._metrics.count_degraded(without.degraded)
            return reply(row, fused, without, reranked=False, give=False)

        expected_s = self._rerank.expected_s(len(rows))
        in_time = np.array([entries[row].remaining > expected_s for row in rows.tolist()])
        for row in rows[~in_time].tolist():
            reply(row, fused, without, reranked=False)
        rows = rows[in_time]
        if not len(rows):
            return 0
        for row in rows.tolist():
            entries[row].fallback = partial(late, row)
        started = time.monotonic()
        try:
            with self.last_stage():
                reranked = await self._reranked(bundle, histories, fused, rows, weights)
        except Exception as error:
            self._degrade(trace, "rerank", error)
            for row in rows.tolist():
                reply(row, fused, trace, reranked=False)
            return 0
        trace.timings_ms["rerank"] = milliseconds(time.monotonic() - started)
        for row in rows.tolist():
            reply(row, reranked, trace, reranked=True)
        return len(rows)

    async def _reranked(
        self,
        bundle: Loaded,
        histories: Histories,
        fused: Fused,
        rows: IntArray,
        weights: FloatArray,
    ) -> Fused:
        asked, items = histories.take(rows), fused.items[rows, : bundle.rerank_top]
        scores: FloatArray = await self._rerank.call(
            len(rows),
            lambda start, stop: (bundle.id, asked.slice(start, stop), items[start:stop]),
            np.concatenate,
            self._stage_timeout_s,
        )
        return fused.reranked(rows, weights[rows, None] * scores)

    def _reply(
        self,
        bundle: Loaded,
        questions: Questions,
        entries: Jobs,
        started: float,
        without: Counter[str],
        row: int,
        fused: Fused,
        trace: Trace,
        *,
        reranked: bool,
        give: bool = True,
    ) -> RecommendResponse:
        """Make the answer to one request, and give it unless it is only kept ready."""
        answer = bundle.service.answer_row(questions, row, fused, trace, reranked=reranked)
        answer.timings_ms["queue"] = milliseconds(started - entries[row].since)
        if give and not entries[row].done:
            without.update(trace.degraded)
            entries[row].answer(answer)
        return answer

    def _degrade(self, trace: Trace, stage: str, error: Exception) -> None:
        trace.degraded.append(stage)
        logger.warning("stage %s failed, answering without it: %r", stage, error)


def _with_known(histories: Histories, known: Sequence[FloatArray | None]) -> Histories:
    """With vectors where they are ``known``, zeros elsewhere; as they are where none is."""
    found = [vector for vector in known if vector is not None]
    if not found:
        return histories
    vectors = np.zeros((len(known), len(found[0])), dtype=found[0].dtype)
    vectors[[vector is not None for vector in known]] = found
    return histories.with_vectors(vectors)


def _embed_share(entries: Jobs) -> float:
    """Seconds that the embedder may take of what is left to the request that has least."""
    return max(_EMBED_SHARE * min(entry.remaining for entry in entries), 0)


def milliseconds(seconds: float) -> float:
    """For people: to the microsecond."""
    return round(seconds * 1e3, 3)
