"""What the endpoint counts and times, for Prometheus through Ray's metrics agent.

Recording puts tuples on a queue, a few microseconds a batch; once a second a thread hands what has
gathered to Ray, a few microseconds a value. Works outside a cluster too, where nobody collects it.

Ray exports every name with the prefix ``ray_``, and counters with ``_total`` behind it
(:attr:`Definition.exported`); in a replica it adds the labels ``deployment``, ``replica`` and
``application``. Bucket counts are exact; Ray approximates a histogram's ``_sum`` from the middles
of its buckets.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, TypeAlias

from ray.serve import metrics as ray_metrics

logger = logging.getLogger("ray.serve")

FLUSH_S = 1.0
"""Seconds between two times that what has gathered is handed to Ray."""
MAX_PENDING = 100_000
"""Records that may wait to be handed over; should Ray take none, the oldest are dropped."""
_YIELD_EVERY = 32
"""Records handed over before other threads get a turn: serving must not wait for counting."""

_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


class Kind(StrEnum):
    """How a metric behaves over time."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, eq=False)
class Definition:
    """One metric: what it is called, what it means, how it is cut."""

    kind: Kind
    name: str
    meaning: str
    label: str | None = None
    boundaries: tuple[float, ...] = ()
    """Upper ends of a histogram's buckets."""

    @property
    def exported(self) -> str:
        """The name that Prometheus sees; a histogram adds ``_bucket``, ``_sum`` and ``_count``."""
        return f"ray_{self.name}{'_total' if self.kind is Kind.COUNTER else ''}"

    def build(self) -> Any:
        """Ray's object for it."""
        labels: Any = () if self.label is None else (self.label,)
        if self.kind is Kind.HISTOGRAM:
            return ray_metrics.Histogram(self.name, self.meaning, list(self.boundaries), labels)
        made = ray_metrics.Counter if self.kind is Kind.COUNTER else ray_metrics.Gauge
        return made(self.name, self.meaning, labels)


REQUESTS = Definition(
    Kind.COUNTER,
    "fusionrec_requests",
    "Requests for recommendations, by HTTP status; 499 is a client that left",
    "status",
)
REQUEST_SECONDS = Definition(
    Kind.HISTOGRAM,
    "fusionrec_request_latency_seconds",
    "From a request's arrival at the gateway to its answer, where it got one (status 200)",
    boundaries=_SECONDS,
)
STAGE_SECONDS = Definition(
    Kind.HISTOGRAM,
    "fusionrec_stage_latency_seconds",
    "What a batch spent in a stage (embed, retrieve, rerank), and a request waiting for a batch "
    "(queue)",
    "stage",
    _SECONDS,
)
BATCH_SIZE = Definition(
    Kind.HISTOGRAM,
    "fusionrec_batch_size",
    "Requests in a batch of the gateway (gateway), and in one call of a stage's replica",
    "stage",
    _SIZES,
)
QUEUE_DEPTH = Definition(
    Kind.GAUGE, "fusionrec_queue_depth", "Requests that wait for a place in a batch"
)
RUNNING_BATCHES = Definition(
    Kind.GAUGE, "fusionrec_running_batches", "Batches on their way through the stages"
)
CACHE_HITS = Definition(
    Kind.COUNTER, "fusionrec_vector_cache_hits", "Text vectors that were found in the cache"
)
CACHE_MISSES = Definition(
    Kind.COUNTER, "fusionrec_vector_cache_misses", "Text vectors that had to be computed"
)
DEGRADED = Definition(
    Kind.COUNTER,
    "fusionrec_degraded_answers",
    "Answers made without a stage that failed or was skipped",
    "stage",
)
RERANKED = Definition(
    Kind.COUNTER, "fusionrec_reranked_answers", "Answers that the reranker had a part in"
)
RETRIES = Definition(
    Kind.COUNTER,
    "fusionrec_stage_retries",
    "Calls of a stage that were sent again, to another replica",
    "stage",
)
BUNDLE = Definition(
    Kind.GAUGE, "fusionrec_bundle_in_service", "1 for the bundle in service, 0 before", "bundle"
)
SWAPS = Definition(
    Kind.COUNTER, "fusionrec_bundle_swaps", "Attempts to put another bundle in service", "outcome"
)
RATE_LIMITED = Definition(
    Kind.COUNTER, "fusionrec_rate_limited", "Requests refused because a key asked too often"
)

DEFINITIONS = (
    REQUESTS,
    REQUEST_SECONDS,
    STAGE_SECONDS,
    BATCH_SIZE,
    QUEUE_DEPTH,
    RUNNING_BATCHES,
    CACHE_HITS,
    CACHE_MISSES,
    DEGRADED,
    RERANKED,
    RETRIES,
    BUNDLE,
    SWAPS,
    RATE_LIMITED,
)

_Record: TypeAlias = tuple[Definition, float | list[float], str]
"""What is recorded, its value or several, and the value of its label."""


class Metrics:
    """The metrics of one replica. Every method may be called from any thread and returns at once.

    The thread that hands values to Ray ends when nobody holds the object any more.
    """

    def __init__(self, *, flush_s: float = FLUSH_S) -> None:
        """Make the metrics known to Ray.

        Args:
            flush_s: seconds between two flushes.
        """
        self._made = {definition: definition.build() for definition in DEFINITIONS}
        self._pending: deque[_Record] = deque(maxlen=MAX_PENDING)
        self._sampled: dict[Definition, Callable[[], int]] = {}
        self._bundle: str | None = None
        self._flushing = threading.Lock()
        threading.Thread(
            target=_flush_while_held, args=(weakref.ref(self), flush_s), daemon=True, name="metrics"
        ).start()

    def count_request(self, status: int) -> None:
        """A request ended with this HTTP status."""
        self._pending.append((REQUESTS, 1, str(status)))

    def observe_answer(self, seconds: float) -> None:
        """A request got an answer, after so long.

        What is refused is refused at once: counted in, it would hide how long others take.
        """
        self._pending.append((REQUEST_SECONDS, seconds, ""))

    def observe_batch(
        self,
        size: int,
        timings_ms: Mapping[str, float],
        *,
        waited_ms: Iterable[float] = (),
        degraded: Mapping[str, int] = MappingProxyType({}),
        num_reranked: int = 0,
    ) -> None:
        """Record a batch of ``size`` requests that went through the stages.

        Args:
            size: requests in the batch.
            timings_ms: milliseconds by stage.
            waited_ms: how long each request waited for a place in the batch.
            degraded: stage → answers that were made without it.
            num_reranked: answers that the reranker had a part in.
        """
        record = self._pending.append
        record((BATCH_SIZE, size, "gateway"))
        for stage, elapsed_ms in timings_ms.items():
            record((STAGE_SECONDS, elapsed_ms / 1e3, stage))
        record((STAGE_SECONDS, [elapsed_ms / 1e3 for elapsed_ms in waited_ms], "queue"))
        for stage, answers in degraded.items():
            record((DEGRADED, answers, stage))
        if num_reranked:
            record((RERANKED, num_reranked, ""))

    def observe_call(self, stage: str, size: int) -> None:
        """Record that one replica of ``stage`` was called with ``size`` requests."""
        self._pending.append((BATCH_SIZE, size, stage))

    def count_degraded(self, stages: Iterable[str]) -> None:
        """One answer was made without ``stages``, when its deadline came."""
        for stage in stages:
            self._pending.append((DEGRADED, 1, stage))

    def count_retry(self, stage: str) -> None:
        """A call of ``stage`` is sent again."""
        self._pending.append((RETRIES, 1, stage))

    def count_cache(self, *, hits: int, misses: int) -> None:
        """Text vectors were looked up."""
        self._pending.append((CACHE_HITS, hits, ""))
        self._pending.append((CACHE_MISSES, misses, ""))

    def count_swap(self, outcome: str) -> None:
        """An attempt to put another bundle in service ended, with ``outcome``: done or failed."""
        self._pending.append((SWAPS, 1, outcome))

    def count_rate_limited(self) -> None:
        """A request was refused because its key asked too often."""
        self._pending.append((RATE_LIMITED, 1, ""))

    def set_bundle(self, bundle: str) -> None:
        """``bundle`` is in service now, and no other."""
        if self._bundle not in (None, bundle):
            self._pending.append((BUNDLE, 0, str(self._bundle)))
        self._pending.append((BUNDLE, 1, bundle))
        self._bundle = bundle

    def sample(self, *, queue_depth: Callable[[], int], running_batches: Callable[[], int]) -> None:
        """Ask these functions for the two gauges at every flush, from another thread."""
        self._sampled = {QUEUE_DEPTH: queue_depth, RUNNING_BATCHES: running_batches}

    def flush(self) -> None:
        """Hand to Ray what has gathered."""
        with self._flushing:
            counted: defaultdict[tuple[Definition, str], float] = defaultdict(float)
            for number in range(len(self._pending)):
                definition, values, label = self._pending.popleft()
                for value in values if isinstance(values, list) else [values]:
                    if definition.kind is Kind.COUNTER:
                        counted[definition, label] += value
                    else:
                        self._hand_over(definition, value, label)
                if number % _YIELD_EVERY == 0:
                    time.sleep(0)
            for (definition, label), value in counted.items():
                if value:
                    self._hand_over(definition, value, label)
            for definition, ask in self._sampled.items():
                self._hand_over(definition, ask(), "")

    def _hand_over(self, definition: Definition, value: float, label: str) -> None:
        labels = {} if definition.label is None else {definition.label: label}
        made = self._made[definition]
        match definition.kind:
            case Kind.COUNTER:
                made.inc(value, labels)
            case Kind.GAUGE:
                made.set(value, labels)
            case Kind.HISTOGRAM:
                made.observe(value, labels)


def _flush_while_held(reference: weakref.ref[Metrics], flush_s: float) -> None:
    while True:
        time.sleep(flush_s)
        metrics = reference()
        if metrics is None:
            return
        try:
            metrics.flush()
        except Exception:
            logger.exception("metrics were not handed to Ray")
        del metrics  # while this thread sleeps, it must not be what keeps the object
