"""The console against a real PostgreSQL: what is listed, shown, exported, replayed, discarded, and recorded."""

from __future__ import annotations

import base64
import json
import os
import pty
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from webhook_api import actions, audit
from webhook_api.cli.database import Patient
from webhook_api.console import Filter
from webhook_api.db import connect

from tests.support.console import document, good, lines, typed
from tests.support.databases import with_address
from tests.support.gate import gate
from tests.support.workerlab import REPO, Bucket, Lab, lab

pytestmark = pytest.mark.backends


@pytest.fixture(scope="module")
def shared(
    database_url: str, redis_url: str, s3: Bucket, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    with lab(database_url, redis_url, s3, tmp_path_factory.mktemp("console")) as made:
        yield made


@pytest.fixture
def bench(shared: Lab) -> Lab:
    """The database of this module, emptied."""
    shared.connection.execute("truncate webhook.deliveries, webhook.audit restart identity cascade")
    shared.connection.execute("drop table if exists avatars, users")
    shared.redis.delete(shared.stream)
    return shared


@pytest.fixture
def broken(database_url: str, redis_url: str, s3: Bucket, tmp_path: Path) -> Iterator[Lab]:
    """A database of a test's own, whose schema it may spoil."""
    with lab(database_url, redis_url, s3, tmp_path) as made:
        yield made


@pytest.fixture
def env(bench: Lab) -> dict[str, str]:
    return {"DATABASE_URL": bench.database_url, "ENVIRONMENT": "test", "INSTANCE_ID": "api-9"}


def fill(
    bench: Lab, number: int, state: str = "dead", error: str = "archive: object_refused: no", **more: Any
) -> list[int]:
    """Deliveries in a state; returns their ids."""
    ids = [
        bench.deliver({"request_id": f"r-{state}-{index}", "status": "OK", "n": index}, "completed", **more)
        for index in range(number)
    ]
    bench.connection.execute(
        "update webhook.deliveries set state = %s, last_error = %s, tries = 3, "
        "done_at = case when %s = 'done' then now() end where id = any(%s)",
        (state, error, state, ids),
    )
    return ids


def effect(bench: Lab, identifier: int, name: str, state: str, **detail: Any) -> None:
    bench.connection.execute(
        "insert into webhook.effects (delivery_id, name, state, tries, detail, last_error) values (%s, %s, %s, 3, %s, %s)",
        (identifier, name, state, json.dumps(detail), "e" if state == "failed" else None),
    )


def states(bench: Lab, ids: list[int]) -> list[str]:
    return [bench.delivery(identifier)["state"] for identifier in ids]


def test_a_list_is_paged_without_gaps_while_rows_arrive(bench: Lab, env: dict[str, str]) -> None:
    ids = fill(bench, 7, "done")
    first = lines(env, "events", "list", "--limit", 3)
    assert [row["id"] for row in first] == ids[:3:-1]
    fill(bench, 2)
    second = lines(env, "events", "list", "--limit", 10, "--after", first[-1]["id"])
    assert [row["id"] for row in second] == ids[3::-1]
    forward = lines(env, "events", "list", "--limit", 2, "--oldest-first", "--after", ids[1])
    assert [row["id"] for row in forward] == ids[2:4]
    result = good(env, "events", "list", "--limit", 2)
    assert "--after" in result.stderr
    assert "r-dead-1" in result.stdout


FILTERS: list[tuple[tuple[str, ...], set[str]]] = [
    (("--state", "dead"), {"dead", "aside"}),
    (("--state", "dead", "--state", "parked"), {"dead", "parked", "aside"}),
    (("--source", "manual"), {"manual"}),
    (("--status", "failed"), {"failed"}),
    (("--request-id", "r-parked-0"), {"parked"}),
    (("--request-id", "r-parked-0", "--request-id", "r-dead-0"), {"dead", "parked"}),
    (("--avatar-id", "AVATAR"), {"avatar"}),
    (("--avatar-id", "a-recorded"), {"dead"}),
    (("--avatar-id", "nobody"), set()),
    (("--reason", "object_refused"), {"dead"}),
    (("--reason", "only_in_effect"), {"parked"}),
    (("--reason", "refused"), set()),
    (("--text", "needle"), {"done"}),
    (("--text", "Жанна"), {"done"}),
    (("--text", "100%"), set()),
    (("--aside", "any"), {"aside"}),
    (("--aside", "stale"), {"aside"}),
    (("--reason", "stale"), {"aside"}),
    (("--aside", "future"), set()),
    (("--probe",), {"probe"}),
    (("--since", "1h"), {"done", "dead", "parked", "manual", "failed", "avatar", "aside", "probe"}),
    (("--since", "1h", "--until", "10m"), set()),
    (("--until", "3d"), {"old"}),
    (("--since", "20d", "--until", "3d"), {"old"}),
]


def test_filters(bench: Lab, env: dict[str, str]) -> None:
    bench.make_bot_tables()
    avatar = bench.avatar("r-avatar")
    made = {
        "done": bench.deliver({"request_id": "r-1", "status": "OK", "t": "needle Жанна"}, "completed"),
        "dead": fill(bench, 1)[0],
        "parked": fill(bench, 1, "parked", "avatar: unknown_request: none")[0],
        "manual": bench.deliver({"request_id": "r-2"}, "queued", source="manual"),
        "failed": bench.deliver({"request_id": "r-3"}, "failed"),
        "avatar": bench.deliver({"request_id": "r-avatar"}, "completed"),
        "aside": bench.deliver({"request_id": "r-4"}, "completed"),
        "old": bench.deliver({"request_id": "r-5"}, "completed"),
        "probe": bench.deliver({"request_id": "probe-6"}, "completed", probe=True),
    }
    effect(bench, made["parked"], "archive", "failed", reason="only_in_effect")
    effect(bench, made["dead"], "avatar", "done", avatar_id="a-recorded")
    change = "update webhook.deliveries set {} where id = %s"
    bench.connection.execute(change.format("state = 'done', done_at = now()"), (made["done"],))
    bench.connection.execute(change.format("state = 'dead', aside = 'stale'"), (made["aside"],))
    bench.connection.execute(change.format("first_seen_at = now() - interval '9 days'"), (made["old"],))
    names = {identifier: name for name, identifier in made.items()}
    for options, expected in FILTERS:
        asked = [avatar if option == "AVATAR" else option for option in options]
        assert {names[row["id"]] for row in lines(env, "events", "list", *asked)} == expected, options


def test_avatars_are_found_by_what_was_recorded_where_the_bots_table_is_away(
    bench: Lab, env: dict[str, str]
) -> None:
    [identifier] = fill(bench, 1)
    effect(bench, identifier, "avatar", "done", avatar_id="a-1")
    assert [row["id"] for row in lines(env, "events", "list", "--avatar-id", "a-1")] == [identifier]


def test_show_tells_everything_and_the_body_only_when_asked(bench: Lab, env: dict[str, str]) -> None:
    body = b'{"request_id":"r-9","status":"OK","evil":"\x1b[2J \xe2\x80\xae"}'
    bench.connection.execute("select 1")
    identifier = bench.deliver(body, "completed")
    effect(bench, identifier, "stream", "done", entry="1-0", stream="s")
    request_id = bench.delivery(identifier)["request_id"]
    for which in (identifier, request_id):
        [shown] = document(env, "events", "show", which)
        assert shown["id"] == identifier
        assert shown["body_bytes"] == len(body)
        assert [item["name"] for item in shown["effects"]] == ["stream"]
        assert "body_base64" not in shown
        assert "headers" not in shown
    [shown] = document(env, "events", "show", identifier, "--body")
    assert base64.b64decode(shown["body_base64"]) == body
    said = good(env, "events", "show", identifier, "--body").stdout
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert "\\x1b[2J" in said
    assert "evil" not in good(env, "events", "show", identifier).stdout
    for nothing in ("99999999", "no-such-request", "9" * 30):
        assert typed(env, "events", "show", nothing).exit_code == 1


def test_a_list_cannot_drive_a_terminal(bench: Lab, env: dict[str, str]) -> None:
    [identifier] = fill(bench, 1, error="archive: x: \x1b]0;owned\x07 \x9b31m \u202e\n2nd line")
    for output in (good(env, "events", "list").stdout, good(env, "events", "show", identifier).stdout,
                   good(env, "events", "list", "--json").stdout):  # fmt: skip
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(output)
    assert len(good(env, "events", "list").stdout.splitlines()) == 2


def test_export_is_complete_and_in_order(
    bench: Lab, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webhook_api.console.PAGE", 3)
    monkeypatch.setattr("webhook_api.console.IDS", 5)
    ids = fill(bench, 8, "done") + fill(bench, 2)
    assert [row["id"] for row in lines(env, "events", "export")] == ids
    assert [row["id"] for row in lines(env, "events", "export", "--limit", 4)] == ids[:4]
    assert [row["id"] for row in lines(env, "events", "export", "--after", ids[3], "--state", "done")] == ids[
        4:8
    ]
    with_body = lines(env, "events", "export", "--body", "--state", "dead")
    assert [json.loads(base64.b64decode(row["body_base64"]))["n"] for row in with_body] == [0, 1]
    assert lines(env, "events", "export", "--state", "parked") == []


def test_a_dry_run_changes_nothing_and_counts(bench: Lab, env: dict[str, str]) -> None:
    ids = fill(bench, 12)
    report = document(env, "dead-letters", "replay", "--reason", "object_refused", "--dry-run")
    assert (report["matched"], report["changed"], report["dry_run"], len(report["preview"])) == (
        12,
        0,
        True,
        10,
    )
    assert report["states"] == {"dead": 12}
    assert set(states(bench, ids)) == {"dead"}
    assert lines(env, "audit", "list") == []
    said = good(env, "dead-letters", "replay", "--all", "--dry-run").stdout
    assert "12 match" in said
    assert "Nothing was changed" in said


def test_nothing_happens_without_a_filter_or_a_yes(bench: Lab, env: dict[str, str]) -> None:
    ids = fill(bench, 2)
    for options in (["--yes"], ["--all"], ["--all", "--json"], ["--reason", "object_refused"]):
        result = typed(env, "dead-letters", "discard", *options)
        assert result.exit_code == 2, result.output
    assert "2 match" in typed(env, "dead-letters", "discard", "--all").stderr
    assert set(states(bench, ids)) == {"dead"}
    assert lines(env, "audit", "list") == []


def test_replay_takes_the_oldest_up_to_the_limit_and_records_who_did_it(
    bench: Lab, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "BATCH", 2)
    ids = fill(bench, 6)
    report = document(
        env, "dead-letters", "replay", "--reason", "object_refused", "--limit", 5, "--yes", "--as", "Aida"
    )
    assert (report["matched"], report["changed"], report["delivery_ids"]) == (6, 5, ids[:5])
    assert report["outcomes"] == {"replayed": 5}
    assert states(bench, ids) == ["retry"] * 5 + ["dead"]
    entries = lines(env, "audit", "list")
    assert [entry["delivery_ids"] for entry in entries] == [ids[4:5], ids[2:4], ids[:2]]
    assert {(entry["who"], entry["instance"], entry["action"], entry["operation"]) for entry in entries} == {
        ("Aida", "api-9", "dead-letters.replay", report["operation"])
    }
    assert entries[0]["filter"] == {"reason": "object_refused"}
    assert lines(env, "audit", "list", "--delivery", ids[5]) == []
    assert [
        row["id"]
        for row in lines(env, "audit", "list", "--who", "Aida", "--limit", 1, "--after", entries[0]["id"])
    ] == [entries[1]["id"]]
    assert "Aida" in good(env, "audit", "list").stdout
    [shown] = document(env, "events", "show", ids[0])
    assert [deed["who"] for deed in shown["audit"]] == ["Aida"]


def test_the_change_and_its_record_stand_or_fall_together(broken: Lab, env: dict[str, str]) -> None:
    ids = fill(broken, 2)
    broken.connection.execute(
        "alter table webhook.audit add constraint none check (action <> 'dead-letters.discard')"
    )
    result = typed({**env, "DATABASE_URL": broken.database_url}, "dead-letters", "discard", *ids, "--yes")
    assert result.exit_code == 70
    assert all(broken.delivery(identifier)["discarded_at"] is None for identifier in ids)


def test_what_was_changed_before_a_fault_is_told(
    bench: Lab, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "BATCH", 2)
    ids = fill(bench, 5)
    record = audit.record

    def failing(connection: Any, operation: Any, affected: int, delivery_ids: Any, detail: Any) -> int:
        if ids[2] in delivery_ids:
            connection.execute("select pg_terminate_backend(pg_backend_pid())")
        return record(connection, operation, affected, delivery_ids, detail)

    monkeypatch.setattr(audit, "record", failing)
    result = typed(env, "dead-letters", "discard", "--all", "--yes")
    assert result.exit_code == 69
    assert "2 were changed before this" in result.stderr
    discarded = [identifier for identifier in ids if bench.delivery(identifier)["discarded_at"]]
    assert discarded == ids[:2] == lines(env, "audit", "list")[0]["delivery_ids"]


def test_the_audit_cannot_be_altered(bench: Lab, env: dict[str, str]) -> None:
    good(env, "dead-letters", "discard", *fill(bench, 1), "--yes")
    for statement in ("update webhook.audit set who = 'x'", "delete from webhook.audit"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            bench.connection.execute(statement)


def test_a_replay_repeats_only_what_failed(bench: Lab, env: dict[str, str]) -> None:
    [identifier] = fill(bench, 1)
    effect(bench, identifier, "avatar", "done", avatar_id="a")
    effect(
        bench, identifier, "archive", "failed", final=True, reason="object_refused", artifacts=[{"key": "k"}]
    )
    good(env, "dead-letters", "replay", identifier, "--yes")
    effects = bench.effects(identifier)
    assert (effects["avatar"]["state"], effects["avatar"]["tries"]) == ("done", 3)
    assert effects["archive"]["tries"] == 0
    assert effects["archive"]["detail"] == {"artifacts": [{"key": "k"}]}, "what was reached is kept"
    row = bench.delivery(identifier)
    assert (row["state"], row["tries"], row["crashes"]) == ("retry", 0, 0)
    assert row["replayed_at"] is not None


def test_what_is_done_is_not_done_again_unless_it_is_named(bench: Lab, env: dict[str, str]) -> None:
    [identifier] = fill(bench, 1, "done")
    for name in ("avatar", "stream"):
        effect(bench, identifier, name, "done", entry="1-0")
    result = typed(env, "events", "replay", identifier, "--yes", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["not_changed"] == [{"id": identifier, "state": "done"}]
    assert bench.delivery(identifier)["state"] == "done"
    assert typed(env, "events", "replay", identifier, "--yes", "--effects", "nonsense").exit_code == 2
    report = document(env, "events", "replay", identifier, "--yes", "--effects", "stream")
    assert report["changed"] == 1
    effects = bench.effects(identifier)
    assert (bench.delivery(identifier)["state"], effects["avatar"]["state"]) == ("retry", "done")
    assert effects["stream"]["state"] == "failed"
    assert effects["stream"]["detail"] == {"replay": 1, "before": {"entry": "1-0"}}
    assert effects["archive"]["state"] == "skipped", "what it never had is not done by the way"
    [entry] = lines(env, "audit", "list")
    assert entry["detail"]["effects"] == ["stream"]


def test_a_held_row_is_left_out_and_waits_for_nobody(bench: Lab, env: dict[str, str]) -> None:
    ids = fill(bench, 3)
    with psycopg.connect(bench.database_url) as other:
        other.execute("select 1 from webhook.deliveries where id = %s for update", (ids[1],))
        started = time.monotonic()
        result = typed(env, "dead-letters", "discard", *ids, "--yes", "--json")
        assert time.monotonic() - started < 25
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["delivery_ids"] == [ids[0], ids[2]]
    assert report["not_changed"] == [{"id": ids[1], "state": "dead"}]


def test_a_delivery_in_work_cannot_be_touched(bench: Lab, env: dict[str, str]) -> None:
    [identifier] = fill(bench, 1, "retry")
    bench.connection.execute(
        "update webhook.deliveries set state = 'leased', lease_owner = 'w', lease_until = now() + interval '1 hour'"
    )
    for command in (("events", "replay"), ("dead-letters", "discard"), ("parked", "retry")):
        assert typed(env, *command, identifier, "--yes").exit_code == 1
    assert bench.delivery(identifier)["lease_owner"] == "w"


def test_discarding_deletes_nothing_and_can_be_taken_back(bench: Lab, env: dict[str, str]) -> None:
    ids = fill(bench, 2)
    good(env, "dead-letters", "discard", ids[0], "--yes", "--why", "a test")
    row = bench.delivery(ids[0])
    assert (row["state"], row["discarded_at"] is not None) == ("dead", True)
    assert row["last_error"].startswith("discarded: a test; archive")
    assert [item["id"] for item in lines(env, "dead-letters", "list")] == ids[1:]
    assert [item["id"] for item in lines(env, "dead-letters", "list", "--discarded")] == ids[:1]
    assert "discarded" in good(env, "dead-letters", "list", "--discarded").stdout
    # Neither a second discard nor a replay of all takes it along.
    assert typed(env, "dead-letters", "discard", ids[0], "--yes").exit_code == 1
    assert document(env, "events", "replay", "--all", "--yes")["delivery_ids"] == ids[1:]
    assert document(env, "events", "replay", ids[0], "--yes")["changed"] == 1
    row = bench.delivery(ids[0])
    assert (row["state"], row["discarded_at"]) == ("retry", None)


def test_parked_ones_are_retried_now_or_closed(bench: Lab, env: dict[str, str]) -> None:
    ids = fill(bench, 3, "parked", "avatar: unknown_request: none")
    bench.connection.execute("update webhook.deliveries set next_attempt_at = now() + interval '1 hour'")
    assert {row["id"] for row in lines(env, "parked", "list")} == set(ids)
    assert document(env, "parked", "retry", ids[0], "--yes")["outcomes"] == {"due_now": 1}
    due = bench.connection.execute(
        "select id from webhook.deliveries where next_attempt_at <= now()"
    ).fetchall()
    assert due == [(ids[0],)]
    assert states(bench, ids) == ["parked"] * 3
    assert document(env, "parked", "discard", "--request-id", "r-parked-1", "--yes")["outcomes"] == {
        "discarded": 1
    }
    assert states(bench, ids) == ["parked", "dead", "parked"]
    assert lines(env, "dead-letters", "list") == []


def aside(bench: Lab, identifier: int, reason: str) -> None:
    bench.connection.execute(
        "update webhook.deliveries set state = 'dead', aside = %s, dedup_key = 'aside:' || %s || ':' || dedup_key, "
        "last_error = %s where id = %s",
        (reason, reason, f"{reason}: kept aside", identifier),
    )


def test_what_was_kept_aside_is_admitted_only_by_name(bench: Lab, env: dict[str, str]) -> None:
    stale, dead = bench.deliver({"request_id": "r-1"}, "completed"), fill(bench, 1)[0]
    key = bench.delivery(stale)["dedup_key"]
    aside(bench, stale, "stale")
    assert document(env, "dead-letters", "replay", "--all", "--yes")["delivery_ids"] == [dead]
    assert {row["id"] for row in lines(env, "dead-letters", "list")} == {stale}
    assert "stale" in good(env, "dead-letters", "list").stdout
    report = document(env, "dead-letters", "replay", "--aside", "stale", "--yes")
    assert report["outcomes"] == {"admitted": 1}
    row = bench.delivery(stale)
    assert (row["state"], row["aside"], row["dedup_key"]) == ("pending", None, key)


def test_what_was_kept_aside_is_discarded_only_by_name(bench: Lab, env: dict[str, str]) -> None:
    """It is authentic and was not processed: all dead letters that are given up are something else."""
    stale, dead = bench.deliver({"request_id": "r-1"}, "completed"), fill(bench, 1)[0]
    aside(bench, stale, "stale")
    shown = good(env, "dead-letters", "discard", "--all", "--dry-run").stdout
    assert "1 match" in shown
    assert "1 that were kept aside are left out" in shown
    report = document(env, "dead-letters", "discard", "--all", "--yes")
    assert (report["delivery_ids"], report["left_out"]) == ([dead], 1)
    assert bench.delivery(stale)["discarded_at"] is None
    report = document(env, "dead-letters", "discard", "--aside", "any", "--yes")
    assert (report["delivery_ids"], report["left_out"]) == ([stale], 0)


def test_what_was_kept_aside_and_came_again_is_closed_as_a_duplicate(bench: Lab, env: dict[str, str]) -> None:
    stale = bench.deliver({"request_id": "r-1"}, "completed")
    aside(bench, stale, "stale")
    fresh = bench.deliver({"request_id": "r-1"}, "completed")
    assert document(env, "dead-letters", "replay", stale, "--yes")["outcomes"] == {"duplicates": 1}
    row = bench.delivery(stale)
    assert (row["state"], row["last_error"]) == ("dead", f"duplicate of delivery {fresh}")
    assert row["discarded_at"] is not None
    assert lines(env, "dead-letters", "list") == []


def test_fresh_copies_that_come_while_the_kept_ones_are_admitted_make_no_doubles(
    bench: Lab, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "BATCH", 7)
    bodies = [{"request_id": f"r-{index}", "status": "OK"} for index in range(60)]
    for body in bodies:
        aside(bench, bench.deliver(body, "completed"), "stale")

    def arrive() -> None:
        with connect(bench.database_url, "test") as connection:
            for body in reversed(bodies):
                connection.execute(
                    "insert into webhook.deliveries (source, request_id, dedup_key, status, body, body_sha256) "
                    "select source, request_id, regexp_replace(dedup_key, '^aside:[a-z_]+:', ''), status, body, body_sha256 "
                    "from webhook.deliveries where request_id = %s order by id limit 1 "
                    "on conflict on constraint deliveries_identity do update set attempts = deliveries.attempts + 1",
                    (body["request_id"],),
                )

    with ThreadPoolExecutor(1) as pool:
        arriving = pool.submit(arrive)
        report = document(env, "dead-letters", "replay", "--aside", "stale", "--yes")
        arriving.result()
    assert sum(report["outcomes"].values()) == report["changed"] == len(bodies)
    live = bench.connection.execute(
        "select request_id, count(*) from webhook.deliveries where aside is null group by 1 having count(*) <> 1"
    ).fetchall()
    assert live == []
    closed = bench.connection.execute(
        "select count(*) from webhook.deliveries where aside is not null"
    ).fetchone()
    assert closed == (report["outcomes"].get("duplicates", 0),)


def test_a_replayed_delivery_is_processed_and_its_stream_entry_is_not_doubled(
    bench: Lab, env: dict[str, str]
) -> None:
    bench.make_bot_tables()
    bench.avatar("r-1", kind="style")
    body = {"request_id": "r-1", "status": "OK", "payload": {"finetune_id": "ft"}}
    with bench.worker():
        identifier = bench.deliver(body, "completed")
        bench.wait_state(identifier, "done")
        # Given up by a former release, say, after its stream entry was added.
        bench.connection.execute("update webhook.deliveries set state = 'dead', done_at = null")
        bench.connection.execute(
            "update webhook.effects set state = 'failed', detail = detail || '{\"final\": true}'"
        )
        good(env, "dead-letters", "replay", identifier, "--yes")
        bench.wait_state(identifier, "done")
    assert len(bench.entries()) == 1


def test_an_entry_that_was_asked_for_again_is_a_new_one_and_says_so(bench: Lab, env: dict[str, str]) -> None:
    bench.make_bot_tables()
    bench.avatar("r-1", kind="style")
    body = {"request_id": "r-1", "status": "OK", "payload": {"finetune_id": "ft"}}
    with bench.worker():
        identifier = bench.deliver(body, "completed")
        bench.wait_state(identifier, "done")
        before = bench.row("r-1")
        for _ in range(2):
            good(env, "events", "replay", identifier, "--effects", "stream", "--yes")
            bench.connection.execute("notify webhook_deliveries")
            bench.wait_state(identifier, "done")
    assert [entry.get("replay") for entry in bench.entries()] == [None, "1", "2"]
    assert {entry["delivery_id"] for entry in bench.entries()} == {str(identifier)}
    assert bench.row("r-1") == before, "the avatar is left alone"


def test_a_replay_that_waits_already_is_not_counted_twice(bench: Lab, env: dict[str, str]) -> None:
    """Two replays would be recorded, and the worker would do one."""
    [identifier] = fill(bench, 1, "done")
    effect(bench, identifier, "stream", "done")
    again = ("events", "replay", identifier, "--effects", "stream", "--yes")
    good(env, *again)
    result = typed(env, *again)
    assert result.exit_code == 1
    assert "waits for the worker already" in result.stderr
    assert len(lines(env, "audit", "list")) == 1


def test_what_changes_nothing_claims_no_record(bench: Lab, env: dict[str, str]) -> None:
    [identifier] = fill(bench, 1)
    # Not the service's kind of connection: that ends a transaction that is idle for 10 s.
    with psycopg.connect(bench.database_url) as other:
        other.execute("select from webhook.deliveries where id = %s for update", (identifier,))
        report = document(env, "dead-letters", "discard", "--all", "--yes")
        shown = good(env, "dead-letters", "discard", "--all", "--yes").stdout
    assert (report["changed"], report["operation"]) == (0, None)
    assert "nothing recorded" in shown
    assert lines(env, "audit", "list") == []


def test_what_retention_has_cleared_is_left_out_and_says_how_to_get_it_back(
    bench: Lab, env: dict[str, str]
) -> None:
    [identifier] = fill(bench, 1, "done")
    bench.connection.execute("update webhook.deliveries set pruned = 1, body = '', headers = '{}'")
    result = typed(env, "events", "replay", identifier, "--effects", "stream", "--yes")
    assert result.exit_code == 1
    assert f"prune --restore {identifier}" in result.stderr
    assert "archive only" in good(env, "events", "show", identifier, "--body").stdout
    [exported] = lines(env, "events", "export", "--body")
    assert exported["body_base64"] is None, "nothing is not an empty body"


COMMANDS = (
    ("events", "list"), ("events", "show", "1"), ("events", "export"), ("dead-letters", "list"), ("parked", "list"),
    ("audit", "list"), ("dead-letters", "replay", "--all", "--yes"), ("parked", "retry", "1", "--yes"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("how", "commands"),
    [("refused", COMMANDS), ("missing", COMMANDS[:1]), ("password", COMMANDS[:1]), ("silent", COMMANDS[:1])],
)
def test_without_a_database_every_command_ends_soon_and_says_so(
    database_url: str, how: str, commands: tuple[tuple[str, ...], ...]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and says nothing
        url = {
            "refused": "postgresql://u:hunter2@127.0.0.1:1/d",
            "missing": make_conninfo(database_url, dbname="no_such_database"),
            "password": make_conninfo(database_url, password="hunter2"),
            "silent": with_address(database_url, "127.0.0.1", server.getsockname()[1]),
        }[how]
        for command in commands:
            started = time.monotonic()
            result = typed({"DATABASE_URL": url}, *command)
            assert time.monotonic() - started < 25, "5 s on a machine with nothing else to do"
            assert result.exit_code == 69, result.output
            assert "database" in result.stderr
            assert "hunter2" not in result.output


def test_a_database_that_falls_silent_after_connecting_is_given_up(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = urlsplit(database_url)
    with gate(address.hostname or "", address.port or 5432) as before:
        connect_ = Patient.connect

        def then_silent(*arguments: Any, **options: Any) -> Any:
            connection = connect_(*arguments, **options)
            before.silence()
            return connection

        monkeypatch.setattr(Patient, "connect", then_silent)
        started = time.monotonic()
        result = typed(
            {"DATABASE_URL": with_address(database_url, "127.0.0.1", before.port)}, "events", "list"
        )
    assert result.exit_code == 69, result.output
    assert time.monotonic() - started < 25


def test_an_old_schema_is_named(broken: Lab) -> None:
    broken.connection.execute("drop schema webhook cascade")
    result = typed({"DATABASE_URL": broken.database_url}, "events", "list")
    assert result.exit_code == 1
    assert "webhook-api migrate" in result.stderr


def test_a_question_that_takes_too_long_is_given_up(
    bench: Lab, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webhook_api.cli.database.STATEMENT_SECONDS", 0.5)
    fill(bench, 1)
    with psycopg.connect(bench.database_url) as other:
        other.execute("lock table webhook.deliveries in access exclusive mode")
        result = typed(env, "events", "list")
    assert result.exit_code == 75


def program(*arguments: str | int) -> list[str]:
    return [sys.executable, "-m", "webhook_api", *map(str, arguments)]


def real_environment(env: dict[str, str]) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO / "webhook"), **env}


@pytest.mark.parametrize(("answer", "code", "discarded"), [(b"n\n", 1, False), (b"y\n", 0, True)])
def test_who_sits_at_a_terminal_is_asked(
    bench: Lab, env: dict[str, str], answer: bytes, code: int, discarded: bool
) -> None:
    [identifier] = fill(bench, 1)
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            program("dead-letters", "discard", identifier),
            env=real_environment(env), stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        os.write(ours, answer)
        said, asked = process.communicate(timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    assert process.returncode == code
    assert b"1 match" in said, "what would be changed is shown first"
    assert b"change 1 deliveries?" in asked
    assert (bench.delivery(identifier)["discarded_at"] is not None) == discarded


def test_an_export_whose_reader_goes_away_ends_quietly(bench: Lab, env: dict[str, str]) -> None:
    fill(bench, 400)
    process = subprocess.Popen(
        program("events", "export"), env=real_environment(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert json.loads(process.stdout.readline())["id"] == 1
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) in {0, 1}
    assert said == b""


def test_two_operators_at_once_do_it_once(
    bench: Lab, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "BATCH", 20)
    ids = fill(bench, 300)

    def discard(name: str) -> int:
        operation = audit.Operation(name, "api-9", "dead-letters.discard")
        action = actions.discard("dead-letters.discard", actions.DEAD_LETTERS, None)
        with connect(bench.database_url, "test") as connection:
            return actions.perform(connection, action, Filter(), 1000, operation).changed

    with ThreadPoolExecutor(2) as pool:
        changed = list(pool.map(discard, ("Aida", "Timur")))
    entries = [
        identifier
        for entry in lines(env, "audit", "list", "--limit", 1000)
        for identifier in entry["delivery_ids"]
    ]
    assert len(entries) == len(set(entries)) == sum(changed)
    # A row that the other one held was left out: what is left, a third run takes.
    discard("Aida")
    assert all(bench.delivery(identifier)["discarded_at"] is not None for identifier in ids)
