"""The judge of the fault tests condemns what it has to: every kind of difference is named, and agreement is not."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.falfake import new_key
from tests.support.ledger import (
    MALFORMED,
    PORTRAIT,
    STYLE,
    Attempt,
    Event,
    Ledger,
    Observed,
    compare,
    unsettled,
)


def attempt(status: int | None, number: int | None = None, duplicate: bool = False) -> Attempt:
    return Attempt(status, 0.1, 0.0, "http://one", {"delivery_id": number, "duplicate": duplicate})


def archived(number: int, event: Event) -> bytes:
    document = {
        "delivery_id": number,
        "source": event.source,
        "request_id": event.request_id,
        "body_base64": base64.b64encode(event.body).decode(),
    }
    return json.dumps(document).encode() + b"\n"


class Case:
    """Three deliveries, one of them kept aside, and everything as it should be."""

    def __init__(self) -> None:
        self.ledger = Ledger("case", "http://media.test", new_key())
        self.portrait, self.style, self.malformed = (
            self.ledger.event(kind) for kind in (PORTRAIT, STYLE, MALFORMED)
        )
        self.stale = self.ledger.event(STYLE, shift=-600, request_id=self.style.request_id)
        self.seen = Observed()
        for number, event in enumerate((self.portrait, self.style, self.malformed, self.stale), start=1):
            self.ledger.note(event, attempt(None))
            self.ledger.note(event, attempt(200, number))
            self.seen.deliveries.append(
                {
                    "id": number, "source": event.source, "request_id": event.request_id,
                    "body_sha256": event.sha256, "real_sha256": event.sha256, "attempts": 1, "last_error": None,
                    "state": "dead" if event.aside else "done", "aside": event.aside or None,
                }
            )  # fmt: skip
        self.seen.contents["deliveries/segments/one"] = archived(1, self.portrait) + archived(2, self.style)
        length = len(archived(1, self.portrait))
        for number, event in ((1, self.portrait), (2, self.style)):
            place = {"key": "deliveries/segments/one", "offset": (number - 1) * length}
            place["length"] = len(archived(number, event))
            names = ("avatar", "stream", "archive")
            self.seen.effects[number] = {name: {"state": "done", "detail": {}} for name in names}
            self.seen.effects[number]["raw_archive"] = {"state": "done", "detail": place}
            self.seen.avatars[event.request_id] = "completed"
            self.seen.updates[event.request_id] = 1
            self.seen.entries.append({"delivery_id": str(number)})
        self.seen.files["model"] = b"whole"
        self.seen.contents["webhooks/fal/x/y/model"] = b"whole"

    def faults(self) -> list[str]:
        return compare([self.ledger], self.seen)

    def add_row(self, **changes: Any) -> None:
        self.seen.deliveries.append(copy.deepcopy(self.seen.deliveries[0]) | {"id": 9} | changes)


def forge(case: Case, status: int) -> None:
    event = case.ledger.forgery()
    case.ledger.note(event, attempt(status))


def test_agreement_is_no_fault() -> None:
    case = Case()
    forge(case, 401)
    assert case.faults() == []
    assert unsettled([case.ledger], case.seen) == []


TAMPERINGS: dict[str, tuple[str, Callable[[Case], Any]]] = {
    "a row is gone": ("lost", lambda case: case.seen.deliveries.pop(1)),
    "a row stands twice": ("doubled", lambda case: case.add_row()),
    "a row that nobody sent": ("forged", lambda case: case.add_row(request_id="other")),
    "another body stands beside": ("forged", lambda case: case.seen.variants.append((1, "00"))),
    "a forgery was believed": ("forged", lambda case: forge(case, 200)),
    "a body was changed": ("changed", lambda case: case.seen.deliveries[0].update(real_sha256="00")),
    "an answer named another row": ("lied", lambda case: case.ledger.note(case.style, attempt(200, 1))),
    "arrivals were not counted": ("miscounted", lambda case: case.seen.deliveries[0].update(attempts=0)),
    "arrivals were invented": ("miscounted", lambda case: case.seen.deliveries[0].update(attempts=3)),
    "a genuine one was refused": ("wrong answer", lambda case: case.ledger.note(case.style, attempt(401))),
    "work is left": ("not done", lambda case: case.seen.deliveries[0].update(state="retry")),
    "what is aside was processed": (
        "processed",
        lambda case: case.seen.deliveries[2].update(state="done"),
    ),
    "what is stale had an effect": (
        "processed",
        lambda case: case.seen.effects[4].update(avatar={"state": "done"}),
    ),
    "an effect is missing": ("effect missing", lambda case: case.seen.effects[1].pop("avatar")),
    "an avatar was changed twice": (
        "avatar",
        lambda case: case.seen.updates.update({case.portrait.request_id: 1}),
    ),
    "an avatar was not changed": ("avatar", lambda case: case.seen.updates.clear()),
    "an avatar went wrong": (
        "avatar",
        lambda case: case.seen.avatars.update({case.style.request_id: "error"}),
    ),
    "an entry is missing": ("stream", lambda case: case.seen.entries.pop()),
    "an entry stands twice": ("stream", lambda case: case.seen.entries.append({"delivery_id": "1"})),
    "an entry of nothing": ("stream", lambda case: case.seen.entries.append({"delivery_id": "77"})),
    "an object is gone": ("archive", lambda case: case.seen.contents.pop("deliveries/segments/one")),
    "an archived body differs": (
        "archive",
        lambda case: case.seen.contents.update(
            {"deliveries/segments/one": archived(1, case.style) + archived(2, case.style)}
        ),
    ),
    "two share a place": (
        "archive",
        lambda case: case.seen.effects[2]["raw_archive"]["detail"].update(offset=0),
    ),
    "an object that nobody sent": (
        "archive",
        lambda case: case.seen.contents.update({"deliveries/more": b'{"delivery_id": 1}\n'}),
    ),
    "half a file": (
        "archive",
        lambda case: case.seen.contents.update({"webhooks/fal/x/y/model": b"who"}),
    ),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_every_difference_is_named(name: str) -> None:
    word, tamper = TAMPERINGS[name]
    case = Case()
    tamper(case)
    assert any(fault.startswith(word) for fault in case.faults()), case.faults()


def test_what_is_on_its_way_is_waited_for() -> None:
    case = Case()
    case.seen.deliveries[0]["state"] = "leased"
    del case.seen.deliveries[1]
    case.seen.spooled = 1
    assert len(unsettled([case.ledger], case.seen)) == 3


def test_lost_answers_of_the_database_excuse_a_count_but_nothing_else() -> None:
    case = Case()
    case.ledger.ambiguous = True
    case.seen.deliveries[0]["attempts"] = 5
    assert case.faults() == []
    case.seen.deliveries.pop(1)
    assert [fault.split(":")[0] for fault in case.faults()] != []
