import gc
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from serve_apps import metrics
from serve_apps.metrics import DEFINITIONS, Kind, Metrics


class Seen:
    """Stands in for ray.serve.metrics: what every metric was handed."""

    def __init__(self) -> None:
        self.handed: list[tuple[str, float, dict[str, str]]] = []
        self.module = SimpleNamespace(
            Counter=self._make("inc"), Gauge=self._make("set"), Histogram=self._make("observe")
        )

    def _make(self, method: str) -> Any:
        def make(name: str, *_: Any) -> SimpleNamespace:
            def hand(value: float, labels: dict[str, str]) -> None:
                self.handed.append((name.removeprefix("fusionrec_"), value, labels))

            return SimpleNamespace(**{method: hand})

        return make


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    monkeypatch.setattr(metrics, "ray_metrics", seen.module)
    return seen


def test_everything_recorded_reaches_ray_counters_as_one_sum(seen: Seen):
    recorder = Metrics(flush_s=60)
    for _ in range(3):
        recorder.count_request(200)
        recorder.observe_answer(0.02)
    recorder.count_request(503)
    recorder.observe_batch(
        4,
        {"embed": 5.0, "rerank": 20.0},
        waited_ms=[1.0, 2.0],
        degraded={"retrieve": 4},
        num_reranked=2,
    )
    recorder.observe_call("embed", 2)
    recorder.count_retry("rerank")
    recorder.count_cache(hits=3, misses=0)
    recorder.count_swap("done")
    recorder.count_rate_limited()
    recorder.sample(queue_depth=lambda: 7, running_batches=lambda: 2)
    recorder.flush()
    assert [(n, v, tuple(t.values())) for n, v, t in seen.handed] == [
        *[("request_latency_seconds", 0.02, ())] * 3,
        ("batch_size", 4, ("gateway",)),
        ("stage_latency_seconds", 0.005, ("embed",)),
        ("stage_latency_seconds", 0.02, ("rerank",)),
        ("stage_latency_seconds", 0.001, ("queue",)),
        ("stage_latency_seconds", 0.002, ("queue",)),
        ("batch_size", 2, ("embed",)),
        ("requests", 3, ("200",)),
        ("requests", 1, ("503",)),
        ("degraded_answers", 4, ("retrieve",)),
        ("reranked_answers", 2, ()),
        ("stage_retries", 1, ("rerank",)),
        ("vector_cache_hits", 3, ()),
        ("bundle_swaps", 1, ("done",)),
        ("rate_limited", 1, ()),
        ("queue_depth", 7, ()),
        ("running_batches", 2, ()),
    ]
    del seen.handed[:-2]
    recorder.flush()
    assert [name for name, *_ in seen.handed] == ["queue_depth", "running_batches"] * 2


def test_one_bundle_is_in_service_at_a_time(seen: Seen):
    recorder = Metrics(flush_s=60)
    for bundle in ("a", "a", "b"):
        recorder.set_bundle(bundle)
    recorder.flush()
    final = {labels["bundle"]: value for _, value, labels in seen.handed}
    assert final == {"a": 0, "b": 1}


def test_a_thread_flushes_and_ends_with_the_object(seen: Seen):
    before = set(threading.enumerate())
    recorder = Metrics(flush_s=0.01)
    [thread] = set(threading.enumerate()) - before
    recorder.count_request(200)
    _until(lambda: ("requests", 1, {"status": "200"}) in seen.handed)
    del recorder
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_failing_flush_is_logged_and_the_next_one_tried(
    seen: Seen, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(metrics.logger, "propagate", True)
    recorder = Metrics(flush_s=0.01)
    answers = iter([RuntimeError("gone")])

    def ask() -> int:
        for error in answers:
            raise error
        return 5

    recorder.sample(queue_depth=ask, running_batches=lambda: 0)
    _until(lambda: ("queue_depth", 5, {}) in seen.handed)
    assert "metrics were not handed to Ray" in caplog.text


def test_values_that_nobody_takes_do_not_gather_without_bound(seen: Seen):
    recorder = Metrics(flush_s=60)
    for _ in range(metrics.MAX_PENDING):
        recorder.count_request(200)
    assert len(recorder._pending) == metrics.MAX_PENDING


def test_recording_is_cheap_enough_for_every_request(seen: Seen):
    recorder = Metrics(flush_s=60)
    timings_ms = {"embed": 1.0, "retrieve": 1.0, "rerank": 1.0}
    waited_ms = [1.0] * 32
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(32):
            recorder.count_request(200)
            recorder.observe_answer(0.02)
        recorder.observe_batch(32, timings_ms, waited_ms=waited_ms)
        best = min(best, time.perf_counter() - start)
    assert best / 32 < 20e-6


def test_ray_takes_every_definition_and_prometheus_gets_the_names_it_says():
    from prometheus_client import generate_latest
    from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder

    agent = OpenTelemetryMetricRecorder()
    for definition in DEFINITIONS:
        assert definition.build().info["description"] == definition.meaning
        if definition.kind is Kind.HISTOGRAM:
            agent.register_histogram_metric(definition.name, "", list(definition.boundaries))
        elif definition.kind is Kind.COUNTER:
            agent.register_counter_metric(definition.name, "")
        else:
            agent.register_gauge_metric(definition.name, "")
        agent.set_metric_value(definition.name, {definition.label or "": "x"}, 1)
    exposed = generate_latest().decode()
    for definition in DEFINITIONS:
        assert f"# TYPE {definition.exported.removesuffix('_total')}" in exposed
        suffix = "_bucket" if definition.kind is Kind.HISTOGRAM else ""
        assert f"\n{definition.exported}{suffix}{{" in exposed


def _until(holds: Any) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)
