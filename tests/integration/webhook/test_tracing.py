"""Traces, by real processes and a collector that speaks OTLP: one trace from nginx's id to the last effect, and no harm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.apiservice import PACKAGE, ApiService, running
from tests.support.falfake import SECRET, jwks_server, new_key
from tests.support.otlp import Collector, Span, collector
from tests.support.workerlab import Lab, wait_for

pytestmark = pytest.mark.backends


@contextmanager
def api(bench: Lab, **changes: str) -> Iterator[ApiService]:
    with jwks_server(new_key()) as keys:
        environment = bench.environ(FAL_WEBHOOK_SECRET=SECRET, FAL_JWKS_URL=keys.url, **changes)
        with running(environment, bench.tmp_path / "api.log") as service:
            service.wait_for(lambda: send(service, "probe-warm")[0] == 200, "deliveries are taken", 30)
            yield service


@contextmanager
def worker(bench: Lab, **changes: str) -> Iterator[subprocess.Popen[bytes]]:
    child = bench.spawn(**changes)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0


def send(
    service: ApiService, request_id: str, edge: str | None = None, status: str = "completed", note: str = ""
) -> tuple[int, dict[str, Any], float, dict[str, str]]:
    document = {"request_id": request_id, "status": status, "result": {"finetune_id": "ft", "note": note}}
    headers = {"Content-Type": "application/json", "X-Webhook-Secret": SECRET}
    if edge is not None:
        headers["X-Request-Id"] = edge
    return service.post(json.dumps(document).encode(), headers)


@pytest.mark.parametrize("note", ["", "x" * 100_000], ids=["the quick way", "Flask's way"])
def test_one_trace_from_the_edges_id_to_the_last_effect(bench: Lab, note: str) -> None:
    bench.avatar("r-1", kind="style")
    edge = os.urandom(16).hex()
    with collector() as collected:
        setting = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collected.url,
            "OTEL_EXPORTER_OTLP_HEADERS": "x-login=a%20b",
        }
        with api(bench, **setting) as service, worker(bench, **setting):
            began = time.time_ns()
            status, document, _, _ = send(service, "r-1", edge, note=note)
            assert status == 200
            bench.wait_state(document["delivery_id"], "done")
            ended = time.time_ns()
            wait_for(lambda: len([s for s in collected.spans if s.trace == edge]) >= 8, "the spans", 60)
    spans = {span.name: span for span in collected.spans if span.trace == edge}
    assert set(spans) == {
        "delivery.receive", "verify", "store", "delivery.attempt",
        "effect.avatar", "effect.raw_archive", "effect.archive", "effect.stream",
    }  # fmt: skip
    root = spans["delivery.receive"]
    assert root.parent == ""
    assert (root.service, root.attributes["http.response.status_code"]) == ("aisha-webhook-api", 200)
    assert root.attributes["webhook.delivery_id"] == document["delivery_id"]
    assert root.attributes["webhook.outcome"] == "stored"
    attempt = spans["delivery.attempt"]
    assert (attempt.parent, attempt.service) == (root.id, "aisha-webhook-worker")
    assert spans["verify"].parent == spans["store"].parent == root.id
    effects = [span for name, span in spans.items() if name.startswith("effect.")]
    assert {span.parent for span in effects} == {attempt.id}
    assert spans["effect.avatar"].attributes["webhook.effect_state"] == "done"
    for span in spans.values():
        assert began - 10**9 <= span.start <= span.end <= ended + 10**9
    assert spans["verify"].end <= spans["store"].start + 10**6
    assert collected.requests[0]["x-login"] == "a b"
    assert "finetune" not in str(collected.spans)


def test_a_failed_effect_and_a_refused_request_show_why(bench: Lab) -> None:
    """Also of a request whose id is no trace's: it makes one trace all the same."""
    refused = os.urandom(16).hex()
    with collector() as collected:
        setting = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{collected.url}/v1/traces"}
        with api(bench, **setting) as service, worker(bench, **setting):
            body = b'{"request_id": "r-9", "status": "completed"}'
            assert service.post(body, {"X-Webhook-Secret": "wrong", "X-Request-Id": refused})[0] == 401
            document = send(service, "nobody", "not.hex")[1]
            bench.wait_state(document["delivery_id"], "parked")
            wait_for(lambda: of(collected, "delivery.attempt", "nobody"), "the attempt", 60)
            wait_for(lambda: of(collected, "delivery.receive", "nobody"), "the request", 60)
            wait_for(
                lambda: any(s.name == "effect.avatar" and s.failed for s in collected.spans), "spans", 60
            )
            wait_for(lambda: any(s.trace == refused for s in collected.spans), "the refused one", 60)
    (root,) = of(collected, "delivery.receive", "nobody")
    attempt = of(collected, "delivery.attempt", "nobody")[0]
    assert (attempt.trace, attempt.parent) == (root.trace, root.id)
    avatar = next(span for span in collected.named("effect.avatar") if span.parent == attempt.id)
    assert avatar.attributes["error.type"] == "avatar_not_found"
    (turned_away,) = [span for span in collected.named("delivery.receive") if span.trace == refused]
    assert turned_away.attributes["http.response.status_code"] == 401


def of(collected: Collector, name: str, request_id: str) -> list[Span]:
    return [s for s in collected.named(name) if s.attributes.get("webhook.request_id") == request_id]


@pytest.mark.parametrize("fault", ["away", "hanging", "failing"])
def test_a_collector_that_is_not_well_harms_nobody(bench: Lab, fault: str) -> None:
    with collector() as collected:
        collected.status = 500
        if fault == "hanging":
            collected.gate = threading.Event()
        url = "http://127.0.0.1:9" if fault == "away" else collected.url
        setting = {"OTEL_EXPORTER_OTLP_ENDPOINT": url}
        with api(bench, **setting) as service, worker(bench, **setting):
            slowest = 0.0
            for number in range(60):
                bench.avatar(f"r-{number}", kind="style")
                status, document, seconds, _ = send(service, f"r-{number}", os.urandom(16).hex())
                assert status == 200
                slowest = max(slowest, seconds)
            bench.wait_state(document["delivery_id"], "done")
            wait_for(lambda: len(bench.entries()) == 60, "all entries")
            assert slowest < 4.5, "a call of the collector takes 5 s"
            service.wait_for(
                lambda: fault == "hanging" or "traces_not_exported" in service.log.read_text(), "the line", 60
            )
            started = time.monotonic()
            assert service.stop() == 0
            assert time.monotonic() - started < 15
    text = service.log.read_text()
    assert text.count("traces_not_exported") <= 1, "it is said once"
    assert "Traceback" not in text


def test_a_sampled_share_is_the_same_in_both_processes(bench: Lab) -> None:
    with collector() as collected:
        setting = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collected.url,
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": "0.5",
        }
        identifiers = []
        with api(bench, **setting) as service, worker(bench, **setting):
            for number in range(40):
                bench.avatar(f"r-{number}", kind="style")
                identifiers.append(send(service, f"r-{number}", os.urandom(16).hex())[1]["delivery_id"])
            for identifier in identifiers:
                bench.wait_state(identifier, "done")

            def same() -> bool:
                return len(traces(collected, "delivery.receive")) > 5 and (
                    traces(collected, "delivery.receive") == traces(collected, "delivery.attempt")
                )

            wait_for(same, "the same traces in both", 60)
    assert 5 < len(traces(collected, "delivery.receive")) < 35


def traces(collected: Collector, name: str) -> set[str]:
    real = [
        s for s in collected.named(name) if str(s.attributes.get("webhook.request_id", "")).startswith("r-")
    ]
    return {span.trace for span in real}


_SERVE = """
import sys
import webhook_api.gunicorn_conf
from webhook_api.app import create_app
create_app()
"""
_WORK = """
import os, signal, sys, threading, time
from webhook_api.cli import run
def end():
    while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=end, daemon=True).start()
try:
    run.worker.callback()
except SystemExit as ended:
    assert ended.code == 0
assert "webhook_api.worker.loop" in sys.modules and "redis" in sys.modules
"""
_SHOW = """
print(sorted(n for n in sys.modules if n.startswith(("opentelemetry", "google.protobuf")) and sys.modules[n]))
"""


@pytest.mark.parametrize("program", [_SERVE, _WORK], ids=["API", "worker"])
def test_while_it_is_off_nothing_of_it_is_imported(bench: Lab, program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program + _SHOW],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(PACKAGE),
            **bench.environ(FAL_WEBHOOK_SECRET=SECRET),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
