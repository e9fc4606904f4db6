"""Files of a delivery, from the object store to an operator: what its effects have recorded, and nothing else.

An address names a delivery and one of its recorded objects by a digest, never a key, so nobody chooses what is read. A
file's last piece is held back until its digest is that of the record: what was changed in the store does not arrive whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error

from webhook_api.config import Settings
from webhook_api.outlets import minio_client
from webhook_api.web.lists import kept_headers

PIECE: Final = 256 * 1024
"""Bytes of a file that are in memory at once, twice."""
DELIVERY_MOST: Final = 16 * 1024**2
"""Bytes of an archived delivery, which is read whole, one at a time: as JSON it takes several times as many."""
SECONDS: Final = 3600.0
"""The longest download."""
_MISSING: Final = frozenset({"NoSuchKey", "NoSuchObject", "NoSuchBucket"})
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]+")


class FileFault(Exception):
    """It cannot be given. ``reason`` names a message: missing, large, differs, store."""

    STATUS: Final = {"missing": 404, "large": 413, "differs": 502, "store": 503}

    def __init__(self, reason: str, message: str) -> None:
        self.reason = f"file_{reason}"
        self.status = self.STATUS[reason]
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Stored:
    """A recorded object. ``part``: where in it the delivery's own line stands, which it shares with others."""

    key: str
    name: str
    """What it is called on the operator's disk."""
    size: int | None = None
    sha256: str | None = None
    part: tuple[int, int] | None = None
    delivery: bool = False
    """Whether it is the delivery itself, as it was archived."""

    @property
    def mark(self) -> str:
        """What an address says of it."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:16]


def stored(row: Mapping[str, Any]) -> list[Stored]:
    """What a delivery's effects have recorded as stored, the delivery itself first."""
    found = []
    for effect in row["effects"]:
        detail = effect["detail"]
        if effect["name"] == "raw_archive" and "key" in detail:
            found.append(_delivery(row, detail))
        found += [
            Stored(entry["key"], _name(entry["key"]), entry.get("size"), entry.get("sha256"))
            for entry in detail.get("artifacts", ())
            if entry.get("state") == "stored"
        ]
    return sorted(found, key=lambda item: not item.delivery)


def _delivery(row: Mapping[str, Any], detail: Mapping[str, Any]) -> Stored:
    length = detail.get("length")
    part = None if length is None else (int(detail.get("offset", 0)), int(length))
    return Stored(
        detail["key"], f"delivery-{row['id']}.json", length, detail.get("sha256"), part, delivery=True
    )


def _name(key: str) -> str:
    """The last part of a key, which the archive has made safe; once more, because it goes into a header."""
    return _UNSAFE.sub("_", key.rpartition("/")[2]).lstrip(".")[-120:] or "file"


def find(row: Mapping[str, Any], mark: str) -> Stored | None:
    """The recorded object of an address."""
    return next((item for item in stored(row) if item.mark == mark), None)


class Answer(Protocol):
    """An object on its way, as the client's library gives it."""

    def stream(self, amt: int | None = ..., decode_content: bool | None = ...) -> Iterator[bytes]:
        """Its bytes."""

    def close(self) -> None:
        """Cut it off."""

    def release_conn(self) -> None:
        """Give the connection back."""


@dataclass
class Download:
    """A file on its way. ``close`` it, whether it was read or not."""

    size: int
    pieces: Iterator[bytes]
    close: Callable[[], None]


class Files:
    """Reads the bucket. There is nothing here that could write."""

    def __init__(
        self, client: Minio, bucket: str, most: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``most``: bytes of the largest file that is given."""
        self._client = client
        self._bucket = bucket
        self._most = most
        self._clock = clock
        self._one_at_a_time = threading.Lock()

    def open(self, item: Stored) -> Download:
        """Begin to read. Raises FileFault."""
        size = self._size(item)
        if size > (DELIVERY_MOST if item.delivery else self._most):
            raise FileFault("large", f"{item.key} has {size} bytes")
        offset, length = item.part or (0, size)
        try:
            answer = self._client.get_object(self._bucket, item.key, offset=offset, length=length)
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            raise FileFault("store", f"{item.key}: {error}") from error
        if not item.delivery:
            return Download(size, whole(answer, size, item.sha256, self._clock), lambda: _end(answer))
        try:
            with self._one_at_a_time:
                data = harmless_delivery(b"".join(whole(answer, size, item.sha256, self._clock)))
        finally:
            _end(answer)
        return Download(len(data), iter([data]), lambda: None)

    def _size(self, item: Stored) -> int:
        """Bytes that will come."""
        try:
            found = self._client.stat_object(self._bucket, item.key).size or 0
        except S3Error as error:
            if error.code in _MISSING:
                raise FileFault("missing", f"there is no {item.key}") from error
            raise FileFault("store", f"{item.key}: {error.code}") from error
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            raise FileFault("store", f"{item.key}: {error}") from error
        if item.part is not None:
            offset, length = item.part
            if offset + length > found:
                raise FileFault("differs", f"{item.key} is shorter than it was")
            return length
        if item.size is not None and item.size != found:
            raise FileFault("differs", f"{item.key} has {found} bytes, recorded were {item.size}")
        return found


def whole(answer: Answer, size: int, sha256: str | None, clock: Callable[[], float]) -> Iterator[bytes]:
    """The bytes of an object, the last piece only when all of them are those that were recorded. Raises FileFault."""
    digest, seen, held, ends = hashlib.sha256(), 0, b"", clock() + SECONDS
    try:
        for piece in answer.stream(PIECE, decode_content=False):
            digest.update(piece)
            seen += len(piece)
            if clock() > ends:
                raise FileFault("store", f"it took longer than {SECONDS:.0f} s")
            if seen > size:
                break
            if held:
                yield held
            held = piece
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise FileFault("store", str(error)) from error
    if seen != size or (sha256 is not None and digest.hexdigest() != sha256):
        raise FileFault(
            "differs", f"{seen} bytes with digest {digest.hexdigest()} came, recorded were {size}"
        )
    if held:
        yield held


def _end(answer: Answer) -> None:
    answer.close()
    answer.release_conn()


def harmless_delivery(data: bytes) -> bytes:
    """An archived delivery, byte for byte unless a header is withheld. Raises FileFault."""
    try:
        document = json.loads(data)
        headers = {str(name): str(value) for name, value in (document.get("headers") or {}).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise FileFault("differs", "this is no archived delivery") from error
    kept = kept_headers(document)
    return (
        data
        if kept == headers
        else json.dumps({**document, "headers": kept}, sort_keys=True).encode() + b"\n"
    )


def reader(settings: Settings) -> Files | None:
    """What reads the bucket of these settings; None without its keys."""
    if not (settings.minio_endpoint and settings.minio_access_key and settings.minio_secret_key):
        return None
    return Files(minio_client(settings), settings.minio_bucket, settings.archive_max_bytes)
