"""The obvious composition on Ray Serve: what its documentation leads to, with the same stages.

A FastAPI ingress calls one handle per request and stage; each stage gathers its requests with
``serve.batch``. Serve's default proxy and logging. Only what would cripple it is not left at its
default: ``max_ongoing_requests`` (5) and the size of a batch (10).
"""

# No `from __future__ import annotations`: Serve and FastAPI look at types at run time.

import signal
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from pydantic import Field
from ray import serve
from ray.serve.handle import DeploymentHandle

from fusionrec.bundles.store import BundleStore
from fusionrec.config import JobConfig, parse
from fusionrec.data.histories import FloatArray, Histories
from fusionrec.fusion.model import Fused
from fusionrec.serving.schemas import parse_request
from fusionrec.serving.service import Service, Trace
from jobs import cluster
from jobs.entry import run

MAX_BATCH = 32
api = FastAPI()


class ObviousConfig(JobConfig):
    """Serve the current bundle, composed in the obvious way."""

    bundles: Path
    """Folder of bundles; the current one is served."""
    port: int
    """Port on loopback."""
    replicas: int = Field(default=1, ge=1)
    """Replicas of each stage behind the ingress."""
    threads: int = Field(default=1, ge=1)
    """Threads of the models in each replica."""


def load(stage: str, bundle: str, threads: int) -> Any:
    """The part of the pipeline that a replica of ``stage`` needs."""
    import torch

    from fusionrec.serving.pipeline import Pipeline, Stage

    torch.set_num_threads(threads)
    return Pipeline.load(Path(bundle), stages=frozenset({Stage(stage)}))


class Embedder:
    """Text vectors, a batch of single histories at a time."""

    def __init__(self, bundle: str, threads: int) -> None:
        self._pipeline = load("embedder", bundle, threads)

    @serve.batch(max_batch_size=MAX_BATCH)
    async def __call__(self, histories: list[Histories]) -> list[FloatArray | None]:
        """[1, D] each."""
        vectors = self._pipeline.embed(_join(histories)).vectors
        if vectors is None:
            return [None] * len(histories)
        return [vectors[row : row + 1] for row in range(len(vectors))]


class Retriever:
    """Fused candidates, a batch of single histories at a time."""

    def __init__(self, bundle: str, threads: int) -> None:
        self._pipeline = load("retriever", bundle, threads)

    @serve.batch(max_batch_size=MAX_BATCH)
    async def __call__(self, histories: list[Histories]) -> list[Fused]:
        """One history's candidates each."""
        return _split(self._pipeline.retrieve(_join(histories)))


class Reranker:
    """Reranked candidates, a batch of single histories at a time."""

    def __init__(self, bundle: str, threads: int) -> None:
        self._pipeline = load("reranker", bundle, threads)

    @serve.batch(max_batch_size=MAX_BATCH)
    async def __call__(self, asked: list[tuple[Histories, Fused]]) -> list[Fused]:
        """One history's candidates each."""
        histories = _join([history for history, _ in asked])
        return _split(self._pipeline.rerank(histories, Fused.join([fused for _, fused in asked])))


@serve.ingress(api)
class Gateway:
    """HTTP, and one call a request and stage."""

    def __init__(
        self,
        bundle: str,
        embedder: DeploymentHandle[Any],
        retriever: DeploymentHandle[Any],
        reranker: DeploymentHandle[Any],
    ) -> None:
        self._service = Service.load(Path(bundle))
        self._embedder, self._retriever, self._reranker = embedder, retriever, reranker

    @api.post("/v1/recommend")
    async def recommend(self, request: Request) -> Response:
        """Answer one request."""
        questions = self._service.ask([parse_request(await request.body())])
        histories = questions.histories
        histories = histories.with_vectors(await self._embedder.remote(histories))
        fused = await self._retriever.remote(histories)
        fusion = self._service.fusion
        if fusion is not None and fusion.reranked(histories.lengths).any():
            fused = await self._reranker.remote((histories, fused))
        [answer] = self._service.answer(questions, fused, Trace())
        return Response(answer.model_dump_json(), media_type="application/json")


def _join(histories: list[Histories]) -> Histories:
    """One batch of many."""
    texts = [text for each in histories for text in each.texts or (None,) * len(each)]
    vectors = [each.vectors for each in histories if each.vectors is not None]
    return Histories(
        items=np.concatenate([each.items for each in histories]),
        timestamps=np.concatenate([each.timestamps for each in histories]),
        offsets=np.cumsum([0, *(len(each.items) for each in histories)]),
        texts=tuple(texts) if any(texts) else None,
        vectors=np.concatenate(vectors) if vectors else None,
    )


def _split(fused: Fused) -> list[Fused]:
    """The rows of a batch."""
    return [
        Fused(
            fused.items[row : row + 1],
            fused.scores[row : row + 1],
            fused.terms[row : row + 1],
            fused.term_names,
        )
        for row in range(len(fused.items))
    ]


def main() -> None:
    """Parse, start Ray, serve until interrupted."""
    config = parse(ObviousConfig)
    bundle = str(BundleStore(config.bundles).current().resolve())
    settings: dict[str, Any] = {
        "num_replicas": config.replicas,
        "max_ongoing_requests": 256,
        "ray_actor_options": {"num_cpus": 0.1},  # so that they fit; the threads are set apart
    }
    stages = [
        serve.deployment(**settings)(stage).bind(bundle, config.threads)
        for stage in (Embedder, Retriever, Reranker)
    ]
    with cluster.start():
        serve.start(http_options={"host": "127.0.0.1", "port": config.port})
        gateway = serve.deployment(**{**settings, "num_replicas": 1})(Gateway)
        serve.run(gateway.bind(bundle, *stages))
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # in place of Ray's
        while True:
            signal.pause()


if __name__ == "__main__":
    run(main)
