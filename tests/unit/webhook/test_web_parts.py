"""The console's parts without a database: words, limits, form tokens, names, filters, headers, charts, certificates."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from flask import Flask
from flask.testing import FlaskClient
from webhook_api.config import NEEDS_CONSOLE, ConfigError, load_settings
from webhook_api.gauges import Inbox
from webhook_api.web import accounts, charts, gate, lists, look, openapi, overview, sessions
from webhook_api.web.app import create_app
from webhook_api.web.limits import PER_ACCOUNT, PER_ADDRESS, WINDOW, Attempts
from webhook_api.web.monitor import Instance, Seen, not_after
from webhook_api.web.words import Words, catalogue, harmless, lines, preferred

WEB = Path(accounts.__file__).parent
BASE = "https://localhost"
ZONE = ZoneInfo("Asia/Almaty")


@pytest.fixture(scope="module")
def app() -> Flask:
    return create_app(load_settings({"DATABASE_URL": "postgresql://u@127.0.0.1:1/d"}, NEEDS_CONSOLE))


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


# Words


def test_both_catalogues_have_the_same_keys_and_places() -> None:
    english, russian = catalogue("en"), catalogue("ru")
    assert set(english) == set(russian)
    for key, message in english.items():
        places = re.findall(r"\{(\w+)\}", message)
        assert sorted(places) == sorted(re.findall(r"\{(\w+)\}", russian[key])), key
        assert message.strip(), key
        assert russian[key].strip(), key


def test_every_message_that_a_template_names_is_there() -> None:
    text = "\n".join(path.read_text() for path in WEB.glob("templates/*.html"))
    named = set(re.findall(r"\bt\('([\w.-]+)'[,)]", text))
    assert len(named) > 80
    assert named - set(catalogue("en")) == set()


def test_every_message_that_the_program_names_is_there() -> None:
    for path in WEB.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                known = re.fullmatch(r"(error|verdict|finding|login)\.(?!html|show)[a-z_]+", node.value)
                assert not known or node.value in catalogue("en"), node.value


def test_every_action_has_its_words() -> None:
    for name in openapi.ACTIONS:
        assert {f"deed.{name}", f"about.{name}"} <= set(catalogue("ru"))


def test_text_that_turns_around_is_shown_as_escapes() -> None:
    assert harmless("a\u202eb\x1b[31m\u2066") == "a\\u202eb\\x1b[31m\\u2066"
    assert str(lines("<b>\n\u202e")) == "&lt;b&gt;\n\\u202e"
    assert harmless(5) == 5


def test_what_nobody_sees_is_shown_as_escapes() -> None:
    assert harmless("a\u3164b\ufe0f\u2800") == "a\\u3164b\\ufe0f\\u2800"
    assert str(lines("\u034f\n\U000e0100")) == "\\u034f\n\\U000e0100"


def test_times_are_in_the_zone_and_lengths_in_two_units() -> None:
    words = Words("en", "Asia/Almaty")
    shown = str(words.time(datetime(2026, 11, 29, 4, 0, tzinfo=UTC)))
    assert ">2026-11-29 09:00:00<" in shown
    assert 'datetime="2026-11-29T04:00:00.000+00:00"' in shown
    assert words.offset() == "UTC+05:00"
    assert [words.span(value) for value in (0.4, 59, 61, 90_061, None)] == [
        "400 ms",
        "59 s",
        "1 min 1 s",
        "1 d 1 h",
        "–",
    ]


def test_the_language_is_the_browsers_where_we_have_it() -> None:
    assert preferred("kk-KZ,ru;q=0.8,en;q=0.5", "en") == "ru"
    assert preferred("de", "en") == "en"
    assert preferred("", "ru") == "ru"


# Settings


def test_the_zone_is_tz_unless_it_is_chosen() -> None:
    base = {"DATABASE_URL": "postgresql://u@h/d"}
    assert load_settings(base, NEEDS_CONSOLE).console.zone == "Asia/Almaty"
    assert load_settings({**base, "TZ": "Europe/Berlin"}, NEEDS_CONSOLE).console.zone == "Europe/Berlin"
    assert load_settings({**base, "CONSOLE_TIMEZONE": "UTC"}, NEEDS_CONSOLE).console.zone == "UTC"


@pytest.mark.parametrize(("name", "value"), [
    ("CONSOLE_TIMEZONE", "Mars/Olympus"), ("CONSOLE_LANGUAGE", "kk"), ("CONSOLE_INSTANCES", "ftp://x"),
    ("CONSOLE_INSTANCES", "http://u:p@h"), ("CONSOLE_EDGE", "nothing"), ("CONSOLE_IDLE_SECONDS", "1"),
])  # fmt: skip
def test_settings_that_cannot_be_used_are_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load_settings({"DATABASE_URL": "postgresql://u@h/d", name: value}, NEEDS_CONSOLE)


# Accounts and logins


@pytest.mark.parametrize("name", ["", "Maria", "-m", "a b", "m\u0430ria", "x" * 65, "a\n"])
def test_names_that_could_be_mistaken_are_refused(name: str) -> None:
    with pytest.raises(accounts.AccountError):
        accounts.check_name(name)


@pytest.mark.parametrize("password", ["short", "a" * 20, "maria1234567", "x" * 2000])
def test_weak_passwords_are_refused(password: str) -> None:
    with pytest.raises(accounts.AccountError):
        accounts.check_password("maria", password)


def test_a_password_proves_its_account_and_nobody_else() -> None:
    kept = accounts.HASHER.hash("correct horse battery")
    assert kept.startswith("$argon2id$")
    assert accounts.proves(kept, "correct horse battery")
    assert not accounts.proves(kept, "correct horse batterz")
    assert not accounts.proves(None, "correct horse battery")
    assert not accounts.proves("damaged", "correct horse battery")


def test_attempts_are_limited_by_account_and_by_address() -> None:
    now = [0.0]
    attempts = Attempts(lambda: now[0])
    assert [attempts.wait("maria", f"10.0.0.{index}") for index in range(PER_ACCOUNT)] == [0.0] * PER_ACCOUNT
    assert attempts.wait("maria", "10.0.1.1") == WINDOW
    assert attempts.wait("other", "10.0.0.1") == 0.0
    now[0] = WINDOW + 1
    assert attempts.wait("maria", "10.0.1.1") == 0.0
    for index in range(PER_ADDRESS):
        attempts.wait(f"name-{index}", "10.9.9.9")
    assert attempts.wait("fresh", "10.9.9.9") > 0


def test_a_right_password_forgets_the_wrong_ones() -> None:
    attempts = Attempts(lambda: 0.0)
    for _ in range(PER_ACCOUNT):
        assert attempts.wait("maria", "a") == 0.0
    attempts.forget("maria", "a")
    assert attempts.wait("maria", "a") == 0.0


def test_a_form_fits_its_session_alone() -> None:
    one, other = sessions.fresh(), sessions.fresh()
    assert sessions.form_fits(one, sessions.form_token(one))
    assert not sessions.form_fits(other, sessions.form_token(one))
    assert not sessions.form_fits(one, "")
    assert not sessions.form_fits(one, "\u00fc\ud800")
    assert one not in sessions.form_token(one)


@pytest.mark.parametrize(("given", "path"), [
    ("/deliveries?state=dead", "/deliveries?state=dead"), ("//evil.example", "/"), ("/\\evil.example", "/"),
    ("https://evil.example", "/"), ("", "/"), (None, "/"), ("/a\r\nSet-Cookie: x", "/"), ("javascript:alert(1)", "/"),
])  # fmt: skip
def test_a_login_leads_to_a_path_of_ours(given: str | None, path: str) -> None:
    assert gate.safe_path(given) == path


# HTTP without a database


def test_every_answer_has_the_headers(client: FlaskClient) -> None:
    for path in ("/login", "/static/console.css", "/nothing/here", "/api/v1/console/overview"):
        with client.get(path, base_url=BASE) as answer:
            assert answer.headers["Content-Security-Policy"] == gate.CSP, path
            for name, value in gate.HEADERS.items():
                assert answer.headers[name] == value
    assert "unsafe" not in gate.CSP


def test_no_template_has_script_or_style_in_it() -> None:
    for path in WEB.glob("templates/*.html"):
        text = path.read_text()
        assert not re.search(r"\son\w+=|style=|<style|javascript:", text), path.name
        assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", text)), path.name
        assert "|safe" not in text.replace(" ", ""), path.name
        assert "autoescape" not in text, path.name


def test_strangers_are_led_to_the_login(client: FlaskClient) -> None:
    for path in ("/", "/deliveries?state=dead", "/deliveries/1", "/deliveries/1/files/0123456789abcdef", "/dead-letters",
                 "/parked", "/avatars", "/deployments",
                 "/live", "/live/events", "/charts/deliveries-light.svg"):  # fmt: skip
        answer = client.get(path, base_url=BASE)
        assert answer.status_code == 302, path
        assert answer.headers["Location"].startswith("/login?next="), path


def test_every_form_needs_its_token(app: Flask, client: FlaskClient) -> None:
    client.get("/login", base_url=BASE)
    posts = [
        rule
        for rule in app.url_map.iter_rules()
        if "POST" in (rule.methods or ()) and not rule.rule.startswith("/api/")
    ]
    assert len(posts) == 5
    for path in ("/login", "/look"):
        assert client.post(path, data={"name": "m", "csrf": "0" * 64}, base_url=BASE).status_code == 403


def test_the_cookie_of_the_form_is_bound_to_the_host(client: FlaskClient) -> None:
    cookie = client.get("/login", base_url=BASE).headers["Set-Cookie"]
    assert cookie.startswith("__Host-console_form=")
    for part in ("Secure", "HttpOnly", "Path=/", "SameSite=Strict"):
        assert part in cookie
    assert "Domain" not in cookie


def test_a_reader_chooses_the_zone_and_it_is_named(client: FlaskClient) -> None:
    text = client.get("/login", base_url=BASE).text
    assert "Times in Asia/Almaty (UTC+05:00)" in text
    csrf = re.search(r'name="csrf" value="(\w+)"', text)
    assert csrf
    for zone, named in (("UTC", "Times in UTC (UTC+00:00)"), ("Mars/Olympus", "Times in UTC"), ("", "Times in Asia/Almaty"),
                        ("Asia/Kathmandu", "Times in Asia/Kathmandu (UTC+05:45)")):  # fmt: skip
        answer = client.post("/look", data={"csrf": csrf[1], "zone": zone, "next": "/login"}, base_url=BASE)
        assert answer.status_code == 303
        assert named in client.get("/login", base_url=BASE).text


def test_a_zone_that_somebody_has_made_up_is_the_sites(client: FlaskClient) -> None:
    client.set_cookie("__Host-console_zone", "../../etc/passwd", domain="localhost", secure=True)
    assert "Times in Asia/Almaty" in client.get("/login", base_url=BASE).text


def test_the_api_wants_a_token_and_says_so_in_json(client: FlaskClient) -> None:
    for headers in ({}, {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer "}):
        answer = client.get("/api/v1/console/deliveries", headers=headers, base_url=BASE)
        assert answer.status_code == 401
        assert answer.json["error"] == "missing_token"
        assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_a_large_form_is_refused(client: FlaskClient) -> None:
    client.get("/login", base_url=BASE)
    assert client.post("/login", data={"name": "x" * 100_000}, base_url=BASE).status_code == 413


def test_health_answers_without_a_database(client: FlaskClient) -> None:
    answer = client.get("/health", base_url=BASE)
    assert answer.status_code == 200
    assert answer.json["database"] is False


def test_the_api_document_names_every_route(app: Flask) -> None:
    served = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in app.url_map.iter_rules() if rule.rule.startswith("/api/")
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }  # fmt: skip
    described = {(path, method) for path, way in openapi.document("1")["paths"].items() for method in way}
    assert described == served


# Filters


def test_filters_are_read_in_the_consoles_zone() -> None:
    wanted = lists.read_filter(
        {"since": "2026-11-29", "state": "dead", "status": "failed"}, ZONE, bodies=False
    )
    assert wanted.since is not None
    assert wanted.since.utcoffset() == timedelta(hours=5)
    assert wanted.states == ("dead",)


@pytest.mark.parametrize("values", [
    {"since": "yesterday"}, {"status": "odd"}, {"state": "odd"}, {"reason": "a b"}, {"aside": "x'"}, {"until": "0001-01-01"},
])  # fmt: skip
def test_values_that_cannot_be_used_are_named(values: dict[str, str]) -> None:
    with pytest.raises(lists.FilterInvalid) as caught:
        lists.read_filter(values, ZONE, bodies=True)
    assert caught.value.field == next(iter(values))


@pytest.mark.parametrize("value", ["x" * 301, "\x00", "\ud800"])
def test_values_are_bounded(value: str) -> None:
    with pytest.raises(lists.FilterInvalid):
        lists.values_of({"request_id": value})


def test_who_sees_no_bodies_looks_for_no_text() -> None:
    with pytest.raises(lists.FilterInvalid):
        lists.read_filter({"text": "secret"}, ZONE, bodies=False)
    assert lists.read_filter({"text": "x"}, ZONE, bodies=True).since is not None


WAYS = [
    ({}, "true", None),
    ({"request_id": "r", "text": "x"}, "true", None),
    ({"since": "1h"}, "true", ({"since"}, set(), True)),
    ({"since": "24h", "status": "failed"}, "true", ({"since", "status"}, set(), True)),
    ({"status": "failed", "source": "manual"}, "true", ({"status"}, {"source"}, True)),
    ({"source": "manual", "state": "done"}, "true", ({"source"}, {"states"}, True)),
    ({"source": "fal", "status": "completed"}, "true", (set(), {"source", "status"}, True)),
    ({"until": "1h", "text": "x"}, "true", ({"until", "since"}, {"text"}, True)),
    ({"reason": "x"}, "true", (set(), {"reason"}, True)),
    ({"state": "dead", "since": "1h"}, "true", ({"states"}, {"since"}, False)),
    ({"aside": "stale"}, "true", ({"aside"}, set(), False)),
    ({"status": "failed", "since": "1h"}, "d.state = 'parked'", (set(), {"status", "since"}, False)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "extra", "way"), WAYS, ids=[" ".join(values) or "none" for values, _, _ in WAYS]
)
def test_each_filter_is_looked_through_in_the_order_of_an_index(
    values: dict[str, str], extra: str, way: tuple[set[str], set[str], bool] | None
) -> None:
    found = look._way(lists.read_filter(values, ZONE, bodies=True), extra)
    shown = None if found is None else (set(found.given.said()), set(found.rest.said()), found.by_time)
    assert shown == way


# A delivery


def test_what_could_be_a_secret_is_withheld() -> None:
    given = {
        "X-Webhook-Secret": "a",
        "authorization": "b",
        "Cookie": "c",
        "X-Api-Key": "d",
        "X-Fal-Webhook-Signature": "e",
    }
    shown = lists.kept_headers({"headers": given})
    assert [name for name, value in shown.items() if value != "***"] == ["X-Fal-Webhook-Signature"]


@pytest.mark.parametrize("body", [b'{"a": "it\'s $(touch x) `y`"}', b"\x00\xff\n", "жанна\u202e".encode()])
def test_curl_sends_the_same_bytes(body: bytes, tmp_path: Path) -> None:
    row = {"source": "fal", "headers": {"X-Evil": "'; touch evil; '", "X-Webhook-Secret": "s3cr3t"}}
    command = lists.curl(row, body)
    assert "s3cr3t" not in command
    fake = tmp_path / "curl"
    fake.write_text(
        f"#!{sys.executable}\nimport sys, os\nlast = sys.argv[-1]\n"
        "sys.stdout.buffer.write(sys.stdin.buffer.read() if last == '@-' else os.fsencode(last))\n"
    )
    fake.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", command], env={"PATH": f"{tmp_path}:/usr/bin:/bin", "LC_ALL": "C.UTF-8"}, cwd=tmp_path,
        capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout == body
    assert not (tmp_path / "evil").exists()


def test_deep_json_is_shown_raw() -> None:
    assert lists.pretty(b"[" * 100_000) is None
    assert lists.pretty(b'{"a":1}') == '{\n  "a": 1\n}'


# The sentence


def test_the_sentence_names_what_is_wrong_the_worst_first() -> None:
    well = Inbox(dict.fromkeys(("dead", "aside", "parked"), 0), {})
    assert overview.findings(well, Seen()) == []
    bad = Inbox({"dead": 2, "aside": 1, "parked": 0}, {"pending": 500.0})
    seen = Seen((Instance("http://a"), Instance("http://b", {"status": "degraded", "instance": "api-2"})),
                datetime.now(UTC) + timedelta(days=10))  # fmt: skip
    found = overview.findings(bad, seen)
    assert [item.key for item in found] == [
        "finding.dead", "finding.late", "finding.away", "finding.degraded", "finding.certificate", "finding.aside",
    ]  # fmt: skip


def test_hours_without_deliveries_are_there_too() -> None:
    now = datetime(2026, 11, 29, 10, 30, tzinfo=UTC)
    row = {"starts_at": now - timedelta(hours=1), "deliveries": 3, "failed": 1, "done": 2, "dead": 0,
           "latency_p50": 0.5, "latency_p95": 2.0}  # fmt: skip
    hours = lists.by_hour([row, {**row, "latency_p95": 1.0, "latency_p50": None}], now)
    assert len(hours) == 24
    assert hours[-2] == {"starts_at": now.replace(hour=9, minute=0), "deliveries": 6, "failed": 2, "dead": 0,
                         "p50": 0.5, "p95": 2.0}  # fmt: skip


@pytest.mark.parametrize("name", charts.NAMES)
@pytest.mark.parametrize("theme", charts.THEMES)
def test_a_chart_is_a_picture_without_a_script(name: str, theme: str) -> None:
    hours = lists.by_hour([], datetime(2026, 11, 29, tzinfo=UTC))
    svg = charts.draw(name, theme, hours, Words("ru", "Asia/Almaty")).decode()
    assert "<svg" in svg
    assert "http://kozea" not in svg.split("<defs>")[0] or "<script" not in svg
    assert 'src="' not in svg


def test_the_end_of_a_certificate_is_read(tmp_path: Path) -> None:
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
         "-subj", "/CN=x", "-keyout", str(tmp_path / "k"), "-outform", "DER", "-out", str(tmp_path / "c")],
        capture_output=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    ends = not_after((tmp_path / "c").read_bytes())
    assert timedelta(days=29) < ends - datetime.now(UTC) < timedelta(days=31)
    for cut in (b"", b"\x30", b"\x30\x82\xff\xff"):
        with pytest.raises(ValueError):
            not_after(cut)
