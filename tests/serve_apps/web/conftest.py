"""A real server around the tiny pipeline in this process, and a real browser."""

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from playwright.sync_api import Browser, Error, Page, Request, expect, sync_playwright

from fusionrec.bundles.store import BundleStore
from fusionrec.serving import browse
from fusionrec.serving.pipeline import Pipeline
from fusionrec.serving.schemas import (
    BundleResponse,
    ItemsRequest,
    ItemsResponse,
    ReadyResponse,
    RecommendRequest,
    RecommendResponse,
    ReplicaCounts,
    StatusResponse,
    UsersRequest,
    UsersResponse,
)
from fusionrec.serving.service import Service, Trace
from serve_apps.api import Unavailable, build_api
from serve_apps.security import Access, Door

if TYPE_CHECKING:
    from fastapi import FastAPI

KEY = "a-key-for-the-page"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_MS = 20_000
expect.set_options(timeout=PATIENCE_MS)
PICTURES = os.environ.get("SCREENSHOTS")
"""Folder for the pictures in the document, and of what a failed test saw last; where there is none,
none are taken."""
FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Have fixtures know, when they end, whether the test failed."""
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


class LocalEndpoint:
    """What the gateway does, without Ray, with the stages that are not in ``down``."""

    def __init__(self, store: BundleStore, bundles: list[str]) -> None:
        self.held = bundles
        self.services = {bundle: Service.load(store.path(bundle)) for bundle in bundles}
        self.pipelines = {bundle: Pipeline.load(store.path(bundle)) for bundle in bundles}
        service = self.services[bundles[0]]
        self.browser = browse.Browser(service.catalogue, service.users)
        self.reset()

    def reset(self) -> None:
        self.down: set[str] = set()
        self.refusal: Exception | None = None
        self.next: str | None = None
        self.asked: list[RecommendRequest] = []

    async def recommend(self, request: RecommendRequest, *_: Any) -> RecommendResponse:
        self.asked.append(request)
        if self.refusal is not None:
            raise self.refusal
        bundle = request.bundle or self.held[0]
        service, pipeline = self.services[bundle], self.pipelines[bundle]
        trace, start = Trace(timings_ms={"queue": 0.1}), time.perf_counter()

        def stage(name: str, work: Callable[[], Any]) -> Any:
            began = time.perf_counter()
            answer = work()
            trace.timings_ms[name] = round((time.perf_counter() - began) * 1e3, 3)
            return answer

        questions = service.ask([request])
        histories = questions.histories
        if "embed" in self.down:
            trace.degraded.append("embed")
        else:
            histories = stage("embed", lambda: pipeline.embed(histories))
        fused = stage("retrieve", lambda: pipeline.retrieve(histories))
        if "rerank" in self.down:
            trace.degraded.append("rerank")
        elif (service.rerank_weights(histories) > 0).any():
            fused = stage("rerank", lambda: pipeline.rerank(histories, fused))
        trace.timings_ms["total"] = round((time.perf_counter() - start) * 1e3 + 0.4, 3)
        (answer,) = service.answer(questions, fused, trace)
        return answer

    async def ready(self) -> ReadyResponse:
        raise Unavailable

    def describe_bundle(self) -> BundleResponse:
        raise Unavailable

    async def status(self) -> StatusResponse:
        names = ("Gateway", "Embedder", "Retriever", "Reranker")
        replicas = {name: ReplicaCounts(running=1, target=1) for name in names}
        replicas["Embedder"] = ReplicaCounts(running=1, target=2)
        return StatusResponse(
            bundle=self.held[0],
            held=self.held,
            next=self.next,
            replicas=replicas,
            degraded=sorted(self.down),
            queue=3,
            uptime_s=12.5,
        )

    def find_items(self, request: ItemsRequest) -> ItemsResponse:
        return self.browser.find_items(request)

    def find_users(self, request: UsersRequest) -> UsersResponse:
        return self.browser.find_users(request)


@contextmanager
def serving(api: "FastAPI") -> Iterator[str]:
    """The address of a server on loopback."""
    config = uvicorn.Config(api, port=0, log_level="warning", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline
            assert thread.is_alive()
            time.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def two_bundles(bundles: BundleStore, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Ids: the current bundle, and one that trusts its sources differently and does not rerank."""
    current = bundles.current()
    other = tmp_path_factory.mktemp("other") / "pipeline"
    shutil.copytree(current, other)
    (other / "manifest.json").unlink(missing_ok=True)
    fusion = json.loads((current / "fusion.json").read_text())
    for segment in fusion["segments"]:
        segment["weights"] |= {"popularity": 0.9, "ease": 0.4, "bm25": 0.7}
        segment["reranker"] = 0.0
    (other / "fusion.json").chmod(0o644)
    (other / "fusion.json").write_text(json.dumps(fusion))
    return [current.name, bundles.add(other).id]


@pytest.fixture(scope="module")
def held_endpoint(bundles: BundleStore, two_bundles: list[str]) -> LocalEndpoint:
    return LocalEndpoint(bundles, two_bundles)


@pytest.fixture
def endpoint(held_endpoint: LocalEndpoint) -> LocalEndpoint:
    held_endpoint.reset()
    return held_endpoint


@pytest.fixture(scope="module")
def address(held_endpoint: LocalEndpoint) -> Iterator[str]:
    with serving(build_api(held_endpoint, Door())) as url:
        yield url


@pytest.fixture(scope="module")
def keyed_address(held_endpoint: LocalEndpoint) -> Iterator[str]:
    access = Access(api_keys=(hashlib.sha256(KEY.encode()).hexdigest(),))
    with serving(build_api(held_endpoint, Door.build(access, {}))) as url:
        yield url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    # Not for the whole session: while it is up, no other test could run an event loop.
    if CHROMIUM is None:
        message = "no Chromium found: `make browser` installs Debian's"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        # Its sandbox does not work for root, and what it opens here is our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """A page, what it complained of, and what it asked for."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[Request] = []
        self.address = address
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                self.complaints.append(message.text)
                if message.type in ("error", "warning")
                else None
            ),
        )
        page.on("request", lambda request: self.requests.append(request))

    def load(self) -> Page:
        """Open the page and wait for its first list."""
        self.page.goto(self.address)
        self.page.locator(".card").first.wait_for()
        self.settle()
        return self.page

    def settle(self) -> None:
        """Wait for the answer to what was last asked."""
        self.page.locator("#columns:not([aria-busy])").wait_for()

    def ids(self, label: str = "A") -> list[str]:
        """The items of a list, as shown."""
        cards = self.page.get_by_role("region", name=f"List {label}").locator(".card")
        return cards.evaluate_all("cards => cards.map(card => card.dataset.id)")

    def forgive(self, *expected: re.Pattern[str]) -> None:
        """Complaints that the test provoked."""
        self.complaints = [c for c in self.complaints if not any(e.search(c) for e in expected)]

    def picture(self, name: str) -> None:
        """Keep a screenshot for the document, if they are wanted."""
        if PICTURES:
            self.page.mouse.move(0, 0)
            path = Path(PICTURES) / f"{name}.png"
            self.page.screenshot(path=path, animations="disabled")


Visit = Callable[..., Visitor]


@pytest.fixture
def key() -> str:
    return KEY


@pytest.fixture
def visit(chromium: Browser, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """Opens the page at an address; afterwards nothing may have gone wrong in the browser."""
    visitors: list[Visitor] = []

    def open_page(address: str, **options: Any) -> Visitor:
        options = {"viewport": {"width": 1280, "height": 900}, **options}
        visitors.append(Visitor(chromium.new_context(**options).new_page(), address))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        strangers = [r.url for r in visitor.requests if not r.url.startswith(visitor.address)]
        if request.node.stash[FAILED] or strangers or visitor.complaints:
            with suppress(Error):  # the page may have crashed, and is not what is asserted
                visitor.picture("failed-" + re.sub(r"[^\w-]+", "-", request.node.name))
        visitor.page.context.close()
        assert strangers == []
        assert visitor.complaints == []
