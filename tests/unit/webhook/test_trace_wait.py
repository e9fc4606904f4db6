"""Waiting in `webhook-api trace`: when it ends, how often it looks, and what the command makes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import webhook_api.trace as tracing
from click.testing import CliRunner, Result
from webhook_api.cli import main
from webhook_api.config import Settings
from webhook_api.trace import TraceError, settled, trace_and_remove, wait_settled

STREAM = {"name": "stream", "state": "done", "detail": {"entry": "1-0", "stream": "s"}, "last_error": None}
ENVIRONMENT = {
    "DATABASE_URL": "postgresql://u@127.0.0.1:1/d",
    "REDIS_URL": "redis://127.0.0.1:1/0",
    "MINIO_ENDPOINT": "127.0.0.1:1",
    "MINIO_ACCESS_KEY": "access",
    "MINIO_SECRET_KEY": "secret-of-the-test",
}


def delivery(state: str = "done", **more: Any) -> dict[str, Any]:
    made = {
        "id": 7,
        "source": "fal",
        "status": "completed",
        "attempts": 1,
        "first_seen_at": "t",
        "tries": 1,
        "last_error": None,
        "state": state,
        "effects": [STREAM],
        "stream_entry": {"stream": "s", "id": "1-0", "fields": {}},
        "objects": [{"key": "k", "exists": True, "size": 2}],
    }
    return {**made, **more}


def found(*deliveries: dict[str, Any]) -> dict[str, Any]:
    return {"request_id": "probe-1", "found": bool(deliveries), "deliveries": list(deliveries)}


@pytest.mark.parametrize(
    ("document", "over"),
    [
        (found(), False),
        (found(delivery()), True),
        (found(delivery("dead", stream_entry=None)), True),
        (found(delivery(), delivery("pending")), False),
        (found(delivery(), delivery("dead")), True),
        *((found(delivery(state)), False) for state in ("pending", "leased", "retry", "parked")),
        (found(delivery(stream_entry=None)), False),
        (found(delivery(stream_entry={"error": "redis is away"})), False),
        (found(delivery(stream_entry=None, effects=[])), True),
        (found(delivery(objects=[{"key": "k", "exists": False}])), False),
        (found(delivery(objects=[{"key": "k", "exists": None, "error": "away"}])), False),
        (found(delivery(objects=[])), True),
    ],
)
def test_when_waiting_is_over(document: dict[str, Any], over: bool) -> None:
    assert settled(document) is over


class Looks:
    """Answers look after look, on a clock of its own; the last one stays."""

    def __init__(self, *documents: dict[str, Any]) -> None:
        self.documents, self.looked, self.now = list(documents), 0, 0.0

    def __call__(self) -> dict[str, Any]:
        self.looked += 1
        return self.documents.pop(0) if len(self.documents) > 1 else self.documents[0]

    def wait(self, seconds: float) -> dict[str, Any]:
        return wait_settled(self, seconds, lambda: self.now, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_it_looks_until_it_is_settled() -> None:
    looks = Looks(found(), found(delivery("leased")), found(delivery()))
    assert looks.wait(30)["deliveries"][0]["state"] == "done"
    assert (looks.looked, looks.now) == (3, pytest.approx(0.2))


@pytest.mark.parametrize(("seconds", "most"), [(0.0, 1), (0.05, 1), (1.0, 11), (float("nan"), 1)])
def test_it_looks_once_and_never_beyond_its_time(seconds: float, most: int) -> None:
    looks = Looks(found())
    assert looks.wait(seconds) == found()
    assert 1 <= looks.looked <= most
    assert not looks.now > seconds


def test_what_is_no_probe_is_refused_without_waiting() -> None:
    settings: Settings = None  # type: ignore[assignment]  # nothing is connected to
    with pytest.raises(TraceError) as refused:
        trace_and_remove(settings, "r-1", 300)
    assert refused.value.reason == "not_a_probe"


# The command


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["trace", *arguments], env=ENVIRONMENT)


@pytest.mark.parametrize("seconds", ["-1", "soon"])
def test_a_wait_that_is_none_is_wrong_usage(seconds: str) -> None:
    assert run("probe-1", "--wait", seconds).exit_code == 2


@pytest.mark.parametrize(("state", "code"), [("done", 0), ("dead", 0), ("pending", 1)])
def test_waiting_says_whether_it_was_done_in_time(
    monkeypatch: pytest.MonkeyPatch, state: str, code: int
) -> None:
    waited = []

    def follow(_: Settings, request_id: str, wait: float) -> dict[str, Any]:
        waited.append((request_id, wait))
        return found(delivery(state))

    monkeypatch.setattr(tracing, "trace", follow)
    result = run("probe-1", "--wait", "2.5", "--json")
    assert result.exit_code == code, result.output
    assert json.loads(result.stdout)["deliveries"][0]["state"] == state
    assert ("not done everywhere after 2.5 s" in result.stderr) is bool(code)
    assert waited == [("probe-1", 2.5)]
    assert run("probe-1", "--json").exit_code == 0


@pytest.mark.parametrize("wait", [True, False])
def test_what_was_found_is_shown_although_removing_failed(
    monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    def busy(*_: Any) -> dict[str, Any]:
        error = TraceError("busy", "a worker holds delivery 7")
        error.found = found(delivery("leased"))
        raise error

    monkeypatch.setattr(tracing, "trace_and_remove", busy)
    result = run("probe-1", *(["--wait", "1"] if wait else []), "--remove", "--json")
    assert result.exit_code == 1
    assert "a worker holds delivery 7" in result.stderr
    if wait:
        assert "removed" not in json.loads(result.stdout)
    else:
        assert result.stdout == ""
