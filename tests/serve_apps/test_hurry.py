"""Requests with little time in a batch with others: what they cost, and whom."""

import asyncio
from typing import Any

import pytest

from fusionrec.bundles.store import BundleStore
from tests.serve_apps.rig import Rig, until

PATIENT_S = 60.0
HURRIED_S = 1.0


def ask(rig: Rig, timeout_s: float, **body: Any) -> asyncio.Future[Any]:
    headers = {"x-request-timeout-seconds": str(timeout_s)}
    return asyncio.ensure_future(rig.client.post("/v1/recommend", json=body, headers=headers))


@pytest.mark.parametrize("embed_in_retriever", [False, True])
def test_who_is_in_a_hurry_costs_nobody_else_a_vector(
    paper_bundles: BundleStore, embed_in_retriever: bool
):
    rig = Rig(paper_bundles, embed_in_retriever=embed_in_retriever, stage_timeout_s=PATIENT_S)
    embeds = rig.retriever if embed_in_retriever else rig.embedder

    async def main() -> None:
        released = asyncio.Event()

        async def hang() -> None:
            if len(embeds.sizes) == 1:
                await released.wait()

        embeds.failure = hang
        patient = [ask(rig, PATIENT_S, history=[f"i{n}"], explain=True) for n in range(3)]
        hurried = await ask(rig, HURRIED_S, explain=True)
        assert hurried.json()["degraded"] == ["embed"]
        assert hurried.json()["items"][0]["terms"] == {"popularity": 0.5, "semantic": 0.0}
        assert not any(answer.done() for answer in patient)
        released.set()
        answers = [response.json() for response in await asyncio.gather(*patient)]
        assert [answer["degraded"] for answer in answers] == [[]] * 3
        assert {answer["items"][0]["terms"]["semantic"] for answer in answers} == {0.25}
        assert embeds.sizes[0] == 4  # they were one batch
        assert (await rig.client.get("/v1/status")).json()["degraded"] == []

    asyncio.run(main())


def test_requests_with_about_as_much_time_go_ahead_together(paper_bundles: BundleStore):
    rig = Rig(paper_bundles, stage_timeout_s=PATIENT_S)
    rig.embedder.failure = lambda: asyncio.Event().wait()

    async def main() -> None:
        patient = ask(rig, PATIENT_S)
        hurried = await asyncio.gather(*(ask(rig, HURRIED_S + n / 100) for n in range(4)))
        assert [response.json()["degraded"] for response in hurried] == [["embed"]] * 4
        assert rig.retriever.sizes == [4]
        patient.cancel()

    asyncio.run(main())


def test_a_timeout_of_the_caller_says_nothing_of_the_embedder(paper_bundles: BundleStore):
    rig = Rig(paper_bundles, stage_timeout_s=PATIENT_S)
    rig.embedder.failure = lambda: asyncio.Event().wait()

    async def main() -> None:
        for _ in range(3):
            response = await ask(rig, 0.5)
            assert response.json()["degraded"] == ["embed"]
        assert (await rig.client.get("/v1/status")).json()["degraded"] == []
        rig.embedder.failure = None
        assert (await ask(rig, PATIENT_S)).json()["degraded"] == []

    asyncio.run(main())


@pytest.mark.parametrize("embed_in_retriever", [False, True])
def test_an_embedder_too_slow_for_the_default_time_is_left_alone(
    paper_bundles: BundleStore, embed_in_retriever: bool
):
    """Though no call of it ever lasts as long as a stage may."""
    rig = Rig(
        paper_bundles,
        embed_in_retriever=embed_in_retriever,
        timeout_s=0.5,
        stage_timeout_s=PATIENT_S,
    )
    rig.embedder.failure = lambda: asyncio.Event().wait()
    rig.embeds_late = True

    async def main() -> None:
        for _ in range(3):
            assert (await rig.recommend())["degraded"] == ["embed"]
        assert (await rig.client.get("/v1/status")).json()["degraded"] == ["embed"]

    asyncio.run(main())


def test_who_goes_ahead_is_cancelled_with_the_batch(paper_bundles: BundleStore):
    rig = Rig(paper_bundles, stage_timeout_s=PATIENT_S)
    cancelled: list[str] = []

    def hang(stage: str) -> Any:
        async def wait() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(stage)
                raise

        return wait

    rig.embedder.failure, rig.retriever.failure = hang("embed"), hang("retrieve")

    async def main() -> None:
        asked = [ask(rig, PATIENT_S), ask(rig, HURRIED_S)]
        await until(lambda: rig.retriever.sizes == [1])
        for each in asked:
            each.cancel()
        await until(lambda: sorted(cancelled) == ["embed", "retrieve"])

    asyncio.run(main())
