"""webhook_probe over real HTTP and a real container. The service itself is probed by role verify, end to end.

The receiver here verifies signatures as fal documents them, and the container's `webhook-api` answers `trace` with
documents of the service's shape, so that each part can be broken on its own.
"""

from __future__ import annotations

import hashlib
import json

import nacl.exceptions
import nacl.signing
import pytest

from tests.support.recorded_server import Answer, Recorded, serve

pytestmark = pytest.mark.engine

SEED = "5e" * 32
SECRET = "a-shared-secret-of-the-test"
# What is found stands in /trace.json, after --remove in /removed.json; --remove is noted. With /no-wait it is of a
# release without --wait, with /busy --remove fails for the first time. Two plain questions find nothing yet.
TRACE_PROGRAM = """#!/bin/sh
[ "$1" = trace ] || exit 2
echo "$*" >> /commands
if [ -e /no-wait ]; then case "$*" in *--wait*) echo "No such option: --wait" >&2; exit 2;; esac; fi
case "$*" in *--remove*)
    if [ -e /busy ]; then
        rm /busy
        case "$*" in *--wait*) cat /trace.json;; esac
        echo "a worker holds delivery 1" >&2
        exit 1
    fi
    echo "$2" >> /removed; cat /removed.json; exit 0;;
esac
echo . >> /asked
if [ "$(wc -l < /asked)" -lt 3 ]; then echo '{"found": false, "deliveries": []}'; exit 1; fi
cat /trace.json
"""
DONE = {
    "deliveries": [
        {
            "id": 1,
            "state": "done",
            "tries": 1,
            "last_error": None,
            "effects": [
                {"name": name, "state": "done", "last_error": None} for name in ("stream", "raw_archive")
            ],
            "stream_entry": {"stream": "aisha:webhook:events:probe", "id": "1-0", "fields": {}},
            "objects": [{"key": "deliveries/fal/probe/1.json", "exists": True}],
        }
    ]
}


class Receiver:
    """A webhook service as seen from outside."""

    def __init__(self, recorded):
        self.recorded, self.url, self.accepted = recorded, recorded.url, []
        self.health = {"status": "healthy", "version": "v1", "release": "r-1", "checks": {}}
        recorded.routes["GET /health"] = lambda _: Answer(200, json.dumps(self.health).encode())
        recorded.routes["POST /hook"] = self.receive

    def receive(self, asked):
        headers = asked.headers
        if headers.get("X-Webhook-Secret") == SECRET:
            self.accepted.append(json.loads(asked.body)["request_id"])
            return Answer(200, b'{"status":"received"}')
        names = ("Request-Id", "User-Id", "Timestamp")
        parts = [headers.get(f"X-Fal-Webhook-{name}", "") for name in names]
        message = "\n".join([*parts, hashlib.sha256(asked.body).hexdigest()]).encode()
        try:
            signature = bytes.fromhex(headers.get("X-Fal-Webhook-Signature", ""))
            nacl.signing.SigningKey(bytes.fromhex(SEED)).verify_key.verify(message, signature)
        except (nacl.exceptions.CryptoError, ValueError):
            return Answer(401, b'{"error":"signature_invalid"}')
        self.accepted.append(parts[0])
        return Answer(200, b'{"status":"received"}')


@pytest.fixture
def receiver():
    with serve(Recorded()) as recorded:
        yield Receiver(recorded)


@pytest.fixture
def service(containers, base_image):
    """A container whose `webhook-api trace` answers with a document, and whose log has last words."""

    def start(document, *quirks):
        files = {
            "/usr/local/bin/webhook-api": TRACE_PROGRAM.encode(),
            "/trace.json": json.dumps(document).encode(),
            "/removed.json": json.dumps({**document, "removed": {"deliveries": 1}}).encode(),
            **{f"/{quirk}": b"" for quirk in quirks},
        }
        command = "chmod 755 /usr/local/bin/webhook-api; echo last words of the worker; touch /ready; exec sleep 600"
        container = containers(base_image, ["sh", "-c", command], files=files)
        assert container.exec_run(["sh", "-c", "until [ -e /ready ]; do sleep 0.05; done"]).exit_code == 0
        return container

    return start


@pytest.fixture
def arguments(receiver, tmp_path):
    (tmp_path / "key").write_text(SEED + "\n")
    (tmp_path / "secret").write_text(SECRET + "\n")
    return {
        "urls": [{"url": f"{receiver.url}/health"}],
        "delivery_url": f"{receiver.url}/hook",
        "key_file": str(tmp_path / "key"),
        "health_wait": 1,
        "timeout": 120,
    }


@pytest.mark.parametrize("kind", ["key", "secret"])
def test_a_delivery_is_followed_and_removed_again(run_module, service, receiver, arguments, tmp_path, kind):
    container = service(DONE)
    if kind == "secret":
        arguments |= {"key_file": "", "secret_file": str(tmp_path / "secret")}
    result = run_module("webhook_probe", container=container.name, release="r-1", **arguments)
    assert not result.get("failed"), result.get("msg")
    assert result["changed"] is False
    assert [check["check"] for check in result["checks"]] == [
        "health", "delivery", "row", "effects", "stream", "object", "removed",
    ]  # fmt: skip
    assert all(check["ok"] and check["latency_ms"] > 0 for check in result["checks"])
    assert receiver.accepted == [result["request_id"]]
    assert result["request_id"].startswith("probe-")
    assert container.exec_run(["cat", "/removed"]).output.decode().split() == [result["request_id"]]
    commands = container.exec_run(["cat", "/commands"]).output.decode().splitlines()
    assert commands == [f"trace {result['request_id']} --wait 120 --remove --json"]
    assert SEED not in result["output"]
    assert SECRET not in result["output"]


@pytest.mark.parametrize("quirk", ["no-wait", "busy"])
def test_it_is_removed_step_by_step_when_one_command_cannot(run_module, service, arguments, quirk):
    container = service(DONE, quirk)
    result = run_module("webhook_probe", container=container.name, **arguments)
    assert not result.get("failed"), result.get("msg")
    assert all(check["ok"] for check in result["checks"])
    assert container.exec_run(["cat", "/removed"]).output.decode().split() == [result["request_id"]]
    commands = container.exec_run(["cat", "/commands"]).output.decode().splitlines()
    assert commands[-1] == f"trace {result['request_id']} --remove --json"


def test_an_object_that_is_missing_fails_with_the_log_and_is_removed_all_the_same(
    run_module, service, arguments
):
    document = json.loads(json.dumps(DONE))
    document["deliveries"][0]["objects"][0]["exists"] = False
    container = service(document)
    result = run_module(
        "webhook_probe",
        container=container.name,
        log_containers=[container.name],
        **{**arguments, "timeout": 2},
    )
    assert result["failed"]
    assert [check["check"] for check in result["checks"] if not check["ok"]] == ["object"]
    for words in (
        "Check 'object' failed",
        "deliveries/fal/probe/1.json",
        "Check the object store",
        "last words",
    ):
        assert words in result["msg"]
    assert container.exec_run(["test", "-s", "/removed"]).exit_code == 0


def test_a_wrong_key_is_refused_and_nothing_is_followed(run_module, service, receiver, arguments, tmp_path):
    (tmp_path / "key").write_text("77" * 32)
    container = service(DONE)
    result = run_module("webhook_probe", container=container.name, **arguments)
    assert [check["check"] for check in result["checks"] if not check["ok"]] == ["delivery"]
    assert "401" in result["msg"]
    assert "signature_invalid" in result["msg"]
    assert receiver.accepted == []
    assert container.exec_run(["test", "-e", "/asked"]).exit_code == 1


def test_nothing_is_sent_while_an_address_is_not_healthy(run_module, receiver, arguments):
    receiver.health["release"] = "r-0"
    arguments["urls"].append({"url": f"{receiver.url}/gone"})
    result = run_module("webhook_probe", container="none-such", release="r-1", **arguments)
    assert result["failed"]
    assert "'r-0', expected 'r-1'" in result["msg"]
    assert f"{receiver.url}/gone" in result["msg"]
    assert [asked.method for asked in receiver.recorded.asked if asked.method == "POST"] == []


def test_check_mode_only_asks(run_module, receiver, arguments):
    result = run_module("webhook_probe", container="none-such", check=True, **arguments)
    assert not result.get("failed")
    assert result["ok"] is True
    receiver.health["status"] = "unhealthy"
    result = run_module("webhook_probe", container="none-such", check=True, **arguments)
    assert not result.get("failed")
    assert result["ok"] is False
    assert {asked.method for asked in receiver.recorded.asked} == {"GET"}


def test_a_container_that_is_not_there_and_a_key_that_is_not(run_module, receiver, arguments, project):
    result = run_module("webhook_probe", container=project, **{**arguments, "timeout": 1})
    assert "No such container" in result["msg"]
    arguments["key_file"] = "/nonexistent/key"
    result = run_module("webhook_probe", container=project, **arguments)
    assert result["reason"] == "no_key"
    assert "--tags secrets" in result["msg"]
    assert "Traceback" not in result["output"]
