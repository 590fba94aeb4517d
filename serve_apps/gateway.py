"""The gateway: the ingress deployment, with HTTP on one side and the stages on the other.

Requests are gathered into batches here (batching.py), which travel through the stages
(composition.py) with the bundle that is in service (swap.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from functools import partial
from pathlib import Path

from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve._private.common import ReplicaState

from fusionrec.bundles.store import BundleStore
from fusionrec.config import Config
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
from serve_apps.api import Unavailable, UnknownBundle, build_api
from serve_apps.batch import Job, milliseconds
from serve_apps.batching import Batcher, Late
from serve_apps.calls import MIN_PART, Handle, Stage
from serve_apps.composition import Composition
from serve_apps.keys import guard
from serve_apps.metrics import Metrics
from serve_apps.recent import Recent
from serve_apps.security import Access, Door
from serve_apps.swap import Shelf
from serve_apps.tracing import tracer_from

logger = logging.getLogger("ray.serve")

_MARGIN = 0.95
"""Of a client's timeout, what the answer may take: it has to travel, too."""
_READY_S = 1.0
"""How long whether it is ready is told to all who ask: they need no key, and it costs a request."""
_COUNT_EVERY_S = 3.0
"""Seconds between two questions to the controller: an answer is dear, to it and to us."""


class GatewayConfig(Config):
    """How requests travel."""

    max_batch: int = Field(default=32, ge=1)
    """Largest number of requests that travel as one unit."""
    batches_ahead: int = Field(default=1, ge=0)
    """Batches under way from one gateway beyond one for each replica of the stage that has most:
    ready when a replica has done its own. All requests there are make up that many batches of one
    size; more of them are smaller, and cost more calls. Beside a batch that is being reranked there
    is one more in any case."""
    max_waiting: int = Field(default=512, ge=1)
    """Requests that may wait in one gateway; more are answered 503."""
    timeout_s: float = Field(default=5.0, gt=0)
    """Time for an answer, where a request names none in `x-request-timeout-seconds`; what is
    there by then is answered."""
    stage_timeout_s: float = Field(default=10.0, gt=0)
    """A stage that takes longer has failed."""
    load_timeout_s: float = Field(default=300.0, gt=0)
    """A replica that takes longer to load a bundle has failed. Those of one machine load one after
    the other, and their waiting counts."""
    watch_s: float = Field(default=1.0, gt=0)
    """Seconds between two looks at which bundle is current."""
    vector_cache: int = Field(default=20_000, ge=0)
    """Text vectors of recent histories and texts that a gateway keeps."""


class Gateway:
    """The ingress of the application."""

    def __init__(
        self,
        bundles: str,
        bundle: str | None,
        embedder: Handle | None,
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

        def composed(name: str, handle: Handle) -> Stage:
            return Stage(name, handle, on_call=metrics.observe_call, on_retry=metrics.count_retry)

        embed = None if embedder is None else composed("embed", embedder)
        others = (composed("retrieve", retriever), composed("rerank", reranker))
        self._stages = others if embed is None else (embed, *others)
        self._composition = Composition(
            embed,
            *others,
            timeout_s=config.timeout_s,
            stage_timeout_s=config.stage_timeout_s,
            vector_cache=config.vector_cache,
            metrics=metrics,
            tracer=self._tracer,
        )
        self._shelf = Shelf(
            BundleStore(Path(bundles)),
            bundle,
            self._stages,
            load_timeout_s=config.load_timeout_s,
            on_swap=self._swapped,
        )
        metrics.set_bundle(self._shelf.current.id)
        self._batcher: Batcher[Job, RecommendResponse] = Batcher(
            self._composition.answer,
            max_batch=config.max_batch,
            small_batch=MIN_PART,
            max_running=1 + config.batches_ahead,
            max_waiting=config.max_waiting,
        )
        self._composition.last_stage = self._batcher.last_stage
        for stage in self._stages:
            stage.batches = lambda: self._batcher.running
            stage.refused = self._shelf.confirm_soon
        metrics.sample(
            queue_depth=lambda: self._batcher.waiting,
            running_batches=lambda: self._batcher.running,
        )
        self._ready = Recent(self._look, _READY_S)
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
            on_request=self._metrics.count_request,
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
        try:
            with bundle.used():
                answer = await self._batcher.submit(Job(request, bundle, span), deadline)
        except Late as error:
            raise Unavailable from error
        elapsed_s = time.monotonic() - started
        self._metrics.observe_answer(elapsed_s)
        answer.timings_ms["total"] = milliseconds(elapsed_s)
        return answer

    async def ready(self) -> ReadyResponse:
        """Whether an empty request, sent through all stages a moment ago or now, is answered.

        Until every stage has come up once, a degraded answer does not count.

        Raises:
            Overloaded, Unavailable: it is not.
        """
        return await self._ready.get()

    async def _look(self) -> ReadyResponse:
        answer = await self.recommend(RecommendRequest(k=1))
        if answer.degraded and not self._composition.came_up:
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
            degraded=self._composition.left_alone,
            queue=self._batcher.waiting,
            uptime_s=round(time.monotonic() - self._started, 3),
        )

    def find_items(self, request: ItemsRequest) -> ItemsResponse:
        """Items by words of their titles."""
        return self._shelf.current.browser.find_items(request)

    def find_users(self, request: UsersRequest) -> UsersResponse:
        """Some users, or one with the history."""
        return self._shelf.current.browser.find_users(request)

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
            for stage in self._stages:
                counts = self._replicas.get(_DEPLOYMENTS[stage.name])
                if counts is not None:
                    stage.replicas = max(counts.running, 1)
            most = max(stage.replicas for stage in self._stages)
            self._batcher.max_running = most + self._config.batches_ahead
            await asyncio.sleep(_COUNT_EVERY_S)


_DEPLOYMENTS = {"embed": "Embedder", "retrieve": "Retriever", "rerank": "Reranker"}
"""Names of the deployments of the stages."""


def _count_replicas() -> dict[str, ReplicaCounts]:
    """Deployment → replicas of this application; nothing outside Serve."""
    import ray

    if not ray.is_initialized():
        return {}
    context = serve.get_replica_context()
    application = serve.status().applications[context.app_name]
    return {
        name: ReplicaCounts(
            running=deployment.replica_states.get(ReplicaState.RUNNING, 0),
            target=sum(
                count
                for state, count in deployment.replica_states.items()
                if state is not ReplicaState.STOPPING
            ),
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
