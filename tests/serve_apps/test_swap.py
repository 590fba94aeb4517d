"""Live swap of bundles, over fake stages."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fusionrec.bundles.store import BundleStore
from fusionrec.data.catalogue import Catalogue
from fusionrec.fusion.model import Fusion
from serve_apps import swap
from serve_apps.held import BundleNotHeld
from tests.serve_apps.rig import Rig, until

PATIENT = {"stage_timeout_s": 60, "timeout_s": 60}
"""Where a stage waits for the test, however busy the machine is."""


@pytest.fixture
def store(paper_bundles: BundleStore, tmp_path: Path) -> BundleStore:
    shutil.copytree(paper_bundles.directory, tmp_path / "store", symlinks=True)
    return BundleStore(tmp_path / "store")


def other(store: BundleStore, tmp_path: Path, prefix: str = "Other") -> str:
    """Another bundle: the same, but for the titles."""
    pipeline = tmp_path / "other"
    shutil.copytree(store.current(), pipeline, ignore=shutil.ignore_patterns("manifest.json"))
    catalogue = Catalogue.load(pipeline / "catalogue.parquet")
    titles = tuple(f"{prefix} {title}" for title in catalogue.titles)
    (pipeline / "catalogue.parquet").unlink()
    replace(catalogue, titles=titles).save(pipeline / "catalogue.parquet")
    return store.add(pipeline).id


def test_the_embedder_rests_where_the_fusion_turned_semantic_off(
    store: BundleStore, tmp_path: Path
):
    assert swap.Loaded.load(store, store.current().name).embeds
    pipeline = tmp_path / "off"
    shutil.copytree(store.current(), pipeline, ignore=shutil.ignore_patterns("manifest.json"))
    fusion = Fusion.load(pipeline / "fusion.json")
    (pipeline / "fusion.json").unlink()
    fusion.without(["semantic"]).save(pipeline / "fusion.json")
    loaded = swap.Loaded.load(store, store.add(pipeline).id)
    assert "semantic" in loaded.manifest.pipeline["sources"]
    assert not loaded.embeds


def test_the_promoted_bundle_is_swapped_in_and_back(store: BundleStore, tmp_path: Path):
    first, second = store.current().name, other(store, tmp_path)
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


@pytest.mark.parametrize("embed_in_retriever", [False, True])
def test_what_another_bundle_embedded_is_embedded_again(
    store: BundleStore, tmp_path: Path, embed_in_retriever: bool
):
    """Two encoders have nothing to say to each other, not even about one history."""
    first, second = store.current().name, other(store, tmp_path)
    rig = Rig(store, embed_in_retriever=embed_in_retriever)

    def embedded() -> int:
        return sum(map(sum, rig.missing)) if embed_in_retriever else sum(rig.embedder.sizes)

    async def main():
        for bundle in (first, second):
            store.promote(bundle, "test")
            await rig.gateway._shelf.follow()
            before = embedded()
            for _ in range(2):
                assert (await rig.recommend(user_id="ann"))["bundle"] == bundle
            assert embedded() == before + 1
        await rig.recommend(user_id="ann", bundle=first)  # still held, still known
        assert embedded() == before + 1

    asyncio.run(main())


def test_a_request_keeps_the_bundle_that_it_began_with(store: BundleStore, tmp_path: Path):
    first, second = store.current().name, other(store, tmp_path)
    rig = Rig(store, **PATIENT)

    async def main():
        released = asyncio.Event()
        rig.retriever.failure = released.wait
        began = asyncio.ensure_future(rig.recommend())
        await until(lambda: rig.retriever.sizes == [1])
        store.promote(second, "test")
        await rig.gateway._shelf.follow()
        late = asyncio.ensure_future(rig.recommend())
        released.set()
        assert ((await began)["bundle"], (await late)["bundle"]) == (first, second)

    asyncio.run(main())


def test_no_swap_until_every_stage_holds_it(store: BundleStore, tmp_path: Path):
    first, second = store.current().name, other(store, tmp_path)
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


def test_a_replica_that_lacks_the_bundle_is_told_to_hold_it(
    store: BundleStore, monkeypatch: pytest.MonkeyPatch
):
    """One that came up with what was current by then, while gateways still send another."""
    monkeypatch.setattr(swap, "_CONFIRM_EVERY", 10**9)  # but for the first look
    bundle = store.current().name
    rig = Rig(store)
    shelf = rig.gateway._shelf

    async def lack() -> None:
        if rig.retriever.held != [bundle]:
            raise BundleNotHeld("not yet")

    rig.retriever.failure = lack

    async def main():
        watching = asyncio.ensure_future(shelf.watch(0.001))
        try:
            await until(lambda: rig.retriever.held == [bundle])
            rig.retriever.held = []
            rig.retriever.sizes.clear()
            assert (await rig.recommend())["bundle"] == bundle
            assert len(rig.retriever.sizes) > 1
        finally:
            watching.cancel()

    asyncio.run(main())


def test_a_damaged_bundle_changes_nothing(store: BundleStore, tmp_path: Path):
    first, second = store.current().name, other(store, tmp_path)
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


def test_a_gateway_that_starts_while_the_current_bundle_is_damaged_takes_the_one_before(
    store: BundleStore, tmp_path: Path
):
    """As one does that replaces another: nobody would be left, one after the other."""
    first, second = store.current().name, other(store, tmp_path)
    store.promote(second, "test")
    file = store.path(second) / "users.parquet"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    rig = Rig(store)

    async def main():
        assert (await rig.recommend())["bundle"] == first
        await rig.gateway._shelf.follow()  # and does not take it later
        assert (await rig.recommend())["bundle"] == first

    asyncio.run(main())


def test_a_bundle_that_is_not_held_is_422(store: BundleStore):
    response = asyncio.run(Rig(store).client.post("/v1/recommend", json={"bundle": "other"}))
    assert response.status_code == 422
    assert response.json()["detail"][0]["field"] == "bundle"


def test_a_request_that_waits_keeps_its_bundle_held(store: BundleStore, tmp_path: Path):
    """Two swaps later nothing else would need the first bundle any more."""
    first, second = store.current().name, other(store, tmp_path)
    third = other(store, tmp_path / "again", prefix="Third")
    rig = Rig(store, max_batch=1, **PATIENT)
    shelf = rig.gateway._shelf

    async def main():
        released = asyncio.Event()
        rig.retriever.failure = released.wait
        began = [asyncio.ensure_future(rig.recommend()) for _ in range(3)]
        await until(lambda: shelf.current.in_use == 3)
        await until(lambda: rig.retriever.sizes == [1])  # one batch is under way, two wait
        store.promote(second, "test")
        await shelf.follow()
        store.promote(third, "test")
        swap = asyncio.ensure_future(shelf.follow())
        await until(lambda: shelf.current.id == third)
        await asyncio.sleep(0.06)  # the shelf looks whether it is in use every 50 ms
        assert rig.retriever.held == [third, second, first]
        released.set()
        assert {answer["bundle"] for answer in await asyncio.gather(*began)} == {first}
        await swap
        assert rig.retriever.held == [third, second]

    asyncio.run(main())
