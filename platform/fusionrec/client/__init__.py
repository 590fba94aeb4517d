"""A client of the endpoint, with and without asyncio.

::

    with Client("http://127.0.0.1:8000") as client:
        for item in client.recommend(user_id="u00017").items:
            print(item.title, item.score)

Every call may be repeated without harm, so it is: when the endpoint cannot be reached, drops the
connection, or answers 429, 500, 502, 503 or 504. A wait is what ``Retry-After`` asks for, if
anything, and a random time on top, between nothing and a bound that doubles with every retry. One
deadline covers all attempts; the endpoint is told how much of it is left, and gives up when nobody
waits any longer.

What a call raises is a :class:`~fusionrec.errors.RequestFailed`.
"""

from __future__ import annotations

import asyncio
import time
from typing import Self, TypeVar, Unpack

import httpx
from pydantic import BaseModel

from fusionrec.client import calls
from fusionrec.client.calls import (
    RETRIES,
    TIMEOUT_S,
    Call,
    Outcome,
    Pause,
    RecommendFields,
    Settings,
)
from fusionrec.serving.schemas import (
    BundleResponse,
    ItemsResponse,
    ReadyResponse,
    RecommendResponse,
    StatusResponse,
    UsersResponse,
)

A = TypeVar("A", bound=BaseModel)


class Client:
    """Asks an endpoint and waits for the answer. Threads may share one; connections are kept.

    The time that is left bounds each wait of an attempt on its own: for a connection, for the
    request to be taken, for the next part of the answer. So an answer that comes in drops can take
    longer than ``timeout_s``; :class:`AsyncClient` gives up in the middle of it.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        retries: int = RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Connect when first asked.

        Args:
            url: address of the endpoint, such as ``http://127.0.0.1:8000``.
            api_key: where the endpoint wants one.
            timeout_s: how long a call may take with all its retries, unless it says otherwise.
            retries: how often a call is repeated at most.
            transport: how to send, instead of httpx's own way: for proxies and tests.

        Raises:
            ConfigError: one of them cannot be used.
        """
        self._settings = Settings.check(url, api_key, timeout_s, retries)
        self._http = httpx.Client(
            base_url=self._settings.url, headers=self._settings.headers, transport=transport
        )

    def recommend(
        self, *, timeout_s: float | None = None, **fields: Unpack[RecommendFields]
    ) -> RecommendResponse:
        """Items for a known user, for a history, for a text, or in general.

        Raises:
            RequestRefused: a field cannot be used.
            Unauthorized, Unavailable, DeadlinePassed: there is no answer.
        """
        return self._run(calls.recommend(fields, timeout_s))

    def items(self, query: str, *, k: int = 10, timeout_s: float | None = None) -> ItemsResponse:
        """Items by words of their titles."""
        return self._run(calls.items(query, k, timeout_s))

    def users(
        self, *, user_id: str | None = None, k: int = 10, timeout_s: float | None = None
    ) -> UsersResponse:
        """Some users, or one with the history."""
        return self._run(calls.users(user_id, k, timeout_s))

    def bundle(self) -> BundleResponse:
        """The bundle in service."""
        return self._run(calls.BUNDLE)

    def status(self) -> StatusResponse:
        """What the endpoint is made of at this moment."""
        return self._run(calls.STATUS)

    def ready(self) -> ReadyResponse:
        """Whether requests are answered now; never retried.

        Raises:
            Unavailable: they are not.
        """
        return self._run(calls.READY)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, call: Call[A]) -> A:
        steps = self._settings.steps(call)
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                answer: A = end.value
                return answer
            outcome = None
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                continue
            try:
                outcome = self._http.send(self._settings.request(self._http, call, step.left_s))
            except httpx.RequestError as error:
                outcome = error


class AsyncClient:
    """The same for asyncio. A call that is cancelled is cancelled at the endpoint too."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        retries: int = RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Connect when first asked; everything as for :class:`Client`."""
        self._settings = Settings.check(url, api_key, timeout_s, retries)
        self._http = httpx.AsyncClient(
            base_url=self._settings.url, headers=self._settings.headers, transport=transport
        )

    async def recommend(
        self, *, timeout_s: float | None = None, **fields: Unpack[RecommendFields]
    ) -> RecommendResponse:
        """As :meth:`Client.recommend`."""
        return await self._run(calls.recommend(fields, timeout_s))

    async def items(
        self, query: str, *, k: int = 10, timeout_s: float | None = None
    ) -> ItemsResponse:
        """As :meth:`Client.items`."""
        return await self._run(calls.items(query, k, timeout_s))

    async def users(
        self, *, user_id: str | None = None, k: int = 10, timeout_s: float | None = None
    ) -> UsersResponse:
        """As :meth:`Client.users`."""
        return await self._run(calls.users(user_id, k, timeout_s))

    async def bundle(self) -> BundleResponse:
        """As :meth:`Client.bundle`."""
        return await self._run(calls.BUNDLE)

    async def status(self) -> StatusResponse:
        """As :meth:`Client.status`."""
        return await self._run(calls.STATUS)

    async def ready(self) -> ReadyResponse:
        """As :meth:`Client.ready`."""
        return await self._run(calls.READY)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, call: Call[A]) -> A:
        steps = self._settings.steps(call)
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                answer: A = end.value
                return answer
            outcome = None
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                continue
            request = self._settings.request(self._http, call, step.left_s)
            try:
                async with asyncio.timeout(step.left_s):
                    outcome = await self._http.send(request)
            except TimeoutError:
                outcome = httpx.ReadTimeout("the deadline has passed", request=request)
            except httpx.RequestError as error:
                outcome = error
