"""A batch as the stages see it: requests for one bundle that travel together, and their answers.

Some of its requests may go on without what the others wait for. Knows no stage.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from fusionrec.data.histories import BoolArray, Histories
from fusionrec.fusion.model import Fused
from fusionrec.serving.schemas import RecommendRequest, RecommendResponse
from fusionrec.serving.service import Questions, Trace
from serve_apps.batching import Entry
from serve_apps.swap import Loaded


@dataclass(slots=True)
class Job:
    """One request, and the bundle that answers it."""

    request: RecommendRequest
    bundle: Loaded
    span: Any = None
    """Of its trace, where there is one."""


Jobs = Sequence[Entry[Job, RecommendResponse]]


@dataclass(slots=True)
class Outcome:
    """What was answered to a batch, and to those that went ahead of it."""

    without: Counter[str] = field(default_factory=Counter)
    """Stage → answers that were made without it."""
    num_reranked: int = 0


@dataclass(slots=True)
class Batch:
    """B requests for one bundle that travel together."""

    entries: Jobs
    bundle: Loaded
    questions: Questions
    histories: Histories
    """With the text vectors that are known."""
    missing: BoolArray
    """[B] which text vectors the retriever is to make."""
    started: float
    trace: Trace = field(default_factory=Trace)
    outcome: Outcome = field(default_factory=Outcome)
    ahead: list[asyncio.Future[None]] = field(default_factory=list)
    """Parts of it that go on without what the rest waits for."""

    @classmethod
    def of(cls, entries: Jobs) -> Self:
        """All of them ask for the bundle of the first."""
        started = time.monotonic()
        bundle = entries[0].question.bundle
        questions = bundle.service.ask([entry.question.request for entry in entries])
        missing = np.zeros(len(entries), dtype=np.bool_)
        return cls(entries, bundle, questions, questions.histories, missing, started)

    def part(self, rows: Sequence[int], without: str) -> Batch:
        """Some of the requests, who go on without a stage."""
        questions = self.questions
        elapsed_ms = milliseconds(time.monotonic() - self.started)
        return Batch(
            [self.entries[row] for row in rows],
            self.bundle,
            Questions(
                [questions.requests[row] for row in rows],
                questions.histories.take(np.array(rows)),
                tuple(questions.fallbacks[row] for row in rows),
            ),
            self.histories.take(np.array(rows)),
            np.zeros(len(rows), dtype=np.bool_),
            self.started,
            Trace({without: elapsed_ms}, [*self.trace.degraded, without]),
            self.outcome,
        )

    def answer(self, row: int, fused: Fused, trace: Trace, *, reranked: bool) -> RecommendResponse:
        """Make the answer to one request."""
        service = self.bundle.service
        answer = service.answer_row(self.questions, row, fused, trace, reranked=reranked)
        answer.timings_ms["queue"] = milliseconds(self.started - self.entries[row].since)
        return answer

    def give(self, row: int, fused: Fused, trace: Trace, *, reranked: bool) -> None:
        """Answer one request, unless it has been or nobody waits for it any more."""
        if self.entries[row].done:
            return
        self.outcome.without.update(trace.degraded)
        self.outcome.num_reranked += reranked
        self.entries[row].answer(self.answer(row, fused, trace, reranked=reranked))


def milliseconds(seconds: float) -> float:
    """For people: to the microsecond."""
    return round(seconds * 1e3, 3)
