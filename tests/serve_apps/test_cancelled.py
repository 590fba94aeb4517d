"""Clients that go away, through a real Serve: the work for them ends in the replica, too."""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.harness.application import embed_apart
from benchmarks.harness.processes import free_port
from fusionrec.bundles.store import BundleStore
from fusionrec.data.catalogue import Catalogue
from serve_apps.deploy import start
from serve_apps.recommend import CONFIG_FILE
from tests.serve_apps.slowed import Notes

pytestmark = pytest.mark.ray
PATIENCE_S = 120.0
FOREVER_S = 3600.0


@pytest.fixture(scope="module")
def store(bundles: BundleStore, tmp_path_factory: pytest.TempPathFactory) -> BundleStore:
    folder = tmp_path_factory.mktemp("cancelled") / "bundles"
    shutil.copytree(bundles.directory, folder, symlinks=True)
    return BundleStore(folder)


@pytest.fixture(scope="module")
def notes(store: BundleStore) -> Notes:
    notes = Notes.beside(store.directory)
    notes.clear()
    return notes


@pytest.fixture(scope="module")
def address(ray_cluster: Any, store: BundleStore, notes: Notes) -> Iterator[str]:
    from ray import serve

    document = yaml.safe_load(CONFIG_FILE.read_text())
    [application] = document["applications"]
    embed_apart(application)  # every stage by itself
    document["http_options"]["request_timeout_s"] = 2 * FOREVER_S
    application["import_path"] = "tests.serve_apps.slowed:app"
    file = store.directory.parent / "application.yaml"
    file.write_text(yaml.safe_dump(document))
    # Every request is work for every stage, and may take as long as it wants.
    times = dict.fromkeys(("timeout_s", "stage_timeout_s"), 2 * FOREVER_S)
    gateway = {**times, "vector_cache": 0}
    yield start(store.directory, free_port(), config=file, gateway=gateway)
    serve.shutdown()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stage", ["Reranker", "Retriever", "Embedder"])
def test_what_nobody_waits_for_any_more_is_not_done(
    address: str, store: BundleStore, notes: Notes, stage: str
):
    """One step of the model is under way and cannot be stopped; those after it are not begun."""
    items = list(Catalogue.load(store.current() / "catalogue.parquet").item_ids)

    async def main() -> None:
        async with httpx.AsyncClient(base_url=address, timeout=PATIENCE_S) as client:

            def ask(number: int) -> asyncio.Task[httpx.Response]:
                history = items[number : number + 6]
                return asyncio.ensure_future(
                    client.post("/v1/recommend", json={"history": history})
                )

            notes.clear(**{stage: FOREVER_S})
            first = ask(0)
            await until(lambda: notes.count(stage, "began") == 1)
            others = [ask(number) for number in range(1, 13)]
            await asyncio.sleep(0.2)  # they may have come to the stage by then, and may not
            for request in (first, *others):
                request.cancel()  # closes the connection
            while (await client.get("/v1/status")).json()["queue"]:
                await asyncio.sleep(0.01)
            asked = notes.count(stage, "asked")
            await until(lambda: notes.count(stage, "cancelled") == asked)
            assert notes.count(stage, "began") == 1
            notes.clear()  # the step ends
            answer = (await ask(20)).json()
            assert answer["degraded"] == []
            assert notes.count(stage, "began") == 1  # the step of this request alone

    asyncio.run(main())
