"""The object store: every object of the bucket with its type and metadata."""

from __future__ import annotations

from typing import IO, Any, Final

from minio import Minio
from minio.error import InvalidResponseError, S3Error

from webhook_api.backup import Tally, Writer, members

PART: Final = "objects"
LEFT_OUT: Final = ("doctor/", "deliveries/.canary")
"""Objects that are written only to be removed again."""
_META: Final = "x-amz-meta-"
_GONE: Final = frozenset({"NoSuchKey", "NoSuchObject"})


def measure(client: Minio, bucket: str) -> Tally:
    """Count the objects and their bytes."""
    tally = Tally(PART)
    if client.bucket_exists(bucket):
        for found in client.list_objects(bucket, recursive=True):
            if not str(found.object_name).startswith(LEFT_OUT):
                tally.add(found.size or 0)
    return tally


def export(client: Minio, bucket: str, stream: IO[bytes]) -> Tally:
    """Write every object. One that goes away while it is listed is left out and counted as skipped."""
    writer = Writer(stream, PART)
    if client.bucket_exists(bucket):
        for found in client.list_objects(bucket, recursive=True):
            key = str(found.object_name)
            if not found.is_dir and not key.startswith(LEFT_OUT):
                _export_one(client, bucket, key, writer)
    return writer.end()


def _export_one(client: Minio, bucket: str, key: str, writer: Writer) -> None:
    try:
        answer: Any = client.get_object(bucket, key)
    except (S3Error, InvalidResponseError) as error:
        # Not every server's answer about a missing object can be parsed: then it is asked for once more.
        if getattr(error, "code", None) not in _GONE and _stands(client, bucket, key):
            raise
        writer.tally.skipped += 1
        return
    try:
        headers = {name.lower(): value for name, value in answer.headers.items()}
        fields = {name: value for name, value in headers.items() if name.startswith(_META)}
        fields["content-type"] = headers.get("content-type", "application/octet-stream")
        # Of this very answer: the object may be replaced between a listing and a read.
        writer.add(key, int(headers["content-length"]), answer, fields)
    finally:
        answer.close()
        answer.release_conn()


def _stands(client: Minio, bucket: str, key: str) -> bool:
    try:
        client.stat_object(bucket, key)
    except S3Error as error:
        return error.code not in _GONE
    return True


def restore(client: Minio, bucket: str, stream: IO[bytes]) -> Tally:
    """Put every object of the stream where it was; what stands under its key is replaced, other objects stay."""
    tally = Tally(PART)
    for member in members(stream, PART):
        if tally.count == 0 and not client.bucket_exists(bucket):
            client.make_bucket(bucket)
        meta: dict[str, Any] = {
            name.removeprefix(_META): value for name, value in member.fields.items() if name.startswith(_META)
        }
        client.put_object(
            bucket,
            member.name,
            member.body,  # type: ignore[arg-type]  # only read() is called
            member.size,
            content_type=member.fields.get("content-type", "application/octet-stream"),
            metadata=meta,
            num_parallel_uploads=1,
        )
        tally.add(member.size)
    return tally
