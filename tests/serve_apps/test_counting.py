import asyncio
import hashlib

import pytest

from fusionrec.bundles.store import BundleStore
from serve_apps.metrics import Metrics
from serve_apps.security import Access
from tests.serve_apps.rig import Rig, until

KEY = "secret"


def test_every_way_that_a_request_ends_is_counted_by_its_status(
    paper_bundles: BundleStore, monkeypatch: pytest.MonkeyPatch
):
    counted: list[int] = []
    monkeypatch.setattr(Metrics, "count_request", lambda _, status: counted.append(status))
    hashed = hashlib.sha256(KEY.encode()).hexdigest()
    access = Access(api_keys=(hashed,), requests_per_s=1e-9, burst=6)
    rig = Rig(paper_bundles, access=access, stage_timeout_s=60)
    key = {"x-api-key": KEY}

    async def main():
        async def post(content: bytes = b"{}", **headers: str) -> int:
            sent = {"content-type": "application/json"}
            sent |= {name.replace("_", "-"): value for name, value in headers.items()}
            response = await rig.client.post("/v1/recommend", content=content, headers=sent)
            return response.status_code

        ended = [
            await post(),
            await post(**key),
            await post(content_type="text/plain", **key),
            await post(b"x" * (1 << 20 | 1), **key),
            await post(b'{"k": 0}', **key),
            await post(b'{"bundle": "other"}', **key),
            await post(x_much="x" * (1 << 15), **key),
        ]
        rig.retriever.failure = lambda: asyncio.Event().wait()
        left = asyncio.ensure_future(post(**key))
        await until(lambda: len(rig.retriever.sizes) == 2)
        left.cancel()
        await asyncio.wait([left])
        ended += [499, await post(**key)]
        assert counted == ended == [401, 200, 415, 413, 422, 422, 431, 499, 429]
        await rig.client.get("/v1/status", headers=key)
        assert len(counted) == len(ended)  # of requests for recommendations alone

    asyncio.run(main())
