"""The API as a process with a spool: every 200 is in the database exactly once in the end, whatever was down or died."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import urllib3

from tests.integration.webhook.test_intake_service import IN_TIME, Lab, Parts, accept_at_once, bucket, parts
from tests.support.apiservice import PACKAGE, running
from tests.support.falfake import delivery

__all__ = ["bucket", "parts"]
pytestmark = pytest.mark.backends
SECONDS = 60.0


@pytest.fixture
def spool_dir(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def environment(parts: Parts, spool_dir: Path) -> dict[str, str]:
    return {**parts.environment, "SPOOL_DIR": str(spool_dir), "SPOOL_RESERVE_BYTES": "0"}


@pytest.fixture
def lab(parts: Parts, environment: dict[str, str], tmp_path: Path) -> Iterator[Lab]:
    with running(environment, tmp_path / "api.log") as service:
        service.wait_health("healthy")
        yield parts.lab(service)


def spool(lab: Lab) -> dict[str, Any]:
    shown: dict[str, Any] = lab.service.get("/health")[1]["checks"]["spool"]
    return shown


def wait_drained(lab: Lab) -> None:
    lab.service.wait_health("healthy", SECONDS)
    lab.service.wait_for(lambda: spool(lab)["rows"] == 0, "the spool is drained", SECONDS)


def stored_directly(lab: Lab, request_id: str) -> None:
    """The database takes a delivery, and nothing is left in the spool: on a busy machine it may take several tries."""

    def taken() -> bool:
        if lab.send(request_id)[1].get("delivery_id") is not None:
            return True
        # Sent again at once it would only queue behind itself.
        wait_drained(lab)
        return False

    lab.service.wait_for(taken, f"{request_id} is stored", 2 * SECONDS)


def attempts(lab: Lab) -> dict[str, int]:
    with psycopg.connect(lab.url) as connection:
        found = connection.execute("select request_id, attempts from webhook.deliveries").fetchall()
    counted = Counter(request_id for request_id, _ in found)
    assert set(counted.values()) <= {1}, "an event has more than one row"
    return dict(found)


def each_arrived(lab: Lab, request_ids: list[str], times: int = 1, resent: int = 0) -> None:
    """All of them are there, and none was counted more often. What was refused for its deadline may count as well."""
    found = attempts(lab)
    assert set(found) == set(request_ids)
    assert min(found.values()) >= times
    assert sum(found.values()) <= times * len(request_ids) + len(lab.service.resent) + resent


def metric(lab: Lab, name: str) -> float:
    lines = str(lab.service.get("/metrics")[1]).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((name + " ", name + "{")))


def console(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "webhook_api", *arguments], capture_output=True, text=True, timeout=60, check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGE), **environment},
    )  # fmt: skip


@pytest.mark.parametrize("way", ["cut", "silence"])
def test_postgresql_down_is_a_200_from_the_spool_in_time(lab: Lab, way: str) -> None:
    """fal.md's fault table, "PostgreSQL down": 200 from a local fsynced spool, drained when it is back."""
    stored_directly(lab, "before")
    spooled, drained = (
        metric(lab, name) for name in ("webhook_spooled_total", "webhook_spool_drained_total")
    )
    getattr(lab.postgres, way)()
    answers = [answer for _ in range(3) for answer in accept_at_once(lab, 30)]
    lab.service.answered_within(IN_TIME)
    assert {answer["delivery_id"] for answer in answers} == {None}
    document = lab.service.wait_health("degraded")
    assert lab.service.get("/health")[0] == 200
    assert not document["checks"]["database"]["ok"]
    lab.service.wait_for(lambda: spool(lab)["rows"] == 90, "the spool shows its rows", SECONDS)
    assert metric(lab, "webhook_spool_rows") == 90
    assert metric(lab, "webhook_spooled_total") == spooled + 90
    lab.postgres.open()
    wait_drained(lab)
    assert set(attempts(lab)) == {"before"} | {answer["request_id"] for answer in answers}
    assert metric(lab, "webhook_spool_drained_total") == drained + 90
    stored_directly(lab, "after")


def test_the_answer_of_a_committed_row_is_lost_and_nothing_is_doubled(lab: Lab) -> None:
    """The connection is cut under load: what was committed without an answer is one row and one arrival's event."""
    sent: list[str] = []
    accepted: list[str] = []
    stop = threading.Event()

    def sender() -> None:
        while not stop.is_set():
            request_id = str(uuid.uuid4())
            sent.append(request_id)
            if lab.send(request_id)[0] == 200:
                accepted.append(request_id)

    threads = [threading.Thread(target=sender) for _ in range(8)]
    for thread in threads:
        thread.start()
    for already in (50, 150, 250):
        lab.service.wait_for(
            lambda already=already: len(accepted) > already, "deliveries are under way", SECONDS
        )
        lab.postgres.cut()
        lab.service.wait_for(
            lambda already=already: len(accepted) > already + 50, "the spool takes them", SECONDS
        )
        lab.postgres.open()
    stop.set()
    for thread in threads:
        thread.join(30)
    wait_drained(lab)
    found = attempts(lab)
    # What was refused because its time was up may be stored all the same.
    assert set(accepted) <= set(found) <= set(sent)
    assert set(found.values()) == {1}


def test_a_killed_process_leaves_its_spool_to_the_next(lab: Lab) -> None:
    """fal.md's fault table, "killed before / after the commit": what was answered 200 is there, once."""
    accepted: list[str] = []
    stop = threading.Event()

    def sender() -> None:
        while not stop.is_set():
            request_id = str(uuid.uuid4())
            try:
                if lab.send(request_id)[0] == 200:
                    accepted.append(request_id)
            except urllib3.exceptions.HTTPError:
                stop.wait(0.01)

    lab.postgres.cut()
    threads = [threading.Thread(target=sender) for _ in range(8)]
    for thread in threads:
        thread.start()
    lab.service.wait_for(lambda: len(accepted) > 100, "the spool takes them", SECONDS)
    lab.service.kill_all()
    stop.set()
    for thread in threads:
        thread.join(30)
    lab.service.start()
    lab.service.wait_for(lambda: spool(lab)["rows"] >= len(accepted), "the spool is adopted", SECONDS)
    lab.accept(accepted[0])
    lab.postgres.open()
    wait_drained(lab)
    found = attempts(lab)
    assert set(accepted) <= set(found)
    assert 2 <= found.pop(accepted[0]) <= 2 + len(lab.service.resent)
    assert set(found.values()) == {1}


def test_a_hundred_copies_while_the_database_goes_and_comes_are_one_row(lab: Lab) -> None:
    """fal.md's fault table, "duplicate, also inside one batch"."""
    sent = delivery("portrait-ok", lab.key, request_id="same")
    statuses: list[int] = []
    lock = threading.Lock()

    def one() -> None:
        for _ in range(10):
            status = lab.service.deliver(sent.body, sent.headers)[0]
            with lock:
                statuses.append(status)

    threads = [threading.Thread(target=one) for _ in range(10)]
    for thread in threads:
        thread.start()
    lab.service.wait_for(lambda: len(statuses) > 20, "copies are under way", SECONDS)
    lab.postgres.cut()
    lab.service.wait_for(lambda: len(statuses) > 50, "copies are spooled", SECONDS)
    lab.postgres.open()
    for thread in threads:
        thread.join(60)
    wait_drained(lab)
    assert statuses == [200] * 100
    assert attempts(lab)["same"] >= 100


def test_a_full_spool_is_a_503_in_time_and_keeps_what_it_took(
    parts: Parts, environment: dict[str, str], tmp_path: Path
) -> None:
    with running({**environment, "SPOOL_MAX_BYTES": str(1024 * 1024)}, tmp_path / "api.log") as service:
        lab = parts.lab(service)
        service.wait_health("healthy")
        parts.postgres.cut()
        accepted: list[str] = []
        refused: list[tuple[int, str]] = []

        def unhealthy_after_one_more() -> bool:
            request_id = f"r-{len(accepted) + len(refused)}"
            body = json.dumps(
                {"request_id": request_id, "status": "queued", "padding": "x" * 50_000}
            ).encode()
            headers = delivery("old-completed", parts.key).headers
            status, document, _, headers = service.deliver(body, headers)
            if status == 200:
                accepted.append(request_id)
            else:
                refused.append((status, document["error"]))
                assert int(headers["Retry-After"]) > 0
            return bool(service.get("/health")[1]["status"] == "unhealthy")

        service.wait_for(unhealthy_after_one_more, "the spool is full", SECONDS)
        assert 5 < len(accepted) < 25
        assert set(refused) == {(503, "spool_full")}
        service.answered_within(IN_TIME)
        document = service.wait_health("unhealthy")
        assert document["checks"]["spool"]["error"] == "full"
        parts.postgres.open()
        wait_drained(lab)
        found = set(attempts(lab))
        assert set(accepted) <= found
        assert len(found) <= len(accepted) + len(service.resent)


def test_two_processes_on_one_directory_lose_and_double_nothing(
    lab: Lab, parts: Parts, environment: dict[str, str], tmp_path: Path
) -> None:
    with running({**environment, "INSTANCE_ID": "it-2"}, tmp_path / "api-2.log") as second:
        other = parts.lab(second)
        second.wait_health("healthy")
        lab.postgres.cut()
        sent = [f"r-{n}" for n in range(30)]
        for request_id in sent:
            lab.accept(request_id)
            other.accept(request_id)
        lab.service.kill_all()
        # The living one takes over what the dead one left.
        second.wait_for(lambda: spool(other)["rows"] == 60, "the second adopts", SECONDS)
        lab.postgres.open()
        wait_drained(other)
        each_arrived(lab, sent, 2, resent=len(second.resent))


def test_a_damaged_file_is_put_aside_and_shown(
    parts: Parts, environment: dict[str, str], spool_dir: Path, tmp_path: Path
) -> None:
    spool_dir.mkdir()
    (spool_dir / "0123.spool").write_bytes(b"no database" * 5000)
    with running(environment, tmp_path / "api.log") as service:
        lab = parts.lab(service)
        service.wait_health("healthy")
        assert metric(lab, "webhook_spool_failures_total") >= 1
        parts.postgres.cut()
        lab.accept("taken")
        parts.postgres.open()
        wait_drained(lab)
        status = console(environment, "spool", "status", "--json")
        assert status.returncode == 1
        files = {file["name"]: file for file in json.loads(status.stdout)["files"]}
        assert files["0123.spool.broken"]["broken"]


def test_verification_never_depends_on_the_database(lab: Lab) -> None:
    lab.postgres.cut()
    for shape in ("forged", "tampered", "wrong-secret", "other-account"):
        assert lab.send(shape=shape)[0] in {401, 403}
    lab.accept("good")
    lab.postgres.open()
    wait_drained(lab)
    assert set(attempts(lab)) == {"good"}


def test_the_command_line_shows_exports_and_drains(
    lab: Lab, environment: dict[str, str], parts: Parts
) -> None:
    lab.postgres.cut()
    for n in range(5):
        lab.accept(f"r-{n}")
    alive = console(environment, "spool", "status", "--json")
    assert alive.returncode == 0, alive.stderr
    shown = json.loads(alive.stdout)
    assert (shown["rows"], [file["owned"] for file in shown["files"]]) == (5, [True])
    assert "alive" in console(environment, "spool", "status").stdout
    rows = [json.loads(line) for line in console(environment, "spool", "export").stdout.splitlines()]
    assert [row["request_id"] for row in rows] == [f"r-{n}" for n in range(5)]
    assert all(row["whole"] and row["headers"] and row["body_base64"] for row in rows)
    # Without a database it says so and changes nothing; a file that is owned is nobody else's.
    assert console(environment, "spool", "drain").returncode == 69
    lab.service.kill_all()
    lab.postgres.open()
    assert [
        file["owned"]
        for file in json.loads(console(environment, "spool", "status", "--json").stdout)["files"]
    ] == [False]
    drained = console(environment, "spool", "drain", "--json")
    assert drained.returncode == 0, drained.stderr
    assert json.loads(drained.stdout)["drained"] == 5
    each_arrived(lab, [f"r-{n}" for n in range(5)])
    assert json.loads(console(environment, "spool", "status", "--json").stdout)["files"] == []
    without = console(
        {key: value for key, value in environment.items() if key != "SPOOL_DIR"}, "spool", "status"
    )
    assert without.returncode == 1
    assert "SPOOL_DIR" in without.stderr


def test_it_starts_without_its_database_and_takes_deliveries(
    parts: Parts, environment: dict[str, str], tmp_path: Path
) -> None:
    parts.postgres.cut()
    with running(environment, tmp_path / "api.log") as service:
        lab = parts.lab(service)
        service.wait_health("degraded")
        lab.accept("early")
        parts.postgres.open()
        wait_drained(lab)
        each_arrived(lab, ["early"])
