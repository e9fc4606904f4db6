"""The probe: its signature, what it makes of answers and of recorded traces, and that it cleans up."""

from __future__ import annotations

import builtins
import hashlib
import json

import nacl.exceptions
import nacl.signing
import pytest
from ansible.module_utils import probe
from ansible.module_utils.docker_engine import EngineError
from ansible.module_utils.probe import (
    Address,
    Check,
    ProbeError,
    Prober,
    failure_message,
    health_fault,
    make_delivery,
    new_request_id,
    quiet_session,
    read_secret,
    read_trace,
)

from tests.support.recorded_server import Answer, Recorded, serve

SEED = "01" * 32
HEALTHY = {"status": "healthy", "version": "v1", "release": "r-1", "checks": {"database": {"ok": True}}}


def row(state="done", effects="done", entry=True, exists=True, **more):
    return {
        "id": 7,
        "state": state,
        "tries": 1,
        "last_error": None,
        "effects": [{"name": "stream", "state": effects, "last_error": None if effects == "done" else "redis is away"}],
        "stream_entry": {"stream": "aisha:webhook:events:probe", "id": "1-0", "fields": {}} if entry else None,
        "objects": [{"key": "deliveries/fal/probe-1/7.json", "exists": exists}],
        **more,
    }  # fmt: skip


def trace(*rows):
    return {"request_id": "probe-1", "found": bool(rows), "deliveries": list(rows)}


# The delivery


def test_a_signed_delivery_verifies_by_the_documented_scheme():
    body, headers = make_delivery("probe-1", 1_700_000_000.9, seed_hex=SEED, user_id="acc")
    assert headers["X-Fal-Webhook-Timestamp"] == "1700000000"
    message = f"probe-1\nacc\n1700000000\n{hashlib.sha256(body).hexdigest()}".encode()
    key = nacl.signing.SigningKey(bytes.fromhex(SEED)).verify_key
    signature = bytes.fromhex(headers["X-Fal-Webhook-Signature"])
    assert len(signature) == 64
    key.verify(message, signature)
    with pytest.raises(nacl.exceptions.BadSignatureError):
        key.verify(message + b"\n", signature)
    assert json.loads(body)["request_id"] == headers["X-Fal-Webhook-Request-Id"] == "probe-1"
    assert "X-Webhook-Secret" not in headers


def without(monkeypatch, *names):
    real = builtins.__import__

    def importing(name, *args, **kwargs):
        if name.partition(".")[0] in names:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_both_libraries_sign_alike_and_without_one_it_says_so(monkeypatch):
    one = probe.ed25519_sign(SEED, b"message")
    with monkeypatch.context() as patch:
        without(patch, "nacl")
        assert probe.ed25519_sign(SEED, b"message") == one
    without(monkeypatch, "nacl", "cryptography")
    with pytest.raises(ProbeError, match="python3-nacl") as caught:
        probe.ed25519_sign(SEED, b"message")
    assert caught.value.reason == "no_signer"


def test_a_delivery_with_the_secret():
    body, headers = make_delivery("probe-1", 0, secret="s3cr3t")
    assert headers["X-Webhook-Secret"] == "s3cr3t"
    assert json.loads(body) == {"request_id": "probe-1", "status": "completed", "message": "probe"}
    assert not [name for name in headers if name.startswith("X-Fal")]


@pytest.mark.parametrize("seed", ["", "zz" * 32, "01" * 31, "01" * 32 + " "])
def test_a_bad_seed_is_refused_and_not_told(seed):
    with pytest.raises(ProbeError) as caught:
        probe.ed25519_sign(seed, b"")
    assert caught.value.reason == "bad_key"
    assert not seed or seed not in str(caught.value)


def test_secret_files(tmp_path):
    path = tmp_path / "secret"
    with pytest.raises(ProbeError, match="--tags secrets"):
        read_secret(str(path), "secret file")
    path.write_text("\n")
    with pytest.raises(ProbeError, match="is empty"):
        read_secret(str(path), "secret file")
    path.write_text("value\n")
    assert read_secret(str(path), "secret file") == "value"


def test_ids_mark_a_probe_and_differ():
    assert new_request_id().startswith("probe-")
    assert new_request_id() != new_request_id()


# Health


@pytest.mark.parametrize(
    ("status", "change", "options", "words"),
    [
        (200, {}, {}, ""),
        (200, {}, {"version": "v1", "release": "r-1"}, ""),
        (200, {"status": "degraded"}, {"accept": ("healthy", "degraded")}, ""),
        (200, {"status": "degraded"}, {}, "'degraded', expected healthy"),
        (503, {"status": "unhealthy"}, {}, "HTTP 503"),
        (200, {}, {"release": "r-2"}, "release is 'r-1', expected 'r-2'"),
        (200, {}, {"version": "v2"}, "version is 'v1'"),
        (
            503,
            {"status": "unhealthy", "checks": {"redis": {"ok": False, "error": "timeout"}}},
            {},
            "redis (timeout)",
        ),
    ],
)
def test_health_answers(status, change, options, words):
    fault = health_fault(Address("u", **options), status, json.dumps(HEALTHY | change))
    assert words in fault
    assert bool(fault) is bool(words)


@pytest.mark.parametrize("text", ["", "<html>", "[]", '"healthy"'])
def test_an_answer_that_is_no_health(text):
    assert "no JSON" in health_fault(Address("u"), 200, text)


# Traces


def test_a_complete_trace():
    assert read_trace(trace(row())).complete


@pytest.mark.parametrize(
    ("document", "missing"),
    [
        (trace(), {"row", "effects", "stream", "object"}),
        (trace(row("pending")), {"row"}),
        (trace(row("done", entry=False)), {"stream"}),
        (trace(row(stream_entry={"error": "redis is away"})), {"stream"}),
        (trace(row(exists=False)), {"object"}),
        (trace(row(exists=None)), {"object"}),
        (trace(row(objects=[])), {"object"}),
        (trace(row("retry", effects="failed")), {"row", "effects"}),
    ],
)
def test_what_a_trace_lacks(document, missing):
    traced = read_trace(document)
    assert {kind for kind in ("row", "effects", "stream", "object") if not getattr(traced, kind)} == missing
    assert not traced.complete
    assert not traced.hopeless


def test_a_dead_letter_is_hopeless_and_says_why():
    traced = read_trace(trace(row("dead", effects="failed", last_error="no bucket", tries=12)))
    assert traced.hopeless
    assert "no bucket" in traced.problems["row"]
    assert "redis is away" in traced.problems["effects"]


# Doing it


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Engine:
    """Answers trace with recorded outputs in turn; the last one stays."""

    def __init__(self, *outputs):
        self.outputs, self.commands = list(outputs), []

    def run_in(self, name, command):
        self.commands.append(command)
        output = self.outputs.pop(0) if len(self.outputs) > 1 else self.outputs[0]
        if isinstance(output, Exception):
            raise output
        return output if isinstance(output, tuple) else (0, json.dumps(output), "")


COMMAND = ["webhook-api", "trace"]


def prober(engine=None):
    clock = Clock()
    return Prober(
        quiet_session(), engine, request_timeout=5, clock=clock, sleep=clock.sleep, wall=clock
    ), clock


def test_it_follows_until_all_is_there():
    not_yet = (1, json.dumps(trace()), "no delivery has arrived")
    engine = Engine(not_yet, trace(row("pending", entry=False, objects=[])), trace(row()))
    following, _ = prober(engine)
    checks = following.follow("api-1", COMMAND, "probe-1", 30)
    assert [check.kind for check in checks] == ["row", "effects", "stream", "object"]
    assert all(check.ok for check in checks)
    assert engine.commands[0] == ["webhook-api", "trace", "probe-1", "--json"]


def test_one_command_proves_and_removes():
    engine = Engine(trace(row()) | {"removed": {"deliveries": 1}})
    proving, _ = prober(engine)
    checks = proving.prove("api-1", COMMAND, "probe-1", 30.0)
    assert [(check.kind, check.ok) for check in checks] == [
        (kind, True) for kind in ("row", "effects", "stream", "object", "removed")
    ]
    assert engine.commands == [["webhook-api", "trace", "probe-1", "--wait", "30", "--remove", "--json"]]


def test_a_probe_that_is_to_stay_is_not_removed():
    engine = Engine(trace(row()))
    proving, _ = prober(engine)
    checks = proving.prove("api-1", COMMAND, "probe-1", 2.5, removing=False)
    assert [check.kind for check in checks] == ["row", "effects", "stream", "object"]
    assert engine.commands == [["webhook-api", "trace", "probe-1", "--wait", "2.5", "--json"]]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (trace(row("retry", effects="failed", last_error="stream: redis is away")), "redis is away"),
        (trace(row("dead", last_error="no bucket")), "no bucket"),
        (trace(), "no row yet"),
    ],
)
def test_what_one_command_found_missing_is_told_although_it_is_removed(found, words):
    engine = Engine(found | {"removed": {"deliveries": 1}})
    proving, clock = prober(engine)
    checks = {check.kind: check for check in proving.prove("api-1", COMMAND, "probe-1", 30)}
    assert not checks["row"].ok
    assert words in checks["row"].detail
    assert checks["removed"].ok
    assert (len(engine.commands), clock.now) == (1, 0)


def test_what_one_command_found_counts_although_the_removal_takes_longer():
    busy = (1, json.dumps(trace(row())), "a worker holds delivery 7")
    engine = Engine(busy, (busy[0], "", busy[2]), trace(row()) | {"removed": {"deliveries": 1}})
    proving, _ = prober(engine)
    checks = proving.prove("api-1", COMMAND, "probe-1", 30)
    assert [check.kind for check in checks] == ["row", "effects", "stream", "object", "removed"]
    assert all(check.ok for check in checks)
    assert [command[3:] for command in engine.commands[1:]] == [["--remove", "--json"]] * 2


@pytest.mark.parametrize(
    "output",
    [
        (2, "", "No such option: --wait"),
        (69, "", "PostgreSQL cannot be asked"),
        EngineError("failed", "timed out"),
    ],
)
def test_when_one_command_fails_it_is_done_step_by_step(output):
    removed = trace(row()) | {"removed": {"deliveries": 1}}
    engine = Engine(output, trace(row("pending")), trace(row()), removed)
    proving, _ = prober(engine)
    checks = proving.prove("api-1", COMMAND, "probe-1", 30)
    assert [check.kind for check in checks] == ["row", "effects", "stream", "object", "removed"]
    assert all(check.ok for check in checks)
    assert [command[3:] for command in engine.commands[1:]] == [
        ["--json"],
        ["--json"],
        ["--remove", "--json"],
    ]


def test_it_gives_up_at_the_deadline_and_says_what_is_missing():
    following, clock = prober(
        Engine(trace(row("retry", effects="failed", last_error="stream: redis is away")))
    )
    checks = {check.kind: check for check in following.follow("api-1", COMMAND, "probe-1", 3)}
    assert not checks["row"].ok
    assert "redis is away" in checks["row"].detail
    assert checks["object"].ok
    assert clock.now <= 3


def test_it_gives_up_on_a_dead_letter_at_once():
    following, clock = prober(Engine(trace(row("dead"))))
    following.follow("api-1", COMMAND, "probe-1", 300)
    assert clock.now == 0


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ((69, "", "PostgreSQL cannot be asked"), "PostgreSQL cannot be asked"),
        ((127, "", "executable file not found"), "ended with 127"),
        (EngineError("not_found", "no such container: api-1"), "no such container"),
    ],
)
def test_a_trace_that_cannot_be_asked(output, words):
    following, _ = prober(Engine(output))
    checks = following.follow("api-1", COMMAND, "probe-1", 1)
    assert not any(check.ok for check in checks)
    assert words in checks[0].detail


def test_a_container_that_is_not_there_is_not_waited_for():
    following, clock = prober(Engine(EngineError("not_found", "no such container: api-1")))
    assert not following.follow("api-1", COMMAND, "probe-1", 300)[0].ok
    assert not following.remove("api-1", COMMAND, "probe-1", 300).ok
    checks = following.prove("api-1", COMMAND, "probe-1", 300)
    assert [check.ok for check in checks] == [False] * 5
    assert "no such container" in checks[0].detail
    assert clock.now == 0


def test_removing_waits_for_a_worker_that_holds_it():
    engine = Engine((1, "", "a worker holds delivery 7"), trace(row()))
    removing, _ = prober(engine)
    assert removing.remove("api-1", COMMAND, "probe-1", 5).ok
    assert engine.commands[-1] == ["webhook-api", "trace", "probe-1", "--remove", "--json"]
    stuck, _ = prober(Engine((1, "", "a worker holds delivery 7")))
    check = stuck.remove("api-1", COMMAND, "probe-1", 1)
    assert not check.ok
    assert "holds" in check.detail


@pytest.fixture
def recorded():
    with serve(Recorded()) as server:
        yield server


def test_health_is_asked_again_until_the_wait_is_over(recorded):
    answers = [Answer(503, b'{"status":"unhealthy"}'), Answer(200, json.dumps(HEALTHY).encode())]
    recorded.routes["GET /health"] = lambda asked: answers.pop(0) if len(answers) > 1 else answers[0]
    asking, _ = prober()
    assert asking.health([Address(f"{recorded.url}/health")], 5)[0].ok
    answers[:] = [Answer(503, b'{"status":"unhealthy"}')]
    (check,) = asking.health([Address(f"{recorded.url}/health")], 1)
    assert not check.ok
    assert "HTTP 503" in check.detail


def test_every_bad_address_is_named(recorded):
    recorded.routes["GET /health"] = Answer(200, json.dumps(HEALTHY).encode())
    asking, _ = prober()
    checks = asking.health(
        [
            Address(f"{recorded.url}/nothing"),
            Address("http://127.0.0.1:1/x"),
            Address(f"{recorded.url}/health"),
        ],
        0,
    )
    assert [check.ok for check in checks] == [False, False, True]
    assert "Connection refused" in checks[1].detail


@pytest.mark.parametrize(("status", "ok"), [(200, True), (401, False), (503, False), (302, False)])
def test_delivering(recorded, status, ok):
    recorded.routes["POST /hook"] = Answer(status, b'{"error":"x"}', {"Location": "/elsewhere"})
    sending, _ = prober()
    check = sending.deliver(Address(f"{recorded.url}/hook"), b"{}", {"X-Webhook-Secret": "s3cr3t"})
    assert check.ok is ok
    assert ok or f"HTTP {status}" in check.detail
    assert recorded.asked[0].headers["X-Webhook-Secret"] == "s3cr3t"
    assert len(recorded.asked) == 1


def test_the_message_names_check_remedy_and_last_words():
    checks = [Check("health", "u", True, 1), Check("removed", "probe-1", False, 1, "busy")]
    message = failure_message(checks, {"worker": ["one", "last words"]})
    for words in ("'removed' failed", "busy", "webhook-api trace probe-1 --remove", "worker: last words"):
        assert words in message
    assert "'health'" not in message
