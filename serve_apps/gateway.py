"""The gateway: HTTP on one side, batches through the three stages on the other.

A batch is one unit: gathered here, one call per stage and replica, scattered again. Every request
keeps the bundle that it began with, and has a deadline. A stage that is down, or too slow for what
is left of the time, is left out of the answer and named in ``degraded``; without the retriever
there is no answer, and the client is told to come back (503).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from pydantic import Field
from ray import serve

from fusionrec.bundles.store import BundleStore
from fusionrec.config import Config
from fusionrec.data.histories import FloatArray, Histories, IntArray
from fusionrec.fusion.model import Fused
from fusionrec.serving.schemas import (
    BundleResponse,
    ItemsRequest,
    ItemsResponse,
    ReadyResponse,
    RecommendRequest,
    RecommendResponse,
    ReplicaCounts,
    StatusResponse,
    UsersRequest,
    UsersResponse,
)
from fusionrec.serving.service import Questions, Trace
from serve_apps.api import Unavailable, UnknownBundle, build_api
from serve_apps.batching import Batcher, Entry, Late
from serve_apps.cache import VectorCache
from serve_apps.calls import Handle, Stage
from serve_apps.keys import guard
from serve_apps.metrics import Metrics
from serve_apps.security import Access, Door
from serve_apps.swap import Loaded, Shelf
from serve_apps.tracing import tracer_from

logger = logging.getLogger("ray.serve")

_EMBED_SHARE = 0.5
"""Of the time that is left, what the embedder may take: the sources without text need the rest."""
_MARGIN = 0.95
"""Of a client's timeout, what the answer may take: it has to travel, too."""
_COUNT_EVERY_S = 3.0
"""Seconds between two questions to the controller; an answer costs it and us 30 ms of CPU."""


class GatewayConfig(Config):
    """How requests travel."""

    max_batch: int = Field(default=32, ge=1)
    """Largest number of requests that travel as one unit."""
    batches_ahead: int = Field(default=1, ge=0)
    """Batches under way from one gateway beyond one for each replica of the stage that has most:
    ready when a replica has done its own. More of them are smaller, and cost more calls."""
    max_waiting: int = Field(default=512, ge=1)
    """Requests that may wait in one gateway; more are answered 503."""
    timeout_s: float = Field(default=5.0, gt=0)
    """Time for an answer, where a request names none in `x-request-timeout-seconds`; what is
    there by then is answered."""
    stage_timeout_s: float = Field(default=10.0, gt=0)
    """A stage that takes longer has failed."""
    load_timeout_s: float = Field(default=300.0, gt=0)
    """A replica that takes longer to load a bundle has failed."""
    watch_s: float = Field(default=1.0, gt=0)
    """Seconds between two looks at which bundle is current."""
    vector_cache: int = Field(default=20_000, ge=0)
    """Text vectors of recent histories and texts that a gateway keeps."""


@dataclass(slots=True)
class Job:
    """One request, and the bundle that answers it."""

    request: RecommendRequest
    bundle: Loaded
    span: Any = None
    """Of its trace, where there is one."""


Jobs = Sequence[Entry[Job, RecommendResponse]]


class Gateway:
    """The ingress of the application."""

    def __init__(
        self,
        bundles: str,
        bundle: str | None,
        embedder: Handle,
        retriever: Handle,
        reranker: Handle,
        config: GatewayConfig,
        access: Access,
    ) -> None:
        door = Door.build(access, os.environ)
        guard(_bound_host(), door.keys)
        if (file := _audit_file()) is not None and door.audit is not None:
            door.audit.write_to(file)
        self._door = door
        self._config = config
        self._metrics = metrics = Metrics()
        self._tracer = tracer_from(os.environ)
        self._embed, self._retrieve, self._rerank = self._stages = tuple(
            Stage(name, handle, on_call=metrics.observe_call, on_retry=metrics.count_retry)
            for name, handle in (
                ("embed", embedder),
                ("retrieve", retriever),
                ("rerank", reranker),
            )
        )
        self._shelf = Shelf(
            BundleStore(Path(bundles)),
            bundle,
            self._stages,
            load_timeout_s=config.load_timeout_s,
            on_swap=self._swapped,
        )
        metrics.set_bundle(self._shelf.current.id)
        self._cache = VectorCache(config.vector_cache)
        self._batcher: Batcher[Job, RecommendResponse] = Batcher(
            self._work,
            max_batch=config.max_batch,
            max_running=1 + config.batches_ahead,
            max_waiting=config.max_waiting,
        )
        metrics.sample(
            queue_depth=lambda: self._batcher.waiting,
            running_batches=lambda: self._batcher.running,
        )
        self._came_up = False
        self._started = time.monotonic()
        self._replicas: dict[str, ReplicaCounts] = {}

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica, after the constructor."""
        return build_api(
            self,
            self._door,
            background=(
                partial(self._shelf.watch, self._config.watch_s),
                self._count_replicas,
            ),
            on_too_fast=self._metrics.count_rate_limited,
            tracer=self._tracer,
        )

    async def recommend(
        self, request: RecommendRequest, timeout_s: float | None = None
    ) -> RecommendResponse:
        """Answer one request, in a batch with others.

        Args:
            request: what is asked.
            timeout_s: when the client stops waiting; by default the configured time.

        Raises:
            Overloaded: too many requests wait.
            Unavailable: the retriever failed, or there was nothing to answer in time.
            UnknownBundle: the request asks for one that is not held.
        """
        started = time.monotonic()
        bundle = self._shelf.find(request.bundle)
        if bundle is None:
            raise UnknownBundle(self._shelf.held)
        span = None if self._tracer is None else self._tracer.current()
        deadline = started + _MARGIN * (timeout_s or self._config.timeout_s)
        status = 503
        try:
            answer = await self._batcher.submit(Job(request, bundle, span), deadline)
            status = 200
        except Late as error:
            raise Unavailable from error
        except asyncio.CancelledError:
            status = 499  # the client has gone; the code that proxies use for it
            raise
        finally:
            elapsed_s = time.monotonic() - started
            self._metrics.observe_request(status, elapsed_s)
        answer.timings_ms["total"] = _ms(elapsed_s)
        return answer

    async def ready(self) -> ReadyResponse:
        """Whether an empty request, sent through all stages, is answered.

        Until every stage has come up once, a degraded answer does not count.

        Raises:
            Overloaded, Unavailable: it is not.
        """
        answer = await self.recommend(RecommendRequest(k=1))
        if answer.degraded and not self._came_up:
            raise Unavailable
        return ReadyResponse(ready=True, degraded=answer.degraded)

    def describe_bundle(self) -> BundleResponse:
        """The bundle in service."""
        loaded = self._shelf.current
        return BundleResponse(
            bundle=loaded.id,
            held=self._shelf.held,
            dataset=loaded.manifest.dataset,
            pipeline=loaded.manifest.pipeline,
            metrics=loaded.manifest.metrics,
            num_items=len(loaded.service.catalogue),
            num_users=len(loaded.service.users.rows),
        )

    async def status(self) -> StatusResponse:
        """Bundles, replicas and queue at this moment."""
        return StatusResponse(
            bundle=self._shelf.current.id,
            held=self._shelf.held,
            next=self._shelf.next,
            replicas=self._replicas,
            degraded=[stage.name for stage in self._stages if stage.circuit.is_open],
            queue=self._batcher.waiting,
            uptime_s=round(time.monotonic() - self._started, 3),
        )

    def find_items(self, request: ItemsRequest) -> ItemsResponse:
        """Items by words of their titles."""
        return self._shelf.current.browser.find_items(request)

    def find_users(self, request: UsersRequest) -> UsersResponse:
        """Some users, or one with the history."""
        return self._shelf.current.browser.find_users(request)

    async def _work(self, entries: Jobs) -> None:
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
        with bundle.used():
            questions = bundle.service.ask([entry.question.request for entry in entries])
            embedded = await self._embedded(bundle, questions.histories, entries, trace)
            fused = await self._retrieved(bundle, embedded, entries, trace)
            without: Counter[str] = Counter()
            reply = partial(self._reply, bundle, questions, entries, started, without)
            rows = await self._read(bundle, embedded, fused, entries, trace, reply)
        self._came_up = self._came_up or not trace.degraded
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
    ) -> Histories:
        """The histories with their text vectors; without, where the embedder is down."""
        if not bundle.embeds:
            return histories
        keys = self._cache.keys(bundle.id, histories)
        known = [self._cache.get(key) for key in keys]
        unknown = [row for row, vector in enumerate(known) if vector is None]
        self._metrics.count_cache(
            hits=len(keys) - len(unknown), misses=sum(keys[row] is not None for row in unknown)
        )
        if unknown:
            asked = histories if len(unknown) == len(keys) else histories.take(unknown)
            started = time.monotonic()
            left_s = min(entry.remaining for entry in entries)
            try:
                vectors = await self._embed.call(
                    len(asked),
                    lambda start, stop: (bundle.id, asked.slice(start, stop)),
                    np.concatenate,
                    min(self._config.stage_timeout_s, max(_EMBED_SHARE * left_s, 0)),
                )
            except Exception as error:
                self._degrade(trace, "embed", error)
                return histories
            finally:
                trace.timings_ms["embed"] = _ms(time.monotonic() - started)
            for row, vector in zip(unknown, vectors, strict=True):
                known[row] = vector
                self._cache.put(keys[row], vector)
        return histories.with_vectors(np.stack([v for v in known if v is not None]))

    async def _retrieved(
        self, bundle: Loaded, histories: Histories, entries: Jobs, trace: Trace
    ) -> Fused:
        """The fused candidates.

        Raises:
            Unavailable: the retriever is down.
        """
        requests = [entry.question.request for entry in entries]
        # All of them where some are filtered out here: nobody knows how many will be left.
        depth = None
        if all(request.filters is None for request in requests):
            depth = max(bundle.rerank_top, *(request.k for request in requests))
        started = time.monotonic()
        try:
            return await self._retrieve.call(
                len(histories),
                lambda start, stop: (bundle.id, histories.slice(start, stop), depth),
                Fused.join,
                self._config.stage_timeout_s,
            )
        except Exception as error:
            logger.error("stage retrieve failed, no answer: %r", error)
            raise Unavailable from error
        finally:
            trace.timings_ms["retrieve"] = _ms(time.monotonic() - started)

    async def _read(
        self,
        bundle: Loaded,
        histories: Histories,
        fused: Fused,
        entries: Jobs,
        trace: Trace,
        reply: Any,
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
        for row in rows.tolist():
            entries[row].fallback = partial(late, row)
        started = time.monotonic()
        try:
            reranked = await self._reranked(bundle, histories, fused, rows, weights)
        except Exception as error:
            self._degrade(trace, "rerank", error)
            for row in rows.tolist():
                reply(row, fused, trace, reranked=False)
            return 0
        trace.timings_ms["rerank"] = _ms(time.monotonic() - started)
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
        if not len(rows):
            return fused
        asked, items = histories.take(rows), fused.items[rows, : bundle.rerank_top]
        scores = await self._rerank.call(
            len(rows),
            lambda start, stop: (bundle.id, asked.slice(start, stop), items[start:stop]),
            np.concatenate,
            self._config.stage_timeout_s,
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
        answer.timings_ms["queue"] = _ms(started - entries[row].since)
        if give:
            without.update(trace.degraded)
            entries[row].answer(answer)
        return answer

    def _degrade(self, trace: Trace, stage: str, error: Exception) -> None:
        trace.degraded.append(stage)
        logger.warning("stage %s failed, answering without it: %r", stage, error)

    def _swapped(self, outcome: str) -> None:
        self._metrics.count_swap(outcome)
        self._metrics.set_bundle(self._shelf.current.id)

    async def _count_replicas(self) -> None:
        """Learn from the controller how many replicas there are, for ever."""
        while True:
            try:
                self._replicas = await asyncio.to_thread(_count_replicas)
            except Exception as error:  # the controller is away: what was known goes on
                logger.warning("replicas are not counted for now: %r", error)
            for stage, name in zip(self._stages, _DEPLOYMENTS, strict=True):
                if name in self._replicas:
                    stage.replicas = max(self._replicas[name].running, 1)
            most = max(stage.replicas for stage in self._stages)
            self._batcher.max_running = most + self._config.batches_ahead
            await asyncio.sleep(_COUNT_EVERY_S)


_DEPLOYMENTS = ("Embedder", "Retriever", "Reranker")
"""Names of the deployments of the stages."""


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _count_replicas() -> dict[str, ReplicaCounts]:
    """Deployment → replicas of this application; nothing outside Serve."""
    import ray

    if not ray.is_initialized():
        return {}
    context = serve.get_replica_context()
    application = serve.status().applications[context.app_name]
    return {
        name: ReplicaCounts(
            running=deployment.replica_states.get("RUNNING", 0),
            target=sum(deployment.replica_states.values()),
        )
        for name, deployment in application.deployments.items()
    }


def _bound_host() -> str | None:
    """The address that Serve's proxy is bound to; None outside a cluster."""
    import ray
    from ray.serve.context import _get_global_client

    if not ray.is_initialized():  # asking for the client would start a Ray
        return None
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else str(client.http_config.host)


def _audit_file() -> Path | None:
    """Where the audit log of this replica lies: beside Serve's logs; None outside a cluster."""
    from ray.serve._private.logging_utils import get_serve_logs_dir
    from ray.serve.exceptions import RayServeException

    try:
        replica = serve.get_replica_context().replica_id.unique_id
    except RayServeException:
        return None
    return Path(get_serve_logs_dir()) / f"audit_{replica}.jsonl"
