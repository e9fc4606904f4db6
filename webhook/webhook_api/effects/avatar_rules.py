"""What a report makes of an avatar: pure rules, those of the replaced system and decisions 0121 and 0431."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlsplit

from webhook_api.bodies import Event, clean_text, training_type
from webhook_api.effects.avatar_table import Column
from webhook_api.effects.base import Delivery
from webhook_api.media import MediaError, MediaPolicy, check_url
from webhook_api.states import EffectError, Failure

FINISHED: Final = frozenset({"completed", "error", "cancelled"})
TARGETS: Final[Mapping[str, str]] = {
    "queued": "training",
    "in_progress": "training",
    "completed": "completed",
    "failed": "error",
    "cancelled": "cancelled",
}
"""The avatar's status that belongs to an event's."""
MAX_RESPONSE_TEXT: Final = 4096
"""Characters of a string in `fal_response_data`: longer ones are embedded files, which are archived elsewhere."""


@dataclass(frozen=True, slots=True)
class Avatar:
    """What of the row decides. Status and training type in lower case, whatever the row's spelling."""

    status: str
    training_type: str | None
    progress: int | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What an event tells about an avatar, apart from the row."""

    status: str
    progress: int | None
    payload: Any
    error: str | None
    payload_error: str | None
    type_hints: tuple[str | None, ...]
    finetune_id: str | None
    received_at: datetime
    media: MediaPolicy
    """Whose addresses the bot may be given."""


@dataclass(frozen=True, slots=True)
class Change:
    """The columns to set (before spelling), or none; and what to record."""

    values: dict[str, Any]
    outcome: str


def facts(event: Event, delivery: Delivery, media: MediaPolicy) -> Facts:
    """What this delivery tells."""
    return Facts(
        status=event.status,
        progress=event.progress,
        payload=event.payload,
        error=event.error or event.message,
        payload_error=event.payload_error,
        # The query's hint is outside fal's signature, the body's own is inside it; neither beats the row.
        type_hints=(training_type(delivery.training_type_hint), training_type(event.hints.training_type)),
        finetune_id=event.hints.finetune_id,
        received_at=delivery.first_seen_at,
        media=media,
    )


def allowed(current: str, target: str) -> bool:
    """Whether an avatar may go from `current` to `target`.

    A finished one stays as it is, with one exception: a result that arrives after an error (fetched again, or sent
    again) was paid for and is not thrown away.
    """
    if current not in FINISHED:
        return True
    return current == "error" and target == "completed"


def plan(avatar: Avatar, told: Facts, columns: Mapping[str, Column]) -> Change:
    """What to write into the row. Pure; the rules are those of the replaced system.

    Raises `EffectError` (permanent) when a result lies on a host that is not allowed: the row stays as it is.
    """
    target = TARGETS[told.status]
    if not allowed(avatar.status, target):
        return Change({}, f"ignored: the avatar is already {avatar.status}")
    values: dict[str, Any] = {"status": target}
    if target == "training":
        values["training_progress"] = forward(avatar.progress, told.progress)
        values["training_started_at"] = told.received_at
    elif target == "completed":
        values |= _completion(avatar, told, columns)
    elif target == "error":
        values["training_error"] = told.error or "fal.ai reported a failure without saying why"
    if told.payload is not None:
        values["fal_response_data"] = response_data(told.payload)
    return Change(values, str(values["status"]))


def forward(current: int | None, reported: int | None) -> int | None:
    """Progress within 0..100 that never goes backwards."""
    known = [min(100, max(0, value)) for value in (current, reported) if value is not None]
    return max(known, default=None)


def _completion(avatar: Avatar, told: Facts, columns: Mapping[str, Column]) -> dict[str, Any]:
    """A finished training: its results by the avatar's type, or the error that says what was missing."""
    kind = avatar.training_type or next((hint for hint in told.type_hints if hint), None)
    results, faults = _results(kind, told, columns)
    if faults:
        lacking = "; ".join(faults)
        if told.payload_error:
            lacking += f"; fal.ai: {told.payload_error}"
        return {"status": "error", "training_error": f"The training is reported as completed, but {lacking}"}
    return {
        **results,
        "training_progress": 100,
        "training_completed_at": told.received_at,
        "training_error": None,
    }


def _results(
    kind: str | None, told: Facts, columns: Mapping[str, Column]
) -> tuple[dict[str, Any], list[str]]:
    payload = told.payload if isinstance(told.payload, Mapping) else {}
    if kind == "portrait":
        lora, lora_fault = _url(payload, "diffusers_lora_file", columns, told.media)
        config, config_fault = _url(payload, "config_file", columns, told.media)
        found = {"diffusers_lora_file_url": lora, "config_file_url": config, "finetune_id": None}
        return found, [fault for fault in (lora_fault, config_fault) if fault]
    if kind == "style":
        finetune, fault = _finetune(payload, told, columns)
        found = {"finetune_id": finetune, "diffusers_lora_file_url": None, "config_file_url": None}
        return found, [fault] if fault else []
    return {}, ["its training type is unknown: neither the avatar nor the delivery names one"]


def _url(
    payload: Mapping[str, Any], name: str, columns: Mapping[str, Column], media: MediaPolicy
) -> tuple[str | None, str | None]:
    """URL of a file in the payload, or what is wrong with it.

    Raises `EffectError` for a host that is not allowed, and for a file that came inside the delivery: the training
    succeeded, so the avatar is no error, but its row takes an address and there is none.
    """
    entry = payload.get(name)
    url = entry.get("url") if isinstance(entry, Mapping) else entry if isinstance(entry, str) else None
    if not isinstance(url, str) or not url:
        return None, f"{name} is missing"
    if url[:5].lower() == "data:":
        message = f"{name} came inside the delivery, without an address: the file is archived, and somebody has to decide"
        raise EffectError(Failure.PERMANENT, "avatar_file_inline", message)
    try:
        parts = urlsplit(url)
        valid = (
            parts.scheme in ("https", "http")
            and bool(parts.hostname)
            and url.isprintable()
            and " " not in url
        )
    except ValueError:
        valid = False
    if not valid:
        return None, f"{name} holds no web address"
    column = columns.get(f"{name}_url")
    if column is not None and column.limit is not None and len(url) > column.limit:
        return None, f"the address of {name} has {len(url)} characters, and the avatar holds {column.limit}"
    try:
        check_url(url, media)
    except MediaError as error:
        raise EffectError(Failure.PERMANENT, "avatar_url_refused", f"{name}: {error}") from None
    return url, None


def _finetune(
    payload: Mapping[str, Any], told: Facts, columns: Mapping[str, Column]
) -> tuple[str | None, str | None]:
    value = payload.get("finetune_id") or told.finetune_id
    if not isinstance(value, str) or not value.strip():
        return None, "finetune_id is missing"
    column = columns.get("finetune_id")
    if column is not None and column.limit is not None and len(value) > column.limit:
        return None, f"finetune_id has {len(value)} characters, and the avatar holds {column.limit}"
    return value, None


def response_data(payload: Any) -> str:
    """The payload as JSON text that json and jsonb take: no NUL, no surrogates, no NaN, no embedded files."""
    return json.dumps(_storable(payload), ensure_ascii=False, allow_nan=False)


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        text = clean_text(value)
        if len(text) <= MAX_RESPONSE_TEXT:
            return text
        return f"{text[:64]}… ({len(text)} characters, see the raw delivery)"
    if isinstance(value, Mapping):
        return {clean_text(str(name))[:MAX_RESPONSE_TEXT]: _storable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
