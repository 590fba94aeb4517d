"""The edge of the pipeline: requests become histories, ranked candidates become answers.

Ids, titles, users and filters exist only here; the pipeline between the two halves knows codes. The
same code serves the endpoint and an offline caller (:func:`recommend`). A batch of requests is one
unit. Costs the memory of the catalogue and of the known histories; needs no model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow.parquet as pq

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import CodeArray, FloatArray, Histories, IntArray
from fusionrec.fusion.model import RERANKER, Fused, Fusion
from fusionrec.serving.schemas import (
    Fallback,
    Filters,
    HistoryEvent,
    Recommendation,
    RecommendRequest,
    RecommendResponse,
)

if TYPE_CHECKING:  # a gateway holds no model, and should not pay for importing torch
    from fusionrec.serving.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class KnownUsers:
    """The histories that the bundle holds."""

    rows: Mapping[str, int]
    """User id → row of ``histories``."""
    histories: Histories
    newest: int
    """Time of the newest event of all."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read ``users.parquet``: user_id, item_codes, timestamps."""
        table = pq.read_table(path).combine_chunks()
        items, times = (
            table.column(name).combine_chunks() for name in ("item_codes", "timestamps")
        )
        offsets = np.zeros(len(table) + 1, dtype=np.int64)
        np.cumsum(items.value_lengths().to_numpy(zero_copy_only=False), out=offsets[1:])
        users = table.column("user_id").to_pylist()
        histories = Histories(
            items=items.flatten().to_numpy().astype(np.int32),
            timestamps=times.flatten().to_numpy().astype(np.int64),
            offsets=offsets,
        )
        return cls(
            rows={user: row for row, user in enumerate(users)},
            histories=histories,
            newest=int(histories.timestamps.max(initial=0)),
        )

    def find(self, user_id: str) -> tuple[CodeArray, IntArray] | None:
        """Items and times of a user, oldest first; None for an unknown one."""
        row = self.rows.get(user_id)
        if row is None:
            return None
        first, last = self.histories.offsets[row : row + 2]
        return self.histories.items[first:last], self.histories.timestamps[first:last]


@dataclass(frozen=True, slots=True)
class Questions:
    """B requests as the pipeline understands them."""

    requests: Sequence[RecommendRequest]
    histories: Histories
    fallbacks: tuple[Fallback | None, ...]
    """Why a request cannot be answered personally; None where it can."""


@dataclass(slots=True)
class Trace:
    """What happened to a batch on its way."""

    timings_ms: dict[str, float] = field(default_factory=dict)
    """Stage → milliseconds."""
    degraded: list[str] = field(default_factory=list)
    """Stages that were skipped."""


@dataclass(frozen=True, slots=True)
class Service:
    """Both halves of the edge, for one bundle."""

    bundle: str
    catalogue: Catalogue
    users: KnownUsers
    fusion: Fusion | None
    """Where it is None, nothing is reranked."""

    @classmethod
    def load(cls, directory: Path) -> Self:
        """From a bundle, or from a pipeline directory that is not published yet."""
        return cls(
            bundle=directory.name,
            catalogue=Catalogue.load(directory / "catalogue.parquet"),
            users=KnownUsers.load(directory / "users.parquet"),
            fusion=Fusion.served(directory),
        )

    def rerank_weights(self, histories: Histories) -> FloatArray:
        """[B] the reranker's weight in the list of each history; 0 where it has no say."""
        if self.fusion is None:
            return np.zeros(len(histories), dtype=np.float32)
        return self.fusion.reranked(histories.lengths)

    def ask(self, requests: Sequence[RecommendRequest]) -> Questions:
        """Histories of ``requests`` (at least one), in their order."""
        rows = [self._history(request) for request in requests]
        texts = [_words(request.text) for request in requests]
        return Questions(
            requests=requests,
            histories=Histories(
                items=np.concatenate([items for items, _ in rows]),
                timestamps=np.concatenate([times for _, times in rows]),
                offsets=np.cumsum([0, *(len(items) for items, _ in rows)]),
                texts=tuple(texts) if any(texts) else None,
            ),
            fallbacks=tuple(
                _fallback(request, len(items) > 0 or text is not None)
                for request, (items, _), text in zip(requests, rows, texts, strict=True)
            ),
        )

    def answer(self, questions: Questions, fused: Fused, trace: Trace) -> list[RecommendResponse]:
        """One answer a request from the ranked candidates of ``questions.histories``."""
        assert len(fused.items) == len(questions.requests)
        reranked = self.rerank_weights(questions.histories) > 0
        return [
            self.answer_row(questions, row, fused, trace, reranked=bool(reranked[row]))
            for row in range(len(questions.requests))
        ]

    def answer_row(
        self, questions: Questions, row: int, fused: Fused, trace: Trace, *, reranked: bool
    ) -> RecommendResponse:
        """The answer to one request.

        Args:
            questions: the batch.
            row: of the request in it.
            fused: the ranked candidates of the batch.
            trace: what happened to this request.
            reranked: whether the reranker had a say in this list.
        """
        return RecommendResponse(
            items=list(self._items(questions.requests[row], fused, row, reranked=reranked)),
            bundle=self.bundle,
            timings_ms=dict(trace.timings_ms),
            degraded=list(trace.degraded),
            fallback=questions.fallbacks[row],
        )

    def _history(self, request: RecommendRequest) -> tuple[CodeArray, IntArray]:
        """Items and times of a request, oldest first, without items that are not known.

        Items without times were met just now, which is the last moment that the bundle knows of.
        """
        if request.user_id is not None:
            return self.users.find(request.user_id) or _NOTHING
        events = request.history or ()
        ids = [event.item_id if isinstance(event, HistoryEvent) else event for event in events]
        times = np.fromiter(
            (e.timestamp if isinstance(e, HistoryEvent) else self.users.newest for e in events),
            dtype=np.int64,
        )
        codes = self.catalogue.encode(ids)
        order = np.argsort(times, kind="stable")
        order = order[codes[order] >= 0]
        return codes[order], times[order]

    def _items(
        self, request: RecommendRequest, fused: Fused, row: int, *, reranked: bool
    ) -> Iterator[Recommendation]:
        left = request.k
        for column, code in enumerate(fused.items[row].tolist()):
            if code < 0 or left == 0:
                return
            if request.filters is not None and not self._allowed(request.filters, code):
                continue
            left -= 1
            recommendation = Recommendation(
                item_id=self.catalogue.item_ids[code],
                title=self.catalogue.titles[code],
                score=float(fused.scores[row, column]),
            )
            if request.explain:
                recommendation.categories = list(self.catalogue.categories[code])
                recommendation.domain = self.catalogue.domains[code]
                terms = fused.terms[row, :, column].tolist()
                recommendation.terms = dict(zip(fused.term_names, terms, strict=True))
                if not reranked:  # the term is there, as 0, if another history of the batch was
                    recommendation.terms.pop(RERANKER, None)
            yield recommendation

    def _allowed(self, filters: Filters, code: int) -> bool:
        """Whether an item passes. Only a few hundred ranked candidates are ever asked about."""
        if filters.domains is not None and self.catalogue.domains[code] not in filters.domains:
            return False
        if filters.categories is not None and not any(
            category in filters.categories for category in self.catalogue.categories[code]
        ):
            return False
        return self.catalogue.item_ids[code] not in filters.exclude_items


def recommend(
    service: Service, pipeline: Pipeline, requests: Sequence[RecommendRequest]
) -> list[RecommendResponse]:
    """Answer ``requests`` in this process, as the endpoint would."""
    start = time.perf_counter()
    questions = service.ask(requests)
    fused = pipeline.recommend(questions.histories)
    total = round((time.perf_counter() - start) * 1e3, 3)
    return service.answer(questions, fused, Trace(timings_ms={"total": total}))


_NOTHING = (np.empty(0, np.int32), np.empty(0, np.int64))


def _words(text: str | None) -> str | None:
    """A wish that holds a word; None for blank ones."""
    return text if text is not None and text.strip() else None


def _fallback(request: RecommendRequest, personal: bool) -> Fallback | None:
    if personal:
        return None
    if request.user_id is not None:
        return Fallback.UNKNOWN_USER
    return Fallback.UNKNOWN_ITEMS if request.history else Fallback.EMPTY_REQUEST
