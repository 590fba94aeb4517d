"""The gateway: HTTP on one side, batches through the three stages on the other.

A batch is one unit: one call per stage, awaited before the next stage is called. A stage that fails
is left out of the answer and named in ``degraded``; without the retriever there is no answer, and
the client is told to come back (503).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI

from fusionrec.bundles.manifest import Manifest
from fusionrec.bundles.store import BundleStore
from fusionrec.serving.schemas import (
    BundleResponse,
    ReadyResponse,
    RecommendRequest,
    RecommendResponse,
)
from fusionrec.serving.service import Service, Trace
from serve_apps.api import Unavailable, build_api
from serve_apps.batching import Batcher
from serve_apps.keys import guard
from serve_apps.security import Access, Door

logger = logging.getLogger("ray.serve")


class Handle(Protocol):
    """What the gateway needs of a Serve handle: ``handle.method.remote(...)`` can be awaited."""

    def __getattr__(self, method: str) -> Any: ...


class Gateway:
    """The ingress of the application."""

    def __init__(
        self,
        bundles: str,
        bundle: str,
        embedder: Handle,
        retriever: Handle,
        reranker: Handle,
        *,
        max_batch: int,
        max_running_batches: int,
        max_waiting: int,
        stage_timeout_s: float,
        access: Access,
    ) -> None:
        door = Door.build(access, os.environ)
        guard(_bound_host(), door.keys)
        if (file := _audit_file()) is not None and door.audit is not None:
            door.audit.write_to(file)
        store = BundleStore(Path(bundles))
        self._manifest: Manifest = store.verify(bundle)
        directory = store.path(bundle)
        self._service = Service.load(directory)
        self._embedder = embedder if (directory / "encoder").is_dir() else None
        self._retriever = retriever
        self._reranker = reranker if (directory / "reranker").is_dir() else None
        self._stage_timeout_s = stage_timeout_s
        self._batcher: Batcher[RecommendRequest, RecommendResponse] = Batcher(
            self._answer,
            max_batch=max_batch,
            max_running=max_running_batches,
            max_waiting=max_waiting,
        )
        self._door = door
        self._came_up = False

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica, after the constructor."""
        return build_api(self, self._door)

    async def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """Answer one request, in a batch with others.

        Raises:
            Overloaded: too many requests wait.
            Unavailable: the retriever failed.
        """
        start = time.perf_counter()
        answer, waited_ms = await self._batcher.submit(request)
        answer.timings_ms["queue"] = round(waited_ms, 3)
        answer.timings_ms["total"] = round((time.perf_counter() - start) * 1e3, 3)
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
        return BundleResponse(
            bundle=self._service.bundle,
            dataset=self._manifest.dataset,
            pipeline=self._manifest.pipeline,
            metrics=self._manifest.metrics,
            num_items=len(self._service.catalogue),
            num_users=len(self._service.users.rows),
        )

    async def _answer(self, requests: Sequence[RecommendRequest]) -> list[RecommendResponse]:
        trace = Trace()
        bundle = self._service.bundle
        questions = self._service.ask(requests)
        histories = questions.histories
        if self._embedder is not None:
            try:
                vectors = await self._call(trace, "embed", self._embedder.embed, bundle, histories)
                histories = histories.with_vectors(vectors)
            except Exception as error:
                self._degrade(trace, "embed", error)
        try:
            fused = await self._call(trace, "retrieve", self._retriever.retrieve, bundle, histories)
        except Exception as error:
            logger.error("stage retrieve failed, no answer: %r", error)
            raise Unavailable from error
        if self._reranker is not None and self._service.reranks(histories).any():
            try:
                fused = await self._call(
                    trace, "rerank", self._reranker.rerank, bundle, histories, fused
                )
            except Exception as error:
                self._degrade(trace, "rerank", error)
        self._came_up = self._came_up or not trace.degraded
        return self._service.answer(questions, fused, trace)

    async def _call(self, trace: Trace, stage: str, method: Any, *arguments: object) -> Any:
        start = time.perf_counter()
        try:
            return await asyncio.wait_for(method.remote(*arguments), self._stage_timeout_s)
        finally:
            trace.timings_ms[stage] = round((time.perf_counter() - start) * 1e3, 3)

    def _degrade(self, trace: Trace, stage: str, error: Exception) -> None:
        trace.degraded.append(stage)
        logger.warning("stage %s failed, answering without it: %r", stage, error)


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
    from ray import serve
    from ray.serve._private.logging_utils import get_serve_logs_dir
    from ray.serve.exceptions import RayServeException

    try:
        replica = serve.get_replica_context().replica_id.unique_id
    except RayServeException:
        return None
    return Path(get_serve_logs_dir()) / f"audit_{replica}.jsonl"
