"""The peer: one hand-written FastAPI process with micro-batching around the pipeline.

What a team without Ray would write, as well as it can be written in a file: uvicorn on uvloop and
httptools; requests gather while the models are busy, and a free worker takes all that wait, up to
``max_batch``; everything but HTTP happens in the worker's thread. No replicas, no deadlines, no
swap of bundles, and it dies with its process.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from pydantic import Field

from fusionrec.bundles.store import BundleStore
from fusionrec.config import JobConfig, parse
from fusionrec.serving.pipeline import Pipeline
from fusionrec.serving.schemas import RecommendRequest, parse_request
from fusionrec.serving.service import Service, recommend
from jobs.entry import run

Waiting = tuple[RecommendRequest, asyncio.Future[bytes]]


class PeerConfig(JobConfig):
    """Serve the current bundle in one process."""

    bundles: Path
    """Folder of bundles; the current one is served."""
    port: int
    """Port on loopback."""
    workers: int = Field(default=1, ge=1)
    """Threads that run batches side by side."""
    threads: int = Field(default=1, ge=1)
    """Threads of the models in each worker."""
    max_batch: int = Field(default=32, ge=1)
    """Requests of a batch at most."""


class Batches:
    """Requests in, one batch at a time and worker through the pipeline."""

    def __init__(self, config: PeerConfig) -> None:
        bundle = BundleStore(config.bundles).current()
        self._service, self._pipeline = Service.load(bundle), Pipeline.load(bundle)
        self._executor = ThreadPoolExecutor(
            config.workers, initializer=torch.set_num_threads, initargs=(config.threads,)
        )
        self._free = config.workers
        self._max_batch = config.max_batch
        self._waiting: list[Waiting] = []
        self._running: set[asyncio.Task[None]] = set()

    def submit(self, request: RecommendRequest) -> asyncio.Future[bytes]:
        """The answer to come, as JSON."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()
        self._waiting.append((request, answer))
        if self._free and len(self._waiting) == 1:
            loop.call_soon(self._start)  # with all that came in this turn of the loop
        return answer

    def _start(self) -> None:
        while self._free and self._waiting:
            batch = self._waiting[: self._max_batch]
            del self._waiting[: self._max_batch]
            self._free -= 1
            task = asyncio.get_running_loop().create_task(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _run(self, batch: list[Waiting]) -> None:
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(
                self._executor, self._work, [request for request, _ in batch]
            )
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():  # its client may have gone away
                    future.set_result(answer)
        finally:
            self._free += 1
            self._start()

    def _work(self, requests: list[RecommendRequest]) -> list[bytes]:
        answers = recommend(self._service, self._pipeline, requests)
        return [answer.model_dump_json(exclude_unset=True).encode() for answer in answers]


def build(batches: Batches) -> FastAPI:
    """The application."""
    api = FastAPI()

    @api.post("/v1/recommend")
    async def answer(request: Request) -> Response:
        body = await batches.submit(parse_request(await request.body()))
        return Response(body, media_type="application/json")

    return api


def main() -> None:
    """Parse, load, serve."""
    config = parse(PeerConfig)
    uvicorn.run(
        build(Batches(config)),
        port=config.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
        timeout_keep_alive=75,
    )


if __name__ == "__main__":
    run(main)
