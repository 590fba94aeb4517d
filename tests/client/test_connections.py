"""Connections that drop, drip, say nothing, or are refused."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from fusionrec.client import AsyncClient, Client
from fusionrec.errors import DeadlinePassed, Unavailable

ANSWER = {"items": [], "bundle": "b1", "timings_ms": {}, "degraded": [], "fallback": None}


class Dropping:
    """Answers; the connection of every second request is closed in the middle of the answer."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    async def __call__(self, scope: Any, _: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        body = json.dumps(ANSWER).encode()
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        whole = len(self.paths) % 2 == 0
        await send({"type": "http.response.body", "body": body if whole else body[:20]})


@contextmanager
def served(app: Any) -> Iterator[str]:
    """``app`` on a port of loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def test_a_dropped_connection_costs_no_answer(ask: Any):
    dropping = Dropping()
    with served(dropping) as url:
        for _ in range(3):
            assert ask(url, "recommend", user_id="ann").bundle == "b1"
    assert dropping.paths == ["/v1/recommend"] * 6


def test_one_client_keeps_its_connection_through_drops():
    dropping = Dropping()
    with served(dropping) as url, Client(url) as client:
        for _ in range(3):
            assert client.recommend(user_id="ann").bundle == "b1"
    assert len(dropping.paths) == 6


def test_an_answer_that_does_not_come_ends_with_the_deadline(ask: Any):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DeadlinePassed):
            ask(url, "recommend", timeout_s=0.2)


async def dripping(_: Any, receive: Any, send: Any) -> None:
    """An answer of which a byte comes every 50 ms for as long as somebody is there."""
    await receive()
    gone = asyncio.ensure_future(receive())
    length = (b"content-length", b"10000")
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    while not gone.done():
        await send({"type": "http.response.body", "body": b" ", "more_body": True})
        await asyncio.wait([gone], timeout=0.05)


def test_an_answer_that_comes_in_drops_ends_with_the_deadline():
    async def ask(url: str) -> None:
        async with AsyncClient(url, timeout_s=0.3) as client:
            await client.recommend(user_id="ann")

    with served(dripping) as url, pytest.raises(DeadlinePassed):
        asyncio.run(ask(url))


def test_nobody_there(ask: Any):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Unavailable, match=", 3 times: is it running"):
            ask(url, "recommend", made={"retries": 2})
