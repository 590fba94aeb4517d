"""Replicas follow the load: the policy by itself, and through a real Serve."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.harness.processes import free_port
from fusionrec.bundles.manifest import MANIFEST
from fusionrec.bundles.store import BundleStore
from serve_apps.deploy import start
from serve_apps.recommend import CONFIG_FILE
from serve_apps.scaling import follow_load

STAGES = ("Embedder", "Retriever", "Reranker")
PATIENCE_S = 240.0


def context(calls: float, target: int, running: int | None = None) -> Any:
    return SimpleNamespace(
        total_num_requests=calls,
        target_num_replicas=target,
        current_num_replicas=target if running is None else running,
        config=SimpleNamespace(get_target_ongoing_requests=lambda: 0.8),
    )


@pytest.mark.parametrize(
    ("calls", "replicas", "wanted"),
    [
        (0.0, 1, 1),
        (0.5, 1, 1),
        (0.9, 1, 2),
        (5.0, 1, 2),  # one at a time
        (1.0, 2, 2),
        (0.7, 2, 2),  # a single one would be as busy as wanted: it stays
        (0.6, 2, 1),
        (2.5, 3, 4),
        (0.0, 3, 2),
    ],
)
def test_one_replica_more_or_less(calls: float, replicas: int, wanted: int):
    assert follow_load(context(calls, replicas)) == (wanted, {})


def test_while_a_replica_starts_there_is_no_other():
    assert follow_load(context(5.0, 2, running=1)) == (2, {})
    assert follow_load(context(0.0, 2, running=1)) == (1, {})


def test_both_profiles_name_the_policy_for_every_stage():
    for file in (CONFIG_FILE, CONFIG_FILE.with_name("recommend.cluster.yaml")):
        [application] = yaml.safe_load(file.read_text())["applications"]
        for deployment in application["deployments"]:
            if deployment["name"] in STAGES:
                scaling = deployment["autoscaling_config"]
                assert scaling["policy"] == {"policy_function": "serve_apps.scaling:follow_load"}
                assert scaling["target_ongoing_requests"] < 1


@pytest.fixture(scope="module")
def store(bundles: BundleStore, tmp_path_factory: pytest.TempPathFactory) -> BundleStore:
    """A bundle whose reranker reads long lists: by far the slowest stage."""
    pipeline = tmp_path_factory.mktemp("slow") / "pipeline"
    shutil.copytree(bundles.current(), pipeline)
    (pipeline / MANIFEST).unlink()
    config = json.loads((pipeline / "pipeline.json").read_text())
    (pipeline / "pipeline.json").write_text(json.dumps({**config, "rerank_top": 50}))
    store = BundleStore(pipeline.parent / "bundles")
    store.promote(store.add(pipeline).id, "test")
    return store


@pytest.fixture(scope="module")
def address(ray_cluster: Any, store: BundleStore, tmp_path_factory: Any) -> Iterator[str]:
    from ray import serve

    document = yaml.safe_load(CONFIG_FILE.read_text())
    [application] = document["applications"]
    application["args"]["gateway"]["timeout_s"] = 60
    application["args"]["gateway"]["stage_timeout_s"] = 60
    for deployment in application["deployments"]:
        deployment["autoscaling_config"].update(
            look_back_period_s=2, upscale_delay_s=1, downscale_delay_s=2
        )
    file = tmp_path_factory.mktemp("scaling") / "application.yaml"
    file.write_text(yaml.safe_dump(document))
    yield start(store.directory, free_port(), config=file)
    serve.shutdown()


@contextmanager
def load(address: str, body: dict[str, Any], connections: int) -> Iterator[list[int]]:
    """Clients that ask one request after the other until the block ends; their statuses."""
    over, statuses = threading.Event(), []

    def ask() -> None:
        with httpx.Client(base_url=address, timeout=PATIENCE_S) as client:
            while not over.is_set():
                statuses.append(client.post("/v1/recommend", json=body).status_code)

    with ThreadPoolExecutor(connections) as pool:
        clients = [pool.submit(ask) for _ in range(connections)]
        try:
            yield statuses
        finally:
            over.set()
    for client in clients:
        client.result()


def replicas(address: str) -> dict[str, int]:
    found = httpx.get(f"{address}/v1/status", timeout=PATIENCE_S).json()["replicas"]
    return {name: counts["running"] for name, counts in found.items() if name in STAGES}


def await_replicas(address: str, wanted: dict[str, int]) -> None:
    until = time.monotonic() + PATIENCE_S
    while (found := replicas(address)) != wanted:
        assert time.monotonic() < until, found
        time.sleep(0.3)


@pytest.mark.ray
# A variable says how often in these tests, and the setting that would be asked about is deprecated.
@pytest.mark.filterwarnings("ignore:.look_back_period_s:FutureWarning")
def test_the_slow_stage_follows_the_load_up_and_down(address: str, store: BundleStore):
    single = dict.fromkeys(STAGES, 1)
    await_replicas(address, single)
    items = _known_items(store.current())
    with load(address, {"history": items[:8], "k": 5}, connections=8) as statuses:
        await_replicas(address, {**single, "Reranker": 2})
    assert set(statuses) == {200}
    await_replicas(address, single)


def _known_items(bundle: Path) -> list[str]:
    from fusionrec.data.catalogue import Catalogue

    return list(Catalogue.load(bundle / "catalogue.parquet").item_ids)
