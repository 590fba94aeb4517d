"""A gateway over fake stages."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np

from fusionrec.bundles.store import BundleStore
from fusionrec.data.histories import BoolArray, FloatArray, Histories
from fusionrec.fusion.model import Fused
from fusionrec.serving.pipeline import Pipeline
from serve_apps.delivery import Delivery
from serve_apps.gateway import Gateway, GatewayConfig
from serve_apps.security import Access
from serve_apps.stages import Found

OPEN = Access()


class FakeStage:
    """Answers like a Serve handle; ``failure`` is raised, or awaited where it is a function."""

    def __init__(self, name: str, method: Callable[..., Any]) -> None:
        self.sizes: list[int] = []
        self.lone: list[bool] = []
        self.failure: Exception | Callable[[], Any] | None = None
        self.refusal: Exception | None = None
        self.held: list[str] = []
        self._method = method
        setattr(self, name, SimpleNamespace(remote=self._remote))

    def broadcast(self, method: str, bundles: list[str]) -> Any:
        assert method == "hold"
        self.held = bundles

        async def results(timeout_s: float) -> list[Any]:
            if self.refusal is not None:
                raise self.refusal
            return [bundles]

        return SimpleNamespace(results_async=results)

    async def _remote(
        self, bundle: str, histories: Histories, *rest: Any, delivery: Delivery
    ) -> Any:
        assert len(bundle) == 32
        self.sizes.append(len(histories))
        self.lone.append(delivery.lone)
        if isinstance(self.failure, Exception):
            raise self.failure
        if self.failure is not None:
            await self.failure()
        return self._method(histories, *rest)


def embed(histories: Histories) -> FloatArray:
    """The same vector for all."""
    return np.ones((len(histories), 2), np.float32)


def retrieve(histories: Histories, depth: int | None) -> Fused:
    """Items 0 to 4; the term of the vectors is missing without the embedder."""
    items = np.tile(np.arange(5, dtype=np.int32), (len(histories), 1))
    known = np.zeros(len(histories), np.bool_)
    if histories.vectors is not None:
        known = histories.vectors.any(axis=1)
    terms = np.tile(np.array([[0.5], [0.25]], np.float32), (len(histories), 1, 5))
    terms[~known, 1] = 0
    return Fused(items, terms.sum(axis=1), terms, ("popularity", "semantic")).head(depth)


def rerank(histories: Histories, items: Any) -> Any:
    """The reverse order."""
    assert items.shape[1] == 5
    return np.tile(np.linspace(0, 1, 5, dtype=np.float32), (len(histories), 1))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it, as long as it takes."""
    while not condition():
        await asyncio.sleep(0.001)


class Rig:
    """A gateway and a client that calls it in this process; over fake stages, or a pipeline's."""

    def __init__(
        self,
        store: BundleStore,
        *,
        access: Access = OPEN,
        embed_in_retriever: bool = False,
        pipeline: Pipeline | None = None,
        **options: Any,
    ) -> None:
        self._embed = embed if pipeline is None else lambda h: pipeline.embed(h).vectors
        self._retrieve = (
            retrieve if pipeline is None else lambda h, depth: pipeline.retrieve(h).head(depth)
        )
        self.embedder = FakeStage("embed", self._embed)
        self.retriever = FakeStage("retrieve", self._find if embed_in_retriever else self._retrieve)
        self.missing: list[list[bool]] = []
        """What a retriever that embeds was asked to embed, by call."""
        self.embed_timeouts: list[float] = []
        """Seconds that it was given for that, by call."""
        self.embeds = True
        """Whether a retriever that embeds can."""
        self.embeds_late = False
        """Whether it only can when its time is over."""
        self.reranker = FakeStage("rerank", rerank if pipeline is None else pipeline.rerank_scores)
        ingress = Gateway(
            str(store.directory),
            None,
            None if embed_in_retriever else self.embedder,
            self.retriever,
            self.reranker,
            GatewayConfig(
                **{
                    "max_batch": 8,
                    "batches_ahead": 0,
                    "max_waiting": 20,
                    "stage_timeout_s": 0.2,
                    **options,
                }
            ),
            access,
        )
        self.gateway = ingress
        transport = httpx.ASGITransport(ingress.__serve_build_asgi_app__())
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")

    def _find(
        self, histories: Histories, depth: int | None, missing: BoolArray, timeout_s: float
    ) -> Found:
        self.missing.append(missing.tolist())
        self.embed_timeouts.append(timeout_s)
        if not missing.any():
            return Found(self._retrieve(histories, depth), np.empty((0, 0), np.float32))
        if self.embeds_late:
            return Found(self._retrieve(histories, depth), None, timeout_s)
        if not self.embeds:
            return Found(self._retrieve(histories, depth), None)
        vectors = self._embed(histories)
        histories = histories.with_vectors(vectors)
        return Found(self._retrieve(histories, depth), vectors[missing], 0.001)

    async def recommend(self, **body: Any) -> dict[str, Any]:
        response = await self.client.post("/v1/recommend", json=body)
        assert response.status_code == 200, response.text
        return response.json()
