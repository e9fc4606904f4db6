"""Incidents: when they begin and end, whom they are told to and how often, and what is said. The pure part."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webhook_api import incidents
from webhook_api.config import NEEDS_WORKER, ConfigError, Settings, load_settings
from webhook_api.gauges import Inbox
from webhook_api.incidents import CLOSED, DEAD_LETTERS, KINDS, OPENED, STUCK, Incident, Sighting
from webhook_api.worker import notices

from tests.unit.webhook.test_config import GOOD

AT = datetime.datetime(
    2026, 11, 28, 21, 3, 11, 402_000, tzinfo=datetime.timezone(datetime.timedelta(hours=5))
)
SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


def incident(**changes: Any) -> Incident:
    fields: dict[str, Any] = {
        "id": 7, "kind": DEAD_LETTERS, "opened_at": AT, "closed_at": None, "quiet_seconds": 0.0, "deliveries": 2,
        "oldest_seconds": 61.4, "told": {},
    }  # fmt: skip
    return Incident(**{**fields, **changes})


def test_what_needs_a_person() -> None:
    nothing = Inbox(dict.fromkeys(("pending", "dead"), 0), {})
    assert incidents.sightings(nothing, 900) == {}
    # Parked waits for the bot; aside is no dead letter; 900 s are not more than 900.
    patient = Inbox(
        {"pending": 3, "parked": 9, "aside": 2, "dead": 0}, {"pending": 900.0, "parked": 1e6, "aside": 1e6}
    )
    assert incidents.sightings(patient, 900) == {}
    bad = Inbox(
        {"pending": 3, "retry": 2, "leased": 1, "dead": 4}, {"retry": 901.0, "leased": 5.0, "dead": 30.0}
    )
    assert incidents.sightings(bad, 900) == {DEAD_LETTERS: Sighting(4, 30.0), STUCK: Sighting(2, 901.0)}


def test_an_incident_begins_once_and_ends_when_all_has_been_well_for_a_while() -> None:
    seen = {DEAD_LETTERS: Sighting(1, 1.0)}
    assert incidents.changes(seen, [], 60).opened == seen
    again = incidents.changes(seen, [incident()], 60)
    assert (again.opened, again.seen, again.closed) == ({}, (7,), ())
    calm = incidents.changes({}, [incident(quiet_seconds=59.9)], 60)
    assert (calm.opened, calm.seen, calm.closed) == ({}, (), ())
    assert incidents.changes({}, [incident(quiet_seconds=60.0)], 60).closed == (7,)
    # One that is over is history: the next one is another.
    assert incidents.changes(seen, [incident(closed_at=AT)], 60).opened == seen
    assert incidents.changes({}, [incident(closed_at=AT, quiet_seconds=1e6)], 60).closed == ()


def test_each_channel_is_told_of_the_beginning_and_of_the_end() -> None:
    assert incidents.due(incident(), "webhook") == OPENED
    assert incidents.due(incident(told={"webhook": OPENED}), "webhook") is None
    assert incidents.due(incident(told={"webhook": OPENED}), "telegram") == OPENED
    over = incident(closed_at=AT, told={"webhook": OPENED})
    assert incidents.due(over, "webhook") == CLOSED
    # Never told that it began: there is nothing to take back.
    assert incidents.due(over, "telegram") is None
    assert incidents.due(incident(closed_at=AT, told={"webhook": CLOSED}), "webhook") is None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_whatever_happens_a_channel_hears_beginnings_and_ends_in_turn(steps: list[tuple[bool, bool]]) -> None:
    """`steps`: whether dead letters are seen, and whether the channel can be reached, at each look."""
    rows: list[Incident] = []
    heard: list[tuple[int, str]] = []
    for dead, reachable in steps:
        found = incidents.changes({DEAD_LETTERS: Sighting(1, 1.0)} if dead else {}, rows, 0)
        rows = [
            incident(id=row.id, closed_at=AT if row.id in found.closed else row.closed_at, told=row.told)
            for row in rows
        ]
        rows += [incident(id=len(rows) + 1) for _ in found.opened]
        assert sum(row.closed_at is None for row in rows) == (1 if dead else 0)
        for index, row in enumerate(rows):
            notice = incidents.due(row, "webhook")
            if notice and reachable:
                heard.append((row.id, notice))
                rows[index] = incident(id=row.id, closed_at=row.closed_at, told={"webhook": notice})
    assert len(heard) == len(set(heard))
    for number in {identifier for identifier, _ in heard}:
        assert [notice for identifier, notice in heard if identifier == number] in (
            [OPENED],
            [OPENED, CLOSED],
        )


def test_what_a_webhook_gets() -> None:
    assert incidents.document(incident(), OPENED) == {
        "type": "incident.opened",
        "timestamp": "2026-11-28T16:03:11.402Z",
        "data": {
            "incident": 7,
            "kind": "dead_letters",
            "count": 2,
            "oldest_seconds": 61,
            "since": "2026-11-28T16:03:11.402Z",
        },
    }
    over = incidents.document(incident(closed_at=AT + datetime.timedelta(minutes=1)), CLOSED)
    assert (over["type"], over["timestamp"]) == ("incident.closed", over["data"]["until"])
    assert json.dumps(over)


def test_a_message_keeps_its_id_and_no_two_share_one() -> None:
    assert incidents.message_id(incident(), OPENED) == incidents.message_id(incident(deliveries=9), OPENED)
    ids = {
        incidents.message_id(found, notice)
        for found in (incident(), incident(id=8), incident(opened_at=AT + datetime.timedelta(seconds=1)))
        for notice in (OPENED, CLOSED)
    }
    assert len(ids) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_people_are_told_in_words(kind: str) -> None:
    found = incident(kind=kind, closed_at=AT)
    assert incidents.title(found, OPENED) != incidents.title(found, CLOSED)
    assert ("Deliveries", "2") in incidents.lines(found, OPENED)
    assert "webhook-api" in dict(incidents.lines(found, OPENED))["Look"]
    assert "Until" in dict(incidents.lines(found, CLOSED))


def load(**changes: str) -> Settings:
    return load_settings({**GOOD, **changes}, NEEDS_WORKER)


TELEGRAM = {"TELEGRAM_BOT_TOKEN": "12345678:AAhunter2-hunter2_hunter2", "TELEGRAM_CHAT_ID": "-1"}


def test_nobody_is_told_unless_the_settings_name_somebody() -> None:
    assert load().notices is None
    # Settings of another effect alone name nobody.
    assert load(FORWARD_URL="https://a.example/", FORWARD_SECRET=SECRET, **TELEGRAM).notices is None
    assert set(notices.channels(load())) == set()
    given = load(
        NOTICE_URL="https://ops.example/x", FORWARD_SECRET=SECRET, NOTICE_TELEGRAM="true", **TELEGRAM
    )
    assert set(notices.channels(given)) == {"webhook", "telegram"}
    assert given.forward is None
    assert "hunter2" not in repr(given)
    # Only the worker tells.
    assert (
        load_settings({**GOOD, "NOTICE_URL": "https://ops.example/x", "FORWARD_SECRET": SECRET}).notices
        is None
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"NOTICE_URL": "https://ops.example/x"}, "FORWARD_SECRET"),
        ({"NOTICE_URL": "http://ops.example/x", "FORWARD_SECRET": SECRET}, "NOTICE_URL cannot be used"),
        ({"NOTICE_URL": "https://ops.example/x", "FORWARD_SECRET": "short"}, "FORWARD_SECRET cannot be used"),
        ({"NOTICE_TELEGRAM": "true"}, "TELEGRAM_CHAT_ID"),
        ({"NOTICE_TELEGRAM": "perhaps"}, "NOTICE_TELEGRAM"),
        ({"NOTICE_STUCK_SECONDS": "0"}, "NOTICE_STUCK_SECONDS"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(**changes)
