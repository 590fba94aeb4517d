import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from fusionrec.client import AsyncClient, Client


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """``ask(transport or url, method, *arguments)`` with either client."""

    def ask(where: Any, method: str, *arguments: Any, made: Any = None, **fields: Any) -> Any:
        url, transport = (
            (where, None) if isinstance(where, str) else ("http://endpoint.test", where)
        )
        options = {"transport": transport, **(made or {})}
        if request.param == "sync":
            with Client(url, **options) as client:
                return getattr(client, method)(*arguments, **fields)

        async def main() -> Any:
            async with AsyncClient(url, **options) as client:
                return await getattr(client, method)(*arguments, **fields)

        return asyncio.run(main())

    return ask
