"""The console against a real PostgreSQL: logins, roles, lists, actions and their audit, the API, Live, the rollups."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import psycopg
import pytest
from flask import Flask
from flask.testing import FlaskClient
from minio import Minio
from minio.error import MinioException
from webhook_api import rollups
from webhook_api.config import NEEDS_CONSOLE, load_settings
from webhook_api.db import connect
from webhook_api.web import deeds, live, look, openapi
from webhook_api.web.app import create_app
from webhook_api.web.limits import PER_ACCOUNT
from webhook_api.web.services import Services

from tests.support.console import good, lines, typed
from tests.support.website import EVIL, PASSWORD, Inbox, show_case, website
from tests.support.workerlab import Bucket, bot_tables

pytestmark = pytest.mark.backends

BASE = "https://localhost"
API = "/api/v1/console"


@pytest.fixture(scope="module")
def database(url: str) -> Iterator[Inbox]:
    made = Inbox(url)
    yield made
    made.connection.close()


@pytest.fixture
def inbox(database: Inbox) -> Inbox:
    database.empty()
    return database


@pytest.fixture
def app(inbox: Inbox) -> Iterator[Flask]:
    made = create_app(load_settings({"DATABASE_URL": inbox.url, "INSTANCE_ID": "console"}, NEEDS_CONSOLE))
    made.extensions["services"].start()
    yield made
    made.extensions["services"].stop()


def form_of(text: str) -> str:
    found = re.search(r'name="csrf" value="(\w+)"', text)
    assert found
    return found[1]


def log_in(app: Flask, name: str, password: str = PASSWORD) -> tuple[FlaskClient, Any]:
    client = app.test_client()
    csrf = form_of(client.get("/login", base_url=BASE).text)
    answer = client.post("/login", data={"csrf": csrf, "name": name, "password": password}, base_url=BASE)
    return client, answer


@pytest.fixture
def operator(app: Flask, inbox: Inbox) -> FlaskClient:
    inbox.account("maria", "operator")
    client, answer = log_in(app, "maria")
    assert answer.status_code == 303
    return client


@pytest.fixture
def viewer(app: Flask, inbox: Inbox) -> FlaskClient:
    inbox.account("viktor", "viewer")
    client, answer = log_in(app, "viktor")
    assert answer.status_code == 303
    return client


def get(client: FlaskClient, path: str) -> Any:
    return client.get(path, base_url=BASE)


def post(client: FlaskClient, path: str, **fields: Any) -> Any:
    fields.setdefault("csrf", form_of(get(client, "/").text))
    return client.post(path, data=fields, base_url=BASE)


def act(client: FlaskClient, name: str, **fields: Any) -> Any:
    """Send the form of an action, and go where its answer leads."""
    fields.setdefault("csrf", form_of(get(client, "/").text))
    return client.post(f"/actions/{name}", data=fields, base_url=BASE, follow_redirects=True)


def ids(text: str) -> list[int]:
    return [
        int(found) for found in re.findall(r'<th scope="row" class="num"><a href="/deliveries/(\d+)">', text)
    ]


# Logins


def test_a_session_is_a_bound_cookie_whose_digest_alone_is_kept(app: Flask, inbox: Inbox) -> None:
    inbox.account("maria", "operator")
    _, answer = log_in(app, "maria")
    cookie = next(item for item in answer.headers.getlist("Set-Cookie") if "session" in item)
    for part in ("__Host-console_session=", "Secure", "HttpOnly", "SameSite=Strict", "Path=/"):
        assert part in cookie
    token = cookie.partition("=")[2].partition(";")[0]
    assert (
        inbox.one(
            "select count(*) from webhook.sessions where token_sha256 = sha256(%s::bytea)", token.encode()
        )
        == 1
    )
    kept = inbox.one("select row_to_json(s)::text from webhook.sessions s")
    assert token not in kept


@pytest.mark.parametrize(("name", "password"), [
    ("maria", "wrong password!"), ("nobody", PASSWORD), ("MARIA' or 1=1", PASSWORD), ("", ""), ("maria", ""),
])  # fmt: skip
def test_a_wrong_login_is_refused_and_recorded(app: Flask, inbox: Inbox, name: str, password: str) -> None:
    inbox.account("maria", "operator")
    _, answer = log_in(app, name, password)
    assert answer.status_code == 403
    assert not any("session" in item for item in answer.headers.getlist("Set-Cookie"))
    assert inbox.one("select count(*) from webhook.sessions") == 0
    who = inbox.one("select who from webhook.audit where action = 'console.login_failed'")
    assert who == ("maria" if name == "maria" else "-")


def test_too_many_attempts_wait_even_with_the_right_password(app: Flask, inbox: Inbox) -> None:
    inbox.account("maria", "operator")
    for _ in range(PER_ACCOUNT):
        assert log_in(app, "maria", "wrong password!")[1].status_code == 403
    _, answer = log_in(app, "maria")
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) > 200
    assert (
        inbox.one("select count(*) from webhook.audit where action = 'console.login_failed'") == PER_ACCOUNT
    )


def test_a_login_needs_its_own_form(app: Flask, inbox: Inbox) -> None:
    inbox.account("maria", "operator")
    client = app.test_client()
    csrf = form_of(get(client, "/login").text)
    stranger = app.test_client()
    get(stranger, "/login")
    answer = stranger.post(
        "/login", data={"csrf": csrf, "name": "maria", "password": PASSWORD}, base_url=BASE
    )
    assert answer.status_code == 403


@pytest.mark.parametrize("change", [
    "update webhook.sessions set seen_at = now() - interval '31 minutes'",
    "update webhook.sessions set created_at = now() - interval '13 hours'",
    "update webhook.accounts set disabled_at = now()",
    "delete from webhook.sessions",
])  # fmt: skip
def test_a_session_ends(operator: FlaskClient, inbox: Inbox, change: str) -> None:
    assert get(operator, "/").status_code == 200
    inbox.connection.execute(change)  # type: ignore[call-overload]
    assert get(operator, "/").status_code == 302


def test_a_session_that_is_used_goes_on(operator: FlaskClient, inbox: Inbox) -> None:
    inbox.connection.execute("update webhook.sessions set seen_at = now() - interval '29 minutes'")
    assert get(operator, "/").status_code == 200
    assert inbox.one("select seen_at > now() - interval '1 minute' from webhook.sessions")


def test_logging_out_ends_the_session_in_the_database(operator: FlaskClient, inbox: Inbox) -> None:
    assert post(operator, "/logout").status_code == 303
    assert inbox.one("select count(*) from webhook.sessions") == 0
    assert get(operator, "/").status_code == 302
    assert [row[0] for row in inbox.connection.execute("select action from webhook.audit order by id").fetchall()] == [
        "accounts.add", "console.login", "console.logout"]  # fmt: skip


# The command line


def test_accounts_and_tokens_by_the_command_line(inbox: Inbox, app: Flask) -> None:
    env = {"DATABASE_URL": inbox.url, "ENVIRONMENT": "test"}
    made = typed(env, "accounts", "add", "asel", "--role", "operator", "--as", "root", answer=PASSWORD + "\n")
    assert made.exit_code == 0
    assert typed(env, "accounts", "add", "asel", answer=PASSWORD + "\n").exit_code == 1
    assert typed(env, "accounts", "add", "weak", answer="short\n").exit_code == 1
    listed = lines(env, "accounts", "list")
    assert [(row["name"], row["role"]) for row in listed] == [("asel", "operator")]
    assert "argon2" not in json.dumps(listed)
    client, _ = log_in(app, "asel")
    assert get(client, "/").status_code == 200
    assert typed(env, "accounts", "password", "asel", answer="another good password\n").exit_code == 0
    assert get(client, "/").status_code == 302
    client, answer = log_in(app, "asel", "another good password")
    assert answer.status_code == 303
    good(env, "accounts", "disable", "asel")
    assert get(client, "/").status_code == 302
    assert log_in(app, "asel", "another good password")[1].status_code == 403
    assert typed(env, "accounts", "disable", "nobody").exit_code == 1
    token = good(env, "tokens", "add", "nightly").stdout.strip()
    assert (
        app.test_client().get(API + "/overview", headers={"Authorization": f"Bearer {token}"}).status_code
        == 200
    )
    assert token not in json.dumps(lines(env, "tokens", "list"))
    good(env, "tokens", "revoke", "nightly")
    assert (
        app.test_client().get(API + "/overview", headers={"Authorization": f"Bearer {token}"}).status_code
        == 401
    )
    actions = [
        row[0] for row in inbox.connection.execute("select action from webhook.audit order by id").fetchall()
    ]
    assert {"accounts.add", "accounts.password", "accounts.disable", "tokens.add", "tokens.revoke"} <= set(
        actions
    )
    assert PASSWORD not in str(inbox.connection.execute("select * from webhook.audit").fetchall())


# Lists


def test_pages_are_followed_by_key_while_rows_arrive(operator: FlaskClient, inbox: Inbox) -> None:
    made = [inbox.deliver(f"r-{index}") for index in range(120)]
    first = get(operator, "/deliveries").text
    assert ids(first) == made[:-51:-1]
    older = re.search(r'href="([^"]+)" rel="next"', first)
    assert older
    for index in range(5):
        inbox.deliver(f"new-{index}")
    second = get(operator, older[1].replace("&amp;", "&")).text
    assert ids(second) == made[69:19:-1]
    newer = re.search(r'href="([^"]+)" rel="prev"', second)
    assert newer
    assert ids(get(operator, newer[1].replace("&amp;", "&")).text) == made[:-51:-1]
    last = re.search(r'href="([^"]+)" rel="next"', second)
    assert last
    third = get(operator, last[1].replace("&amp;", "&")).text
    assert ids(third) == made[19::-1]
    assert 'rel="next"' not in third


def test_a_window_of_time_is_followed_in_the_order_of_arrival(operator: FlaskClient, inbox: Inbox) -> None:
    made = [inbox.deliver(f"r-{index}", ago=7000.0 - index) for index in range(110)]
    drained = inbox.deliver("from the spool")
    inbox.connection.execute(
        "update webhook.deliveries set first_seen_at = now() - interval '2 hours' + id * interval '1 second' where id <> %s",
        (drained,),
    )
    inbox.connection.execute(
        "update webhook.deliveries set first_seen_at = (select first_seen_at + interval '0.5 seconds' "
        "from webhook.deliveries where id = %s) where id = %s",
        (made[4], drained),
    )
    inbox.deliver("too old", ago=90_000.0)
    inbox.deliver("too new", ago=5.0)
    until = (datetime.now(UTC) - timedelta(minutes=5)).strftime("%Y-%m-%dT%H:%M:%S%%2B00:00")
    wanted = [*made[:5], drained, *made[5:]]
    text, found, link = "", [], f"/deliveries?since=3h&until={until}&state=done"
    while link:
        text = get(operator, link).text
        found += ids(text)
        older = re.search(r'href="([^"]+)" rel="next"', text)
        link = older[1].replace("&amp;", "&") if older else ""
    assert found == wanted[::-1]
    newer = re.search(r'href="([^"]+)" rel="prev"', text)
    assert newer
    assert ids(get(operator, newer[1].replace("&amp;", "&")).text) == wanted[::-1][50:100]


LOOKED = [
    ("text=needle", lambda index: index % 40 == 3),
    ("state=done&status=completed&text=needle", lambda index: index % 40 == 3 and index % 7 != 0),
    ("status=failed&text=needle", lambda index: index % 40 == 3 and index % 7 == 0),
    ("status=failed&source=manual", lambda index: index % 7 == 0 and index % 3 == 0),
    ("reason=needle", lambda index: index % 40 == 3),
    ("avatar_id=a-1", lambda index: index % 50 == 1),
]  # fmt: skip


@pytest.mark.parametrize(("query", "matches"), LOOKED, ids=[query for query, _ in LOOKED])
def test_what_no_index_answers_is_looked_for_page_by_page(
    operator: FlaskClient, inbox: Inbox, monkeypatch: pytest.MonkeyPatch, query: str, matches: Any
) -> None:
    monkeypatch.setattr(look, "AT_ONCE", 17)
    monkeypatch.setattr(look, "PROBED", 17)
    wanted = []
    for index in range(150):
        number = inbox.deliver(
            f"r-{index}", "failed" if index % 7 == 0 else "completed", source="manual" if index % 3 == 0 else "fal",
            ago=1500.0 - index, error="avatar: needle: x" if index % 40 == 3 else None,
        )  # fmt: skip
        if index % 50 == 1:
            inbox.effect(number, "avatar", avatar_id="a-1")
        if matches(index):
            wanted.insert(0, number)
    found, link, pages = [], f"/deliveries?since=2h&{query}", []
    while link:
        pages.append(get(operator, link).text)
        found += ids(pages[-1])
        older = re.search(r'href="([^"]+)" rel="next"', pages[-1])
        assert (older is not None) == ("looked through for this page: 17" in pages[-1])
        link = older[1].replace("&amp;", "&") if older else ""
    assert found == wanted
    assert len(pages) > 1
    # And back again, from before the first: each once, and none is missing.
    back, before = [], inbox.one("select min(id) - 1 from webhook.deliveries")
    for _ in range(30):
        text = get(operator, f"/deliveries?since=2h&{query}&before={before}").text
        back = ids(text) + back
        newer = re.search(r'before=(\d+)" rel="prev"', text)
        if not newer:
            break
        before = newer[1]
    assert back == wanted


def test_large_bodies_make_a_page_look_through_fewer(
    operator: FlaskClient, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look, "BYTES", 2500)
    made = [
        inbox.deliver(f"r-{index}", ago=100.0 - index, body={"x": "y" * 1000, "n": f"needle{index}"})
        for index in range(7)
    ]
    texts, link = [], "/deliveries?since=1h&text=needle0"
    while link:
        texts.append(get(operator, link).text)
        older = re.search(r'href="([^"]+)" rel="next"', texts[-1])
        link = older[1].replace("&amp;", "&") if older else ""
    assert [ids(text) for text in texts] == [[], [], [], made[:1]]
    assert all("looked through for this page: 2." in text for text in texts[:3])


def test_the_api_says_how_far_it_has_looked(
    app: Flask, inbox: Inbox, monkeypatch: pytest.MonkeyPatch, document: Any
) -> None:
    monkeypatch.setattr(look, "AT_ONCE", 5)
    made = [
        inbox.deliver(f"r-{index}", ago=100.0 - index, error="x: needle" if index == 0 else None)
        for index in range(9)
    ]
    token = inbox.token("ci", "operator")
    first = call(app, token, "/deliveries?text=needle")
    check(document, "/deliveries", first)
    assert (first.json["deliveries"], first.json["after"]) == ([], made[4])
    assert first.json["looked_to"]
    second = call(app, token, f"/deliveries?text=needle&after={first.json['after']}").json
    assert [row["id"] for row in second["deliveries"]] == made[:1]
    assert (second["after"], second["looked_to"]) == (None, None)


def test_a_page_goes_on_from_a_delivery_that_is_gone(operator: FlaskClient, inbox: Inbox) -> None:
    made = [inbox.deliver(f"r-{index}", "failed", ago=100.0 - index) for index in range(9)]
    inbox.connection.execute("delete from webhook.deliveries where id = %s", (made[5],))
    assert ids(get(operator, f"/deliveries?status=failed&after={made[5]}").text) == made[4::-1]
    assert ids(get(operator, f"/deliveries?status=failed&before={made[5]}").text) == made[:5:-1]


def test_a_bots_table_that_takes_too_long_is_said(
    operator: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(_: Any) -> Any:
        raise psycopg.errors.QueryCanceled

    monkeypatch.setattr("webhook_api.web.lists.avatars", slow)
    answer = get(operator, "/avatars")
    assert answer.status_code == 200
    assert "no index on what is in training" in answer.text


@pytest.mark.parametrize("native_enum", [False, True])
def test_avatars_are_found_however_the_bot_spells(
    operator: FlaskClient, inbox: Inbox, native_enum: bool
) -> None:
    inbox.connection.execute(bot_tables(native_enum, True))  # type: ignore[call-overload]
    user = uuid.uuid4()
    inbox.connection.execute("insert into users values (%s, '1')", (user,))
    for name, status in (("Aigerim", "TRAINING"), ("Timur", "COMPLETED")):
        inbox.connection.execute(
            "insert into avatars (id, user_id, name, status) values (%s, %s, %s, %s)",
            (uuid.uuid4(), user, name, status),
        )
    text = get(operator, "/avatars").text
    inbox.connection.execute(
        "drop table avatars, users; drop type if exists avatar_status, avatar_training_type"
    )
    assert "Aigerim" in text
    assert "Timur" not in text


FILTERS = [
    ("state=dead", {"dead", "evil", "aside"}), ("status=failed&state=dead", {"evil"}), ("aside=stale", {"aside"}),
    ("text=diffusers_lora_file", {"done"}), ("request_id=stale-5d41402a", {"aside"}), ("reason=object_refused", {"dead"}),
    ("state=parked&source=fal", {"parked"}), ("source=manual", set()), ("avatar_id=nobody", set()),
]  # fmt: skip


@pytest.mark.parametrize(("query", "names"), FILTERS)
def test_filters_find_what_they_say(app: Flask, inbox: Inbox, query: str, names: set[str]) -> None:
    made = show_case(inbox)
    client, _ = log_in(app, "maria")
    assert set(ids(get(client, f"/deliveries?{query}").text)) == {made[name] for name in names}


def test_every_page_opens_and_nothing_of_others_runs(app: Flask, inbox: Inbox) -> None:
    made = show_case(inbox)
    for name in ("maria", "viktor"):
        client, _ = log_in(app, name)
        for path in ("/", "/deliveries", "/dead-letters", "/parked", "/avatars", "/deployments", "/live",
                     "/charts/latency-dark.svg", *(f"/deliveries/{number}" for number in made.values())):  # fmt: skip
            answer = get(client, path)
            assert answer.status_code == 200, path
            assert "<script>alert" not in answer.text
            assert "<img src=x" not in answer.text
            assert "\u202e" not in answer.text
            assert "s3cr3t" not in answer.text


def test_viewers_see_no_bodies_and_no_actions(app: Flask, inbox: Inbox) -> None:
    made = show_case(inbox)
    maria, _ = log_in(app, "maria")
    viktor, _ = log_in(app, "viktor")
    mine, his = (get(client, f"/deliveries/{made['evil']}").text for client in (maria, viktor))
    assert "X-Evil" in mine
    assert "X-Evil" not in his
    assert "<pre" not in his
    assert "/actions/" not in his
    assert "/actions/" not in get(viktor, "/dead-letters").text
    assert get(viktor, "/deliveries?text=evil").status_code == 400
    before = inbox.one("select count(*) from webhook.audit")
    for path in ("/actions/dead-letters.replay/preview", "/actions/dead-letters.replay"):
        assert post(viktor, path, limit=10).status_code == 403
    assert inbox.one("select count(*) from webhook.audit") == before
    assert inbox.one("select count(*) from webhook.deliveries where state = 'dead'") == 3


def test_the_timeline_is_in_the_order_of_time(app: Flask, inbox: Inbox) -> None:
    made = show_case(inbox)
    client, _ = log_in(app, "maria")
    text = get(client, f"/deliveries/{made['done']}").text
    times = re.findall(r'<span class="at"><time datetime="([^"]+)"', text)
    assert len(times) == 5
    assert times == sorted(times)
    assert "aisha-files/deliveries/2026/11/29/segment-0001.ndjson" in text


def test_deployments_are_followed_to_the_first(
    app: Flask, inbox: Inbox, operator: FlaskClient, document: Any
) -> None:
    inbox.connection.execute(
        "insert into webhook.deployments (id, host, kind, started_at, result, record) "
        "select 'run-' || run, 'webhook-' || host, 'deploy', now() - make_interval(hours => run / 2), 'done', '{}' "
        "from generate_series(10, 49) run, generate_series(1, 3) host"
    )
    wanted = inbox.connection.execute(
        "select id, host from webhook.deployments order by started_at desc, id desc, host"
    ).fetchall()
    token, found, path = inbox.token("ci", "viewer"), [], "/deployments"
    while path:
        page = call(app, token, path)
        check(document, "/deployments", page)
        found += [(row["id"], row["host"]) for row in page.json["deployments"]]
        after, host = page.json["after"], page.json["host"]
        path = f"/deployments?after={after}&host={host}" if after else ""
    assert found == wanted
    assert len(found) == 120
    older = re.search(r'href="([^"]+)" rel="next"', get(operator, "/deployments").text)
    assert older
    assert "webhook-1" in get(operator, older[1].replace("&amp;", "&")).text
    assert get(operator, "/deployments?after=%00&host=x").status_code == 400
    assert "No deployment is recorded." in get(operator, "/deployments?after=nowhere&host=x").text


# Files


@pytest.fixture
def store(s3: Bucket) -> Iterator[Minio]:
    client = Minio(s3.endpoint, s3.access_key, s3.secret_key, secure=False, region="us-east-1")
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    client.make_bucket(bucket)
    client.bucket = bucket
    yield client
    for found in client.list_objects(bucket, recursive=True):
        client.remove_object(bucket, found.object_name)
    with contextlib.suppress(MinioException):
        client.remove_bucket(bucket)


def test_files_come_whole_from_the_object_store_or_not_at_all(
    inbox: Inbox, s3: Bucket, store: Any, tmp_path: Path
) -> None:
    inbox.account("maria", "operator")
    number = inbox.deliver("r-1")
    data, key = os.urandom(3 * 2**20 + 4711), "webhooks/fal/r-1/payload.lora/lora.safetensors"
    lines = [
        json.dumps({"headers": {"X-Webhook-Secret": "s3cr3t", "A": str(index)}}).encode() + b"\n"
        for index in range(3)
    ]
    segment = "deliveries/segments/2026-11-29/1-3.ndjson"
    place = {
        "key": segment,
        "offset": len(lines[0]),
        "length": len(lines[1]),
        "sha256": hashlib.sha256(lines[1]).hexdigest(),
    }
    inbox.effect(number, "raw_archive", **place)
    artifact = {"key": key, "state": "stored", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    inbox.effect(number, "archive", artifacts=[artifact])
    store.put_object(store.bucket, segment, io.BytesIO(b"".join(lines)), sum(map(len, lines)))
    store.put_object(store.bucket, key, io.BytesIO(data), len(data))
    settings = {"MINIO_ENDPOINT": s3.endpoint, "MINIO_ACCESS_KEY": s3.access_key, "MINIO_SECRET_KEY": s3.secret_key,
                "MINIO_BUCKET_NAME": store.bucket, "CONSOLE_SECURE_COOKIES": "false"}  # fmt: skip
    with website(inbox.url, tmp_path / "log", **settings) as site:
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        csrf = form_of(opener.open(site.address + "/login").read().decode())
        opener.open(
            site.address + "/login", f"csrf={csrf}&name=maria&password={PASSWORD.replace(' ', '+')}".encode()
        )
        page = opener.open(f"{site.address}/deliveries/{number}").read().decode()
        delivery, file = re.findall(r'href="(/deliveries/\d+/files/\w+)"', page)
        for _ in range(5):
            with opener.open(site.address + file, timeout=20) as answer:
                assert answer.read() == data
        assert json.loads(opener.open(site.address + delivery).read())["headers"] == {
            "X-Webhook-Secret": "***",
            "A": "1",
        }
        count = "select count(*) from webhook.audit where action = 'archive.download' and delivery_ids = array[%s::bigint]"
        assert inbox.one(count, number) == 6
        # Somebody has been at the bucket.
        store.put_object(store.bucket, key, io.BytesIO(data[:-1] + b"!"), len(data))
        with (
            opener.open(site.address + file, timeout=20) as answer,
            pytest.raises(http.client.IncompleteRead),
        ):
            answer.read()
        store.put_object(store.bucket, key, io.BytesIO(data[:-1]), len(data) - 1)
        for status in (502, 404):
            with pytest.raises(urllib.error.HTTPError) as refused:
                opener.open(site.address + file, timeout=20)
            assert refused.value.status == status
            refused.value.close()
            store.remove_object(store.bucket, key)
        assert "s3cr3t" not in site.log()


# Actions


def test_a_preview_counts_and_changes_nothing(operator: FlaskClient, inbox: Inbox) -> None:
    made = [inbox.deliver(f"r-{index}", state="dead", error="x") for index in range(12)]
    aside = inbox.deliver("late", state="dead", aside="stale")
    answer = post(operator, "/actions/dead-letters.replay/preview")
    assert answer.status_code == 200
    assert 'name="limit" value="12"' in answer.text
    assert ids(answer.text) == made[:10]
    assert "Kept aside and left out: 1" in answer.text
    assert inbox.one("select count(*) from webhook.deliveries where state = 'dead'") == 13
    assert aside


def test_a_preview_looks_through_the_oldest_and_says_so(
    operator: FlaskClient, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deeds, "LOOKED", 5)
    made = [inbox.deliver(f"r-{index}", state="dead", ago=900.0 - index, error="x: needle" if index in (1, 7) else "x")
            for index in range(9)]  # fmt: skip
    answer = post(operator, "/actions/dead-letters.replay/preview", text="needle", since="1h")
    assert "Only the oldest 5 were looked through" in answer.text
    assert 'name="limit" value="1"' in answer.text
    assert ids(answer.text) == [made[1]]
    assert "Changed: 1" in act(operator, "dead-letters.replay", text="needle", since="1h", limit=1).text
    assert inbox.one("select array_agg(id) from webhook.deliveries where state = 'retry'") == [made[1]]
    plain = post(operator, "/actions/dead-letters.replay/preview", since="1h").text
    assert "Only the oldest" not in plain
    assert 'name="limit" value="8"' in plain


def test_a_preview_says_its_filter_as_the_form_does(operator: FlaskClient, inbox: Inbox) -> None:
    one = inbox.deliver("r-1", "failed", "dead", error="x", aside="stale")
    fields = {"since": "2026-01-01T10:00:00+00:00", "status": "failed", "aside": "stale", "request_id": "r-1"}
    text = post(operator, "/actions/dead-letters.replay/preview", **fields).text
    said = re.findall(r'<span class="tag"><bdi>(.*?)</bdi></span>', text)
    assert [re.sub("<[^>]+>", "", item) for item in said] == [
        "Since: 2026-01-01 15:00:00", "Status: failed", "Request: r-1", "Kept aside: stale"]  # fmt: skip
    assert "no filter" not in text
    single = post(operator, "/actions/events.replay/preview", id=one).text
    assert f"<bdi>Delivery: {one}</bdi>" in single
    operator.set_cookie("__Host-console_language", "ru", domain="localhost", secure=True)
    operator.set_cookie("__Host-console_zone", "UTC", domain="localhost", secure=True)
    text = post(operator, "/actions/dead-letters.replay/preview", **fields).text
    assert ">2026-01-01 10:00:00</time>" in text
    assert "<bdi>Статус: " in text


@pytest.mark.parametrize(("language", "words"), [("en", "no filter: everything"), ("ru", "без фильтра: всё")])
def test_a_preview_without_a_filter_says_that_it_takes_everything(
    operator: FlaskClient, inbox: Inbox, language: str, words: str
) -> None:
    inbox.deliver("r-1", state="dead", error="x")
    operator.set_cookie("__Host-console_language", language, domain="localhost", secure=True)
    assert words in post(operator, "/actions/dead-letters.replay/preview").text
    assert words not in post(operator, "/actions/dead-letters.replay/preview", status="failed").text


def test_a_replay_is_done_to_what_was_counted_and_recorded(operator: FlaskClient, inbox: Inbox) -> None:
    made = [inbox.deliver(f"r-{index}", state="dead", error="x") for index in range(3)]
    late = inbox.deliver("r-9", state="dead", error="x")
    answer = act(operator, "dead-letters.replay", limit=3)
    assert "Changed: 3" in answer.text
    states = dict(inbox.connection.execute("select id, state from webhook.deliveries").fetchall())
    assert [states[number] for number in made] == ["retry"] * 3
    assert states[late] == "dead"
    row = inbox.connection.execute(
        "select who, instance, affected, delivery_ids, filter ->> 'by' from webhook.audit "
        "where action = 'dead-letters.replay'"
    ).fetchone()
    assert row == ("maria", "console", 3, made, "console")


def test_discarding_by_filter_says_why(operator: FlaskClient, inbox: Inbox) -> None:
    one = inbox.deliver("r-1", "failed", "dead", error="x")
    inbox.deliver("r-2", "completed", "dead", error="x")
    answer = act(operator, "dead-letters.discard", limit=1000, status="failed", why=EVIL)
    assert "Changed: 1" in answer.text
    assert "\u202e" not in get(operator, f"/deliveries/{one}").text
    assert inbox.one("select count(*) from webhook.deliveries where discarded_at is not null") == 1
    assert (
        inbox.one("select detail ->> 'why' from webhook.audit where action = 'dead-letters.discard'") == EVIL
    )
    assert ids(get(operator, "/dead-letters").text) == [one + 1]


def test_parked_deliveries_are_tried_now(operator: FlaskClient, inbox: Inbox) -> None:
    number = inbox.deliver("r-1", state="parked")
    assert "Changed: 1" in act(operator, "parked.retry", limit=1).text
    assert inbox.one("select next_attempt_at <= now() from webhook.deliveries where id = %s", number)
    assert "Changed: 1" in act(operator, "parked.discard", limit=1).text


@pytest.mark.parametrize(("action", "state"), [
    ("parked.retry", "parked"), ("parked.discard", "parked"), ("dead-letters.replay", "dead"),
    ("dead-letters.discard", "dead"),
])  # fmt: skip
def test_the_audit_says_who_did_what_to_how_many(
    operator: FlaskClient, inbox: Inbox, action: str, state: str
) -> None:
    chosen = [inbox.deliver(f"r-{index}", "failed", state) for index in range(3)]
    inbox.deliver("another", "completed", state)
    before = inbox.one("select max(id) from webhook.audit")
    post(operator, f"/actions/{action}/preview", status="failed")
    answer = act(operator, action, status="failed", limit=1000, why="seen")
    assert "Changed: 3" in answer.text
    rows = inbox.connection.execute(
        "select who, instance, action, affected, delivery_ids, filter ->> 'status', filter ->> 'by', detail ->> 'why' "
        "from webhook.audit where id > %s",
        (before,),
    ).fetchall()
    why = "seen" if action.endswith("discard") else None
    assert rows == [("maria", "console", action, 3, chosen, "failed", "console", why)]
    assert lines({"DATABASE_URL": inbox.url, "ENVIRONMENT": "test"}, "audit", "list")[0]["action"] == action


def test_what_was_kept_aside_is_taken_when_the_filter_says_so(operator: FlaskClient, inbox: Inbox) -> None:
    inbox.deliver("r-1", state="dead")
    late = inbox.deliver("r-2", state="dead", aside="stale")
    assert ids(get(operator, "/dead-letters?aside=any").text) == [late]
    assert "Changed: 1" in act(operator, "dead-letters.discard", aside="stale", limit=10).text
    assert inbox.one("select discarded_at is not null from webhook.deliveries where id = %s", late)
    assert inbox.one("select count(*) from webhook.deliveries where discarded_at is null") == 1


def test_the_console_takes_four_connections_at_most(app: Flask, operator: FlaskClient, inbox: Inbox) -> None:
    threads = [threading.Thread(target=lambda: get(operator, "/")) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with app.extensions["services"].write() as one, app.extensions["services"].write() as two:
        assert one is not two
        count = inbox.one("select count(*) from pg_stat_activity where application_name like 'webhook-console%%' "
                          "and datname = current_database()")  # fmt: skip
    assert 2 <= count <= 4


DEEDS = "select count(*) from webhook.audit where action = 'dead-letters.replay'"


def test_a_result_that_is_loaded_again_does_nothing(operator: FlaskClient, inbox: Inbox) -> None:
    for index in range(2):
        inbox.deliver(f"r-{index}", "failed", "dead", error="x")
    inbox.deliver("another", "completed", "dead", error="x")
    shown = act(operator, "dead-letters.replay", status="failed", limit=2)
    assert (shown.status_code, shown.request.method) == (200, "GET")
    inbox.deliver("later", "failed", "dead", error="x")
    again = get(operator, shown.request.full_path)
    assert again.text == shown.text
    assert "Changed: 2. Recorded under: maria." in again.text
    assert 'href="/dead-letters?status=failed"' in again.text
    assert inbox.one(DEEDS) == 1
    assert inbox.one("select count(*) from webhook.deliveries where state = 'dead'") == 2


def test_a_result_adds_up_the_transactions_of_its_operation_alone(
    operator: FlaskClient, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webhook_api.actions.BATCH", 2)
    for index in range(5):
        inbox.deliver(f"r-{index}", state="dead", error="x")
    shown = act(operator, "dead-letters.replay", limit=4)
    assert "Changed: 4." in shown.text
    assert "Changed: 1." in act(operator, "dead-letters.replay", limit=1).text
    first, last = (int(number) for number in shown.request.path.split("/")[-2:])
    assert last > first
    assert "Changed: 4." in get(operator, f"/done/dead-letters.replay/{first}/{last + 1}").text


def test_a_result_of_nothing_says_so_and_stays(operator: FlaskClient, inbox: Inbox) -> None:
    shown = act(operator, "dead-letters.replay", limit=1)
    assert "Nothing was changed" in shown.text
    assert get(operator, shown.request.full_path).text == shown.text
    assert inbox.one(DEEDS) == 0


def test_results_are_for_operators_and_for_what_was_done(
    operator: FlaskClient, viewer: FlaskClient, inbox: Inbox
) -> None:
    inbox.deliver("r-1", state="dead", error="x")
    path = act(operator, "dead-letters.replay", limit=1).request.path
    assert get(operator, path).status_code == 200
    assert get(viewer, path).status_code == 403
    first = int(path.split("/")[-1])
    for other in (f"/done/dead-letters.discard/{first}/{first}", f"/done/dead-letters.replay/{first - 1}/{first}",
                  f"/done/dead-letters.replay/1/{2**70}", f"/done/dead-letters.replay/{first}/{first + 10**6}",
                  "/done/drop.table", f"/done/drop.table/{first}/{first}"):  # fmt: skip
        assert get(operator, other).status_code == 404, other


def test_one_delivery_is_replayed_by_its_number(operator: FlaskClient, inbox: Inbox) -> None:
    inbox.deliver("r-1", state="dead")
    late = inbox.deliver("r-2", state="dead", aside="stale")
    assert "Changed: 1" in act(operator, "events.replay", id=late, limit=1).text
    assert inbox.one("select aside from webhook.deliveries where id = %s", late) is None
    assert inbox.one("select count(*) from webhook.deliveries where state = 'dead'") == 1


@pytest.mark.parametrize("csrf", ["", "0" * 64])
def test_a_forged_form_changes_nothing(operator: FlaskClient, inbox: Inbox, csrf: str) -> None:
    inbox.deliver("r-1", state="dead")
    for path in (
        "/actions/dead-letters.discard",
        "/actions/dead-letters.discard/preview",
        "/logout",
        "/look",
    ):
        assert post(operator, path, csrf=csrf, limit=10).status_code == 403
    assert inbox.one("select count(*) from webhook.deliveries where discarded_at is null") == 1
    assert inbox.one("select count(*) from webhook.sessions") == 1


def test_odd_requests_are_refused(operator: FlaskClient) -> None:
    assert get(operator, "/deliveries?after=x").status_code == 400
    assert get(operator, "/deliveries?since=%00").status_code == 400
    missing = get(operator, f"/deliveries/{2**70}")
    assert missing.status_code == 404
    assert "There is nothing at this address." in missing.text
    assert get(operator, "/charts/passwords-light.svg").status_code == 404
    assert post(operator, "/actions/drop.table", limit=1).status_code == 404
    assert post(operator, "/actions/dead-letters.replay", id="x", limit=1).status_code == 400


def test_reading_connections_cannot_write(app: Flask) -> None:
    services: Services = app.extensions["services"]
    with services.read() as connection, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        connection.execute("delete from webhook.deliveries")


def test_what_takes_too_long_is_given_up(
    app: Flask, operator: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    services: Services = app.extensions["services"]
    monkeypatch.setattr(
        "webhook_api.web.lists.page", lambda connection, *_, **__: connection.execute("select pg_sleep(9)")
    )
    started = time.monotonic()
    answer = get(operator, "/deliveries?text=x")
    assert answer.status_code == 503
    assert time.monotonic() - started < 4
    assert "narrow the filter" in answer.text
    assert services.database_there()


# The API


@pytest.fixture
def document() -> Any:
    return openapi.document("1")


def call(app: Flask, token: str, path: str, body: Any = None) -> Any:
    headers = {"Authorization": f"Bearer {token}"}
    client = app.test_client()
    return (
        client.get(API + path, headers=headers)
        if body is None
        else client.post(API + path, json=body, headers=headers)
    )


def check(document: Any, path: str, answer: Any) -> None:
    way = next(iter(document["paths"][API + path].values()))
    schema = way["responses"][str(answer.status_code)]["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(answer.json)


def test_each_answer_of_the_api_has_the_described_form(app: Flask, inbox: Inbox, document: Any) -> None:
    made = show_case(inbox)
    token = inbox.token("ci", "operator")
    for path in ("/overview", "/deliveries", "/dead-letters", "/parked", "/avatars", "/deployments"):
        answer = call(app, token, path)
        assert answer.status_code == 200, path
        check(document, path, answer)
    check(document, "/deliveries/{identifier}", call(app, token, f"/deliveries/{made['evil']}"))
    check(document, "/deliveries/{identifier}", call(app, token, "/deliveries/999999"))
    check(document, "/deliveries", call(app, token, "/deliveries?status=odd"))
    check(document, "/overview", call(app, "wct_wrong", "/overview"))


def test_the_api_pages_by_key(app: Flask, inbox: Inbox) -> None:
    made = [inbox.deliver(f"r-{index}") for index in range(7)]
    token = inbox.token("ci", "viewer")
    first = call(app, token, "/deliveries?limit=3").json
    second = call(app, token, f"/deliveries?limit=3&after={first['after']}").json
    assert [row["id"] for row in [*first["deliveries"], *second["deliveries"]]] == made[:0:-1]


def test_an_action_of_the_api_counts_first_and_is_recorded(app: Flask, inbox: Inbox, document: Any) -> None:
    made = [inbox.deliver(f"r-{index}", state="dead") for index in range(3)]
    token = inbox.token("ci", "operator")
    counted = call(app, token, "/actions/dead-letters.replay", {"filter": {}})
    check(document, "/actions/{name}", counted)
    assert (counted.json["matched"], counted.json["changed"]) == (3, 0)
    done = call(app, token, "/actions/dead-letters.replay", {"ids": made[:2], "dry_run": False})
    check(document, "/actions/{name}", done)
    assert done.json["changed"] == 2
    assert inbox.one("select who from webhook.audit where action = 'dead-letters.replay'") == "token:ci"


@pytest.mark.parametrize("fields", [{}, {"since": " "}, {"limit": "1", "after": "5"}])
def test_everything_is_taken_only_when_it_is_said(
    app: Flask, inbox: Inbox, document: Any, fields: dict[str, str]
) -> None:
    for index in range(2):
        inbox.deliver(f"r-{index}", state="dead")
    token, path = inbox.token("ci", "operator"), "/actions/dead-letters.discard"
    for beside in ({}, {"all": False}):
        refused = call(app, token, path, {"filter": fields, "dry_run": False, **beside})
        assert (refused.status_code, refused.json["error"]) == (400, "empty_filter")
        assert '"all": true' in refused.json["message"]
        check(document, "/actions/{name}", refused)
    assert inbox.one("select count(*) from webhook.deliveries where discarded_at is null") == 2
    assert call(app, token, path, {"filter": fields}).json["matched"] == 2
    assert call(app, token, path, {"filter": fields, "dry_run": False, "all": True}).json["changed"] == 2


@pytest.mark.parametrize("body", [
    {}, {"filter": {}, "all": "yes"}, {"filter": {}, "all": 1},
    {"filter": {}, "ids": [1]}, {"ids": []}, {"ids": ["1"]}, {"ids": [True]}, {"filter": {"odd": "x"}}, {"filter": []},
    {"filter": {}, "limit": 0}, {"filter": {}, "limit": 10**9}, {"filter": {}, "dry_run": "no"}, {"filter": {}, "why": ""},
    {"filter": {}, "more": 1}, [],
])  # fmt: skip
def test_bodies_that_cannot_be_used_are_refused(app: Flask, inbox: Inbox, document: Any, body: Any) -> None:
    answer = call(app, inbox.token("ci", "operator"), "/actions/dead-letters.discard", body)
    assert answer.status_code == 400
    check(document, "/actions/{name}", answer)


def test_a_viewers_token_does_nothing_and_sees_no_bodies(app: Flask, inbox: Inbox) -> None:
    made = show_case(inbox)
    token = inbox.token("ci", "viewer")
    assert (
        call(app, token, "/actions/dead-letters.discard", {"filter": {}, "dry_run": False}).status_code == 403
    )
    assert call(app, token, "/deliveries?text=evil").status_code == 400
    row = call(app, token, f"/deliveries/{made['evil']}").json
    assert "body_base64" not in row
    assert "headers" not in row


def test_a_session_is_no_token(operator: FlaskClient) -> None:
    assert get(operator, API + "/overview").status_code == 401


# Live


def test_live_goes_on_where_it_stopped(inbox: Inbox, tmp_path: Path) -> None:
    inbox.account("maria", "operator")
    first = inbox.deliver("before")
    with website(inbox.url, tmp_path / "log", CONSOLE_SECURE_COOKIES="false") as site:
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        csrf = form_of(opener.open(site.address + "/login").read().decode())
        opener.open(
            site.address + "/login", f"csrf={csrf}&name=maria&password={PASSWORD.replace(' ', '+')}".encode()
        )

        def follow(last: int, number: int) -> list[int]:
            request = urllib.request.Request(
                site.address + "/live/events", headers={"Last-Event-ID": str(last)}
            )
            with opener.open(request, timeout=20) as stream:
                found: list[int] = []
                while len(found) < number:
                    line = stream.readline().decode()
                    if line.startswith("id: "):
                        found.append(int(line[4:]))
                return found

        later: list[int] = []
        timer = threading.Timer(1.5, lambda: later.append(inbox.deliver("during")))
        timer.start()
        assert follow(first, 1) == [first + 1]
        timer.join()
        assert later == [first + 1]
        missed = [inbox.deliver("while away"), inbox.deliver("while away, too")]
        assert follow(first + 1, 2) == missed
        started = time.monotonic()
        assert site.stop() == 0
        assert time.monotonic() - started < 15
        assert PASSWORD not in site.log()


def test_what_is_committed_late_is_not_missed(inbox: Inbox) -> None:
    late = psycopg.connect(inbox.url)
    now = [0.0]

    class Lent:
        def __enter__(self) -> Any:
            return inbox.connection

        def __exit__(self, *_: object) -> None:
            return None

    tail = live.Tail(Lent, 0, lambda row: b"", lambda: now[0], lambda _: None)
    held = late.execute(
        "insert into webhook.deliveries (source, request_id, dedup_key, status, body, body_sha256) "
        "values ('fal', 'slow', 'k', 'completed', '{}', repeat('0', 64)) returning id"
    ).fetchone()
    quick = inbox.deliver("quick")
    assert [row["id"] for row in tail.look()] == [quick]
    now[0] = 2.0
    late.commit()
    late.close()
    assert held is not None
    assert [row["id"] for row in tail.look()] == [held[0]]
    now[0] = 20.0
    assert tail.look() == []


# Rollups


def test_rollups_count_each_five_minutes(inbox: Inbox) -> None:
    start = rollups.start_of(datetime.now(UTC))
    ago = (datetime.now(UTC) - (start - timedelta(minutes=8))).total_seconds()
    for status in ("completed", "completed", "failed"):
        inbox.deliver(f"r-{status}-{time.monotonic_ns()}", status, ago=ago)
    inbox.deliver("dead", state="dead", ago=ago)
    with connect(inbox.url, "test") as connection:
        assert rollups.count(connection, datetime.now(UTC)) == 3 + rollups.AT_ONCE
        while rollups.count(connection, datetime.now(UTC)) > 3:
            pass
    row = inbox.connection.execute(
        "select deliveries, failed, done, dead, latency_p50 from webhook.rollups where deliveries > 0"
    ).fetchall()
    assert [(*item[:4], round(item[4], 2)) for item in row] == [(4, 1, 3, 1, 0.4)]
    assert inbox.one("select count(*) from webhook.rollups") == 288
