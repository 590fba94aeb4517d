"""What is sent to an endpoint stays out of every log; and the endpoint speaks TLS and knows keys.

A user id, an item id and a text that exist nowhere else go through a real application on all ways
that end well or badly. Then everything that Ray and Serve wrote is searched for them.
"""

import hashlib
import json
import re
import secrets
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
import yaml

from benchmarks.harness.processes import free_port
from fusionrec.bundles.store import BundleStore
from serve_apps.deploy import start
from serve_apps.recommend import CONFIG_FILE

pytestmark = pytest.mark.ray

KEY = "a-secret-key"
CANARY = f"canary{secrets.token_hex(8)}"
USER, ITEM, TEXT = f"user-{CANARY}", f"item-{CANARY}", f"a film of {CANARY}"
BODIES: list[dict[str, Any]] = [
    {"user_id": USER},
    {"user_id": USER, "explain": True, "filters": {"exclude_items": [ITEM]}},
    {"history": [ITEM]},
    {"history": [{"item_id": ITEM, "timestamp": 1}], "text": TEXT},
    {"text": TEXT},
]
WRONG = [
    json.dumps({"user_id": USER, "text": TEXT}),
    json.dumps({"user_id": USER, "k": 0}),
    json.dumps({"user_id": [USER]}),
    json.dumps({USER: 1}),
    json.dumps({"history": [{"item_id": ITEM}]}),
    json.dumps({"bundle": CANARY}),
    f'{{"user_id": "{USER}"',
    f'{{"user_id": "{USER}\\ud800"}}',
    json.dumps({"text": CANARY * 5_000}),
]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def address(
    ray_cluster: Any,
    bundles: BundleStore,
    authority: trustme.CA,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """The endpoint with TLS, a key, and logs that keep as much as they can."""
    from ray import serve

    folder = tmp_path_factory.mktemp("tls")
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    with (folder / "cert.pem").open("wb") as file:
        file.writelines(blob.bytes() for blob in certificate.cert_chain_pems)
    values = yaml.safe_load(CONFIG_FILE.read_text())
    values["http_options"] |= {
        "ssl_keyfile": str(folder / "key.pem"),
        "ssl_certfile": str(folder / "cert.pem"),
    }
    values["logging_config"] = {"log_level": "INFO", "enable_access_log": True}
    config = folder / "endpoint.yaml"
    config.write_text(yaml.safe_dump(values))
    port = free_port()
    yield start(
        bundles.directory,
        port,
        config=config,
        api_keys=(f"shop={hashlib.sha256(KEY.encode()).hexdigest()}",),
        access={"audit_sample": 1.0},
    )
    serve.shutdown()


@pytest.fixture(scope="module")
def client(address: str, authority: trustme.CA) -> Iterator[httpx.Client]:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with httpx.Client(
        base_url=address, verify=context, headers={"x-api-key": KEY}, timeout=60
    ) as client:
        yield client


def test_it_speaks_tls_only_and_says_so(address: str, client: httpx.Client):
    assert address.startswith("https://")
    answer = client.get("/healthz")
    assert answer.status_code == 200
    assert "strict-transport-security" in answer.headers
    with pytest.raises(httpx.TransportError):
        httpx.get(address.replace("https", "http"), timeout=10)


def test_nothing_that_is_sent_is_in_any_log(
    ray_cluster: Any, client: httpx.Client, capfd: pytest.CaptureFixture[str]
):
    logs = Path(ray_cluster.address_info["session_dir"]) / "logs"
    for body in BODIES:
        assert client.post("/v1/recommend", json=body).status_code == 200
    json_type = {"content-type": "application/json"}
    for content in WRONG:
        answer = client.post("/v1/recommend", content=content, headers=json_type)
        assert answer.status_code == 422, content
    refused = [
        client.post("/v1/recommend", content=USER, headers={"content-type": "text/plain"}),
        client.post("/v1/recommend", content=CANARY * 70_000, headers=json_type),
        client.post("/v1/recommend", json=BODIES[0], headers={"x-api-key": CANARY}),
        client.put("/v1/recommend", json=BODIES[0]),
        client.post("/v1/nothing", json=BODIES[0]),
        client.post("/v1/users", json={"user_id": USER}),
        client.post("/v1/items", json={"query": TEXT}),
    ]
    assert [answer.status_code for answer in refused] == [415, 413, 401, 405, 404, 200, 200]

    kill_replicas("Retriever", "Reranker")
    statuses = {client.post("/v1/recommend", json=body).status_code for body in BODIES}
    assert statuses <= {200, 503}

    entries = wait_for_audit(logs, at_least=len(BODIES) + len(WRONG))
    assert {entry["key"] for entry in entries} == {"shop", None}
    assert all(entry["status"] == 401 for entry in entries if entry["key"] is None)
    users = {entry["user"] for entry in entries if "user" in entry}
    assert len(users) == 1  # one user, under one name
    assert re.fullmatch(r"[0-9a-f]{32}", *users)

    wrote = [path for path in logs.rglob("*") if path.is_file()]
    assert any("replica_recommend_Gateway" in path.name for path in wrote)
    leaks = [path for path in wrote if CANARY.encode() in path.read_bytes()]
    assert leaks == []
    out, err = capfd.readouterr()
    assert CANARY not in out + err


def kill_replicas(*names: str) -> None:
    """SIGKILL, as far as Ray goes: the calls that are under way in them fail."""
    import ray
    from ray.serve.context import _get_global_client

    (application,) = _get_global_client().get_serve_details()["applications"].values()
    for name in names:
        for replica in application["deployments"][name]["replicas"]:
            ray.kill(ray.get_actor(replica["actor_name"], namespace="serve"))


def wait_for_audit(logs: Path, at_least: int) -> list[dict[str, Any]]:
    """The lines of the audit logs, which a thread writes."""
    deadline = time.monotonic() + 20
    while True:
        files = (logs / "serve").glob("audit_*.jsonl")
        entries = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        if len(entries) >= at_least:
            return entries
        assert time.monotonic() < deadline, entries
        time.sleep(0.2)
