"""``spool``: what stands on the local disk while the database is away."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from webhook_api.cli.common import (
    EX_FAILED,
    EX_LATER,
    EX_UNAVAILABLE,
    WRITABLE,
    echo_json,
    echo_table,
    fail,
    json_option,
    line,
    settings,
)

if TYPE_CHECKING:
    from webhook_api.config import Settings


@click.group("spool")
def command() -> None:
    """Deliveries on the local disk: what is there, drain what no process owns, export."""


@command.command("status")
@json_option
def status(as_json: bool) -> None:
    """Show every spool file of this host: rows, size, age, and whether a living process owns it.

    Exits 1 when a file is damaged or holds rows that cannot be stored.
    """
    from dataclasses import asdict

    from webhook_api.config import NEEDS_MIGRATE
    from webhook_api.inbox.spoolview import look

    loaded = settings(NEEDS_MIGRATE)
    directory = _directory(loaded)
    files = [look(path) for path in _paths(directory)]
    ages = [file.oldest_seconds for file in files if file.oldest_seconds is not None]
    document = {
        "directory": str(directory),
        "rows": sum(file.rows or 0 for file in files),
        "arrivals": sum(file.arrivals or 0 for file in files),
        "rejected": sum(file.rejected or 0 for file in files),
        "bytes": sum(file.bytes for file in files),
        "max_bytes": loaded.spool_max_bytes,
        "oldest_seconds": max(ages, default=None),
        "files": [asdict(file) for file in files],
    }
    if as_json:
        echo_json(document)
    elif not files:
        click.echo(f"no spool file in {directory}")
    else:
        echo_table(
            ("file", "owner", "rows", "arrivals", "rejected", "bytes", "oldest", "error"),
            (
                (
                    file.name, "broken" if file.broken else "alive" if file.owned else "none", file.rows, file.arrivals,
                    file.rejected, file.bytes, file.oldest_at, file.error,
                )
                for file in files
            ),
        )  # fmt: skip
    if any(file.broken or file.error or file.rejected for file in files):
        sys.exit(EX_FAILED)


@command.command("export")
@click.argument("names", metavar="[FILE]...", nargs=-1)
@click.option("--output", type=WRITABLE, help="Write here, a new file.  [default: standard output]")
@json_option
def export(names: tuple[str, ...], output: Path | None, as_json: bool) -> None:  # noqa: ARG001  (always JSON)
    """Write rows as JSON, one object a line, with headers and body (base64), as the archive keeps them.

    Reads every file, or those named, without changing them: also what is left of damaged ones. Always JSON.
    """
    from webhook_api.config import NEEDS_MIGRATE
    from webhook_api.inbox.spoolview import export as rows_of

    directory = _directory(settings(NEEDS_MIGRATE))
    found = {path.name: path for path in _paths(directory)}
    unknown = [name for name in names if name not in found]
    if unknown:
        fail(f"there is no spool file {unknown[0]} in {directory}")
    stream = output.open("x") if output else sys.stdout
    try:
        for name in names or found:
            for document in rows_of(found[name]):
                stream.write(line(document) + "\n")
        stream.flush()
    finally:
        if output:
            stream.close()


@command.command("drain")
@json_option
def drain(as_json: bool) -> None:
    """Bring the files that no living process owns into the database, as an API process does by itself.

    For a host on which no API process runs any more. Exits 75 when rows are left that somebody holds, 69 without a
    database; whatever was not brought over still stands in its file.
    """
    import psycopg

    from webhook_api.cli.database import connected
    from webhook_api.config import NEEDS_MIGRATE
    from webhook_api.inbox.orphans import drain_orphans
    from webhook_api.inbox.spoolfile import SpoolBroken

    loaded = settings(NEEDS_MIGRATE)
    directory = _directory(loaded)
    try:
        with connected(loaded, "webhook-spool") as connection:
            result = drain_orphans(connection, directory)
    except psycopg.Error as error:
        fail(f"the database cannot be used: {type(error).__name__}", EX_UNAVAILABLE)
    except (SpoolBroken, OSError) as error:
        fail(f"the spool cannot be used: {error}")
    if as_json:
        echo_json(result)
    else:
        click.echo(
            f"{result['drained']} rows of {result['files']} files are in the inbox, {result['rejected']} cannot be "
            f"stored, {result['left']} are left"
        )
    if result["left"]:
        sys.exit(EX_LATER)
    if result["rejected"] or result["broken"]:
        sys.exit(EX_FAILED)


def _directory(loaded: Settings) -> Path:
    if loaded.spool_dir is None:
        fail("there is no spool: SPOOL_DIR is not set")
    return loaded.spool_dir


def _paths(directory: Path) -> list[Path]:
    from webhook_api.inbox.spoolview import paths

    try:
        return paths(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        fail(f"{directory} cannot be read: {error.strerror or error}")
