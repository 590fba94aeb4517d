import asyncio
import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from fusionrec.bundles.store import BundleStore
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.errors import ConfigError
from fusionrec.fusion.model import Fused
from serve_apps import gateway
from serve_apps.gateway import Gateway, GatewayConfig
from serve_apps.security import Access

OPEN = Access()
KEY = "secret"
HEADERS = {"content-type": "application/json"}


def keyed() -> Access:
    return Access(api_keys=(hashlib.sha256(KEY.encode()).hexdigest(),))


class FakeStage:
    """Answers like a Serve handle; ``failure`` is raised, or awaited where it is a function."""

    def __init__(self, name: str, method: Callable[..., Any]) -> None:
        self.sizes: list[int] = []
        self.failure: Exception | Callable[[], Any] | None = None
        self.refusal: Exception | None = None
        self.held: list[str] = []
        self._method = method
        setattr(self, name, SimpleNamespace(remote=self._remote))

    def broadcast(self, method: str, bundles: list[str]) -> Any:
        assert method == "hold"
        self.held = bundles

        async def results(timeout_s: float) -> list[Any]:
            if self.refusal is not None:
                raise self.refusal
            return [bundles]

        return SimpleNamespace(results_async=results)

    async def _remote(self, bundle: str, histories: Histories, *rest: Any) -> Any:
        assert len(bundle) == 32
        self.sizes.append(len(histories))
        if isinstance(self.failure, Exception):
            raise self.failure
        if self.failure is not None:
            await self.failure()
        return self._method(histories, *rest)


def retrieve(histories: Histories, depth: int | None) -> Fused:
    """Items 0 to 4; the term of the vectors is missing without the embedder."""
    items = np.tile(np.arange(5, dtype=np.int32), (len(histories), 1))
    text = 0.0 if histories.vectors is None else 0.25
    terms = np.tile(np.array([[0.5], [text]], np.float32), (len(histories), 1, 5))
    return Fused(items, terms.sum(axis=1), terms, ("popularity", "semantic")).head(depth)


def rerank(histories: Histories, items: Any) -> Any:
    """The reverse order."""
    assert items.shape[1] == 5
    return np.tile(np.linspace(0, 1, 5, dtype=np.float32), (len(histories), 1))


class Rig:
    """A gateway over fake stages and a client that calls it in this process."""

    def __init__(self, store: BundleStore, *, access: Access = OPEN, **options: Any) -> None:
        self.embedder = FakeStage("embed", lambda h: np.ones((len(h), 2), np.float32))
        self.retriever = FakeStage("retrieve", retrieve)
        self.reranker = FakeStage("rerank", rerank)
        ingress = Gateway(
            str(store.directory),
            None,
            self.embedder,
            self.retriever,
            self.reranker,
            GatewayConfig(
                **{
                    "max_batch": 8,
                    "batches_ahead": 0,
                    "max_waiting": 20,
                    "stage_timeout_s": 0.2,
                    **options,
                }
            ),
            access,
        )
        self.gateway = ingress
        transport = httpx.ASGITransport(ingress.__serve_build_asgi_app__())
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def recommend(self, **body: Any) -> dict[str, Any]:
        response = await self.client.post("/v1/recommend", json=body)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture
def rig(paper_bundles: BundleStore) -> Rig:
    return Rig(paper_bundles)


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def test_an_answer_passes_all_stages(rig: Rig, paper_bundles: BundleStore):
    answer = asyncio.run(rig.recommend(user_id="ann", k=3, explain=True))
    assert ids(answer) == ["i4", "i3", "i2"]
    assert answer["items"][0]["terms"] == {"popularity": 0.5, "semantic": 0.25, "reranker": 0.5}
    assert answer["bundle"] == paper_bundles.current_id()
    assert set(answer["timings_ms"]) == {"embed", "retrieve", "rerank", "queue", "total"}
    assert answer["degraded"] == []
    assert answer["fallback"] is None


def test_concurrent_requests_travel_as_one_batch(rig: Rig):
    async def main():
        bodies = [{"user_id": "ann", "k": k + 1} for k in range(16)]
        return await asyncio.gather(*(rig.recommend(**body) for body in bodies))

    answers = asyncio.run(main())
    assert [len(answer["items"]) for answer in answers] == [min(k + 1, 5) for k in range(16)]
    assert sum(rig.retriever.sizes) == 16
    assert len(rig.retriever.sizes) < 8
    assert rig.retriever.sizes == rig.reranker.sizes
    assert rig.embedder.sizes == rig.retriever.sizes[:1]  # the vector of that history is known now


@pytest.mark.parametrize("failure", [RuntimeError("killed"), lambda: asyncio.sleep(5)])
def test_without_the_reranker_the_fused_order_is_answered(rig: Rig, failure: Any):
    rig.reranker.failure = failure
    answer = asyncio.run(rig.recommend(user_id="ann"))
    assert answer["degraded"] == ["rerank"]
    assert ids(answer) == [f"i{n}" for n in range(5)]


def test_without_the_embedder_the_other_sources_go_on(rig: Rig):
    rig.embedder.failure = RuntimeError("killed")
    answer = asyncio.run(rig.recommend(explain=True))
    assert answer["degraded"] == ["embed"]
    assert answer["items"][0]["terms"] == {"popularity": 0.5, "semantic": 0.0}


def test_without_the_retriever_the_client_is_told_to_come_back(rig: Rig):
    async def main():
        rig.retriever.failure = RuntimeError("killed")
        for method, path in (("POST", "/v1/recommend"), ("GET", "/readyz")):
            response = await rig.client.request(method, path, content=b"{}", headers=HEADERS)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert "a stage is down" in response.text
        assert (await rig.client.get("/healthz")).status_code == 200
        rig.retriever.failure = None
        assert (await rig.client.get("/readyz")).json() == {"ready": True, "degraded": []}

    asyncio.run(main())


def test_ready_once_every_stage_came_up_and_then_also_without_one(rig: Rig):
    async def main():
        rig.embedder.failure = RuntimeError("starting")
        assert (await rig.client.get("/readyz")).status_code == 503
        rig.embedder.failure = None
        assert (await rig.client.get("/readyz")).json() == {"ready": True, "degraded": []}
        rig.embedder.failure = RuntimeError("killed")
        assert (await rig.client.get("/readyz")).json() == {"ready": True, "degraded": ["embed"]}

    asyncio.run(main())


def test_a_gateway_on_an_open_address_needs_keys(
    paper_bundles: BundleStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gateway, "_bound_host", lambda: "0.0.0.0")  # noqa: S104
    with pytest.raises(ConfigError, match="no API key is set"):
        Rig(paper_bundles)
    Rig(paper_bundles, access=keyed())


def test_an_empty_history_is_not_reranked_where_its_segment_is_not(paper_bundles: BundleStore):
    async def main():
        rig = Rig(paper_bundles)
        await rig.recommend()
        assert not rig.reranker.sizes
        await rig.recommend(user_id="ann")
        assert rig.reranker.sizes == [1]

    asyncio.run(main())


def test_a_full_waiting_room_is_503(paper_bundles: BundleStore):
    async def main():
        rig = Rig(paper_bundles, max_waiting=1, max_batch=1)
        rig.retriever.failure = lambda: asyncio.sleep(0.1)
        posts = [rig.client.post("/v1/recommend", json={}) for _ in range(12)]
        return await asyncio.gather(*posts)

    responses = asyncio.run(main())
    statuses = {response.status_code for response in responses}
    assert statuses == {200, 503}
    refused = next(r for r in responses if r.status_code == 503)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["detail"][0]["message"] == "too many requests; try again later"


def test_at_the_deadline_the_fused_order_is_answered(rig: Rig):
    rig.reranker.failure = lambda: asyncio.sleep(0.15)  # within the stage's own time
    headers = {"x-request-timeout-seconds": "0.08"}

    async def main():
        start = time.monotonic()
        post = rig.client.post("/v1/recommend", json={"user_id": "ann"}, headers=headers)
        return await post, time.monotonic() - start

    response, took = asyncio.run(main())
    assert response.json()["degraded"] == ["rerank"]
    assert ids(response.json()) == [f"i{n}" for n in range(5)]
    assert took < 0.12


def test_a_reranker_too_expensive_for_what_is_left_is_not_asked(rig: Rig):
    rig.reranker.failure = lambda: asyncio.sleep(0.1)
    headers = {"x-request-timeout-seconds": "0.05"}

    async def main():
        slow = await rig.recommend(user_id="ann")
        assert slow["degraded"] == []
        post = rig.client.post("/v1/recommend", json={"user_id": "ann"}, headers=headers)
        assert (await post).json()["degraded"] == ["rerank"]

    asyncio.run(main())
    assert rig.reranker.sizes == [1]


def test_nothing_by_the_deadline_is_503(rig: Rig):
    rig.retriever.failure = lambda: asyncio.sleep(0.15)
    headers = {"x-request-timeout-seconds": "0.05"}
    post = rig.client.post("/v1/recommend", json={}, headers=headers)
    assert asyncio.run(post).status_code == 503


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_timeout_is_a_positive_number(rig: Rig, value: str):
    headers = {"x-request-timeout-seconds": value}
    response = asyncio.run(rig.client.post("/v1/recommend", json={}, headers=headers))
    assert response.status_code == 422
    assert response.json()["detail"][0]["field"] == "x-request-timeout-seconds"


def test_a_slow_embedder_leaves_time_for_the_other_sources(rig: Rig):
    rig.embedder.failure = lambda: asyncio.sleep(5)
    headers = {"x-request-timeout-seconds": "0.2"}
    post = rig.client.post("/v1/recommend", json={"text": "love"}, headers=headers)
    response = asyncio.run(post)
    assert response.status_code == 200
    assert "embed" in response.json()["degraded"]


def test_a_stage_that_keeps_failing_is_left_alone(rig: Rig):
    rig.embedder.failure = RuntimeError("killed")

    async def main():
        for _ in range(3):
            await rig.recommend()
        asked = len(rig.embedder.sizes)
        answers = [await rig.recommend() for _ in range(5)]
        assert [answer["degraded"] for answer in answers] == [["embed"]] * 5
        assert len(rig.embedder.sizes) == asked
        assert (await rig.client.get("/v1/status")).json()["degraded"] == ["embed"]

    asyncio.run(main())


def test_a_part_that_failed_is_sent_again(rig: Rig):
    failures = [RuntimeError("killed")]

    async def once() -> None:
        if failures:
            raise failures.pop()

    rig.retriever.failure = once
    answer = asyncio.run(rig.recommend(user_id="ann"))
    assert len(answer["items"]) == 5
    assert rig.retriever.sizes == [1, 1]


def test_a_batch_is_split_over_the_replicas(paper_bundles: BundleStore):
    async def main():
        rig = Rig(paper_bundles, max_batch=16)
        rig.gateway._rerank.replicas = 2
        bodies = [{"user_id": "ann", "k": 5} for _ in range(16)]
        answers = await asyncio.gather(*(rig.recommend(**body) for body in bodies))
        assert all(ids(answer) == ["i4", "i3", "i2", "i1", "i0"] for answer in answers)
        assert rig.retriever.sizes == [16]
        assert rig.reranker.sizes == [8, 8]

    asyncio.run(main())


class TestSwap:
    @pytest.fixture
    def store(self, paper_bundles: BundleStore, tmp_path: Path) -> BundleStore:
        shutil.copytree(paper_bundles.directory, tmp_path / "store", symlinks=True)
        return BundleStore(tmp_path / "store")

    @staticmethod
    def other(store: BundleStore, tmp_path: Path) -> str:
        """Another bundle: the same, but for the titles."""
        pipeline = tmp_path / "other"
        shutil.copytree(store.current(), pipeline, ignore=shutil.ignore_patterns("manifest.json"))
        catalogue = Catalogue.load(pipeline / "catalogue.parquet")
        titles = tuple(f"Other {title}" for title in catalogue.titles)
        (pipeline / "catalogue.parquet").unlink()
        replace(catalogue, titles=titles).save(pipeline / "catalogue.parquet")
        return store.add(pipeline).id

    def test_the_promoted_bundle_is_swapped_in_and_back(self, store: BundleStore, tmp_path: Path):
        first, second = store.current().name, self.other(store, tmp_path)
        rig = Rig(store)

        async def main():
            await rig.gateway._shelf.follow()
            assert rig.retriever.held == [first]
            store.promote(second, "test")
            await rig.gateway._shelf.follow()
            assert rig.embedder.held == rig.reranker.held == [second, first]
            answer = await rig.recommend(user_id="ann")
            assert answer["bundle"] == second
            assert answer["items"][0]["title"].startswith("Other")
            old = await rig.recommend(user_id="ann", bundle=first)
            assert (old["bundle"], old["items"][0]["title"][:5]) == (first, "Title")
            assert (await rig.client.get("/v1/bundle")).json()["held"] == [second, first]
            store.rollback()
            await rig.gateway._shelf.follow()
            assert (await rig.recommend())["bundle"] == first

        asyncio.run(main())

    def test_a_request_keeps_the_bundle_that_it_began_with(
        self, store: BundleStore, tmp_path: Path
    ):
        first, second = store.current().name, self.other(store, tmp_path)
        rig = Rig(store)

        async def main():
            rig.retriever.failure = lambda: asyncio.sleep(0.1)
            began = asyncio.ensure_future(rig.recommend())
            await asyncio.sleep(0.03)
            store.promote(second, "test")
            await rig.gateway._shelf.follow()
            late = asyncio.ensure_future(rig.recommend())
            assert ((await began)["bundle"], (await late)["bundle"]) == (first, second)

        asyncio.run(main())

    def test_no_swap_until_every_stage_holds_it(self, store: BundleStore, tmp_path: Path):
        first, second = store.current().name, self.other(store, tmp_path)
        rig = Rig(store)

        async def main():
            rig.reranker.refusal = RuntimeError("replica died")
            store.promote(second, "test")
            await rig.gateway._shelf.follow()
            assert (await rig.recommend())["bundle"] == first
            rig.reranker.refusal = None
            await rig.gateway._shelf.follow()
            assert (await rig.recommend())["bundle"] == second

        asyncio.run(main())

    def test_a_damaged_bundle_changes_nothing(self, store: BundleStore, tmp_path: Path):
        first, second = store.current().name, self.other(store, tmp_path)
        rig = Rig(store)
        store.promote(second, "test")
        file = store.path(second) / "users.parquet"
        file.chmod(0o644)
        file.write_bytes(file.read_bytes()[:-1] + b"x")

        async def main():
            await rig.gateway._shelf.follow()
            assert (await rig.recommend())["bundle"] == first
            assert rig.retriever.held == []  # nobody was asked to load it

        asyncio.run(main())

    def test_a_bundle_that_is_not_held_is_422(self, rig: Rig):
        response = asyncio.run(rig.client.post("/v1/recommend", json={"bundle": "other"}))
        assert response.status_code == 422
        assert response.json()["detail"][0]["field"] == "bundle"


def test_bundle(rig: Rig, paper_bundles: BundleStore):
    answer = asyncio.run(rig.client.get("/v1/bundle")).json()
    assert answer["bundle"] == paper_bundles.current_id()
    assert answer["dataset"] == {"name": "paper"}
    assert (answer["num_items"], answer["num_users"]) == (20, 1)


def test_keys_guard_what_is_worth_guarding(paper_bundles: BundleStore):
    async def main():
        rig = Rig(paper_bundles, access=keyed())
        for headers in ({}, {"x-api-key": "wrong"}, {"authorization": f"Basic {KEY}"}):
            response = await rig.client.post("/v1/recommend", json={}, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert (await rig.client.get("/v1/bundle", headers=headers)).status_code == 401
        assert not rig.retriever.sizes
        for headers in ({"x-api-key": KEY}, {"authorization": f"Bearer {KEY}"}):
            response = await rig.client.post("/v1/recommend", json={}, headers=headers)
            assert response.status_code == 200
            assert (await rig.client.get("/v1/bundle", headers=headers)).status_code == 200
        assert (await rig.client.get("/healthz")).status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize(
    ("body", "content_type", "status", "field"),
    [
        (b"", "application/json", 422, "body"),
        (b"{", "application/json", 422, "body"),
        (b"\x00\xff", "application/json", 422, "body"),
        (b'{"text":"\\ud800"}', "application/json", 422, "body"),
        (b'{"k":' + b"9" * 50_000 + b"}", "application/json", 422, "body"),
        (b"[" * 50_000, "application/json", 422, "body"),
        (b'{"k":NaN}', "application/json", 422, "k"),
        (b'{"k":1e999}', "application/json", 422, "k"),
        (b'{"user_id":null,"colour":1}', "application/json", 422, "colour"),
        (b"{}", "text/plain", 415, "content-type"),
        (b"{}", "", 415, "content-type"),
        (b"k=1", "application/x-www-form-urlencoded", 415, "content-type"),
        (b'{"text":"' + b"x" * (1 << 20) + b'"}', "application/json", 413, "body"),
    ],
)
def test_bad_requests(rig: Rig, body: bytes, content_type: str, status: int, field: str):
    request = rig.client.post("/v1/recommend", content=body, headers={"content-type": content_type})
    response = asyncio.run(request)
    assert response.status_code == status
    assert response.json()["detail"][0]["field"] == field
    assert not rig.retriever.sizes


def test_a_content_type_may_name_a_charset(rig: Rig):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    response = asyncio.run(rig.client.post("/v1/recommend", content=b"{}", headers=headers))
    assert response.status_code == 200


def test_the_openapi_document_describes_request_and_answer(rig: Rig):
    document = asyncio.run(rig.client.get("/openapi.json")).json()
    operation = document["paths"]["/v1/recommend"]["post"]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schemas = document["components"]["schemas"]
    assert set(schemas[reference.rpartition("/")[2]]["properties"]) == {
        "user_id", "history", "text", "k", "filters", "explain", "bundle",
    }  # fmt: skip
    assert {"HistoryEvent", "Filters", "RecommendResponse", "ErrorResponse"} <= set(schemas)
    assert set(operation["responses"]) == {
        "200", "401", "408", "413", "415", "422", "429", "431", "503",
    }  # fmt: skip
