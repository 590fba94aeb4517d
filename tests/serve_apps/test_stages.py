"""The stage classes in this process, with inputs as they come out of Ray: read-only."""

import asyncio
import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
import torch

from fusionrec.bundles.store import BundleStore
from fusionrec.data.histories import Histories
from fusionrec.errors import BundleError
from fusionrec.serving.pipeline import Pipeline
from fusionrec.serving.schemas import RecommendRequest
from fusionrec.serving.service import Service
from serve_apps.stages import Embedder, EmbeddingRetriever, Found, Reranker, Retriever


def read_only(value: Any) -> Any:
    for field in dataclasses.fields(value):
        array = getattr(value, field.name)
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    return value


def test_the_stages_together_are_the_pipeline(bundles: BundleStore):
    arguments = (str(bundles.directory), bundles.current().name, 1)
    embedder, retriever, reranker = (
        Embedder(*arguments),
        Retriever(*arguments),
        Reranker(*arguments),
    )
    pipeline, service = Pipeline.load(bundles.current()), Service.load(bundles.current())
    users = [RecommendRequest(user_id=user) for user in list(service.users.rows)[:20]]
    histories = service.ask([*users, RecommendRequest()]).histories

    async def staged() -> Any:
        bundle = bundles.current().name
        vectors = await embedder.embed(bundle, read_only(histories))
        embedded = read_only(histories.with_vectors(vectors))
        fused = read_only(await retriever.retrieve(bundle, embedded, None))
        weights = service.rerank_weights(embedded)
        (rows,) = np.nonzero(weights > 0)
        items = fused.items[rows, : pipeline.config.rerank_top]
        scores = await reranker.rerank(bundle, read_only(embedded.take(rows)), items)
        return fused.reranked(rows, weights[rows, None] * scores)

    expected = pipeline.recommend(histories)
    found = asyncio.run(staged())
    assert found.term_names == expected.term_names
    for name in ("items", "scores", "terms"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_a_retriever_that_embeds_is_both_stages(bundles: BundleStore):
    arguments = (str(bundles.directory), bundles.current().name, 1)
    both, bundle = EmbeddingRetriever(*arguments), bundles.current().name
    pipeline, service = Pipeline.load(bundles.current()), Service.load(bundles.current())
    users = [RecommendRequest(user_id=user) for user in list(service.users.rows)[:5]]
    histories = read_only(service.ask(users).histories)

    found = asyncio.run(both.retrieve(bundle, histories, 7, np.ones(5, np.bool_), 60))
    embedded = read_only(pipeline.embed(histories))
    np.testing.assert_array_equal(found.vectors, embedded.vectors)
    np.testing.assert_array_equal(found.fused.items, pipeline.retrieve(embedded).head(7).items)
    assert found.embed_s > 0

    known = asyncio.run(both.retrieve(bundle, embedded, 7, np.zeros(5, np.bool_), 60))
    assert known.vectors is not None
    assert len(known.vectors) == 0
    np.testing.assert_array_equal(known.fused.items, found.fused.items)

    missing = np.array([False, True, False, False, True])
    partly = np.where(missing[:, None], 0, embedded.vectors)
    some = asyncio.run(both.retrieve(bundle, histories.with_vectors(partly), 7, missing, 60))
    np.testing.assert_allclose(some.vectors, embedded.vectors[missing], atol=1e-5)
    np.testing.assert_array_equal(some.fused.items, found.fused.items)


def test_a_retriever_that_cannot_embed_finds_what_needs_no_text(
    bundles: BundleStore, monkeypatch: pytest.MonkeyPatch
):
    both = EmbeddingRetriever(str(bundles.directory), bundles.current().name, 1)
    pipeline = Pipeline.load(bundles.current())
    histories = Service.load(bundles.current()).ask([RecommendRequest()] * 2).histories
    monkeypatch.setattr(Pipeline, "embed", lambda *_: 1 / 0)
    found = asyncio.run(
        both.retrieve(bundles.current().name, histories, 4, np.ones(2, np.bool_), 60)
    )
    assert found.vectors is None
    np.testing.assert_array_equal(found.fused.items, pipeline.retrieve(histories).head(4).items)


def test_a_text_model_that_hangs_holds_up_nothing_else(
    bundles: BundleStore, monkeypatch: pytest.MonkeyPatch
):
    bundle, released = bundles.current().name, threading.Event()
    both = EmbeddingRetriever(str(bundles.directory), bundle, 1)
    pipeline = Pipeline.load(bundles.current())
    histories = Service.load(bundles.current()).ask([RecommendRequest()] * 2).histories
    every, none = np.ones(2, np.bool_), np.zeros(2, np.bool_)
    embed = Pipeline.embed

    def hang(pipeline: Pipeline, histories: Histories) -> Histories:
        released.wait()
        return embed(pipeline, histories)

    monkeypatch.setattr(Pipeline, "embed", hang)

    async def main() -> None:
        late = [await both.retrieve(bundle, histories, 4, every, 0.01) for _ in range(2)]
        known = await both.retrieve(bundle, histories, 4, none, 0.01)
        assert [found.vectors for found in late] == [None, None]
        assert [found.embed_s for found in late] == [0.01, 0.01]
        for found in (*late, known):
            expected = pipeline.retrieve(histories).head(4).items
            np.testing.assert_array_equal(found.fused.items, expected)
        released.set()
        assert (await both.retrieve(bundle, histories, 4, every, 60)).vectors is not None

    try:
        asyncio.run(main())
    finally:
        released.set()  # or the replica's thread would outlive the tests


def test_what_was_found_in_parts_is_put_together(bundles: BundleStore):
    both = EmbeddingRetriever(str(bundles.directory), bundles.current().name, 1)
    histories = Service.load(bundles.current()).ask([RecommendRequest()] * 3).histories

    def ask(start: int, stop: int, *, embed: bool) -> Found:
        rows = histories.slice(start, stop)
        missing = np.full(len(rows), embed)
        return asyncio.run(both.retrieve(bundles.current().name, rows, 4, missing, 60))

    for last, count in ((True, 3), (False, 1)):
        whole = Found.join([ask(0, 1, embed=True), ask(1, 3, embed=last)])
        assert whole.vectors is not None
        assert len(whole.vectors) == count
        assert len(whole.fused.items) == 3
    failed = dataclasses.replace(ask(1, 3, embed=True), vectors=None)
    assert Found.join([ask(0, 1, embed=True), failed]).vectors is None


def test_a_stage_answers_for_the_bundle_that_it_holds_only(bundles: BundleStore):
    retriever = Retriever(str(bundles.directory), bundles.current().name, 1)
    histories = Service.load(bundles.current()).ask([RecommendRequest()]).histories
    with pytest.raises(BundleError, match="does not hold bundle other"):
        asyncio.run(retriever.retrieve("other", histories, None))


def test_a_batch_that_is_alone_has_more_threads(bundles: BundleStore):
    bundle = bundles.current().name
    stage = Embedder(str(bundles.directory), bundle, 1, 2)
    same = Embedder(str(bundles.directory), bundle, 1)

    async def threads(embedder: Embedder) -> list[int]:
        held = embedder._held
        return [
            await held.run(bundle, lambda _: torch.get_num_threads(), lone=lone)
            for lone in (False, True, False)
        ]

    assert asyncio.run(threads(stage)) == [1, 2, 1]
    assert asyncio.run(threads(same)) == [1, 1, 1]
