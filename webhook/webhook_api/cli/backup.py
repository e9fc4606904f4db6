"""``backup``: what stands outside PostgreSQL as streams, for playbooks/backup.yml and restore.yml."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from webhook_api.cli.common import EX_CONFIG, EX_UNAVAILABLE, echo_json, fail, json_option, line, settings

if TYPE_CHECKING:
    from webhook_api.backup import Tally
    from webhook_api.config import Settings

PARTS = ("objects", "redis", "state")
part_argument = click.argument("part", type=click.Choice(PARTS))


@click.group("backup")
def command() -> None:
    """Objects, stream and spool as one stream each: written to standard output, read from standard input."""


@command.command("size")
@click.argument("parts", metavar="[PART]...", nargs=-1, type=click.Choice(PARTS))
@json_option
def size(parts: tuple[str, ...], as_json: bool) -> None:  # noqa: ARG001  (always JSON)
    """Count what an export would write: members and bytes of each part. Always JSON."""
    echo_json({part: _run(part, "measure").document() for part in parts or PARTS})


@command.command("export")
@part_argument
@json_option
def export(part: str, as_json: bool) -> None:  # noqa: ARG001  (always JSON)
    """Write a part to standard output as a tar stream; what was written is told on standard error, as JSON."""
    if sys.stdout.isatty():
        fail("this writes a tar stream: send it to a file")
    tally = _run(part, "export", sys.stdout.buffer)
    sys.stdout.buffer.flush()
    click.echo(line(tally.document()), err=True)


@command.command("import")
@part_argument
@json_option
def import_(part: str, as_json: bool) -> None:  # noqa: ARG001  (always JSON)
    """Read a part from standard input and put it where it belongs. Exits 1 when the stream was cut off."""
    echo_json(_run(part, "restore", sys.stdin.buffer).document())


def _run(part: str, action: str, stream: IO[bytes] | None = None) -> Tally:
    """Call ``measure``, ``export`` or ``restore`` of a part's module with what it works on."""
    from webhook_api.backup import BackupError

    try:
        return {"objects": _objects, "redis": _redis, "state": _state}[part](action, stream)
    except BackupError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{part}: {error}", EX_UNAVAILABLE)


def _objects(action: str, stream: IO[bytes] | None) -> Tally:
    from webhook_api.backup import objects
    from webhook_api.config import Need
    from webhook_api.outlets import minio_client

    loaded = _settings(Need.OBJECT_STORE)
    given = (stream,) if stream else ()
    return _tally(getattr(objects, action)(minio_client(loaded), loaded.minio_bucket, *given))


def _redis(action: str, stream: IO[bytes] | None) -> Tally:
    from webhook_api.backup import streams
    from webhook_api.config import Need

    loaded = _settings(Need.REDIS)
    client = streams.client_of(loaded.redis_url, loaded.redis_password)
    try:
        if action == "restore" and stream:
            return streams.restore(client, stream)
        if stream:
            return streams.export(client, loaded.redis_stream, stream)
        return streams.measure(client, loaded.redis_stream)
    finally:
        client.close()


def _state(action: str, stream: IO[bytes] | None) -> Tally:
    from webhook_api.backup import state

    cache = settings(frozenset()).fal_jwks_cache_file
    if cache is None:
        fail("FAL_JWKS_CACHE_FILE is not set: this instance keeps nothing on the disk", EX_CONFIG)
    given = (stream,) if stream else ()
    return _tally(getattr(state, action)(Path(cache).parent, *given))


def _settings(need: Any) -> Settings:
    return settings(frozenset({need}))


def _tally(found: Any) -> Tally:
    tally: Tally = found
    return tally
