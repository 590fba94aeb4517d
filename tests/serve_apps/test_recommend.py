"""The endpoint through a real Serve on the session's Ray, over HTTP."""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import yaml
from hypothesis import given, settings
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)
from schemathesis.specs.openapi import checks as openapi_checks

from benchmarks.harness.processes import free_port
from fusionrec.bundles.store import BundleStore
from fusionrec.errors import BundleCorrupt, BundleError, ConfigError
from fusionrec.serving.pipeline import Pipeline
from fusionrec.serving.schemas import RecommendRequest
from fusionrec.serving.service import Service, recommend
from serve_apps.deploy import start
from serve_apps.gateway import _bound_host
from serve_apps.keys import is_loopback
from serve_apps.recommend import CONFIG_FILE, AppArgs, app
from serve_apps.stages import Retriever

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def address(ray_cluster: Any, bundles: BundleStore) -> Iterator[str]:
    from ray import serve

    yield start(bundles.directory, free_port(), gateway={"timeout_s": 60, "stage_timeout_s": 60})
    serve.shutdown()


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def service(bundles: BundleStore) -> Service:
    return Service.load(bundles.current())


@pytest.fixture(scope="module")
def users(service: Service) -> list[str]:
    """Users with something in their histories."""
    lengths = service.users.histories.lengths
    return [user for user, row in service.users.rows.items() if lengths[row] > 0]


def ask(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/recommend", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def history(service: Service, user: str) -> list[str]:
    items, _ = service.users.find(user)
    return service.catalogue.decode(items)


def test_a_known_user(client: httpx.Client, service: Service, users: list[str]):
    answer = ask(client, user_id=users[0])
    assert len(answer["items"]) == 10
    assert answer["fallback"] is None
    assert answer["degraded"] == []
    assert answer["bundle"] == service.bundle
    assert not set(ids(answer)) & set(history(service, users[0]))
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    for item in answer["items"]:
        code = service.catalogue.code_of[item["item_id"]]
        assert item["title"] == service.catalogue.titles[code]
    assert {"retrieve", "queue", "total"} <= set(answer["timings_ms"])


def test_an_inline_history_is_served_like_the_same_user(
    client: httpx.Client, service: Service, users: list[str]
):
    items, times = service.users.find(users[1])
    events = [
        {"item_id": item, "timestamp": int(time)}
        for item, time in zip(service.catalogue.decode(items), times, strict=True)
    ]
    assert ids(ask(client, history=events)) == ids(ask(client, user_id=users[1]))
    plain = ask(client, history=history(service, users[1]))
    assert plain["fallback"] is None
    assert not set(ids(plain)) & set(history(service, users[1]))


def test_a_text(client: httpx.Client, service: Service, users: list[str]):
    answer = ask(client, text=service.catalogue.titles[3])
    assert answer["fallback"] is None
    assert len(answer["items"]) == 10
    both = ask(client, text=service.catalogue.titles[3], history=history(service, users[0]))
    assert not set(ids(both)) & set(history(service, users[0]))


@pytest.mark.parametrize(
    ("body", "fallback"),
    [
        ({"user_id": "nobody"}, "unknown_user"),
        ({}, "empty_request"),
        ({"history": []}, "empty_request"),
        ({"history": ["nothing"]}, "unknown_items"),
    ],
)
def test_fallbacks_are_labelled_and_popular(client: httpx.Client, body: dict, fallback: str):
    answer = ask(client, **body)
    assert answer["fallback"] == fallback
    assert ids(answer) == ids(ask(client))
    assert len(answer["items"]) == 10


def test_filters(client: httpx.Client, service: Service, users: list[str]):
    everything = ids(ask(client, user_id=users[0], k=100))
    domain = service.catalogue.domains[service.catalogue.code_of[everything[-1]]]
    body = {"user_id": users[0], "k": 5, "filters": {"domains": [domain]}}
    answer = ids(ask(client, **body))
    in_domain = [
        item
        for item in everything
        if service.catalogue.domains[service.catalogue.code_of[item]] == domain
    ]
    assert answer == in_domain[:5]
    body["filters"]["exclude_items"] = answer[:1]
    assert ids(ask(client, **body))[:4] == answer[1:]


def test_an_explanation_sums_to_the_score(client: httpx.Client, users: list[str]):
    answer = ask(client, user_id=users[2], explain=True, k=50)
    for item in answer["items"]:
        assert sum(item["terms"].values()) == pytest.approx(item["score"], abs=1e-5)
    assert "terms" not in ask(client, user_id=users[2])["items"][0]


def test_offline_and_online_give_the_same_lists(
    address: str, bundles: BundleStore, service: Service, users: list[str]
):
    """Several hundred requests of all kinds, in whatever batches they happen to share."""
    bodies: list[dict[str, Any]] = [{"user_id": user} for user in users]
    for number, user in enumerate(users):
        known = history(service, user)
        bodies.append({"history": known[: 1 + number % len(known)], "k": 20, "explain": True})
        if number % 3 == 0:
            title = service.catalogue.titles[number % len(service.catalogue)]
            bodies.append({"text": title, "history": known[:1]})
    bodies += [{}, {"user_id": "nobody"}, {"text": "a"}]
    assert len(bodies) > 200

    async def online() -> list[dict[str, Any]]:
        limit = asyncio.Semaphore(16)
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:

            async def one(body: dict[str, Any]) -> dict[str, Any]:
                async with limit:
                    response = await client.post("/v1/recommend", json=body)
                    assert response.status_code == 200, response.text
                    return response.json()

            return await asyncio.gather(*(one(body) for body in bodies))

    requests = [RecommendRequest.model_validate(body) for body in bodies]
    offline = recommend(service, Pipeline.load(bundles.current()), requests)
    for body, live, local in zip(bodies, asyncio.run(online()), offline, strict=True):
        assert live["degraded"] == []
        assert live["fallback"] == local.fallback
        assert live["bundle"] == local.bundle
        scores = [item["score"] for item in live["items"]]
        assert scores == pytest.approx([item.score for item in local.items], abs=1e-4)
        # Texts are padded with others of their batch: scores may differ in the last digits, and
        # items whose scores are that close may change places.
        for here, there in zip(live["items"], local.items, strict=True):
            if here["item_id"] != there.item_id:
                near = [i.item_id for i in local.items if abs(i.score - here["score"]) < 1e-4]
                assert here["item_id"] in near or here is live["items"][-1], body


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"k": 0}, "k"),
        ({"user_id": "a", "history": ["b"]}, "history"),
        ({"history": [{"item_id": "a"}]}, "history.0.timestamp"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_input_is_named(client: httpx.Client, body: dict, field: str):
    response = client.post("/v1/recommend", json=body)
    assert response.status_code == 422
    assert [error["field"] for error in response.json()["detail"]] == [field]


def test_the_other_routes(client: httpx.Client, service: Service):
    bundle = client.get("/v1/bundle").json()
    assert bundle["bundle"] == service.bundle
    assert bundle["num_items"] == len(service.catalogue)
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"ready": True, "degraded": []}
    assert "swagger" in client.get("/docs").text
    assert client.get("/nothing").status_code == 404
    assert client.get("/v1/recommend").status_code == 405


RAW = [
    b"POST /v1/recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\r\n",
    b"POST /v1/recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"POST /v1/recommend HTTP/1.1\r\nhost: x\r\ncontent-type: \xff\xfe\r\n"
    b"content-length: 2\r\n\r\n{}",
    b"POST /v1/recommend HTTP/1.1\r\nhost: x\r\nauthorization: \xff\r\nx-api-key: \xff\r\n"
    b"content-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
    b"POST /v1/recommend?k=%00&x=%ff HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    b"content-length: 2\r\n\r\n{}",
    b"GET /%ff%00/..%2f HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v1/bundle HTTP/1.0\r\n\r\n",
    b"BREW /v1/recommend HTTP/1.1\r\nhost: x\r\n\r\n",
    b"\x00\x01\x02\r\n\r\n",
]


@pytest.mark.parametrize("request_bytes", RAW)
def test_raw_bytes_make_no_server_error(address: str, request_bytes: bytes):
    url = httpx.URL(address)
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        connection.sendall(request_bytes)
        connection.shutdown(socket.SHUT_WR)
        status = connection.recv(4096).split(b" ", 2)[1:2]
    assert not status or int(status[0]) < 500


OPENAPI_CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi_checks.response_schema_conformance,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.negative_data_rejection,
]


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_the_api_as_documented(address: str, mode: schemathesis.GenerationMode):
    """Generated requests, as the document allows them and as it does not."""
    document = schemathesis.openapi.from_url(f"{address}/openapi.json")
    sent = 0
    for result in document.get_all_operations():
        operation = result.ok()
        examples = 80 if operation.body else 3
        if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing of it can be wrong

        @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            nonlocal sent
            sent += 1
            case.call_and_validate(checks=OPENAPI_CHECKS)

        check()
    assert sent >= 80


def test_serve_is_bound_to_loopback_and_the_gateway_knows(address: str):
    assert httpx.URL(address).host == "127.0.0.1" == _bound_host()


def test_an_open_address_needs_keys(bundles: BundleStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FUSIONREC_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match=r"host 0\.0\.0\.0 can be reached .* no API key is set"):
        start(bundles.directory, host="0.0.0.0")  # noqa: S104


def test_without_a_bundle_nothing_starts(tmp_path: Path):
    with pytest.raises(BundleError, match="no current bundle; publish one"):
        start(tmp_path)


def test_a_damaged_bundle_is_not_served(paper_bundles: BundleStore, tmp_path: Path):
    store = BundleStore(tmp_path / "bundles")
    bundle = store.add(paper_bundles.current()).id
    store.promote(bundle, "test")
    (store.path(bundle) / "item_counts.npy").chmod(0o644)
    with (store.path(bundle) / "item_counts.npy").open("r+b") as file:
        file.write(b"\x00")
    with pytest.raises(BundleCorrupt, match=r"item_counts\.npy was changed"):
        app(AppArgs(bundles=str(store.directory)))
    with pytest.raises(BundleCorrupt, match=r"item_counts\.npy was changed"):
        Retriever(str(store.directory), bundle, 1)


def test_the_yaml_has_no_key_that_serve_would_ignore():
    document = yaml.safe_load(CONFIG_FILE.read_text())
    (application,) = document["applications"]
    known = [
        (document, ServeDeploySchema),
        (document["http_options"], HTTPOptionsSchema),
        (application, ServeApplicationSchema),
        (application["args"], AppArgs),
    ]
    for deployment in application["deployments"]:
        known += [
            (deployment, DeploymentSchema),
            (deployment["ray_actor_options"], RayActorOptionsSchema),
            (deployment["autoscaling_config"], AutoscalingConfig),
            (deployment.get("backpressure_config", {}), BackpressureConfig),
        ]
    for mapping, schema in known:
        assert set(mapping) <= set(schema.model_fields), mapping


def test_the_yaml_fits_two_cores_and_bounds_its_queues():
    document = yaml.safe_load(CONFIG_FILE.read_text())
    (application,) = document["applications"]
    deployments = application["deployments"]
    assert [d["name"] for d in deployments] == ["Gateway", "Retriever", "Reranker"]
    assert all(d["max_queued_requests"] > 0 for d in deployments)
    full = [
        d["autoscaling_config"]["max_replicas"] * d["ray_actor_options"]["num_cpus"]
        for d in deployments
    ]
    assert sum(full) <= 2.0001
    assert is_loopback(document["http_options"]["host"])
