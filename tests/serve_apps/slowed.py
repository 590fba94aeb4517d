"""The endpoint with stages that are as slow as a test wants, and note what they do.

Replicas import it. A test talks to them through :class:`Notes`, files beside the bundles.
"""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ray.serve import Application

from serve_apps import recommend
from serve_apps.held import Held
from serve_apps.recommend import AppArgs
from serve_apps.stages import Embedder, Reranker, Retriever


@dataclass(frozen=True)
class Notes:
    """What stages are told, and what they tell."""

    folder: Path

    @classmethod
    def beside(cls, bundles: str | Path) -> "Notes":
        return cls(Path(bundles).parent / "notes")

    def clear(self, **seconds: float) -> None:
        """Forget everything; from now on a step of a stage takes that long, 0 for one not named."""
        self.folder.mkdir(exist_ok=True)
        for file in self.folder.glob("*.*"):
            file.unlink()
        written = self.folder / ".seconds"
        written.write_text(json.dumps(seconds))
        written.rename(self.folder / "seconds")  # at once: stages look at it all the time

    def seconds(self, stage: str) -> float:
        return float(json.loads((self.folder / "seconds").read_text()).get(stage, 0))

    def tell(self, stage: str, event: str) -> None:
        with (self.folder / f"{stage}.{event}").open("ab") as file:
            file.write(b".")

    def count(self, stage: str, event: str) -> int:
        """How often a step was ``asked`` for, ``began`` or was ``cancelled``."""
        file = self.folder / f"{stage}.{event}"
        return file.stat().st_size if file.exists() else 0


def slow_down(held: Held, stage: str, bundles: str) -> None:
    """Steps begin with a wait; it ends early when a test wants another one."""
    notes, run = Notes.beside(bundles), held.run

    async def noted(bundle: str, work: Callable[..., Any], **how: bool) -> Any:
        def slowly(pipeline: Any) -> Any:
            notes.tell(stage, "began")
            began = time.monotonic()
            while time.monotonic() - began < notes.seconds(stage):
                time.sleep(0.005)
            return work(pipeline)

        notes.tell(stage, "asked")
        try:
            return await run(bundle, slowly, **how)
        except asyncio.CancelledError:
            notes.tell(stage, "cancelled")
            raise

    held.run = noted  # type: ignore[method-assign]


class SlowEmbedder(Embedder):
    def __init__(self, bundles: str, *rest: Any) -> None:
        super().__init__(bundles, *rest)
        slow_down(self._held, "Embedder", bundles)


class SlowRetriever(Retriever):
    def __init__(self, bundles: str, *rest: Any) -> None:
        super().__init__(bundles, *rest)
        slow_down(self._held, "Retriever", bundles)


class SlowReranker(Reranker):
    def __init__(self, bundles: str, *rest: Any) -> None:
        super().__init__(bundles, *rest)
        slow_down(self._held, "Reranker", bundles)


def app(args: AppArgs) -> Application:
    slow = {"Embedder": SlowEmbedder, "Retriever": SlowRetriever, "Reranker": SlowReranker}
    with patch.multiple(recommend, **slow):  # type: ignore[arg-type]
        return recommend.app(args)
