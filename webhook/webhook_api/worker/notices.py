"""Tells people of incidents (`webhook_api.incidents`): a webhook or Telegram, once when one begins and once when it is over.

Every worker looks; an advisory lock makes one of them the one that acts, and the rows say who was told what, so
restarts and further workers tell nothing twice. A notice is recorded after it has arrived: one whose answer was lost is
sent again, to a webhook under the same id. Off unless the settings name somebody.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import psycopg

from webhook_api import incidents
from webhook_api.config import NoticeSettings, Settings
from webhook_api.db import Connection, DatabaseUnavailable, connect, sole
from webhook_api.effects.forward import ForwardOutlet, refusal
from webhook_api.effects.telegram import TelegramOutlet, text
from webhook_api.gauges import inbox
from webhook_api.incidents import Incident
from webhook_api.metrics_upkeep import INCIDENTS_OPEN, NOTICES
from webhook_api.outbound import Outbound
from webhook_api.states import EffectError

LOCK_KEY: Final = 0x41495348_4E4F5431
"""The advisory lock of whoever looks and tells (an arbitrary, fixed number)."""
STATEMENT_SECONDS: Final = 6.0
FORGET_SECONDS: Final = 86_400.0
"""An incident that has been over for so long is no longer told: it is no news."""

_READ: Final = """
select id, kind, opened_at, closed_at, extract(epoch from now() - last_seen_at)::float8, deliveries, oldest_seconds, told
from webhook.incidents
where closed_at is null or closed_at > now() - make_interval(secs => %s)
order by id
"""
_OPEN: Final = """
insert into webhook.incidents (kind, deliveries, oldest_seconds) values (%s, %s, %s)
on conflict (kind) where closed_at is null do nothing
"""
_SEEN: Final = "update webhook.incidents set last_seen_at = now() where id = any(%s) and closed_at is null"
_CLOSE: Final = "update webhook.incidents set closed_at = now() where id = any(%s) and closed_at is null"
_TOLD: Final = (
    "update webhook.incidents set told = told || jsonb_build_object(%s::text, %s::text) where id = %s"
)

log = logging.getLogger(__name__)


class Channel(Protocol):
    """Somebody who is told."""

    def tell(self, incident: Incident, notice: str, stop: Callable[[], bool]) -> None:
        """Send one notice. Raises `EffectError`."""
        ...


class WebhookChannel:
    """A POST, signed like effect `forward`."""

    def __init__(self, outlet: ForwardOutlet) -> None:
        self._outlet = outlet

    def tell(self, incident: Incident, notice: str, stop: Callable[[], bool]) -> None:
        """Send one notice; any 2xx is an arrival. Raises `EffectError`."""
        body = json.dumps(incidents.document(incident, notice), separators=(",", ":")).encode()
        answer = self._outlet.post(incidents.message_id(incident, notice), body, stop)
        if not answer.good:
            raise refusal(answer, self._outlet.place)


class TelegramChannel:
    """A message to the chat that hears of trainings."""

    def __init__(self, outlet: TelegramOutlet) -> None:
        self._outlet = outlet

    def tell(self, incident: Incident, notice: str, stop: Callable[[], bool]) -> None:
        """Send one notice. Raises `EffectError`."""
        said = text(incidents.title(incident, notice), incidents.lines(incident, notice), repeated=False)
        self._outlet.say(said, stop)


def channels(settings: Settings) -> dict[str, Channel]:
    """Those that the settings name. Each has a breaker of its own: deliveries and notices don't hold each other up."""
    found: dict[str, Channel] = {}
    wanted = settings.notices
    if wanted is None:
        return found
    if wanted.place is not None:
        outbound = Outbound("notice", wanted.place, threading.BoundedSemaphore(1))
        found["webhook"] = WebhookChannel(ForwardOutlet(outbound, wanted.keys))
    if wanted.telegram and settings.telegram is not None:
        given = settings.telegram
        outbound = Outbound("notice_telegram", given.place, threading.BoundedSemaphore(1))
        found["telegram"] = TelegramChannel(
            TelegramOutlet(outbound, given.token, given.chat_id, given.notify)
        )
    return found


def read(connection: Connection) -> list[Incident]:
    """The incidents that are open, and those that were a day ago."""
    return [Incident(*row) for row in connection.execute(_READ, (FORGET_SECONDS,)).fetchall()]


def observe(connection: Connection, wanted: NoticeSettings) -> list[Incident]:
    """Look at the inbox and bring the incidents up to date; returns them as they stand then."""
    with connection.transaction():
        seen = incidents.sightings(inbox(connection), float(wanted.stuck_seconds))
        found = incidents.changes(seen, read(connection), float(wanted.settle_seconds))
        for kind, sighting in found.opened.items():
            connection.execute(_OPEN, (kind, sighting.deliveries, sighting.oldest_seconds))
            log.error("incident_opened", extra={"kind": kind, "deliveries": sighting.deliveries})
        connection.execute(_SEEN, (list(found.seen),))
        connection.execute(_CLOSE, (list(found.closed),))
        for identifier in found.closed:
            log.info("incident_closed", extra={"incident": identifier})
    return read(connection)


def tell(
    connection: Connection, told: Mapping[str, Channel], known: list[Incident], stop: Callable[[], bool]
) -> None:
    """Send what is due, and record what has arrived. What fails is due again at the next look."""
    for incident in known:
        for name, channel in told.items():
            notice = incidents.due(incident, name)
            if notice is None or stop():
                continue
            extra = {"incident": incident.id, "kind": incident.kind, "notice": notice, "channel": name}
            try:
                channel.tell(incident, notice, stop)
            except EffectError as error:
                NOTICES.labels(outcome="failed").inc()
                log.warning("notice_failed", extra={**extra, "error": error.describe()})
                continue
            connection.execute(_TOLD, (name, notice, incident.id))
            NOTICES.labels(outcome="sent").inc()
            log.info("notice_sent", extra=extra)


def look(settings: Settings, told: Mapping[str, Channel], stop: Callable[[], bool]) -> bool:
    """One look. False where another worker has the turn. Raises psycopg.Error, DatabaseUnavailable."""
    wanted = settings.notices
    assert wanted is not None  # noqa: S101  (for the type checker; `job` asks)
    name = f"webhook-notices {settings.instance_id}"
    with (
        connect(settings.database_url, name, statement_timeout=STATEMENT_SECONDS) as connection,
        sole(connection, LOCK_KEY) as mine,
    ):
        known = observe(connection, wanted) if mine else read(connection)
        _show(known)
        if mine:
            tell(connection, told, known, stop)
    return mine


def _show(known: list[Incident]) -> None:
    open_ones = {incident.kind for incident in known if incident.closed_at is None}
    for kind in incidents.KINDS:
        INCIDENTS_OPEN.labels(kind=kind).set(1.0 if kind in open_ones else 0.0)


def job(settings: Settings, stop: threading.Event) -> None:
    """Look again and again until `stop`. For a thread of the worker."""
    told = channels(settings)
    if settings.notices is None or not told:
        return
    while not stop.is_set():
        try:
            look(settings, told, stop.is_set)
        except (psycopg.Error, DatabaseUnavailable) as error:
            log.warning("notices_unavailable", extra={"error": str(error)[:300]})
        except Exception:  # a defect must not end the worker's other work
            log.exception("notices_defect")
        stop.wait(float(settings.notices.every_seconds))
