"""What a delivery's body says: fal's real bodies, the older ones and other senders', read into one :class:`Event`.

fal (contract: fal.ai, model-apis/inference/webhooks) sends ``{"request_id", "gateway_request_id", "status": "OK" or
"ERROR", "payload", "error", "payload_error"}``. The bot and the older service send ``{"request_id" or "finetune_id",
"status": queued … cancelled, "progress", "message", "result", "error", "user_id", "avatar_id", "training_type",
"comment": "user_id=…;avatar_id=…;training_type=…"}``. Replicate (replicate.com/docs, webhooks) sends its prediction or
training: ``{"id", "status": starting … canceled, "output", "error", "logs", "metrics", …}``.

The raw bytes are the record; what stands here is a view of them that is safe to hand on: no NaN, no NUL, no lone
surrogate, no number that Python refuses to print, bounded depth. Each such repair is named in ``anomalies``.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

STATUSES: Final = ("queued", "in_progress", "completed", "failed", "cancelled", "unknown")
FINAL_STATUSES: Final = frozenset({"completed", "failed", "cancelled"})
TRAINING_TYPES: Final = frozenset({"portrait", "style"})
MAX_DEPTH: Final = 100
"""Levels of lists and objects. fal's deepest known payload has 6."""
MAX_ITEMS: Final = 100_000
"""Members of all lists and objects together. A parsed item takes up to 100 times the bytes of its text."""
LARGE: Final = 65_536
"""Bytes of a body that is read while no other large one is: its tree may take a hundred times the memory."""
MAX_DIGITS: Final = 64
"""Digits of a whole number; seeds have up to 20. Longer ones stay text (Python refuses to print 4,301)."""
MAX_TEXT: Final = 2000
"""Characters of an error or a message that are handed on."""

_STATUS_NAMES: Final[Mapping[str, str]] = {
    "ok": "completed",
    "completed": "completed",
    "error": "failed",
    "failed": "failed",
    "cancelled": "cancelled",
    "canceled": "cancelled",
    "queued": "queued",
    "in_queue": "queued",
    "in_progress": "in_progress",
}
STATUS_WORDS: Final = tuple(_STATUS_NAMES)
"""Every word for a status that fal, the bot and older senders use, in lower case."""
_REPLICATE_STATUS_NAMES: Final[Mapping[str, str]] = {
    "starting": "queued",
    "processing": "in_progress",
    "succeeded": "completed",
    "failed": "failed",
    "canceled": "cancelled",
    "aborted": "cancelled",
}
_GATEWAY_ID: Final = re.compile(rb'"gateway_request_id"\s*:\s*"[^"\\]*"\s*,?')
_ID: Final = re.compile(r"[\x21-\x7e]{1,255}")
_ASIDE: Final = "aside"
_COMMENT_ITEM: Final = re.compile(r"(user_id|avatar_id|training_type)=([\x21-\x3a\x3c-\x7e]{1,100})")
_LARGE_ONE: Final = threading.Lock()
_REPLACED: Final = re.compile("[\x00\ud800-\udfff]")


class BodyError(Exception):
    """The body cannot be read as an event.

    ``reason``: empty, not_utf8, not_json, too_deep, too_complex, not_an_object, missing_id, invalid_id, invalid_status.
    ``request_id`` is there when the body had a usable one.
    """

    def __init__(self, reason: str, message: str, request_id: str | None = None) -> None:
        self.reason = reason
        self.request_id = request_id
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Hints:
    """What the body says about the avatar. Not proven by anything: never the only ground for a change."""

    user_id: str | None = None
    avatar_id: str | None = None
    training_type: str | None = None
    """``portrait`` or ``style``, else ``None``."""
    finetune_id: str | None = None
    """Top-level ``finetune_id`` of an older body. fal's own stands in the payload."""


@dataclass(frozen=True, slots=True)
class Event:
    """One report about one training."""

    request_id: str
    status: str
    """One of :data:`STATUSES`, never ``unknown`` when the body could be read."""
    status_text: str
    """The status as it was written."""
    shape: str
    """``fal``, ``legacy`` or ``replicate``."""
    payload: Any = None
    """The model's output (fal's ``payload``, the older ``result``), cleaned. ``None``: there was none."""
    error: str | None = None
    """What went wrong, with fal's details in one line; at most :data:`MAX_TEXT` characters."""
    payload_error: str | None = None
    """Why fal sent no payload although the job succeeded: fetch the result from the queue API."""
    message: str | None = None
    progress: int | None = None
    """0 to 100."""
    gateway_request_id: str | None = None
    hints: Hints = field(default_factory=Hints)
    anomalies: frozenset[str] = frozenset()
    """Of not_a_number, huge_number, control_text, duplicate_key, invalid_field."""

    @property
    def final(self) -> bool:
        """Whether nothing comes after this status."""
        return self.status in FINAL_STATUSES


def parse(body: bytes, shape: str = "fal") -> Event:
    """Read a body of the given shape. Raises :class:`BodyError`; any other exception is a defect.

    ``shape`` is a name of :data:`SHAPES`: ``fal`` (which takes the older bodies too) or ``replicate``.
    """
    if len(body) <= LARGE:
        return SHAPES[shape](body)
    with _LARGE_ONE:
        return SHAPES[shape](body)


def _fal(body: bytes) -> Event:
    reader = _Reader()
    document = reader.document(body)
    request_id = reader.request_id(document, "request_id", "finetune_id")
    status_text, status = reader.status(document, request_id, _STATUS_NAMES)
    fal = status_text in {"OK", "ERROR"} or "payload" in document
    payload = document.get("payload") if fal else document.get("result")
    return Event(
        request_id=request_id,
        status=status,
        status_text=status_text,
        shape="fal" if fal else "legacy",
        payload=payload,
        error=_error(document.get("error"), payload if status == "failed" else None),
        payload_error=_short(document.get("payload_error")),
        message=_short(document.get("message")),
        progress=reader.progress(document.get("progress")),
        gateway_request_id=reader.identifier(document, "gateway_request_id"),
        hints=reader.hints(document),
        anomalies=frozenset(reader.anomalies),
    )


def _replicate(body: bytes) -> Event:
    reader = _Reader()
    document = reader.document(body)
    request_id = reader.request_id(document, "id")
    status_text, status = reader.status(document, request_id, _REPLICATE_STATUS_NAMES)
    return Event(
        request_id=request_id,
        status=status,
        status_text=status_text,
        shape="replicate",
        payload=document.get("output"),
        error=_error(document.get("error"), None),
        anomalies=frozenset(reader.anomalies),
    )


SHAPES: Final[Mapping[str, Callable[[bytes], Event]]] = {"fal": _fal, "replicate": _replicate}
"""Every shape that a source can be given, by name."""


def identity(body: bytes) -> str:
    """SHA-256 (hex) of what a body reports: of its bytes without ``gateway_request_id``.

    That id names fal's last internal try, so it may differ between two deliveries of the same result.
    """
    return hashlib.sha256(_GATEWAY_ID.sub(b"", body)).hexdigest()


def dedup_key(status: str, identity: str) -> str:
    """What makes two deliveries of one request the same event: the same status, and the same report.

    A result that differs from one that was received before (the full one after one without a payload, say) was paid for
    as well, so it is an event of its own; the rules for avatars decide what it may still change.
    """
    return f"{status}:{identity[:32]}"


def aside_key(reason: str, dedup_key: str) -> str:
    """Identity of a delivery that is kept aside: another one than that of the same event arriving in order."""
    return f"{_ASIDE}:{reason}:{dedup_key}"


def normal_key(dedup_key: str) -> str:
    """The identity that a delivery kept aside gets when it is processed after all. The inverse of `aside_key`."""
    parts = dedup_key.split(":", 2)
    return parts[2] if len(parts) == 3 and parts[0] == _ASIDE else dedup_key


def _items(body: bytes) -> int:
    """How many lists, objects and members the text can at most have."""
    return body.count(b",") + body.count(b"[") + body.count(b"{")


def _too_complex(body: bytes) -> bool:
    """Whether there are more than MAX_ITEMS, not counting what stands inside texts. In linear time and little memory."""
    if _items(body) <= MAX_ITEMS:
        return False
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    # An item has two texts at most, its name and its value.
    if plain.count(b'"') > 4 * MAX_ITEMS + 2:
        return True
    return sum(map(_items, plain.split(b'"')[::2])) > MAX_ITEMS


def parse_comment(comment: str) -> dict[str, str]:
    """Read ``user_id=123;avatar_id=abc;training_type=portrait``. Unknown and malformed items are left out."""
    items = (_COMMENT_ITEM.fullmatch(item.strip()) for item in comment[:1000].split(";"))
    return {item[1]: item[2] for item in items if item}


def clean_text(text: str) -> str:
    """Replace NUL and lone surrogates, which neither PostgreSQL nor UTF-8 can hold, by U+FFFD."""
    if text.isascii() and "\x00" not in text:
        return text
    return _REPLACED.sub("\ufffd", text)


class _Reader:
    """Reads one document and remembers what was odd about it."""

    def __init__(self) -> None:
        self.anomalies: set[str] = set()

    def document(self, body: bytes) -> dict[str, Any]:
        if not body.strip():
            raise BodyError("empty", "the body is empty")
        if body.startswith(codecs.BOM_UTF8):
            raise BodyError(
                "not_json", "the body begins with a byte order mark, which JSON forbids (RFC 8259, 8.1)"
            )
        if _too_complex(body):
            raise BodyError("too_complex", f"the body has more than {MAX_ITEMS} items in lists and objects")
        try:
            text = body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BodyError("not_utf8", f"the body is not UTF-8 (byte {error.start})") from None
        try:
            raw = json.loads(
                text,
                parse_constant=self._constant,
                parse_int=self._integer,
                parse_float=self._float,
                object_pairs_hook=self._object,
            )
            document = self._clean(raw, 0)
        except RecursionError:
            raise BodyError("too_deep", f"the body is nested more than {MAX_DEPTH} levels deep") from None
        except ValueError as error:
            where = (
                f" (line {error.lineno}, column {error.colno})"
                if isinstance(error, json.JSONDecodeError)
                else ""
            )
            raise BodyError("not_json", f"the body is not JSON{where}") from None
        if not isinstance(document, dict):
            raise BodyError("not_an_object", "the body is not a JSON object")
        return document

    def request_id(self, document: dict[str, Any], *names: str) -> str:
        for name in names:
            value = document.get(name)
            if value is None or value == "":
                continue
            if not isinstance(value, str) or not _ID.fullmatch(value):
                raise BodyError(
                    "invalid_id", f"{name} must be 1 to 255 printable ASCII characters without spaces"
                )
            return value
        others = f" (nor {names[1]})" if len(names) > 1 else ""
        raise BodyError("missing_id", f"the body names no {names[0]}{others}")

    def status(self, document: dict[str, Any], request_id: str, names: Mapping[str, str]) -> tuple[str, str]:
        value = document.get("status")
        # Not every text that lower() turns into ASCII was ASCII: the Kelvin sign becomes a k.
        known = names.get(value.lower()) if isinstance(value, str) and value.isascii() else None
        if known is None or not isinstance(value, str):
            shown = json.dumps(value)[:60] if "status" in document else "missing"
            expected = "OK, ERROR, queued, in_progress, completed, failed or cancelled"
            if names is _REPLICATE_STATUS_NAMES:
                expected = ", ".join(names)
            raise BodyError("invalid_status", f"status is {shown}: expected {expected}", request_id)
        return value, known

    def progress(self, value: Any) -> int | None:
        if value is None:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 100:
            self.anomalies.add("invalid_field")
            return None
        return int(value)

    def identifier(self, document: dict[str, Any], name: str) -> str | None:
        """Optional identifier; a whole number is taken as its digits (the bot's users have numbers)."""
        value = document.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is None or value == "":
            return None
        if not isinstance(value, str) or not _ID.fullmatch(value):
            self.anomalies.add("invalid_field")
            return None
        return value

    def hints(self, document: dict[str, Any]) -> Hints:
        comment = document.get("comment")
        said = parse_comment(comment) if isinstance(comment, str) else {}
        return Hints(
            user_id=self.identifier(document, "user_id") or said.get("user_id"),
            avatar_id=self.identifier(document, "avatar_id") or said.get("avatar_id"),
            training_type=training_type(document.get("training_type"))
            or training_type(said.get("training_type")),
            finetune_id=self.identifier(document, "finetune_id"),
        )

    def _constant(self, _name: str) -> None:
        self.anomalies.add("not_a_number")

    def _integer(self, digits: str) -> int | str:
        if len(digits) <= MAX_DIGITS:
            return int(digits)
        self.anomalies.add("huge_number")
        return digits[:MAX_TEXT]

    def _float(self, digits: str) -> float | None:
        value = float(digits)
        if math.isfinite(value):
            return value
        self.anomalies.add("not_a_number")
        return None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) != len(pairs):
            self.anomalies.add("duplicate_key")
        return document

    def _clean(self, value: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise RecursionError
        if isinstance(value, str):
            cleaned = clean_text(value)
            if cleaned is not value:
                self.anomalies.add("control_text") if cleaned != value else None
            return cleaned
        if isinstance(value, list):
            return [self._clean(item, depth + 1) for item in value]
        if isinstance(value, dict):
            return {
                self._clean(name, depth + 1): self._clean(item, depth + 1) for name, item in value.items()
            }
        return value


def training_type(value: Any) -> str | None:
    """``portrait`` or ``style`` in whatever case it was written, else ``None``."""
    lowered = value.strip().lower() if isinstance(value, str) else ""
    return lowered if lowered in TRAINING_TYPES else None


def _error(error: Any, payload: Any) -> str | None:
    """One line out of fal's ``error`` and the ``detail`` of its payload, or of an older error of any shape."""
    if isinstance(error, Mapping):
        error = error.get("message") or error.get("detail") or json.dumps(error, ensure_ascii=False)
    parts = [part for part in (_short(error), _detail(payload)) if part]
    return ": ".join(parts)[:MAX_TEXT] or None


def _detail(payload: Any) -> str | None:
    detail = payload.get("detail") if isinstance(payload, Mapping) else None
    if isinstance(detail, list):
        return "; ".join(text for text in map(_detail_item, detail[:20]) if text) or None
    return _short(detail)


def _detail_item(item: Any) -> str | None:
    if not isinstance(item, Mapping):
        return _short(item)
    location = item.get("loc")
    where = ".".join(str(part) for part in location[:20]) if isinstance(location, list) else ""
    what = _short(item.get("msg")) or _short(item.get("type")) or ""
    return f"{where}: {what}" if where and what else where or what or None


def _short(value: Any) -> str | None:
    if value is None or value == "" or value == [] or value == {}:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text[:MAX_TEXT]
