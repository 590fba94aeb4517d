"""A retriever that embeds, as the gateway sees it; and what is known when nothing embeds."""

import asyncio
from typing import Any

import pytest

from fusionrec.bundles.store import BundleStore
from tests.serve_apps.rig import Rig


def test_a_retriever_may_embed_too(paper_bundles: BundleStore):
    rig = Rig(paper_bundles, embed_in_retriever=True)

    async def main() -> list[dict[str, Any]]:
        return [await rig.recommend(user_id="ann", explain=True) for _ in range(2)]

    first, second = asyncio.run(main())
    terms = {"popularity": 0.5, "semantic": 0.25, "reranker": 0.5}
    assert first["items"][0]["terms"] == second["items"][0]["terms"] == terms
    assert {"embed", "retrieve"} <= first["timings_ms"].keys()
    assert "embed" not in second["timings_ms"]  # the vector of that history is known now
    assert rig.embedder.sizes == []
    assert rig.missing == [[True], [False]]


def test_a_retriever_embeds_what_is_not_known_yet(paper_bundles: BundleStore):
    rig = Rig(paper_bundles, embed_in_retriever=True)

    async def main() -> list[dict[str, Any]]:
        await rig.recommend(user_id="ann")
        bodies = ({"user_id": "ann"}, {"history": ["i1"]})
        return await asyncio.gather(*(rig.recommend(**body, explain=True) for body in bodies))

    answers = asyncio.run(main())
    assert [answer["items"][0]["terms"]["semantic"] for answer in answers] == [0.25, 0.25]
    assert rig.missing[1:] == [[False, True]]


def test_where_the_retriever_cannot_embed_the_other_sources_answer(paper_bundles: BundleStore):
    rig = Rig(paper_bundles, embed_in_retriever=True)
    rig.embeds = False
    answer = asyncio.run(rig.recommend(user_id="ann", explain=True))
    assert answer["degraded"] == ["embed"]
    assert answer["items"][0]["terms"]["semantic"] == 0


def test_a_retriever_has_half_of_the_time_to_embed(paper_bundles: BundleStore):
    rig = Rig(paper_bundles, embed_in_retriever=True, stage_timeout_s=20.0)
    headers = {"x-request-timeout-seconds": "60"}

    async def main() -> None:
        await rig.recommend()
        await rig.client.post("/v1/recommend", json={}, headers=headers)

    asyncio.run(main())
    by_deadline, by_stage = rig.embed_timeouts
    assert 0 < by_deadline < 0.5 * 0.95 * 5
    assert by_stage == 10


def test_a_retriever_that_cannot_embed_is_not_asked_to_for_a_while(paper_bundles: BundleStore):
    rig = Rig(paper_bundles, embed_in_retriever=True)
    rig.embeds = False

    async def main() -> None:
        for _ in range(3):
            await rig.recommend()
        answers = [await rig.recommend() for _ in range(2)]
        assert [answer["degraded"] for answer in answers] == [["embed"]] * 2
        assert rig.missing == [[True]] * 3 + [[False]] * 2
        assert (await rig.client.get("/v1/status")).json()["degraded"] == ["embed"]
        rig.embeds = True
        rig.gateway._composition._circuits["embed"]._next_try = 0.0  # two seconds later
        assert (await rig.recommend())["degraded"] == []
        assert (await rig.client.get("/v1/status")).json()["degraded"] == []

    asyncio.run(main())


def test_a_client_in_a_hurry_says_nothing_of_the_model(paper_bundles: BundleStore):
    rig = Rig(paper_bundles, embed_in_retriever=True, stage_timeout_s=20.0)
    rig.embeds_late = True

    async def degraded_after(timeout_s: float) -> list[str]:
        headers = {"x-request-timeout-seconds": str(timeout_s)}
        for _ in range(3):
            answer = await rig.client.post("/v1/recommend", json={}, headers=headers)
            assert answer.json()["degraded"] == ["embed"]
        return (await rig.client.get("/v1/status")).json()["degraded"]

    async def main() -> None:
        assert await degraded_after(1) == []
        assert await degraded_after(60) == ["embed"]  # that had all the time there is

    asyncio.run(main())


@pytest.mark.parametrize("embed_in_retriever", [False, True])
def test_known_vectors_outlive_the_embedder(paper_bundles: BundleStore, embed_in_retriever: bool):
    rig = Rig(paper_bundles, embed_in_retriever=embed_in_retriever)

    async def main() -> None:
        await rig.recommend(user_id="ann")
        rig.embeds, rig.embedder.failure = False, OSError("gone")
        for _ in range(3):
            await rig.recommend()
        bodies = ({"user_id": "ann"}, {"history": ["i1"]})
        known, new = await asyncio.gather(*(rig.recommend(**body, explain=True) for body in bodies))
        assert known["degraded"] == new["degraded"] == ["embed"]
        terms = [answer["items"][0]["terms"]["semantic"] for answer in (known, new)]
        assert terms == [0.25, 0]

    asyncio.run(main())
