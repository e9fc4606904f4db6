"""The two outlets of the worker, Redis and the object store, with bounded waits and one way of failing.

What goes wrong with them is ours (`Failure.OUTAGE`): the delivery waits, however long it takes, and a breaker keeps
others from waiting as well. The exceptions concern one object alone, and leave the breaker closed: one that the store
refuses (a 4xx answer) while its bucket is fine is tried a limited number of times (`Failure.THEIRS`, reason
`object_refused`); one for which the store fails (5xx, a cut connection) while it takes another object at the same time
is tried for a day (`Failure.UNREACHABLE`, reason `object_failing`).
"""

from __future__ import annotations

import io
import logging
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

import redis
import urllib3
from minio import Minio
from minio.commonconfig import REPLACE, CopySource
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

from webhook_api.config import Settings
from webhook_api.states import Breaker, EffectError, Failure

PART_BYTES: Final = 8 * 1024 * 1024
"""Size of the parts of an upload: this much of a file is in memory at once."""
_CONNECT_SECONDS: Final = 3.0
_READ_SECONDS: Final = 30.0
_REDIS_SECONDS: Final = 5.0
_S3_MISSING: Final = frozenset({"NoSuchKey", "NoSuchObject", "NoSuchBucket"})
_S3_OURS: Final = frozenset(
    {
        "AccessDenied",
        "AllAccessDisabled",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidBucketName",
        "InvalidSecurity",
        "InvalidToken",
        "NoSuchBucket",
        "QuotaExceeded",
        "RequestTimeTooSkewed",
        "RequestTimeout",
        "SignatureDoesNotMatch",
        "SlowDown",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
        "XMinioAdminBucketQuotaExceeded",
    }
)
"""4xx answers that would meet any other object too: credentials, clock, bucket, quota, load."""
_S3_FULL: Final = frozenset({"XMinioStorageFull", "InsufficientStorage", "ServiceUnavailable"})
"""5xx answers that are about the store, however small another object is."""
CANARY: Final = "deliveries/.canary"
"""Written, and removed again, to learn whether the store fails for one object or for all."""
_STATUS_OURS: Final = frozenset({401, 402, 403, 407, 408, 421, 425, 429})

log = logging.getLogger(__name__)


class Source(Protocol):
    """What is uploaded: read in pieces, and at its end knows its size and digest."""

    @property
    def size(self) -> int:
        """Bytes read so far."""

    @property
    def sha256(self) -> str:
        """Digest of the bytes read so far."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes; empty at the end."""


@dataclass(frozen=True)
class Stored:
    """An object as the store reports it."""

    key: str
    size: int
    etag: str
    sha256: str | None
    content_type: str | None


def redis_client(settings: Settings) -> redis.Redis:
    """A client whose waits are bounded. Connects when first used."""
    options: dict[str, Any] = {"password": settings.redis_password} if settings.redis_password else {}
    return redis.Redis.from_url(
        settings.redis_url,
        socket_connect_timeout=_CONNECT_SECONDS,
        socket_timeout=_REDIS_SECONDS,
        health_check_interval=30,
        client_name="webhook-worker",
        decode_responses=True,
        **options,
    )


def minio_client(settings: Settings) -> Minio:
    """A client whose waits are bounded (the library's own default is five minutes, several times)."""
    pool = urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS),
        retries=urllib3.Retry(total=1, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504]),
        maxsize=16,
        ssl_context=ssl.create_default_context() if settings.minio_secure else None,
    )
    return Minio(
        settings.minio_endpoint,
        access_key=settings.minio_access_key,
        secret_key=settings.minio_secret_key,
        secure=settings.minio_secure,
        region=settings.minio_region,
        http_client=pool,
    )


class RedisOutlet:
    """Redis behind a breaker."""

    def __init__(self, client: redis.Redis, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._breaker = Breaker(clock)

    @contextmanager
    def use(self) -> Iterator[redis.Redis]:
        """Lend the client. Raises `EffectError` (outage) for every fault of Redis."""
        if self._breaker.is_open():
            raise EffectError(Failure.OUTAGE, "redis_unavailable", "Redis did not answer a moment ago")
        try:
            yield self._client
        except redis.RedisError as error:
            self._breaker.failed()
            message = f"Redis: {type(error).__name__}: {error}"
            raise EffectError(Failure.OUTAGE, "redis_unavailable", message) from error
        self._breaker.succeeded()

    def close(self) -> None:
        """Close the client's connections."""
        self._client.close()


class ObjectStore:
    """One bucket behind a breaker, made when it is missing."""

    def __init__(self, client: Minio, bucket: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self.bucket = bucket
        self._breaker = Breaker(clock)
        self._bucket_seen = False

    def put(self, key: str, data: bytes, content_type: str, metadata: Mapping[str, str]) -> None:
        """Store a small object in one piece. Raises `EffectError` (outage, or theirs: this object)."""
        with self._use():
            self._ensure_bucket()
            self._client.put_object(
                self.bucket,
                key,
                io.BytesIO(data),
                len(data),
                content_type=content_type,
                metadata=dict(metadata),
            )

    def upload(self, key: str, source: Source, content_type: str) -> bool:
        """Stream `source` to `key`, in parts, with its digest as metadata `sha256`.

        The object appears only when the source has ended well; what the source raises passes through. False when
        the digest could not be added as metadata (it is known only after the last part, so it takes a copy of the
        object onto itself, which not every S3 server offers). Raises `EffectError` (outage, or theirs: this object).
        """
        with self._use():
            self._ensure_bucket()
            head = source.read(PART_BYTES)
            if len(head) < PART_BYTES:
                meta: dict[str, Any] = {"sha256": source.sha256}
                self._client.put_object(
                    self.bucket, key, io.BytesIO(head), len(head), content_type=content_type, metadata=meta
                )
                return True
            self._discard_leftovers(key)
            self._client.put_object(
                self.bucket,
                key,
                _Rest(head, source),  # type: ignore[arg-type]  # only read() is called
                -1,
                content_type=content_type,
                part_size=PART_BYTES,
                num_parallel_uploads=1,
            )
            return self._add_metadata(key, {"sha256": source.sha256}, content_type, source.size)

    def stat(self, key: str) -> Stored | None:
        """What stands under `key`, or None. Raises `EffectError` (outage, or theirs: this object)."""
        with self._use():
            try:
                found = self._client.stat_object(self.bucket, key)
            except S3Error as error:
                if error.code in _S3_MISSING:
                    return None
                raise
        metadata = {name.lower(): value for name, value in (found.metadata or {}).items()}
        return Stored(
            key=key,
            size=found.size or 0,
            etag=(found.etag or "").strip('"'),
            sha256=metadata.get("x-amz-meta-sha256"),
            content_type=found.content_type,
        )

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes | None:
        """`length` bytes of an object from `offset` on, or all of it; None when there is no such object.

        Held in memory: for small objects and for parts of large ones. Raises `EffectError` like `stat`.
        """
        # Asked first: not every server's answer about a missing object can be parsed.
        if self.stat(key) is None:
            return None
        with self._use():
            answer = self._client.get_object(self.bucket, key, offset=offset, length=length or 0)
            try:
                return answer.read()
            finally:
                answer.close()
                answer.release_conn()

    def remove(self, key: str) -> None:
        """Remove `key`; nothing happens when there is none. Raises `EffectError` (outage, or theirs: this object)."""
        with self._use():
            try:
                self._client.remove_object(self.bucket, key)
            except S3Error as error:
                if error.code not in _S3_MISSING:
                    raise

    def _discard_leftovers(self, key: str) -> None:
        """Remove the parts of uploads to `key` that were never ended: a killed worker leaves them, and they cost room.

        Whoever holds the delivery's lease is the only one who uploads to its keys.
        """
        try:
            found = self._client._list_multipart_uploads(self.bucket, prefix=key)
        except (S3Error, InvalidResponseError, ServerError) as error:
            log.debug("object_leftovers_unknown", extra={"object_key": key, "error": _said(error)[:200]})
            return
        for upload in found.uploads:
            if upload.object_name == key:
                with suppress(S3Error, InvalidResponseError, ServerError):
                    self._client._abort_multipart_upload(self.bucket, key, str(upload.upload_id))
                    log.info("object_leftovers_removed", extra={"object_key": key})

    def _add_metadata(self, key: str, metadata: dict[str, Any], content_type: str, size: int) -> bool:
        try:
            self._client.copy_object(
                self.bucket,
                key,
                CopySource(self.bucket, key),
                metadata={**metadata, "Content-Type": content_type},
                metadata_directive=REPLACE,
            )
        except ValueError:
            pass  # rclone does it, but answers without an ETag; what stands there is looked at below.
        except S3Error as error:
            log.warning("object_metadata_refused", extra={"object_key": key, "code": error.code})
        found = self._client.stat_object(self.bucket, key)
        if found.size != size:
            message = f"{found.size} of {size} bytes stand in the object store"
            raise EffectError(Failure.UNREACHABLE, "object_incomplete", message)
        stands = {name.lower(): value for name, value in (found.metadata or {}).items()}
        return all(stands.get(f"x-amz-meta-{name}") == value for name, value in metadata.items())

    def _ensure_bucket(self) -> None:
        if self._bucket_seen:
            return
        if not self._client.bucket_exists(self.bucket):
            try:
                self._client.make_bucket(self.bucket)
            except MinioException:
                # Another worker was faster. Asked again rather than read from the answer: not every server's
                # answer can be parsed.
                if not self._client.bucket_exists(self.bucket):
                    raise
        self._bucket_seen = True

    @contextmanager
    def _use(self) -> Iterator[None]:
        if self._breaker.is_open():
            raise EffectError(
                Failure.OUTAGE, "object_store_unavailable", "the object store failed a moment ago"
            )
        try:
            yield
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            raise self._failed(error) from error
        self._breaker.succeeded()

    def _failed(self, error: Exception) -> EffectError:
        """What a fault means: an outage, which opens the breaker, or trouble with one object, which does not."""
        self._bucket_seen = False
        if _may_concern_one_object(error) and self._bucket_is_fine():
            self._breaker.succeeded()
            return EffectError(
                Failure.THEIRS, "object_refused", f"the object store refused it: {_said(error)}"
            )
        # Open while the canary is on its way: others must not queue up behind a store that hangs.
        self._breaker.failed()
        if _may_fail_for_one_object(error) and self._takes_another():
            self._breaker.succeeded()
            message = f"the object store fails for this object, and takes others: {_said(error)}"
            return EffectError(Failure.UNREACHABLE, "object_failing", message)
        if isinstance(error, S3Error):
            return EffectError(
                Failure.OUTAGE, "object_store_refused", f"the object store answered {_said(error)}"
            )
        message = f"the object store cannot be used: {_said(error)}"
        return EffectError(Failure.OUTAGE, "object_store_unavailable", message)

    def _takes_another(self) -> bool:
        """Whether the store takes another, small object at this moment."""
        try:
            self._client.put_object(self.bucket, CANARY, io.BytesIO(b"canary"), 6)
            self._client.remove_object(self.bucket, CANARY)
        except (MinioException, urllib3.exceptions.HTTPError, OSError):
            return False
        return True

    def _bucket_is_fine(self) -> bool:
        """Whether the store answers for the bucket: a wrong address or a broken proxy refuses that as well."""
        try:
            return self._client.bucket_exists(self.bucket)
        except (MinioException, urllib3.exceptions.HTTPError, OSError):
            return False


def _may_concern_one_object(error: Exception) -> bool:
    """Whether `error` is a 4xx answer other than trouble with credentials, the bucket or the load."""
    if isinstance(error, S3Error):
        if error.code in _S3_OURS:
            return False
        status: int | None = error.response.status
    elif isinstance(error, InvalidResponseError):
        status = error._code  # the library keeps it nowhere else
    elif isinstance(error, ServerError):
        status = error.status_code
    else:
        return False
    return status is not None and 400 <= status < 500 and status not in _STATUS_OURS


def _may_fail_for_one_object(error: Exception) -> bool:
    """Whether `error` is a 5xx answer or a broken transfer, and does not speak of the store as a whole."""
    if isinstance(error, S3Error):
        status = error.response.status
        return error.code not in _S3_OURS | _S3_FULL and status >= 500 and status != 507
    if isinstance(error, InvalidResponseError):
        return int(error._code) >= 500 and error._code != 507
    if isinstance(error, ServerError):
        return error.status_code >= 500 and error.status_code != 507
    return isinstance(error, urllib3.exceptions.HTTPError | OSError)


def _said(error: Exception) -> str:
    """What the store said, in a line."""
    if isinstance(error, S3Error):
        return f"{error.code}: {error.message}"
    return f"{type(error).__name__}: {error}"


class _Rest:
    """A stream of which the head was already read."""

    def __init__(self, head: bytes, source: Source) -> None:
        self._head = head
        self._source = source

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end."""
        if not self._head:
            return self._source.read(size)
        piece, self._head = self._head[:size], self._head[size:]
        return piece if len(piece) == size else piece + self._source.read(size - len(piece))
