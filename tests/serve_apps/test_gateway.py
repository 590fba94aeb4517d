import asyncio
import hashlib
import logging
from typing import Any

import pytest

from fusionrec.bundles.store import BundleStore
from fusionrec.errors import ConfigError
from serve_apps import calls, gateway
from serve_apps.security import Access
from tests.serve_apps.rig import Rig

KEY = "secret"
HEADERS = {"content-type": "application/json"}


def keyed() -> Access:
    return Access(api_keys=(hashlib.sha256(KEY.encode()).hexdigest(),))


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
    assert rig.embedder.lone == rig.retriever.lone == rig.reranker.lone == [True]


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


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a gateway is ready is found out whenever it is asked."""
    monkeypatch.setattr(gateway, "_READY_S", 0.0)


@pytest.mark.usefixtures("looking")
def test_without_the_retriever_the_client_is_told_to_come_back(paper_bundles: BundleStore):
    rig = Rig(paper_bundles)

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


@pytest.mark.usefixtures("looking")
def test_ready_once_every_stage_came_up_and_then_also_without_one(paper_bundles: BundleStore):
    rig = Rig(paper_bundles)

    async def main():
        rig.embedder.failure = RuntimeError("starting")
        assert (await rig.client.get("/readyz")).status_code == 503
        rig.embedder.failure = None
        assert (await rig.client.get("/readyz")).json() == {"ready": True, "degraded": []}
        rig.embedder.failure = RuntimeError("killed")
        assert (await rig.client.get("/readyz")).json() == {"ready": True, "degraded": ["embed"]}

    asyncio.run(main())


def test_whether_it_is_ready_costs_one_request_however_often_it_is_asked(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    counted: list[int] = []
    monkeypatch.setattr(rig.gateway._metrics, "count_request", counted.append)

    async def main():
        for _ in range(2):
            asked = [rig.client.get("/readyz") for _ in range(10)]
            assert {response.status_code for response in await asyncio.gather(*asked)} == {200}

    asyncio.run(main())
    assert rig.retriever.sizes == [1]
    assert counted == []


def test_a_stage_that_fails_with_every_batch_does_not_log_with_every_batch(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    monkeypatch.setattr(gateway.logger, "handlers", [handler])
    rig.embedder.failure = rig.reranker.failure = RuntimeError("killed")

    async def main():
        for _ in range(20):
            assert (await rig.recommend(user_id="ann"))["degraded"] == ["embed", "rerank"]
        rig.retriever.failure = RuntimeError("killed")
        for _ in range(5):
            assert (await rig.client.post("/v1/recommend", json={})).status_code == 503

    asyncio.run(main())
    assert len(told) == len(set(told)) == 2 * 3  # each stage is called again, then given up
    assert "stage embed failed, answering without it: RuntimeError('killed')" in told


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
    post = rig.client.post("/v1/recommend", json={"user_id": "ann"}, headers=headers)
    response = asyncio.run(post)
    assert response.json()["degraded"] == ["rerank"]
    assert ids(response.json()) == [f"i{n}" for n in range(5)]


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


def test_a_reranker_that_hangs_is_waited_for_once(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    rig.reranker.failure = lambda: asyncio.sleep(5)
    headers = {"x-request-timeout-seconds": "0.1"}

    async def main():
        for _ in range(3):
            post = rig.client.post("/v1/recommend", json={"user_id": "ann"}, headers=headers)
            assert (await post).json()["degraded"] == ["rerank"]
        assert rig.reranker.sizes == [1]
        # In time what was seen is forgotten, and one request tries again.
        monkeypatch.setattr(calls, "_FORGET_S", 1e-9)
        rig.reranker.failure = None
        assert (await rig.recommend(user_id="ann"))["degraded"] == []

    asyncio.run(main())


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
    assert rig.retriever.lone == [True, False]  # elsewhere


@pytest.mark.parametrize(("ahead", "retrieved"), [(0, [16]), (1, [8, 8])])
def test_a_batch_is_split_over_its_share_of_the_replicas(
    paper_bundles: BundleStore, ahead: int, retrieved: list[int]
):
    async def main():
        rig = Rig(paper_bundles, max_batch=16, batches_ahead=ahead)
        rig.gateway._stages[2].replicas = 2
        bodies = [{"user_id": "ann", "k": 5} for _ in range(16)]
        answers = await asyncio.gather(*(rig.recommend(**body) for body in bodies))
        assert all(ids(answer) == ["i4", "i3", "i2", "i1", "i0"] for answer in answers)
        assert rig.retriever.sizes == retrieved
        assert rig.reranker.sizes == [8, 8]
        assert rig.retriever.lone == [len(retrieved) == 1 for _ in retrieved]
        assert rig.reranker.lone == [False, False]

    asyncio.run(main())


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
