import asyncio
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Response
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fusionrec.errors import ConfigError
from serve_apps.tracing import Tracer, TracingMiddleware, build, tracer_from

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


@pytest.fixture
def kept() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(kept: InMemorySpanExporter) -> Tracer:
    return build(SimpleSpanProcessor(kept), {})


def post(tracer: Tracer, path: str, **options: Any) -> Any:
    """Ask an application that is traced; the span that its route saw, if one did."""
    seen: list[Any] = [None]
    api = FastAPI()
    api.add_middleware(TracingMiddleware, tracer=tracer)

    @api.post("/v1/recommend")
    async def recommend(response: Response, status: int = 200) -> None:
        seen.append(tracer.current())
        response.status_code = status

    async def ask() -> None:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.post(path, **options)

    asyncio.run(ask())
    return seen[-1]


def batch(tracer: Tracer, spans: list[Any], **options: Any) -> None:
    timings = {"embed": 20.0, "retrieve": 30.0, "rerank": 40.0}
    tracer.record_batch(
        spans, size=len(spans), bundle="b1", seconds=0.1, timings_ms=timings, **options
    )


def test_a_request_continues_its_callers_trace_and_says_how_it_ended(
    tracer: Tracer, kept: InMemorySpanExporter
):
    post(tracer, "/v1/recommend", headers=PARENT)
    post(tracer, "/v1/recommend", params={"status": 503})
    post(tracer, "/anything/u00017")
    known, failed, unknown = kept.get_finished_spans()
    assert known.name == "POST /v1/recommend"
    assert f"{known.context.trace_id:032x}" == TRACE
    assert known.attributes["http.response.status_code"] == 200
    assert known.status.is_ok
    assert f"{failed.context.trace_id:032x}" != TRACE
    assert not failed.status.is_ok
    assert unknown.name == "POST"
    assert "u00017" not in unknown.to_json()


def test_a_batch_is_one_span_with_its_stages_linked_to_all_requests(
    tracer: Tracer, kept: InMemorySpanExporter
):
    first, second = (tracer._tracer.start_span("request") for _ in range(2))
    batch(tracer, [first, second], degraded=["rerank"])
    second.end()
    finished = {span.name: span for span in kept.get_finished_spans()}
    whole = finished["batch"]
    assert whole.parent.span_id == first.get_span_context().span_id
    assert [link.context for link in whole.links] == [second.get_span_context()]
    assert [link.context for link in finished["request"].links] == [whole.context]
    assert whole.attributes["fusionrec.bundle"] == "b1"
    assert whole.attributes["fusionrec.degraded"] == ("rerank",)
    begin = whole.start_time
    assert whole.end_time - begin == 100_000_000
    stages = [finished[name] for name in ("embed", "retrieve", "rerank")]
    assert {stage.parent.span_id for stage in stages} == {whole.context.span_id}
    assert [(s.start_time - begin, s.end_time - begin) for s in stages] == [
        (0, 20_000_000),
        (20_000_000, 50_000_000),
        (50_000_000, 90_000_000),
    ]
    assert [stage.status.is_ok for stage in stages] == [True, True, False]


def test_what_is_not_sampled_leaves_nothing(
    kept: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    tracer = build(SimpleSpanProcessor(kept), {})
    batch(tracer, [post(tracer, "/v1/recommend")])
    assert kept.get_finished_spans() == ()
    post(tracer, "/v1/recommend", headers=PARENT)  # its caller has decided
    assert len(kept.get_finished_spans()) == 1


def test_otlp_spans_arrive_at_the_collector(monkeypatch: pytest.MonkeyPatch):
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        tracer = tracer_from({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SERVICE_NAME": "films"})
        assert tracer is not None
        span = tracer._tracer.start_span("request")
        batch(tracer, [span])
        span.end()
        tracer.close()
        server.shutdown()
        thread.join()
    [(path, body)] = got
    assert path == "/v1/traces"
    for word in (b"films", b"batch", b"retrieve"):
        assert word in body


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_off_unless_asked_for(environment: dict[str, str]):
    assert tracer_from(environment) is None


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"OTEL_TRACES_EXPORTER": "jaeger"}, "jaeger: set it to otlp, console or none"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "grpc: set it to http/protobuf",
        ),
    ],
)
def test_what_is_not_supported_is_refused(environment: dict[str, str], words: str):
    with pytest.raises(ConfigError, match=words):
        tracer_from(environment)


def test_a_missing_exporter_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install .* '\.\[tracing\]'"):
        tracer_from({"OTEL_TRACES_EXPORTER": "otlp"})


def test_nothing_of_opentelemetry_is_imported_where_tracing_is_off():
    code = (
        "import sys; from serve_apps.tracing import tracer_from; assert tracer_from({}) is None; "
        "sys.exit('opentelemetry' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
