"""OpenTelemetry traces, from nginx's request id to the last effect. Off unless the settings name a collector.

Nothing of OpenTelemetry is imported while it is off. The trace's id *is* nginx's request id (`X-Request-Id`, 32 hex
digits; another id is hashed to one), and the id of the request's span follows from it, so that the worker, which finds
the request id with the delivery, hangs its spans below the request's without anything more to be stored:

    request (API) ── verify, store        attempt (worker) ── one span an effect

Spans are made when something has ended, from times that were noted: the ways of a delivery lead through several threads
and batches, and no span has to be carried along. They go into a bounded queue and out in a thread of their own; a
collector that is away costs spans, never a delivery.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from webhook_api.config import Settings
    from webhook_api.effects.base import Job
    from webhook_api.inbox.model import Delivery, Stored

QUEUE_SPANS: Final = 4096
"""Spans that wait to be sent. More are dropped."""
SEND_SECONDS: Final = 5.0
"""Longest call of the collector, with its repetitions."""
STOP_SECONDS: Final = 2.0
"""What a stopping process gives to the spans that are left."""
_EDGE: Final = re.compile(r"[0-9a-f]{32}")
_NOTHING: Final[AbstractContextManager[None]] = nullcontext()

log = logging.getLogger(__name__)


def trace_id(request_id: str) -> int:
    """The trace of a request: its id itself where it is 32 hex digits (nginx's are), otherwise a digest of it."""
    text = request_id.lower()
    number = int(text, 16) if _EDGE.fullmatch(text) else 0
    return number or int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:16], "big")


def span_id(request_id: str) -> int:
    """The id of the request's own span, which the worker knows as its parent."""
    return int.from_bytes(hashlib.sha256(f"request:{request_id}".encode()).digest()[:8], "big") or 1


class _Open:
    """An attempt that is under way."""

    __slots__ = ("effects", "started")

    def __init__(self) -> None:
        self.started = time.time_ns()
        self.effects: list[tuple[str, int, int]] = []


class Tracer:
    """Makes spans of one process. `provider` is OpenTelemetry's."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry import trace

        self._trace = trace
        self._provider = provider
        self._tracer = provider.get_tracer("webhook_api")
        self._ids = provider.id_generator
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}

    def stop(self) -> None:
        """Send what is left, for at most `STOP_SECONDS`."""
        thread = threading.Thread(target=self._provider.shutdown, name="traces-stop", daemon=True)
        thread.start()
        thread.join(STOP_SECONDS)

    def request(
        self,
        request_id: str,
        started: float,
        steps: Sequence[tuple[str, float, float]],
        attributes: Mapping[str, Any],
    ) -> None:
        """A request that has ended now. Times are of `time.perf_counter`."""
        now, now_ns = time.perf_counter(), time.time_ns()

        def moment(at: float) -> int:
            return now_ns - int((now - at) * 1e9)

        root = self._emit(
            "delivery.receive",
            (trace_id(request_id), span_id(request_id)),
            None,
            (moment(started), now_ns),
            attributes,
            kind=self._trace.SpanKind.SERVER,
            error=f"answered {code}" if (code := attributes["http.response.status_code"]) >= 500 else None,
        )
        for name, begin, end in steps:
            self._emit(name, None, root, (moment(begin), moment(end)), {})

    def begin(self, jobs: Sequence[Job]) -> None:
        """Attempts at these deliveries begin."""
        with self._lock:
            for job in jobs:
                self._open[job.delivery.lease_owner] = _Open()

    def note(self, name: str, jobs: Sequence[Job], started: int, ended: int) -> None:
        """An effect was tried for these deliveries. Times in nanoseconds of the epoch."""
        with self._lock:
            for job in jobs:
                attempt = self._open.get(job.delivery.lease_owner)
                if attempt is not None:
                    attempt.effects.append((name, started, ended))

    def end(self, jobs: Sequence[Job], batch: int) -> None:
        """The attempts have ended."""
        ended = time.time_ns()
        for job in jobs:
            with self._lock:
                attempt = self._open.pop(job.delivery.lease_owner, None)
            if attempt is not None:
                self._attempt(job, attempt, ended, batch)

    def _attempt(self, job: Job, attempt: _Open, ended: int, batch: int) -> None:
        delivery = job.delivery
        attributes = {
            "webhook.delivery_id": delivery.id,
            "webhook.source": delivery.source,
            "webhook.request_id": delivery.request_id,
            "webhook.status": delivery.status,
            "webhook.tries": delivery.tries,
            "webhook.batch": batch,
        }
        parent = self._remote(
            delivery.edge_request_id or f"{delivery.source}:{delivery.request_id}:{delivery.id}"
        )
        root = self._emit(
            "delivery.attempt",
            None,
            parent,
            (attempt.started, ended),
            attributes,
            kind=self._trace.SpanKind.CONSUMER,
        )
        for name, begin, end in attempt.effects:
            record = job.records.get(name)
            shown: dict[str, Any] = {"webhook.effect": name}
            error = None
            if record is not None:
                shown["webhook.effect_state"] = record.state
                if not record.settled:
                    error = str(record.detail.get("reason", "failed"))
                    shown["error.type"] = error
            self._emit(f"effect.{name}", None, root, (begin, end), shown, error=error)

    def _remote(self, request_id: str) -> Any:
        """The request's span as a parent, sampled as its own process has decided (by the trace's id alone)."""
        trace = self._trace
        number = trace_id(request_id)
        decision = self._provider.sampler.should_sample(None, number, "delivery.receive").decision
        flags = trace.TraceFlags.SAMPLED if decision.is_sampled() else trace.TraceFlags.DEFAULT
        return trace.SpanContext(
            number, span_id(request_id), is_remote=True, trace_flags=trace.TraceFlags(flags)
        )

    def _emit(
        self,
        name: str,
        ids: tuple[int, int] | None,
        parent: Any,
        times: tuple[int, int],
        attributes: Mapping[str, Any],
        *,
        kind: Any = None,
        error: str | None = None,
    ) -> Any:
        """Make one span; returns its context."""
        trace = self._trace
        # An empty context where there is no parent: whatever else is active in this thread is not ours.
        context = trace.set_span_in_context(trace.NonRecordingSpan(parent), {}) if parent is not None else {}
        with self._ids.preset(ids):
            span = self._tracer.start_span(
                name,
                context=context,
                kind=kind or trace.SpanKind.INTERNAL,
                attributes={key: value for key, value in attributes.items() if value is not None},
                start_time=times[0],
            )
        if error is not None:
            span.set_status(trace.Status(trace.StatusCode.ERROR, error))
        span.end(end_time=max(times))
        return span.get_span_context()


_tracer: Tracer | None = None


def keep_out(settings: Settings) -> None:
    """Where nothing is traced, let nobody import OpenTelemetry: redis does it on sight (30 ms, 3 MB a process)."""
    if settings.otlp_endpoint is None:
        sys.modules.setdefault("opentelemetry", cast(ModuleType, None))


def start(settings: Settings, service: str) -> None:
    """Begin to trace where the settings name a collector. After the fork: it starts a thread. Never raises."""
    global _tracer
    if settings.otlp_endpoint is None or _tracer is not None:
        return
    try:
        _tracer = Tracer(_provider(settings, service))
    except Exception:
        log.exception("tracing_unavailable")
        return
    log.info("tracing_started", extra={"service": service})


def stop() -> None:
    """End it, and send what is left."""
    global _tracer
    tracer, _tracer = _tracer, None
    if tracer is not None:
        tracer.stop()


def received(
    request_id: str,
    endpoint: str,
    code: int,
    started: float,
    verified: float | None,
    delivery: Delivery | None,
    stored: Stored | None,
) -> None:
    """Note a request of the API that has just ended. Never raises.

    `started` and `verified` (when who sent it and what it says was known) are of `time.perf_counter`; `stored` is None
    when it was not stored, `delivery` and `verified` are when it did not even come so far.
    """
    if _tracer is None:
        return
    now = time.perf_counter()
    steps = [("verify", started, verified or now)]
    if verified is not None:
        steps.append(("store", verified, now))
    attributes: dict[str, Any] = {"http.route": endpoint, "http.response.status_code": code}
    if delivery is not None:
        attributes["webhook.source"] = delivery.source
        attributes["webhook.request_id"] = delivery.request_id
        attributes["webhook.status"] = delivery.status
        attributes["webhook.aside"] = delivery.aside
        attributes["webhook.size_bytes"] = len(delivery.body)
    if stored is not None:
        attributes["webhook.delivery_id"] = stored.id
        attributes["webhook.outcome"] = stored.outcome
    try:
        _tracer.request(request_id, started, steps, attributes)
    except Exception:
        log.exception("span_defect")


@contextmanager
def _attempting(tracer: Tracer, jobs: Sequence[Job]) -> Iterator[None]:
    tracer.begin(jobs)
    try:
        yield
    finally:
        try:
            tracer.end(jobs, len(jobs))
        except Exception:
            log.exception("span_defect")


@contextmanager
def _trying(tracer: Tracer, name: str, jobs: Sequence[Job]) -> Iterator[None]:
    started = time.time_ns()
    try:
        yield
    finally:
        tracer.note(name, jobs, started, time.time_ns())


def attempts(jobs: Sequence[Job]) -> AbstractContextManager[None]:
    """Around the attempts at these deliveries: one span each."""
    return _NOTHING if _tracer is None else _attempting(_tracer, jobs)


def effect(name: str, jobs: Sequence[Job]) -> AbstractContextManager[None]:
    """Around one effect, for one delivery or for a batch: a span below each attempt's."""
    return _NOTHING if _tracer is None else _trying(_tracer, name, jobs)


def _provider(settings: Settings, service: str) -> Any:
    """OpenTelemetry's provider: a bounded queue, a thread that sends, and ids that can be given."""
    import os

    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
    from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator

    class GivenIds(RandomIdGenerator):
        """Random ids, unless the caller has given the next ones."""

        def __init__(self) -> None:
            self._given = threading.local()

        @contextmanager
        def preset(self, ids: tuple[int, int] | None) -> Iterator[None]:
            """Give the next span these ids of trace and span."""
            self._given.ids = ids
            try:
                yield
            finally:
                self._given.ids = None

        def generate_trace_id(self) -> int:
            """The given one, or a random one."""
            given = getattr(self._given, "ids", None)
            return int(given[0]) if given else int(super().generate_trace_id())

        def generate_span_id(self) -> int:
            """The given one, or a random one."""
            given = getattr(self._given, "ids", None)
            return int(given[1]) if given else int(super().generate_span_id())

    class Reporting(SpanExporter):
        """Says once that spans are lost, and once that they are sent again, in the place of a line a batch."""

        def __init__(self, inner: SpanExporter) -> None:
            self._inner = inner
            self._lost = 0

        def export(self, spans: Any) -> SpanExportResult:
            """Send spans."""
            result = self._inner.export(spans)
            if result is SpanExportResult.SUCCESS:
                if self._lost:
                    log.info("traces_exported_again", extra={"lost": self._lost})
                self._lost = 0
            else:
                if not self._lost:
                    log.warning("traces_not_exported", extra={"endpoint": settings.otlp_endpoint})
                self._lost += len(spans)
            return result

        def shutdown(self) -> None:
            """End it."""
            self._inner.shutdown()

        def force_flush(self, timeout_millis: int = 30000) -> bool:
            """Nothing is held here."""
            return self._inner.force_flush(timeout_millis)

    ids: IdGenerator = GivenIds()
    # The SDK's own lines name the collector and repeat with every batch; `Reporting` says what matters.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    exporter = OTLPSpanExporter(
        endpoint=settings.otlp_endpoint, headers=settings.otlp_headers or {}, timeout=SEND_SECONDS
    )
    name = os.environ.get("OTEL_SERVICE_NAME") or f"aisha-webhook-{service}"
    resource = Resource.create(
        {
            "service.name": name,
            "service.instance.id": settings.instance_id,
            "service.version": settings.version,
            "deployment.environment.name": settings.environment,
        }
    )
    provider = TracerProvider(resource=resource, id_generator=ids, shutdown_on_exit=False)
    provider.add_span_processor(
        BatchSpanProcessor(
            Reporting(exporter),
            max_queue_size=QUEUE_SPANS,
            schedule_delay_millis=1000,
            max_export_batch_size=512,
            export_timeout_millis=SEND_SECONDS * 1000,
        )
    )
    return provider
