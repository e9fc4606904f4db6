"""Deployment records: whole lines, kept over crashes, and what a dead run left in hand."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime

import pytest
from ansible.module_utils.deploy_record import (
    DeployRecords,
    RecordError,
    bring_into_database,
    parse_lines,
    stopped_record,
)
from ansible.module_utils.docker_cli import Result

RUN, NEXT = "d-20261123T040000-aaaaaa", "d-20261123T040001-bbbbbb"


def record(**changes):
    whole = {
        "id": RUN,
        "host": "webhook-1",
        "kind": "deploy",
        "started": "2026-11-23T04:00:00Z",
        "result": "done",
        "from": None,
        "to": "r-0123456789ab",
    }
    return whole | changes


@pytest.fixture
def records(tmp_path):
    return DeployRecords(tmp_path, keep=10, slack=2)


def test_records_are_read_in_the_order_in_which_they_were_written(records):
    for number in range(5):
        records.append(record(id=f"d-{number}"))
    assert [found["id"] for found in records.read()] == [f"d-{number}" for number in range(5)]
    assert [found["id"] for found in records.read(2)] == ["d-3", "d-4"]
    assert records.read(0) == []
    assert len(records.read(99)) == 5
    assert [json.loads(line)["id"] for line in records.lines(2).splitlines()] == ["d-3", "d-4"]
    assert records.path.stat().st_mode & 0o777 == 0o640


def test_none_yet_is_an_empty_list(records):
    assert (records.read(), records.in_hand(), records.close_interrupted(RUN)) == ([], None, None)


def test_half_a_line_of_a_crash_spoils_no_other(records):
    records.append(record())
    with records.path.open("a") as file:
        file.write('{"id": "d-half", "ho')
    records.append(record(id="d-after"))
    assert [found["id"] for found in records.read()] == [RUN, "d-after"]
    assert parse_lines(records.path.read_text())[1] == 1


def test_a_line_is_one_line_whatever_is_in_it(records):
    said = "one\ntwo\r\u2028three\x85ж"
    records.append(record(reason=said))
    records.append(record(id="d-2"))
    assert [found.get("reason") for found in records.read()] == [said, None]


def test_the_oldest_are_cut_off_and_not_at_every_run(records):
    sizes = []
    for number in range(30):
        records.append(record(id=f"d-{number}"))
        sizes.append(len(records.read()))
    assert max(sizes) == 12
    assert records.read()[-1]["id"] == "d-29"
    assert records.path.stat().st_mode & 0o777 == 0o640


def test_what_is_no_record_is_refused_and_nothing_is_written(records):
    for wrong in ({"id": None}, {"kind": "other"}, {"result": "splendid"}, {"started": None}, {"host": 3}):
        with pytest.raises(RecordError) as error:
            records.append(record(**wrong))
        assert error.value.reason == "invalid"
    assert not records.path.exists()


def test_many_at_once_are_all_there(tmp_path):
    records = DeployRecords(tmp_path)
    threads = [
        threading.Thread(target=lambda n=n: [records.append(record(id=f"d-{n}-{i}")) for i in range(10)])
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({found["id"] for found in records.read()}) == 80


def test_a_run_that_ends_well_leaves_nothing_in_hand(records):
    records.begin(record(result=None, steps=[]))
    assert records.interrupted(RUN) is None
    records.finish(record())
    assert records.in_hand() is None
    assert records.close_interrupted(NEXT) is None
    assert [found["result"] for found in records.read()] == ["done"]


def test_what_a_dead_run_left_is_recorded_as_interrupted(records):
    records.begin(record(result=None, steps=[{"step": "pull"}, {"step": "replace", "service": "api-2"}]))
    closed = records.close_interrupted(NEXT, datetime(2026, 11, 23, 4, 1, 30, tzinfo=UTC))
    assert closed == records.read()[0]
    assert (closed["result"], closed["seconds"], closed["ended"]) == (
        "interrupted",
        90.0,
        "2026-11-23T04:01:30Z",
    )
    assert "replace api-2" in closed["reason"]
    assert records.in_hand() is None


def test_a_run_that_died_after_its_last_line_has_one_record(records):
    records.begin(record(result=None))
    records.append(record())
    assert records.close_interrupted(NEXT) is not None
    assert [found["result"] for found in records.read()] == ["done"]
    assert records.in_hand() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"id": 3}', '{"id": "d-x"}'])
def test_what_cannot_be_read_of_a_dead_run_does_not_stop_the_next(records, text):
    records.begin(record())
    (records.directory / "deployment.json").write_text(text)
    assert records.close_interrupted(NEXT)["result"] == "interrupted"
    assert records.in_hand() is None
    assert records.close_interrupted(NEXT) is None


def test_what_the_disk_refuses_is_said_and_leaves_no_half_line(records, monkeypatch):
    records.append(record())
    before = records.path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RecordError, match="No space left") as error:
        records.append(record(id="d-2"))
    assert error.value.reason == "io"
    assert records.path.read_bytes() == before


class Service:
    """What answers `webhook-api deployments import`: knows the ids that it was given."""

    def __init__(self, known=()):
        self.known, self.calls = set(known), []

    def __call__(self, command, *, stdin, timeout):
        given = [json.loads(line)["id"] for line in stdin.splitlines()]
        self.calls.append(len(given))
        new = [identity for identity in given if identity not in self.known]
        self.known |= set(new)
        return Result(0, json.dumps({"new": len(new), "known": len(given) - len(new), "invalid": []}), "")


def test_the_database_gets_what_it_lacks_and_all_of_it_when_it_was_away_for_long(tmp_path):
    records = DeployRecords(tmp_path)
    for number in range(130):
        records.append(record(id=f"d-{number}"))
    service = Service()
    assert bring_into_database(records, "api-1", 5, run=service) == 130
    assert service.calls == [100, 130]
    records.append(record(id="d-130"))
    assert bring_into_database(records, "api-1", 5, run=service) == 1
    assert service.calls[2:] == [100]


def test_a_service_that_refuses_is_quoted(tmp_path):
    records = DeployRecords(tmp_path)
    records.append(record())
    away = Result(69, "", "webhook-api: the database cannot be reached")
    with pytest.raises(RecordError, match="cannot be reached") as error:
        bring_into_database(records, "api-1", 5, run=lambda command, **_: away)
    assert error.value.reason == "refused"


STOPPED = {
    "id": NEXT,
    "host": "webhook-1",
    "kind": "deploy",
    "started": "2026-11-23T04:00:00Z",
    "who": "ops",
    "controller": "desk",
    "version": "abc",
    "reason": "webhook-api was not built",
    "failed_at": "The images are in the registry",
}


def test_a_run_that_never_came_to_its_rollout_is_on_record_once(records):
    stopped = stopped_record(STOPPED, "r-0123456789ab", datetime(2026, 11, 23, 4, 1, tzinfo=UTC))
    assert records.append_once(stopped)
    assert not records.append_once(stopped)
    (found,) = records.read()
    assert (found["result"], found["from"], found["to"], found["seconds"]) == (
        "failed",
        "r-0123456789ab",
        None,
        60,
    )
    assert (found["reason"], found["failed_at"]) == (STOPPED["reason"], STOPPED["failed_at"])
    assert parse_lines(records.lines())[1] == 0


@pytest.mark.parametrize("noted", [True, False], ids=["in hand", "ended"])
def test_what_a_rollout_has_recorded_itself_is_not_recorded_again(records, noted):
    (records.begin if noted else records.append)(record(id=NEXT))
    assert not records.append_once(stopped_record(STOPPED, None, datetime.now(UTC)))
    assert [found["result"] for found in records.read()] == ([] if noted else ["done"])


def test_a_stopped_run_of_which_little_is_known_is_recorded_all_the_same(records):
    little = {"id": NEXT, "host": "webhook-1", "kind": "prune", "started": "", "reason": "x" * 9000}
    assert records.append_once(stopped_record(little, None, datetime.now(UTC)))
    (found,) = records.read()
    assert (found["kind"], found["seconds"], len(found["reason"])) == ("deploy", None, 2000)
