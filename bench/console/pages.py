"""What is asked for: every page of the console with each of its filters, previews of actions, and the same as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from urllib.parse import urlencode

from bench.console.place import Known

API: Final = "/api/v1/console"
NOWHERE: Final = "a text that stands nowhere"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. ``form`` makes it a POST of a page, ``json`` one of the API. ``who``: an account, for the API a role."""

    name: str
    path: str
    form: Mapping[str, str] | None = None
    json: Mapping[str, Any] | None = None
    who: str = "maria"

    @property
    def api(self) -> bool:
        """Whether a token is sent."""
        return self.path.startswith(API)


def everything(known: Known) -> list[Asked]:
    """All of it, by pages."""
    return [
        *_overview(),
        *_deliveries(known),
        *_one(known),
        *_queues(known),
        *_rest(known),
        *_previews(known),
        *_api(known),
    ]


def _ago(known: Known, **span: float) -> str:
    """A moment before the newest delivery: filling has taken a while."""
    return (known.newest - timedelta(**span)).isoformat()


def _overview() -> list[Asked]:
    charts = [
        f"/charts/{name}-{theme}.svg" for name in ("deliveries", "latency") for theme in ("light", "dark")
    ]
    return [
        Asked("Overview", "/"),
        Asked("Overview, viewer", "/", who="viktor"),
        *(Asked(f"Overview: {path[8:]}", path) for path in charts),
    ]


def _filters(known: Known) -> dict[str, dict[str, Any]]:
    hour, day, weeks = _ago(known, hours=1), _ago(known, hours=24), _ago(known, days=20)
    return {
        "none": {},
        "a page in the middle": {"after": known.middle},
        "a page before the middle": {"before": known.middle},
        "the oldest page": {"before": known.first - 1},
        **{f"state {state}": {"state": state} for state in ("pending", "leased", "retry", "parked", "done", "dead")},
        **{f"status {status}": {"status": status} for status in ("completed", "failed", "cancelled", "unknown")},
        **{f"source {source}": {"source": source} for source in ("fal", "manual", "nobody")},
        "since 1 h": {"since": hour},
        "since 24 h": {"since": day},
        "since 20 d": {"since": weeks},
        "until 20 d ago": {"until": weeks},
        "an hour, long ago": {"since": _ago(known, hours=101), "until": _ago(known, hours=100)},
        "since 20 d, in the middle": {"since": weeks, "after": known.middle},
        "since 24 h, failed": {"since": day, "status": "failed"},
        "since 24 h, cancelled": {"since": day, "status": "cancelled"},
        "since 24 h, manual": {"since": day, "source": "manual"},
        "since 24 h, failed, manual": {"since": day, "status": "failed", "source": "manual"},
        "since 24 h, done": {"since": day, "state": "done"},
        "since 24 h, done, failed": {"since": day, "state": "done", "status": "failed"},
        "since 24 h, dead": {"since": day, "state": "dead"},
        "since 20 d, nobody": {"since": weeks, "source": "nobody"},
        "request": {"request_id": known.request_id},
        "request that never was": {"request_id": "nowhere"},
        "avatar": {"avatar_id": known.avatar_id},
        "avatar that the bot does not have": {"avatar_id": "nobody"},
        "text, within 1 h": {"since": hour, "text": NOWHERE},
        "text, within 1 h, of all": {"since": hour, "text": "diffusers_lora_file"},
        "text with letters of JSON": {"since": hour, "text": "\u0410\u0439\u0448\u0430"},
        "text, within 20 d": {"since": weeks, "text": NOWHERE},
        "text, in the middle": {"since": weeks, "text": NOWHERE, "after": known.middle},
        "text, failed, since 24 h": {"since": day, "status": "failed", "text": NOWHERE},
        "text, dead": {"since": weeks, "state": "dead", "text": NOWHERE},
        "reason": {"reason": "nowhere"},
        "reason, since 24 h": {"reason": "nowhere", "since": day},
        "kept aside": {"aside": "any"},
    }  # fmt: skip


def _deliveries(known: Known) -> list[Asked]:
    return [
        Asked(f"Deliveries: {name}", f"/deliveries?{urlencode(values)}")
        for name, values in _filters(known).items()
    ]


def _one(known: Known) -> list[Asked]:
    return [
        Asked("Delivery", f"/deliveries/{known.done}"),
        Asked("Delivery, viewer", f"/deliveries/{known.done}", who="viktor"),
        Asked("Delivery, dead", f"/deliveries/{known.dead}"),
    ]


def _queues(known: Known) -> list[Asked]:
    day, weeks = _ago(known, hours=24), _ago(known, days=20)
    filters: dict[str, dict[str, Any]] = {
        "none": {}, "in the middle": {"after": known.dead_middle}, "since 24 h": {"since": day},
        "until 20 d ago": {"until": weeks}, "failed": {"status": "failed"}, "manual": {"source": "manual"},
        "request": {"request_id": known.request_id}, "avatar": {"avatar_id": known.avatar_id},
        "avatar that the bot does not have": {"avatar_id": "nobody"}, "text": {"text": NOWHERE, "since": weeks},
    }  # fmt: skip
    found = [
        Asked(f"{name}: {filtered}", f"{path}?{urlencode(values)}")
        for name, path in (("Dead letters", "/dead-letters"), ("Parked", "/parked"))
        for filtered, values in filters.items()
    ]
    return [*found, Asked("Dead letters: kept aside", "/dead-letters?aside=any")]


def _rest(known: Known) -> list[Asked]:
    return [
        Asked("Avatars", "/avatars"),
        Asked("Deployments", "/deployments"),
        Asked("Live", "/live"),
        Asked("What was done", f"/done/dead-letters.replay/{known.record}/{known.record + 4}?status=failed"),
    ]


def _previews(known: Known) -> list[Asked]:
    day, weeks = _ago(known, hours=24), _ago(known, days=20)
    asked: dict[str, tuple[str, dict[str, str]]] = {
        "replay all dead letters": ("dead-letters.replay", {}),
        "replay, since 24 h": ("dead-letters.replay", {"since": day}),
        "replay, failed": ("dead-letters.replay", {"status": "failed"}),
        "replay, a text": ("dead-letters.replay", {"since": weeks, "text": NOWHERE}),
        "replay, an avatar": ("dead-letters.replay", {"avatar_id": known.avatar_id}),
        "replay, an avatar that the bot does not have": ("dead-letters.replay", {"avatar_id": "nobody"}),
        "discard all dead letters": ("dead-letters.discard", {}),
        "discard, kept aside": ("dead-letters.discard", {"aside": "any"}),
        "try all parked": ("parked.retry", {}),
        "discard all parked": ("parked.discard", {}),
        "replay one": ("events.replay", {"id": str(known.dead)}),
    }
    return [
        Asked(f"Preview: {name}", f"/actions/{action}/preview", form=form)
        for name, (action, form) in asked.items()
    ]


def _api(known: Known) -> list[Asked]:
    lists = {
        name: values
        for name, values in _filters(known).items()
        if name in ("none", "a page in the middle", "since 24 h", "since 24 h, failed", "since 24 h, manual",
                    "text, within 1 h", "reason", "avatar", "avatar that the bot does not have", "request")
    }  # fmt: skip
    return [
        Asked("API: overview", f"{API}/overview", who="viewer"),
        *(Asked(f"API: deliveries, {name}", f"{API}/deliveries?{urlencode(values)}", who="operator")
          for name, values in lists.items()),
        Asked("API: deliveries, 200 at once", f"{API}/deliveries?limit=200", who="viewer"),
        Asked("API: delivery", f"{API}/deliveries/{known.done}", who="operator"),
        Asked("API: delivery, viewer", f"{API}/deliveries/{known.done}", who="viewer"),
        Asked("API: dead letters", f"{API}/dead-letters", who="viewer"),
        Asked("API: parked", f"{API}/parked", who="viewer"),
        Asked("API: avatars", f"{API}/avatars", who="viewer"),
        Asked("API: deployments", f"{API}/deployments", who="viewer"),
        Asked("API: document", f"{API}/openapi.json", who="viewer"),
        *(Asked(f"API: {action}, counted", f"{API}/actions/{action}", json={"filter": {}}, who="operator")
          for action in ("dead-letters.replay", "dead-letters.discard", "parked.retry", "parked.discard")),
        Asked("API: events.replay, counted", f"{API}/actions/events.replay", json={"ids": [known.dead]}, who="operator"),
    ]  # fmt: skip
