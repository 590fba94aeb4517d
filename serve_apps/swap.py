"""Which bundle answers: the gateway's side of a live swap.

The store's ``current`` says which bundle is wanted. When it moves, the new bundle is loaded and
verified beside the one in service, here and in every replica of every stage; when all of them hold
it, one assignment puts it in service. A request keeps the bundle that it began with. The bundle
before stays held, for requests that are under way, for those that ask for it by its id, and for
a rollback, which is the same swap. A bundle that cannot be used changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Self

from fusionrec.bundles.manifest import Manifest
from fusionrec.bundles.store import BundleStore
from fusionrec.errors import BundleError
from fusionrec.serving.browse import Browser
from fusionrec.serving.service import Service
from fusionrec.sources.semantic import Semantic
from serve_apps.calls import Stage
from serve_apps.held import load_first, step_back

logger = logging.getLogger("ray.serve")

_CONFIRM_EVERY = 10
"""Looks at the store between two times that the replicas are told what to hold: one that came up
with a bundle that is no longer wanted learns of it then; one that lacks a bundle, as soon as it is
asked for that."""


@dataclass(slots=True, eq=False)
class Loaded:
    """What a gateway holds of one bundle."""

    manifest: Manifest
    service: Service
    browser: Browser
    embeds: bool
    """Whether the bundle has an encoder, and a source that asks for its vectors."""
    reranks: bool
    """Whether the bundle has a reranker."""
    rerank_top: int
    """Places of the fused list that the reranker reads."""
    in_use: int = 0
    """Requests under way, those that wait among them."""

    @classmethod
    def load(cls, store: BundleStore, bundle: str) -> Self:
        """Verify a bundle and load it.

        Raises:
            BundleCorrupt: nothing of it is loaded.
        """
        manifest = store.verify(bundle)
        directory = store.path(bundle)
        service = Service.load(directory)
        fitted = manifest.pipeline.get("sources", ())
        asks = Semantic.name in (service.fusion.sources if service.fusion else fitted)
        return cls(
            manifest=manifest,
            service=service,
            browser=Browser(service.catalogue, service.users),
            embeds=asks and (directory / "encoder").is_dir(),
            reranks=(directory / "reranker").is_dir(),
            rerank_top=int(manifest.pipeline.get("rerank_top", 0)),
        )

    @property
    def id(self) -> str:
        """The bundle's id."""
        return self.service.bundle

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keep it held for the block."""
        self.in_use += 1
        try:
            yield
        finally:
            self.in_use -= 1


class Shelf:
    """The bundles of one gateway. Lives in one event loop."""

    def __init__(
        self,
        store: BundleStore,
        bundle: str | None,
        stages: Sequence[Stage],
        *,
        load_timeout_s: float,
        on_swap: Callable[[str], None] = lambda _outcome: None,
    ) -> None:
        """Load the bundle to begin with.

        Args:
            store: where the bundles are.
            bundle: the one to serve for good; None follows the store's ``current``, and begins
                with the one before where that is damaged.
            stages: whose replicas hold the same bundles.
            load_timeout_s: a replica that takes longer to load a bundle has failed.
            on_swap: told the outcome of every swap, ``done`` or ``failed``.

        Raises:
            BundleError: there is no bundle to serve, or it is damaged.
        """
        self._store = store
        self._follows = bundle is None
        self._stages = stages
        self._load_timeout_s = load_timeout_s
        self._on_swap = on_swap
        self._loader = ThreadPoolExecutor(1, "gateway-loader", step_back)
        self._refused: str | None = None
        self._lacking = False
        self.next: str | None = None
        """Id of the bundle that is being loaded to take over."""
        _, self.current = load_first(store, bundle, partial(Loaded.load, store))
        """The bundle in service."""
        self._held = [self.current]

    @property
    def held(self) -> list[str]:
        """Ids of the bundles that requests can ask for, the one in service first."""
        return [loaded.id for loaded in self._held]

    def find(self, bundle: str | None) -> Loaded | None:
        """The bundle of that id, or the one in service; None for one that is not held."""
        if bundle is None:
            return self.current
        return next((loaded for loaded in self._held if loaded.id == bundle), None)

    async def watch(self, every_s: float) -> None:
        """Follow the store for ever."""
        looks = 0
        while True:
            await asyncio.sleep(every_s)
            confirm, self._lacking = self._lacking or looks % _CONFIRM_EVERY == 0, False
            try:
                await self.follow(confirm=confirm)
            except Exception as error:
                logger.warning("bundles are not followed for now: %r", error)
            looks += 1

    def confirm_soon(self) -> None:
        """A replica lacks a bundle: at the next look all are told what to hold."""
        self._lacking = True

    async def follow(self, *, confirm: bool = True) -> None:
        """Swap, if the store wants another bundle; or else tell the replicas what to hold."""
        wanted = self._store.current_id() if self._follows else None
        if wanted is not None and wanted not in (self.current.id, self._refused):
            await self._swap(wanted)
        elif confirm:
            await self._hold(self.held)

    async def _swap(self, wanted: str) -> None:
        self.next = wanted
        try:
            loaded = await self._load(wanted)
            await self._hold([wanted, *(held for held in self.held if held != wanted)])
        except Exception as error:
            self._on_swap("failed")
            logger.error("bundle %s is not put in service: %r", wanted, error)
            if isinstance(error, BundleError):
                self._refused = wanted  # it will not get better; anything else is tried again
            return
        finally:
            self.next = None
        before = self.current
        self.current = loaded
        self._refused = None
        stale = [old for old in self._held if old not in (loaded, before)]
        self._held = [loaded, before]
        self._on_swap("done")
        while any(old.in_use for old in stale):
            await asyncio.sleep(0.05)
        await self._hold(self.held)

    async def _load(self, bundle: str) -> Loaded:
        held = self.find(bundle)
        if held is not None:
            return held
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._loader, Loaded.load, self._store, bundle)

    async def _hold(self, bundles: Sequence[str]) -> None:
        await asyncio.gather(*(stage.hold(bundles, self._load_timeout_s) for stage in self._stages))
