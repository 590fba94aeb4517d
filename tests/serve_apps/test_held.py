"""What a replica holds, and for how long."""

import asyncio
import shutil
from pathlib import Path

import numpy as np
import pytest

from fusionrec.bundles.store import BundleStore
from fusionrec.errors import BundleError
from fusionrec.serving.pipeline import Pipeline
from fusionrec.serving.schemas import RecommendRequest
from fusionrec.serving.service import Service
from serve_apps import held
from serve_apps.held import Held
from serve_apps.stages import Retriever


def another(bundles: BundleStore, tmp_path: Path) -> tuple[BundleStore, str]:
    """A store with the current bundle and one more, and the id of that."""
    shutil.copytree(bundles.directory, tmp_path / "store", symlinks=True)
    store, pipeline = BundleStore(tmp_path / "store"), tmp_path / "pipeline"
    shutil.copytree(store.current(), pipeline, ignore=shutil.ignore_patterns("manifest.json"))
    counts = np.load(pipeline / "item_counts.npy")
    (pipeline / "item_counts.npy").unlink()
    np.save(pipeline / "item_counts.npy", counts + 1)
    return store, store.add(pipeline).id


def test_all_gateways_that_ask_for_a_bundle_share_one_load(
    bundles: BundleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, other = another(bundles, tmp_path)
    first = store.current().name
    retriever = Retriever(str(store.directory), first, 1)
    loads: list[str] = []
    load = Held._load

    def counted(part: Held, bundle: str) -> Pipeline:
        loads.append(bundle)
        return load(part, bundle)

    monkeypatch.setattr(Held, "_load", counted)

    async def main() -> None:
        gateways = [asyncio.ensure_future(retriever.hold([other, first])) for _ in range(3)]
        await asyncio.sleep(0)
        gateways[0].cancel()  # it gave up
        answers = await asyncio.gather(*gateways[1:])
        assert [set(ids) for ids in answers] == [{first, other}] * 2
        assert loads == [other]
        assert await retriever.hold([first]) == [first]
        await retriever.hold([other, first])
        assert loads == [other, other]

    asyncio.run(main())


def test_a_bundle_that_some_gateway_still_uses_is_kept(
    bundles: BundleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After two swaps in quick succession one gateway may be a bundle behind."""
    store, other = another(bundles, tmp_path)
    first = store.current().name
    retriever = Retriever(str(store.directory), first, 1)
    histories = Service.load(store.current()).ask([RecommendRequest()]).histories

    async def main() -> None:
        await retriever.retrieve(first, histories, 1)
        assert set(await retriever.hold([other])) == {first, other}
        await retriever.retrieve(first, histories, 1)
        monkeypatch.setattr(held, "_IN_USE_S", 0.0)
        assert await retriever.hold([other]) == [other]

    asyncio.run(main())


def test_a_load_that_failed_is_tried_again(bundles: BundleStore):
    retriever = Retriever(str(bundles.directory), bundles.current().name, 1)

    async def main() -> None:
        for _ in range(2):
            failed = [retriever.hold(["0" * 32]) for _ in range(2)]
            for outcome in await asyncio.gather(*failed, return_exceptions=True):
                assert isinstance(outcome, BundleError)
        assert not retriever._held._loading

    asyncio.run(main())
