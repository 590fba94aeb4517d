"""The router of the stages: calls that are sent together go to different replicas."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve._private.request_router.common import PendingRequest
from ray.serve.config import RequestRouterConfig

from serve_apps.calls import Stage
from serve_apps.delivery import Delivery
from serve_apps.held import BundleNotHeld
from serve_apps.recommend import ROUTING
from serve_apps.routing import LeastLoadedRouter

pytestmark = pytest.mark.usefixtures("ray_cluster")
METADATA = RequestMetadata(request_id="r", internal_request_id="i")
STAGE = DeploymentID(name="Embedder", app_name="recommend")


def _router() -> LeastLoadedRouter:
    router = LeastLoadedRouter(
        deployment_id=STAGE,
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
    )
    router.initialize_state()
    return router


def _choose(
    router: LeastLoadedRouter,
    names: str,
    queues: dict[str, int],
    *,
    lone: bool = False,
    tried: str = "",
) -> list[str]:
    replicas: list[Any] = [
        SimpleNamespace(replica_id=ReplicaID(name, deployment_id=STAGE)) for name in names
    ]
    router._replica_id_set = {replica.replica_id for replica in replicas}
    for name, length in queues.items():
        router.replica_queue_len_cache.update(ReplicaID(name, deployment_id=STAGE), length)

    async def choose() -> list[list[Any]]:
        # Made here: it wants a running loop.
        delivery = Delivery(lone, set(tried))
        request = PendingRequest(args=[], kwargs={"delivery": delivery}, metadata=METADATA)
        return await router.choose_replicas(replicas, request)

    ranks = asyncio.run(choose())
    return [replica.replica_id.unique_id for rank in ranks for replica in rank]


def test_calls_that_are_sent_together_take_turns():
    router = _router()
    first = [_choose(router, "abc", {})[0] for _ in range(6)]
    assert sorted(first[:3]) == ["a", "b", "c"]
    assert first[3:] == first[:3]


def test_calls_that_are_alone_go_where_the_last_one_went():
    router = _router()
    last = [_choose(router, "abc", {})[0] for _ in range(2)][-1]
    for _ in range(3):
        router._sending.clear()  # it was answered
        assert _choose(router, "abc", {}, lone=True)[0] == last
    router._sending.clear()
    assert _choose(router, "abc", {})[0] != last
    assert _choose(router, "abc", {last: 1}, lone=True)[0] != last


def test_the_shortest_queue_comes_first():
    router = _router()
    for _ in range(2):
        assert _choose(router, "abc", {"a": 5, "b": 0, "c": 3}) == ["b", "c"]


def test_a_call_that_failed_goes_elsewhere_where_there_is_an_elsewhere():
    """Though the queue of the replica that failed it is the shortest."""
    router = _router()
    for _ in range(3):
        assert _choose(router, "abc", {"a": 0, "b": 50, "c": 3}, tried="a") == ["c", "b"]
    assert _choose(router, "abc", {"a": 0, "b": 50, "c": 3}, tried="ac") == ["b"]
    assert _choose(router, "a", {"a": 0}, tried="a") == ["a"]


def test_a_replica_is_given_the_oldest_call_that_it_has_not_failed():
    router = _router()
    first, second = (ReplicaID(name, deployment_id=STAGE) for name in "ab")
    router._replica_id_set = {first, second}

    async def given(*replicas: ReplicaID) -> list[str | None]:
        waiting = [Delivery(tried={"a"}), Delivery(), Delivery(tried={"a", "b"})]
        for delivery in waiting:
            pending = PendingRequest(args=[], kwargs={"delivery": delivery}, metadata=METADATA)
            router._pending_requests_to_fulfill.append(pending)
        for replica in replicas:
            wrapped: Any = SimpleNamespace(replica_id=replica)
            router._fulfill_next_pending_request(wrapped, METADATA)
        router._pending_requests_to_fulfill.clear()
        return [delivery.chosen for delivery in waiting]

    assert asyncio.run(given(first)) == [None, "a", None]
    assert asyncio.run(given(first, first, first)) == [None, "a", "a"]  # it failed everywhere
    assert asyncio.run(given(second, first, second)) == ["b", "a", "b"]


def test_a_replica_that_is_gone_is_forgotten():
    router = _router()
    for _ in range(3):
        _choose(router, "abc", {})
    assert _choose(router, "b", {}) == ["b"]
    assert len(router._chosen) == 1
    assert _choose(router, "", {}) == []


@serve.deployment(num_replicas=2, request_router_config=ROUTING, ray_actor_options={"num_cpus": 0})
class Busy:
    """Says which replica it is, after a while in which its queue is not empty."""

    async def work(self) -> str:
        await asyncio.sleep(0.05)
        return str(serve.get_replica_context().replica_id.unique_id)


def test_two_calls_on_two_idle_replicas_use_both():
    handle = serve.run(Busy.bind(), name="busy", route_prefix=None)  # type: ignore[attr-defined]
    try:

        async def pairs() -> list[set[str]]:
            return [
                set(await asyncio.gather(handle.work.remote(), handle.work.remote()))
                for _ in range(8)
            ]

        asyncio.run(pairs())  # both replicas are known now
        assert all(len(pair) == 2 for pair in asyncio.run(pairs()))
    finally:
        serve.delete("busy")


@serve.deployment(num_replicas=2, request_router_config=ROUTING, ray_actor_options={"num_cpus": 0})
class Lacking:
    """The first of its replicas lacks all bundles, and says so at once; the other works a while."""

    def __init__(self, first: str) -> None:
        try:
            Path(first).touch(exist_ok=False)
            self._lacks = True
        except FileExistsError:
            self._lacks = False

    async def work(self, *, delivery: Delivery) -> bool:
        assert not delivery.lone
        if self._lacks:
            raise BundleNotHeld("not this one")
        await asyncio.sleep(0.02)
        return True


def test_a_replica_that_lacks_a_bundle_swallows_no_call(tmp_path: Path):
    handle = serve.run(  # type: ignore[attr-defined]
        Lacking.bind(str(tmp_path / "first")), name="lacking", route_prefix=None
    )
    try:
        stage = Stage("work", handle)
        refusals: list[int] = []
        stage.refused = partial(refusals.append, 1)
        stage.batches = lambda: 2

        async def calls() -> list[bool]:
            call = partial(stage.call, 1, lambda *_: (), any, 60)
            return await asyncio.gather(*(call() for _ in range(64)))

        assert all(asyncio.run(calls()))
        assert refusals
    finally:
        serve.delete("lacking")


def test_the_stages_are_routed_so():
    assert isinstance(ROUTING, RequestRouterConfig)
    assert ROUTING.get_request_router_class() is LeastLoadedRouter
