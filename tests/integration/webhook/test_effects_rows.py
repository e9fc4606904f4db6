"""The worker's effects against real backends: what the bot finds in its table, its stream and its bucket."""

from __future__ import annotations

import base64
import hashlib
import json
import uuid
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.support.workerlab import Lab, wait_for

pytestmark = pytest.mark.backends

LORA = "https://v3.fal.media/files/a/pytorch_lora_weights.safetensors"
CONFIG = "https://v3.fal.media/files/a/config.json"


@pytest.fixture
def bench(bare_bench: Lab) -> Lab:
    return bare_bench


def ok(request_id: str, payload: Any, **more: Any) -> dict[str, Any]:
    return {"request_id": request_id, "gateway_request_id": "g", "status": "OK", "payload": payload, **more}


def process(
    bench: Lab, body: dict[str, Any], status: str, state: str = "done", **more: Any
) -> dict[str, Any]:
    """Deliver, and wait until the delivery is in `state`; returns its effects."""
    identifier = bench.deliver(body, status, **more)
    bench.connection.execute("notify webhook_deliveries")
    bench.wait_state(identifier, state)
    return bench.effects(identifier)


@pytest.mark.parametrize("upper", [False, True], ids=["lower", "upper"])
@pytest.mark.parametrize("native_enum", [False, True], ids=["varchar", "enum"])
def test_every_spelling_of_the_table_is_kept(bench: Lab, native_enum: bool, upper: bool) -> None:
    bench.make_bot_tables(native_enum, upper)
    spell = str.upper if upper else str
    bench.avatar("r-style", status="ready_for_training", kind="style")
    bench.avatar("r-fail")
    bench.avatar("r-gone")
    with bench.worker():
        process(bench, {"request_id": "r-style", "status": "IN_PROGRESS", "progress": 40}, "in_progress")
        row = bench.row("r-style")
        assert (row["status"], row["training_progress"]) == (spell("training"), 40)
        assert row["training_started_at"] is not None
        process(bench, ok("r-style", {"finetune_id": "ft-1", "seed": 2**63 + 1}), "completed")
        process(bench, {"request_id": "r-fail", "status": "ERROR", "error": "bad photos"}, "failed")
        process(bench, {"request_id": "r-gone", "status": "cancelled"}, "cancelled")
    row = bench.row("r-style")
    assert (row["status"], row["training_progress"], row["finetune_id"]) == (spell("completed"), 100, "ft-1")
    assert row["diffusers_lora_file_url"] is None
    assert row["training_completed_at"] is not None
    assert row["last_status_check"] is not None
    assert row["fal_response_data"]["seed"] == 2**63 + 1
    assert (bench.row("r-fail")["status"], bench.row("r-fail")["training_error"]) == (
        spell("error"),
        "bad photos",
    )
    assert bench.row("r-gone")["status"] == spell("cancelled")


def test_a_portrait_gets_its_urls_and_no_finetune_id(bench: Lab) -> None:
    bench.make_bot_tables()
    avatar = bench.avatar("r-1", finetune_id="left over by the old system")
    payload = {"diffusers_lora_file": {"url": LORA}, "config_file": {"url": CONFIG}, "finetune_id": "no"}
    with bench.worker():
        # The files cannot be fetched here: the avatar is completed and the bot is told all the same.
        identifier = bench.deliver(ok("r-1", payload), "completed", hint="style")
        wait_for(lambda: "stream" in bench.effects(identifier), "the stream's effect")
    row = bench.row("r-1")
    assert (row["status"], row["diffusers_lora_file_url"], row["config_file_url"]) == (
        "completed",
        LORA,
        CONFIG,
    )
    assert row["finetune_id"] is None
    assert row["training_error"] is None
    effects = bench.effects(identifier)
    assert effects["avatar"]["detail"]["avatar_id"] == avatar
    assert effects["archive"]["state"] == "failed"
    [entry] = bench.entries()
    assert (entry["avatar_id"], entry["training_type"], entry["status"]) == (avatar, "portrait", "completed")


def test_a_result_on_a_strangers_host_is_a_dead_letter_and_the_avatar_is_left_alone(bench: Lab) -> None:
    """Neither the bot nor its user is told anything that may not be true; allowed later, a replay completes it."""
    bench.make_bot_tables()
    bench.avatar("r-1")
    before = bench.row("r-1")
    stranger = "https://v3.fal.media.evil.example/a"
    payload = {"diffusers_lora_file": {"url": stranger}, "config_file": {"url": CONFIG}}
    with bench.worker(ARCHIVE_ALLOWED_HOSTS="nowhere.invalid"):
        effects = process(bench, ok("r-1", payload), "completed", "dead")
    assert bench.row("r-1") == before
    assert effects["avatar"]["detail"]["reason"] == "avatar_url_refused"
    assert "ARCHIVE_ALLOWED_HOSTS" in effects["avatar"]["last_error"]
    assert effects["stream"]["state"] == "skipped"
    assert effects["raw_archive"]["state"] == "done"
    assert bench.entries() == []


@pytest.mark.parametrize(
    ("payload", "more", "said"),
    [
        ({"diffusers_lora_file": {"url": LORA}}, {}, "config_file is missing"),
        (None, {"payload_error": "not JSON serializable"}, "not JSON serializable"),
        (
            {
                "diffusers_lora_file": {"url": "https://v3.fal.media/" + "x" * 500},
                "config_file": {"url": CONFIG},
            },
            {},
            "500",
        ),
        ({"diffusers_lora_file": {"url": "ftp://x/y"}, "config_file": {"url": CONFIG}}, {}, "no web address"),
    ],
    ids=["no config", "no payload", "too long", "no address"],
)
def test_a_completed_portrait_without_results_is_an_error_to_show(
    bench: Lab, payload: Any, more: dict[str, Any], said: str
) -> None:
    bench.make_bot_tables()
    bench.avatar("r-1")
    with bench.worker():
        identifier = bench.deliver(ok("r-1", payload, **more), "completed")
        wait_for(lambda: "avatar" in bench.effects(identifier), "the avatar's effect")
    row = bench.row("r-1")
    assert row["status"] == "error"
    assert said in row["training_error"]
    assert row["diffusers_lora_file_url"] is None
    assert row["config_file_url"] is None


def test_a_finished_avatar_never_goes_back(bench: Lab) -> None:
    bench.make_bot_tables()
    bench.avatar("r-1", kind="style")
    bench.avatar("r-2", status="cancelled")
    with bench.worker():
        process(bench, ok("r-1", {"finetune_id": "ft"}), "completed")
        before = bench.row("r-1")
        process(bench, {"request_id": "r-1", "status": "in_progress", "progress": 3}, "in_progress")
        process(bench, {"request_id": "r-1", "status": "IN_QUEUE"}, "queued")
        process(bench, {"request_id": "r-1", "status": "ERROR", "error": "late"}, "failed")
        process(bench, {"request_id": "r-1", "status": "cancelled"}, "cancelled")
        process(bench, {"request_id": "r-2", "status": "in_progress"}, "in_progress")
    assert bench.row("r-1") == before
    assert bench.row("r-2")["status"] == "cancelled"
    assert [entry["status"] for entry in bench.entries()] == [
        "completed", "in_progress", "queued", "failed", "cancelled", "in_progress",
    ]  # fmt: skip


def test_a_result_after_an_error_is_not_thrown_away(bench: Lab) -> None:
    bench.make_bot_tables()
    bench.avatar("r-1", kind="style")
    with bench.worker():
        process(bench, ok("r-1", None), "completed")
        assert bench.row("r-1")["status"] == "error"
        process(
            bench,
            {"request_id": "r-1", "status": "completed", "finetune_id": "ft"},
            "completed",
            source="manual",
        )
    assert (bench.row("r-1")["status"], bench.row("r-1")["training_error"]) == ("completed", None)


def test_progress_is_clamped_and_never_goes_backwards(bench: Lab) -> None:
    bench.make_bot_tables()
    bench.avatar("r-1", training_progress=60)
    with bench.worker():
        process(bench, {"request_id": "r-1", "status": "in_progress", "progress": 30}, "in_progress")
        assert bench.row("r-1")["training_progress"] == 60
        process(bench, {"request_id": "r-1", "status": "in_progress", "progress": 75}, "in_progress")
        assert bench.row("r-1")["training_progress"] == 75
        process(bench, {"request_id": "r-1", "status": "in_progress", "progress": 4000}, "in_progress")
    assert bench.row("r-1")["training_progress"] == 75


@pytest.mark.parametrize(("hint", "status"), [("style", "completed"), ("portrait", "error"), (None, "error")])
def test_the_querys_hint_counts_only_where_the_row_names_no_type(
    bench: Lab, hint: str | None, status: str
) -> None:
    bench.make_bot_tables()
    bench.avatar("r-1", kind=None)
    with bench.worker():
        process(bench, ok("r-1", {"finetune_id": "ft"}), "completed", hint=hint)
    assert bench.row("r-1")["status"] == status
    if hint is None:
        assert "training type is unknown" in bench.row("r-1")["training_error"]


def test_text_that_json_columns_refuse_does_not_stop_the_avatar(bench: Lab) -> None:
    bench.make_bot_tables()
    bench.connection.execute("alter table avatars alter fal_response_data type jsonb using null")
    bench.avatar("r-1", kind="style")
    body = (
        b'{"request_id":"r-1","status":"OK","payload":{"finetune_id":"ft","logs":"a\\u0000b\\ud800","x":NaN}}'
    )
    identifier = bench.connection.execute(
        "insert into webhook.deliveries (source, request_id, dedup_key, status, body, body_sha256) "
        "values ('fal', 'r-1', 'completed', 'completed', %s, %s) returning id",
        (body, hashlib.sha256(body).hexdigest()),
    ).fetchone()
    assert identifier
    with bench.worker():
        bench.wait_state(identifier[0], "done")
    assert bench.row("r-1")["status"] == "completed"
    assert bench.row("r-1")["fal_response_data"]["logs"] == "a\ufffdb\ufffd"
    raw = next(content for key, content in bench.objects().items() if key.startswith("deliveries/"))
    assert base64.b64decode(json.loads(raw)["body_base64"]) == body


def test_a_delivery_waits_for_its_avatar(bench: Lab) -> None:
    with bench.worker():
        # Not even the table is there.
        identifier = bench.deliver(ok("r-1", {"finetune_id": "ft"}), "completed")
        assert "avatar_table_missing" in bench.wait_state(identifier, "parked")["last_error"]
        bench.make_bot_tables()
        bench.hurry()
        wait_for(
            lambda: "avatar_not_found" in bench.delivery(identifier)["last_error"], "parked for the avatar"
        )
        assert bench.entries() == []
        avatar = bench.avatar("r-1", kind="style")
        bench.hurry()
        bench.wait_state(identifier, "done")
    assert bench.row("r-1")["status"] == "completed"
    [entry] = bench.entries()
    assert entry["avatar_id"] == avatar
    assert bench.effects(identifier)["raw_archive"]["tries"] == 1


def test_a_parked_delivery_is_given_up_in_the_end(bench: Lab) -> None:
    bench.make_bot_tables()
    with bench.worker(PARKED_MAX_SECONDS="3600"):
        identifier = bench.deliver(ok("r-1", {"finetune_id": "ft"}), "completed")
        bench.wait_state(identifier, "parked")
        bench.connection.execute("update webhook.deliveries set first_seen_at = now() - interval '2 hours'")
        bench.hurry()
        assert "avatar_not_found" in bench.wait_state(identifier, "dead")["last_error"]
    assert bench.entries() == []


def test_a_parked_older_delivery_does_not_hold_up_a_newer_one(bench: Lab) -> None:
    bench.make_bot_tables()
    with bench.worker():
        older = bench.deliver({"request_id": "r-1", "status": "in_progress"}, "in_progress")
        bench.wait_state(older, "parked")
        bench.avatar("r-1", kind="style")
        newer = bench.deliver(ok("r-1", {"finetune_id": "ft"}), "completed")
        bench.wait_state(newer, "done")
        bench.hurry()
        bench.wait_state(older, "done")
    assert bench.row("r-1")["status"] == "completed"


def test_what_the_bots_table_refuses_ends_as_a_dead_letter(bench: Lab) -> None:
    bench.make_bot_tables()
    bench.connection.execute("alter table avatars add constraint no_style check (finetune_id is null)")
    bench.avatar("r-1", kind="style")
    with bench.worker():
        identifier = bench.deliver(ok("r-1", {"finetune_id": "ft"}), "completed")

        def dead() -> bool:
            bench.hurry()
            return bool(bench.delivery(identifier)["state"] == "dead")

        wait_for(dead, "a dead letter")
    effect = bench.effects(identifier)["avatar"]
    assert effect["tries"] == 3
    assert "no_style" in bench.delivery(identifier)["last_error"]
    assert bench.row("r-1")["status"] == "training"


def test_a_locked_avatar_is_waited_for_without_harm(bench: Lab) -> None:
    bench.make_bot_tables()
    bench.avatar("r-1", kind="style")
    with psycopg.connect(bench.database_url) as bot, bench.worker():
        bot.execute("select 1 from avatars for update")
        identifier = bench.deliver(ok("r-1", {"finetune_id": "ft"}), "completed")
        bench.wait_state(identifier, "leased")
        wait_for(
            lambda: bench.connection.execute(
                "select 1 from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
            ).fetchone(),
            "the worker waits for the avatar",
        )
        # Intake is not held up meanwhile: the worker keeps no lock on the inbox's row while it waits.
        with bench.connection.transaction():
            bench.connection.execute("set local lock_timeout = '2s'")
            bench.connection.execute("update webhook.deliveries set attempts = attempts + 1")
        bot.execute("update avatars set name = 'kept'")
        bot.commit()
        bench.wait_state(identifier, "done")
    assert (bench.row("r-1")["status"], bench.row("r-1")["name"]) == ("completed", "kept")


def test_a_probe_leaves_the_bots_things_alone(bench: Lab) -> None:
    bench.make_bot_tables()
    bench.avatar("probe-1", kind="style")
    with bench.worker():
        effects = process(bench, ok("probe-1", {"finetune_id": "ft"}), "completed", probe=True)
    assert bench.row("probe-1")["status"] == "training"
    assert effects["avatar"]["state"] == "skipped"
    assert bench.entries() == []
    [entry] = bench.entries(probe=True)
    assert entry["probe"] == "1"
    assert len(bench.objects()) == 1


def test_an_unreadable_body_is_kept_aside(bench: Lab) -> None:
    bench.make_bot_tables()
    with bench.worker():
        identifier = bench.deliver(b"[1, 2", "unknown")
        found = bench.wait_state(identifier, "dead")
    assert "body_unreadable" in found["last_error"]
    assert bench.entries() == []
    [raw] = bench.objects().values()
    assert base64.b64decode(json.loads(raw)["body_base64"]) == b"[1, 2"


def test_the_avatar_of_an_older_delivery_comes_first(bench: Lab) -> None:
    bench.make_bot_tables()
    for request_id in ("r-1", "r-2"):
        bench.avatar(request_id, kind="style")
    older = bench.deliver({"request_id": "r-1", "status": "in_progress"}, "in_progress")
    bench.connection.execute(
        "update webhook.deliveries set state = 'leased', lease_owner = 'another', lease_until = now() + interval '1 h'"
    )
    newer = bench.deliver(ok("r-1", {"finetune_id": "ft"}), "completed")
    with bench.worker():
        process(bench, ok("r-2", {"finetune_id": "ft"}), "completed")
        assert bench.delivery(newer)["tries"] == 0
        bench.connection.execute(
            "insert into webhook.effects (delivery_id, name, state) values (%s, 'avatar', 'done')", (older,)
        )
        wait_for(lambda: bench.row("r-1")["status"] == "completed", "the newer one's avatar")


def test_the_entry_of_an_older_delivery_comes_first(bench: Lab) -> None:
    bench.make_bot_tables()
    bench.avatar("r-1", kind="style")
    older = bench.deliver({"request_id": "r-1", "status": "in_progress"}, "in_progress")
    bench.connection.execute(
        "insert into webhook.effects (delivery_id, name, state) values (%s, 'avatar', 'done')", (older,)
    )
    bench.connection.execute(
        "update webhook.deliveries set state = 'retry', next_attempt_at = now() + interval '1 h'"
    )
    newer = bench.deliver(ok("r-1", {"finetune_id": "ft"}), "completed")
    with bench.worker():
        assert "older_first" in bench.wait_state(newer, "retry")["last_error"]
        assert bench.row("r-1")["status"] == "completed"
        assert bench.entries() == []
        bench.connection.execute(
            "update webhook.deliveries set next_attempt_at = now() + interval '1 h' where id = %s", (newer,)
        )
        bench.connection.execute(
            "update webhook.deliveries set next_attempt_at = now() where id = %s", (older,)
        )
        bench.connection.execute("notify webhook_deliveries")
        # The older one's end wakes the newer, whose own backoff would take an hour.
        bench.wait_state(newer, "done")
    assert [entry["status"] for entry in bench.entries()] == ["in_progress", "completed"]


def test_entries_of_a_request_keep_their_order(bench: Lab) -> None:
    bench.make_bot_tables()
    for number in range(8):
        bench.avatar(f"r-{number}", kind="style")
    # Interleaved, all due at once, for two workers of several threads.
    identifiers = []
    for step in ("IN_QUEUE", "IN_PROGRESS", "OK"):
        for number in range(8):
            body = {"request_id": f"r-{number}", "status": step, "payload": {"finetune_id": "ft"}}
            status = {"IN_QUEUE": "queued", "IN_PROGRESS": "in_progress", "OK": "completed"}[step]
            identifiers.append(bench.deliver(body, status))
    with bench.worker(), bench.worker(INSTANCE_ID="second"):
        for identifier in identifiers:
            bench.wait_state(identifier, "done", seconds=60)
    entries = bench.entries()
    assert len(entries) == 24
    for number in range(8):
        order = [entry["status"] for entry in entries if entry["request_id"] == f"r-{number}"]
        assert order == ["queued", "in_progress", "completed"]
        assert bench.row(f"r-{number}")["status"] == "completed"


def test_two_workers_never_run_the_same_delivery(bench: Lab) -> None:
    bench.make_bot_tables()
    bench.connection.execute("create table seen (request text)")
    bench.connection.execute(
        "create function note() returns trigger language plpgsql as $$ begin insert into seen values (new.fal_request_id);"
        " return new; end $$; create trigger note before update on avatars for each row execute function note()"
    )
    identifiers = []
    for number in range(40):
        bench.avatar(f"r-{number}", kind="style")
        identifiers.append(bench.deliver(ok(f"r-{number}", {"finetune_id": "ft"}), "completed"))
    lease = {"LEASE_SECONDS": "120"}
    with (
        bench.worker(**lease),
        bench.worker(INSTANCE_ID="second", **lease),
        bench.worker(INSTANCE_ID="third", **lease),
    ):
        for identifier in identifiers:
            bench.wait_state(identifier, "done", seconds=60)
    counts = bench.connection.execute("select count(*), count(distinct request) from seen").fetchone()
    assert counts == (40, 40)
    assert len(bench.entries()) == 40
    tries = {identifier: bench.delivery(identifier)["tries"] for identifier in identifiers}
    assert set(tries.values()) == {1}


def test_the_services_role_needs_no_more_than_its_grants(bench: Lab) -> None:
    """Without UPDATE the delivery waits, and says which grant is missing."""
    role = f"wht_role_{uuid.uuid4().hex[:8]}"
    bench.make_bot_tables(native_enum=True, upper=True)
    bench.avatar("r-1", kind="style")
    run = bench.connection.execute
    run(f"create role {role} login password 'test-only'")  # type: ignore[call-overload]
    try:
        run(f"grant usage on schema public, webhook to {role}")  # type: ignore[call-overload]
        run(f"grant select on avatars to {role}")  # type: ignore[call-overload]
        run(f"grant select, insert, update on all tables in schema webhook to {role}")  # type: ignore[call-overload]
        url = make_conninfo(bench.database_url, user=role, password="test-only")
        with bench.worker(DATABASE_URL=url):
            identifier = bench.deliver(ok("r-1", {"finetune_id": "ft"}), "completed")
            assert "grant SELECT and UPDATE" in bench.wait_state(identifier, "retry")["last_error"]
            run(f"grant update on avatars to {role}")  # type: ignore[call-overload]
            bench.hurry()
            bench.wait_state(identifier, "done")
        assert bench.row("r-1")["status"] == "COMPLETED"
    finally:
        run(f"drop owned by {role}")  # type: ignore[call-overload]
        run(f"drop role {role}")  # type: ignore[call-overload]
