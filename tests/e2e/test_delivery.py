"""Deliveries through a whole site: what fal sends ends in every backend, once, and nothing forged does."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from nacl.signing import SigningKey

from tests.support.sites import REPO

from .conftest import Stack, busy, docker, wait_for

pytestmark = pytest.mark.e2e


def test_portrait_training_ends_in_every_backend(stack: Stack) -> None:
    request_id = stack.add_avatar("portrait")
    document, files = stack.portrait(request_id)
    assert stack.deliver(document).status_code == 200
    stack.done(request_id)

    avatar = stack.avatar(request_id)
    assert (avatar["status"], avatar["training_progress"]) == ("completed", 100)
    assert avatar["training_completed_at"] is not None
    assert avatar["diffusers_lora_file_url"] == document["payload"]["diffusers_lora_file"]["url"]
    assert avatar["config_file_url"] == document["payload"]["config_file"]["url"]
    assert avatar["finetune_id"] is None
    assert len(stack.stream_entries(request_id)) == 1
    stored = stack.objects(request_id)
    for name, data in files.items():
        assert [content for key, content in stored.items() if key.endswith(name)] == [data], name


def test_hundred_copies_at_once_leave_one_of_each(stack: Stack) -> None:
    request_id = stack.add_avatar("portrait")
    document, files = stack.portrait(request_id)
    body = json.dumps(document).encode()
    headers = stack.signed(body, request_id)

    again: list[int] = []

    def send(_: int) -> int:
        """Until it is taken: each that was refused may be counted all the same."""
        while True:
            answer = requests.post(stack.url(), data=body, headers=headers, verify=False, timeout=20)
            if not busy(answer) or len(again) > 1000:
                return answer.status_code
            again.append(answer.status_code)

    with ThreadPoolExecutor(32) as pool:
        assert set(pool.map(send, range(100))) == {200}
    stack.done(request_id)
    # What came while the database was slow stands in an instance's spool, and is counted when that is drained.
    wait_for("every copy is counted", lambda: stack.delivery_rows(request_id)[0]["attempts"] >= 100)
    (row,) = stack.delivery_rows(request_id)
    # An arrival whose commit nobody heard of in time is counted once more by the spool.
    assert row["attempts"] <= 2 * (100 + len(again))
    assert len(stack.stream_entries(request_id)) == 1
    artifacts = [key for key in stack.objects(request_id) if key.startswith("webhooks/")]
    assert len(artifacts) == len(files)


def test_forged_delivery_is_refused_and_leaves_nothing(stack: Stack) -> None:
    request_id = stack.add_avatar()
    before = stack.avatar(request_id)
    document, _ = stack.portrait(request_id)
    answer = stack.deliver(document, key=SigningKey.generate())
    assert answer.status_code == 401
    assert answer.json()["error"]
    assert stack.delivery_rows(request_id) == []
    assert stack.avatar(request_id) == before
    assert stack.stream_entries(request_id) == []
    assert stack.objects(request_id) == {}


def test_stale_signature_is_not_acted_on(stack: Stack) -> None:
    request_id = stack.add_avatar()
    document, _ = stack.portrait(request_id)
    assert stack.deliver(document, at=time.time() - 900).status_code == 200
    (kept,) = stack.delivery_rows(request_id)
    assert (kept["state"], kept["aside"]) == ("dead", "stale")
    assert stack.avatar(request_id)["status"] == "training"
    # fal sends it once more, signed anew: that one counts.
    assert stack.deliver(document).status_code == 200
    wait_for("the avatar is completed", lambda: stack.avatar(request_id)["status"] == "completed")


def test_body_that_was_changed_after_signing_is_refused(stack: Stack) -> None:
    request_id = stack.add_avatar()
    document, _ = stack.portrait(request_id)
    headers = stack.signed(json.dumps(document).encode(), request_id)
    other = json.dumps({**document, "status": "ERROR"}).encode()
    assert (
        requests.post(stack.url(), data=other, headers=headers, verify=False, timeout=20).status_code == 401
    )
    assert stack.delivery_rows(request_id) == []


def test_the_bots_own_call_with_the_secret_header(stack: Stack) -> None:
    request_id = f"test-{uuid.uuid4()}"
    body = {"status": "completed", "request_id": request_id}
    url = stack.url(port="site_http_port")
    secret = stack.site.secret("fal_webhook_secret")
    answer = requests.post(url, json=body, headers={"X-Webhook-Secret": secret}, timeout=20)
    assert answer.status_code == 200
    assert answer.json()["status"] == "received"
    assert answer.json()["request_id"] == request_id
    assert (
        requests.post(url, json=body, headers={"X-Webhook-Secret": secret + "x"}, timeout=20).status_code
        == 401
    )
    assert requests.post(url, json=body, timeout=20).status_code == 401
    wait_for("parked, as no avatar is there", lambda: stack.delivery_rows(request_id)[0]["state"] == "parked")


def test_result_before_the_bots_row_waits_for_it(stack: Stack) -> None:
    request_id = str(uuid.uuid4())
    document, _ = stack.portrait(request_id)
    assert stack.deliver(document).status_code == 200
    wait_for("parked", lambda: stack.delivery_rows(request_id)[0]["state"] == "parked")
    real = stack.add_avatar()
    stack.query("UPDATE avatars SET fal_request_id = %s WHERE fal_request_id = %s", request_id, real)
    stack.done(request_id, seconds=120)
    assert stack.avatar(request_id)["status"] == "completed"


def test_errors_have_one_shape_and_tell_what_is_wrong(stack: Stack) -> None:
    secret = {"X-Webhook-Secret": stack.site.secret("fal_webhook_secret"), "Content-Type": "application/json"}
    cases = [
        (405, requests.get(stack.url(), verify=False, timeout=20)),
        (400, requests.post(stack.url(), data=b"{}", headers=secret, verify=False, timeout=20)),
        (413, requests.post(stack.url(), data=b"x" * 11_000_000, headers=secret, verify=False, timeout=20)),
        (404, requests.get(stack.url("/nowhere"), verify=False, timeout=20)),
    ]
    for status, answer in cases:
        assert answer.status_code == status
        assert answer.headers["Content-Type"].startswith("application/json"), status
        assert {"error", "message"} <= set(answer.json()), status


class Sender:
    """Threads that send new deliveries until they are told to stop, with a ledger of what was answered."""

    def __init__(self, stack: Stack, threads: int) -> None:
        self._stack = stack
        self._stop = threading.Event()
        self.accepted: list[str] = []
        self.refused: list[tuple[str, str]] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        session = requests.Session()
        request_id = ""
        while not self._stop.is_set():
            request_id = request_id or str(uuid.uuid4())
            body = json.dumps({"request_id": request_id, "status": "IN_PROGRESS"}).encode()
            headers = self._stack.signed(body, request_id)
            try:
                answer = session.post(self._stack.url(), data=body, headers=headers, verify=False, timeout=20)
            except requests.RequestException as error:
                self.refused.append((request_id, str(error)))
                request_id = ""
                continue
            if busy(answer):
                continue
            if answer.status_code == 200:
                self.accepted.append(request_id)
            else:
                self.refused.append((request_id, str(answer.status_code)))
            request_id = ""

    def __enter__(self) -> Sender:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self, count: int) -> None:
        """Until `count` more deliveries have been accepted."""
        target = len(self.accepted) + count
        wait_for(f"{count} more deliveries accepted", lambda: len(self.accepted) >= target)


@pytest.mark.parametrize("instance", ["api-1", "api-2"])
def test_killing_an_instance_loses_nothing_that_was_answered(stack: Stack, instance: str) -> None:
    """An instance dies in a stream of deliveries: each that was answered 200 is there, once, and none is refused."""
    container = f"{stack.site.name}-{instance}"
    try:
        with Sender(stack, threads=6) as sender:
            sender.wait_for_more(100)
            docker("kill", container)
            sender.wait_for_more(200)
    finally:
        docker("start", container)
    rows = stack.query(
        "SELECT request_id, count(*) AS copies FROM webhook.deliveries WHERE request_id = ANY(%s) GROUP BY 1",
        sender.accepted,
    )
    assert {row["request_id"] for row in rows} == set(sender.accepted)
    assert {row["copies"] for row in rows} == {1}
    assert sender.refused == [], "the other instance takes over what the dead one was sent"
    wait_for(
        "healthy again",
        lambda: docker("inspect", "--format", "{{.State.Health.Status}}", container) == "healthy",
    )


def test_database_away_is_a_200_from_the_spool_and_nothing_is_lost_when_it_is_back(stack: Stack) -> None:
    request_id = stack.add_avatar("style")
    document = {"request_id": request_id, "status": "OK", "payload": {"finetune_id": "ft-1"}}
    docker("pause", f"{stack.site.name}-postgres")
    try:
        answer = stack.deliver(document)
        assert (answer.status_code, answer.json()["delivery_id"]) == (200, None), answer.text
        assert answer.elapsed.total_seconds() < 4
        spool = json.loads(
            docker("exec", f"{stack.site.name}-api-1", "webhook-api", "spool", "status", "--json")
        )
        assert spool["rows"] == 1, spool
    finally:
        docker("unpause", f"{stack.site.name}-postgres")
    stack.done(request_id)
    assert stack.avatar(request_id)["finetune_id"] == "ft-1"
    assert len(stack.stream_entries(request_id)) == 1


def test_redis_and_object_store_away_cost_no_delivery(stack: Stack) -> None:
    request_id = stack.add_avatar("portrait")
    document, files = stack.portrait(request_id)
    docker("stop", "--time", "5", f"{stack.site.name}-redis", f"{stack.site.name}-s3")
    try:
        assert stack.deliver(document).status_code == 200
    finally:
        docker("start", f"{stack.site.name}-redis", f"{stack.site.name}-s3")
    stack.done(request_id, seconds=120)
    assert len(stack.stream_entries(request_id)) == 1
    assert len([key for key in stack.objects(request_id) if key.startswith("webhooks/")]) == len(files)


def test_make_send_sends_every_shape_and_each_is_answered_as_listed(stack: Stack) -> None:
    environment = {**os.environ, "SITE_NAME": stack.site.name, "URL": stack.url()}
    send = str(REPO / "scripts" / "send.sh")
    listed = subprocess.run(
        [send, "help"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    # The stack has no sender with Standard Webhooks unless one is configured.
    shapes = [line.split()[0] for line in listed.splitlines() if not line.startswith("standard-")]
    assert len(shapes) > 50

    def sent(shape: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([send, shape], env=environment, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(4) as pool:
        for shape, run in zip(shapes, pool.map(sent, shapes), strict=True):
            assert run.returncode == 0, f"{shape}: {run.stdout}{run.stderr}"
            assert json.loads(run.stdout.splitlines()[0])["as_expected"], shape


def test_a_better_result_after_a_useless_one_is_acted_on(stack: Stack) -> None:
    request_id = stack.add_avatar("portrait")
    useless = {"request_id": request_id, "status": "OK", "payload": None, "payload_error": "not serializable"}
    assert stack.deliver(useless).status_code == 200
    wait_for("the error shows", lambda: stack.avatar(request_id)["status"] == "error")
    document, _ = stack.portrait(request_id)
    assert stack.deliver(document).status_code == 200
    wait_for("the result is not thrown away", lambda: stack.avatar(request_id)["status"] == "completed")


def test_a_body_that_would_fill_the_memory_kills_nothing(stack: Stack) -> None:
    request_id = str(uuid.uuid4())
    head = f'{{"request_id": "{request_id}", "status": "OK", "payload": ['.encode()
    body = head + b",".join([b"{}"] * 3_300_000) + b"]}"
    assert 9_500_000 < len(body) < 10_485_760
    answer = requests.post(
        stack.url(), data=body, headers=stack.signed(body, request_id), verify=False, timeout=30
    )
    assert answer.status_code == 200
    assert stack.delivery_rows(request_id)[0]["state"] == "dead"
    for instance in ("api-1", "api-2"):
        assert (
            docker("inspect", "--format", "{{.State.OOMKilled}}", f"{stack.site.name}-{instance}") == "false"
        )


def test_nothing_secret_is_in_logs_or_container_settings(stack: Stack) -> None:
    names = docker("ps", "--filter", f"name=^{stack.site.name}-", "--format", "{{.Names}}").splitlines()
    assert len(names) >= 8
    secrets = [
        path.read_text().strip()
        for path in (stack.site.home / "secrets").rglob("*")
        if path.is_file() and "jwks" not in path.name
    ]
    secrets = [secret for secret in secrets if len(secret) >= 16]
    assert len(secrets) >= 6
    for name in names:
        logs = subprocess.run(["docker", "logs", name], capture_output=True, text=True, check=True)
        shown = logs.stdout + logs.stderr + docker("inspect", name) + docker("top", name, "-eo", "pid,args")
        assert not [secret for secret in secrets if secret in shown], f"a secret shows in {name}"
