"""Sampled traces with OpenTelemetry: off unless OTEL_TRACES_EXPORTER says otherwise.

Configured by the standard variables, read by OpenTelemetry itself: ``OTEL_TRACES_SAMPLER`` and
``OTEL_TRACES_SAMPLER_ARG`` for the share that is kept, ``OTEL_EXPORTER_OTLP_ENDPOINT`` and
``OTEL_EXPORTER_OTLP_HEADERS`` for where it goes, ``OTEL_SERVICE_NAME``, ``OTEL_BSP_*``. Where
tracing is off, nothing of OpenTelemetry is imported.

A request is a span, the child of its caller's where there is a ``traceparent`` header. A batch is a
span with a child a stage; it belongs to the trace of its first sampled request, and all others are
linked with it, in both directions. No span carries a user, an item or a text.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from fusionrec.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.trace import Span

VARIABLE = "OTEL_TRACES_EXPORTER"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


class Tracer:
    """Makes the spans of one gateway."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("fusionrec")

    def current(self) -> Span:
        """The span of the request that the caller works for."""
        from opentelemetry import trace

        return trace.get_current_span()

    def record_batch(
        self,
        requests: Iterable[Span],
        *,
        size: int,
        bundle: str,
        seconds: float,
        timings_ms: Mapping[str, float],
        degraded: Iterable[str] = (),
    ) -> None:
        """Make the spans of a batch that is done now, if one of its requests is sampled.

        Args:
            requests: what :meth:`current` was for each.
            size: requests in the batch.
            bundle: the bundle that answered.
            seconds: how long the batch took.
            timings_ms: milliseconds by stage, in the order in which the stages ran; each is taken
                to have started when the one before it ended.
            degraded: stages that the answers were made without.
        """
        from opentelemetry import trace

        sampled = [span for span in requests if span.is_recording()]
        if not sampled:
            return
        end_ns = time.time_ns()
        left_out = tuple(degraded)
        batch = self._tracer.start_span(
            "batch",
            trace.set_span_in_context(sampled[0]),
            links=[trace.Link(span.get_span_context()) for span in sampled[1:]],
            attributes={
                "fusionrec.batch_size": size,
                "fusionrec.bundle": bundle,
                "fusionrec.degraded": left_out,
            },
            start_time=end_ns - round(seconds * 1e9),
        )
        for span in sampled[1:]:
            span.add_link(batch.get_span_context())
        within = trace.set_span_in_context(batch)
        stage_ns = end_ns - round(seconds * 1e9)
        for name, elapsed_ms in timings_ms.items():
            stage = self._tracer.start_span(name, within, start_time=stage_ns)
            stage_ns += round(elapsed_ms * 1e6)
            if name in left_out:
                stage.set_status(trace.StatusCode.ERROR)
            stage.end(stage_ns)
        batch.end(end_ns)

    def close(self) -> None:
        """Send what has gathered."""
        self._provider.shutdown()


class TracingMiddleware:
    """The span of every request, for ``FastAPI.add_middleware(TracingMiddleware, tracer=…)``."""

    def __init__(self, app: Asgi, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer._tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve ``scope`` within a span."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        names = ("traceparent", "tracestate")
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name.decode("latin-1") in names
        }
        with self._tracer.start_as_current_span(
            scope["method"],
            TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.SERVER,
            # What an exception says may hold a user or an item.
            record_exception=False,
            set_status_on_exception=False,
            attributes={"http.request.method": scope["method"]},
        ) as span:

            async def answer(message: MutableMapping[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                    if "route" in scope:  # the path itself may be anything that a client sends
                        span.set_attribute("http.route", scope["route"].path)
                        span.update_name(f"{scope['method']} {scope['route'].path}")
                await send(message)

            try:
                await self._app(scope, receive, answer)
            except Exception:
                span.set_status(StatusCode.ERROR)
                raise


def tracer_from(environment: Mapping[str, str]) -> Tracer | None:
    """What the variables ask for; None where tracing is off.

    Raises:
        ConfigError: an exporter or a protocol is asked for that is not there.
    """
    exporter = environment.get(VARIABLE, "none").strip().lower()
    if exporter in ("", "none") or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if exporter not in ("otlp", "console"):
        raise ConfigError(f"{VARIABLE} is {exporter}: set it to otlp, console or none")
    for variable in _PROTOCOLS:
        if environment.get(variable, "http/protobuf") != "http/protobuf":
            raise ConfigError(
                f"{variable} is {environment[variable]}: set it to http/protobuf, the only one "
                "that is supported"
            )
    try:
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

        if exporter == "console":
            return build(BatchSpanProcessor(ConsoleSpanExporter()), environment)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"{VARIABLE} is {exporter} and OpenTelemetry is not installed: "
            "pip install -c constraints.txt -e '.[tracing]', or set it to none"
        ) from error
    return build(BatchSpanProcessor(OTLPSpanExporter()), environment)


def build(processor: SpanProcessor, environment: Mapping[str, str]) -> Tracer:
    """A tracer whose spans go to ``processor``; OTEL_TRACES_SAMPLER says which are kept."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    name = environment.get("OTEL_SERVICE_NAME", "fusionrec")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(processor)
    return Tracer(provider)
