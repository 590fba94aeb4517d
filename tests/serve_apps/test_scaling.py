"""Replicas follow the load: the policy by itself, and through a real Serve."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from ray.serve._private.constants import DEFAULT_AUTOSCALING_POLICY_NAME
from ray.serve.config import AutoscalingConfig

from benchmarks.harness.application import embed_apart
from benchmarks.harness.processes import free_port
from fusionrec.bundles.store import BundleStore
from fusionrec.data.catalogue import Catalogue
from serve_apps.deploy import start
from serve_apps.recommend import CONFIG_FILE
from serve_apps.scaling import follow_load
from tests.serve_apps.slowed import Notes

STAGES = ("Embedder", "Retriever", "Reranker")
PATIENCE_S = 240.0
STEP_S = 0.4
"""Of the slow stage; the others take some hundredths, also on a busy machine."""


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


def test_both_profiles_name_the_policy_of_every_deployment():
    """That of the gateways is Serve's own: requests pile up there, and several may be missing."""
    for file in (CONFIG_FILE, CONFIG_FILE.with_name("recommend.cluster.yaml")):
        [application] = yaml.safe_load(file.read_text())["applications"]
        for deployment in application["deployments"]:
            scaling = AutoscalingConfig.model_validate(deployment["autoscaling_config"])
            [policy] = deployment["autoscaling_config"]["policy"].values()
            if deployment["name"] in STAGES:
                assert policy == "serve_apps.scaling:follow_load"
                assert scaling.target_ongoing_requests < 1
            else:
                assert policy == DEFAULT_AUTOSCALING_POLICY_NAME
                assert scaling.policy.is_default_policy_function()


@pytest.fixture(scope="module")
def notes(bundles: BundleStore, tmp_path_factory: pytest.TempPathFactory) -> Notes:
    """With which a test says which stage is the slow one."""
    folder = tmp_path_factory.mktemp("scaling") / "bundles"
    shutil.copytree(bundles.directory, folder, symlinks=True)
    notes = Notes.beside(folder)
    notes.clear()
    return notes


@pytest.fixture(scope="module")
def address(ray_cluster: Any, notes: Notes) -> Iterator[str]:
    from ray import serve

    document = yaml.safe_load(CONFIG_FILE.read_text())
    [application] = document["applications"]
    embed_apart(application)  # every stage by itself
    application["import_path"] = "tests.serve_apps.slowed:app"
    # Equal histories come again: without a cache of vectors the embedder has work, too.
    application["args"]["gateway"].update(timeout_s=60, stage_timeout_s=60, vector_cache=0)
    for deployment in application["deployments"]:
        deployment["autoscaling_config"].update(
            look_back_period_s=2, upscale_delay_s=1, downscale_delay_s=2
        )
    folder = notes.folder.parent
    file = folder / "application.yaml"
    file.write_text(yaml.safe_dump(document))
    yield start(folder / "bundles", free_port(), config=file)
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
@pytest.mark.parametrize("slow", STAGES)
def test_the_slow_stage_follows_the_load_up_and_down(address: str, notes: Notes, slow: str):
    """And the others stay: each does its own part in no time."""
    single = dict.fromkeys(STAGES, 1)
    await_replicas(address, single)
    notes.clear(**{slow: STEP_S})
    bundle = BundleStore(notes.folder.parent / "bundles").current()
    items = list(Catalogue.load(bundle / "catalogue.parquet").item_ids)
    with load(address, {"history": items[:8], "k": 5}, connections=4) as statuses:
        await_replicas(address, {**single, slow: 2})
    assert set(statuses) == {200}
    notes.clear()
    await_replicas(address, single)
