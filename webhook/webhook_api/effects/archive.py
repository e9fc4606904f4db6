"""The files that a completed event's payload names, copied byte for byte into the object store.

fal keeps media for days only. Every object of the payload with a `url` is an artifact; each is streamed to
`webhooks/<source>/<request_id>/<place in the payload>/<file name>`, and recorded as soon as it is stored, so that a
retry fetches only what is missing.

A place is always one segment (`images.0`), however deep it lies. So all keys have the same number of segments, and
none can be another's folder, not even that of another delivery of the same request: stores that keep objects as files
refuse such keys. No segment is longer than 120 characters, and so no key than `MAX_KEY`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mimetypes
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import psycopg

from webhook_api.db import DatabaseUnavailable
from webhook_api.effects.base import Job, Outcome, record
from webhook_api.media import MediaError
from webhook_api.states import EffectError, EffectState, Failure

NAME: Final = "archive"
MAX_ARTIFACTS: Final = 64
MAX_NODES: Final = 20_000
MAX_DEPTH: Final = 32
MAX_KEY: Final = 512
"""Bytes of the longest key: S3 takes 1024, some servers less. Holds for a `prefix` up to 270."""
_MAX_SEGMENT: Final = 120
_MAX_SHOWN: Final = 200
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]+")
_PAGES: Final = frozenset({"text/html", "application/xhtml+xml"})
_ANY_TYPE: Final = ("application/octet-stream", "binary/octet-stream", "text/plain")
"""What servers say of files whose type they don't know."""
_TYPE: Final = re.compile(r"[A-Za-z0-9.+-]{1,60}/[A-Za-z0-9.+-]{1,60}")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file that the payload names. `place` is where in the payload; `key` is where it is stored."""

    place: str
    key: str
    url: str
    declared_size: int | None
    content_type: str | None


def prefix(source: str, request_id: str) -> str:
    """Where the artifacts of a request stand in the bucket."""
    return f"webhooks/{source}/{safe_segment(request_id)}"


def safe_segment(text: str) -> str:
    """`text` as one segment of an object key: safe everywhere, and different for different texts."""
    safe = _UNSAFE.sub("_", text).lstrip(".")[:_MAX_SEGMENT]
    if safe and safe == text:
        return safe
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    stem, dot, suffix = safe.rpartition(".")
    if dot and stem and len(suffix) <= 12:
        return f"{stem[: _MAX_SEGMENT - 22]}-{mark}.{suffix}"
    return f"{safe[: _MAX_SEGMENT - 9] or 'unnamed'}-{mark}"


def file_name(entry: Mapping[str, Any], url: str) -> str:
    """A safe name for the file: the payload's own, else the address's last part, else `file` and its type."""
    given = entry.get("file_name")
    name = PurePosixPath(given.replace("\\", "/")).name if isinstance(given, str) else ""
    if not name and url[:5].lower() != "data:":
        try:
            name = PurePosixPath(unquote(urlsplit(url).path)).name
        except ValueError:
            name = ""
    if name.strip("."):
        return safe_segment(name)
    kind = entry.get("content_type")
    if not isinstance(kind, str) and url[:5].lower() == "data:":
        kind = url[5:80].partition(";")[0].partition(",")[0]
    suffix = mimetypes.guess_extension(kind) if isinstance(kind, str) else None
    return f"file{suffix or ''}"


def place_segment(path: Sequence[str]) -> str:
    """A place in the payload as one segment of an object key; the end of a long one is replaced by a digest."""
    joined = ".".join(safe_segment(part) for part in path or ("payload",))
    return joined if len(joined) <= _MAX_SEGMENT else _marked(joined, path)


def _marked(segment: str, path: Sequence[str], number: int = 0) -> str:
    """`segment` with a digest of the true path, within the bound. `number` tells further digests apart."""
    text = json.dumps([*path, number]).encode("ascii")
    mark = hashlib.sha256(text).hexdigest()[:16]
    return f"{segment[: _MAX_SEGMENT - 17]}-{mark}"


def _key(base: str, path: Sequence[str], name: str, taken: Container[str]) -> str:
    """Where an artifact is stored: readable, bounded, and none of `taken`."""
    segment = place_segment(path)
    key = f"{base}/{segment}/{name}"
    number = 0
    while key in taken:
        number += 1
        key = f"{base}/{_marked(segment, path, number)}/{name}"
    return key


def find(payload: Any, base: str) -> list[Artifact]:
    """The artifacts that a payload names, at most `MAX_ARTIFACTS` + 1, in the order in which they stand there.

    No two have the same key; the same payload always gives the same keys.
    """
    found: list[Artifact] = []
    taken: set[str] = set()
    for path, entry in _walk(payload):
        url = entry["url"]
        place = "/".join(path) or "payload"
        key = _key(base, path, file_name(entry, url), taken)
        taken.add(key)
        size = entry.get("file_size")
        kind = entry.get("content_type")
        found.append(
            Artifact(
                place=place,
                key=key,
                url=url,
                declared_size=size
                if isinstance(size, int) and not isinstance(size, bool) and size > 0
                else None,
                content_type=kind if isinstance(kind, str) and _TYPE.fullmatch(kind) else None,
            )
        )
        if len(found) > MAX_ARTIFACTS:
            break
    return found


def _walk(payload: Any) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Objects with a text `url`, with their path, in document order, without recursion."""
    stack: list[tuple[tuple[str, ...], Any]] = [((), payload)]
    nodes = 0
    while stack and nodes < MAX_NODES:
        path, value = stack.pop()
        nodes += 1
        if isinstance(value, Mapping):
            if isinstance(value.get("url"), str) and value["url"]:
                yield path, value
            children = [((*path, str(name)), item) for name, item in value.items()]
        elif isinstance(value, list):
            children = [((*path, str(index)), item) for index, item in enumerate(value)]
        else:
            continue
        if len(path) < MAX_DEPTH:
            stack.extend(reversed(children))


def nothing_to_do(job: Job) -> Outcome | None:
    """Why there is nothing to archive, or None. No I/O."""
    if job.delivery.probe:
        return Outcome.skipped("a probe")
    if job.event is None or job.event.status != "completed":
        return Outcome.skipped("no result")
    return None if any(True for _ in _walk(job.event.payload)) else Outcome.skipped("no files in the payload")


def run(job: Job) -> Outcome:
    """Archive what isn't archived yet. Tries every artifact before it reports a failure."""
    nothing = nothing_to_do(job)
    if nothing is not None:
        return nothing
    payload = job.event.payload if job.event else None
    artifacts = find(payload, prefix(job.delivery.source, job.delivery.request_id))
    stored: dict[str, dict[str, Any]] = {
        entry["key"]: entry
        for entry in job.detail(NAME).get("artifacts", ())
        if entry.get("state") == "stored"
    }
    failures: list[EffectError] = []
    for artifact in artifacts[:MAX_ARTIFACTS]:
        if artifact.key in stored:
            continue
        try:
            stored[artifact.key] = _store(job, artifact)
        except EffectError as error:
            failures.append(error)
            if error.kind in (Failure.INTERRUPTED, Failure.OUTAGE):
                break
        else:
            _remember(job, _detail(artifacts, stored))
    detail = _detail(artifacts, stored)
    if len(artifacts) > MAX_ARTIFACTS:
        message = f"the payload names more than {MAX_ARTIFACTS} files; the first {MAX_ARTIFACTS} are archived"
        failures.append(EffectError(Failure.PERMANENT, "media_too_many", message))
    if failures:
        raise _worst(failures, detail)
    return Outcome(EffectState.DONE, detail)


def _store(job: Job, artifact: Artifact) -> dict[str, Any]:
    try:
        with job.tools.media.open(artifact.url, artifact.declared_size, job.stop) as stream:
            _refuse_page(artifact, stream.content_type)
            content_type = artifact.content_type or stream.content_type
            labelled = job.tools.store.upload(artifact.key, stream, content_type)
            size, sha256 = stream.size, stream.sha256
    except (MediaError, EffectError) as error:
        raise EffectError(error.kind, error.reason, f"{artifact.place[:_MAX_SHOWN]}: {error}") from error
    entry: dict[str, Any] = {
        "place": artifact.place,
        "key": artifact.key,
        "state": "stored",
        "size": size,
        "sha256": sha256,
    }
    if not labelled:
        entry["metadata"] = "refused by the object store"
    if artifact.content_type and stream.content_type not in (artifact.content_type, *_ANY_TYPE):
        entry["served_type"] = stream.content_type
    if artifact.declared_size not in (None, size):
        # The transfer itself was complete; that the payload's figure differs is for a person to look at.
        entry["declared_size"] = artifact.declared_size
        log.warning("archive_size_differs", extra={"object_key": artifact.key, "size": size})
    return entry


def _refuse_page(artifact: Artifact, served: str) -> None:
    """Refuse a web page that comes in the place of a file: an error page, a login, a consent form."""
    if served not in _PAGES or artifact.url[:5].lower() == "data:":
        return
    expected = artifact.content_type or mimetypes.guess_type(artifact.key)[0]
    if expected not in _PAGES:
        message = f"a web page ({served}) came in the place of a file ({expected or 'of no declared type'})"
        raise MediaError(Failure.THEIRS, "media_type_differs", message)


def _detail(artifacts: list[Artifact], stored: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "artifacts": [
            stored.get(artifact.key, {"place": artifact.place, "key": artifact.key, "state": "missing"})
            for artifact in artifacts[:MAX_ARTIFACTS]
        ]
    }


def _remember(job: Job, detail: dict[str, Any]) -> None:
    """Record what is stored so far, before the next download."""
    try:
        with job.tools.borrow() as connection, connection.transaction():
            record(
                connection,
                job.delivery,
                NAME,
                EffectState.FAILED,
                json.dumps(detail),
                "not finished",
                tries=0,
            )
    except (DatabaseUnavailable, psycopg.Error) as error:
        raise EffectError(Failure.OUTAGE, "database_unavailable", str(error), detail) from error


def _worst(failures: list[EffectError], detail: dict[str, Any]) -> EffectError:
    """One error for all: the most hopeful kind, so that nothing is given up while something can still succeed."""
    order = (Failure.INTERRUPTED, Failure.OUTAGE, Failure.UNREACHABLE, Failure.THEIRS, Failure.PERMANENT)
    first = min(failures, key=lambda failure: order.index(failure.kind))
    message = "; ".join(dict.fromkeys(str(failure) for failure in failures))
    return EffectError(first.kind, first.reason, message[:2000], detail)
