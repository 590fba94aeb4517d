"""The short form of ``make chaos``: faults under load, with two replicas of everything."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.harness import actors, faults
from benchmarks.harness.application import STAGES, write_application
from benchmarks.harness.experiment import Scene, observe
from benchmarks.harness.faults import Fault
from benchmarks.harness.material import write_requests
from benchmarks.harness.processes import free_port
from fusionrec.bundles.store import BundleStore
from serve_apps.deploy import start

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def store(bundles: BundleStore, tmp_path_factory: pytest.TempPathFactory) -> BundleStore:
    """A store of its own, to promote in."""
    store = BundleStore(tmp_path_factory.mktemp("chaos") / "bundles")
    store.promote(store.add(bundles.current()).id, "test")
    return store


@pytest.fixture(scope="module")
def scene(ray_cluster: Any, store: BundleStore) -> Iterator[Scene]:
    from ray import serve

    folder = store.directory.parent
    # The machine is busy with a replica that starts: that time is not what is tested.
    patient = {"timeout_s": 30, "watch_s": 0.2}
    application = write_application(
        folder / "application.yaml",
        dict.fromkeys((*STAGES, "Gateway"), 2),
        patient,
        embed_in_retriever=False,
    )
    requests = folder / "requests.jsonl"
    write_requests(store.current(), requests, 5000, seed=0)
    yield Scene(
        address=start(store.directory, free_port(), config=application),
        requests=requests,
        rate=15.0,
        client_rate=10.0,
        before_s=1.0,
        after_s=1.0,
        patience_s=120.0,
        connections=64,
        client_timeout_s=30.0,
    )
    serve.shutdown()


@pytest.mark.parametrize(
    "fault",
    [lambda: faults.stage_replica("Embedder"), faults.controller, faults.gateway],
    ids=["stage", "control", "gateway"],
)
def test_a_kill_breaks_no_promise(scene: Scene, fault: Callable[[], Fault]):
    faults.await_full_strength(scene.patience_s)
    before = actors.find()
    assert {name: len(pids) for name, pids in before.replicas.items()} == dict.fromkeys(
        (*STAGES, "Gateway"), 2
    )
    killing = fault()
    seen = observe(scene, killing.do, killing.marks)
    assert killing.breaches(seen) == [], (seen.counts, seen.client_failures)
    assert len(seen.result.records) > 15
    assert seen.client_calls > 5
    assert len(before.all() - actors.find().all()) == 1


def test_a_swap_costs_no_error_and_goes_back(scene: Scene, store: BundleStore):
    faults.await_full_strength(scene.patience_s)
    old = store.current().name
    swap = faults.swap(store, spike=float("inf"))
    seen = observe(scene, swap.do, swap.marks)
    assert swap.breaches(seen) == [], (seen.counts, seen.client_failures)
    assert min(seen.result.marked(1), seen.result.marked(2)) > 0
    assert store.current().name != old
    assert store.rollback() == old
