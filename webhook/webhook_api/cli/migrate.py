"""``migrate``: the database's schema."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from webhook_api.cli.common import EX_FAILED, EX_UNAVAILABLE, fail, first_line, json_option, line, settings

if TYPE_CHECKING:
    from webhook_api.db import Connection


@click.command("migrate")
@click.option("--dry-run", is_flag=True, help="Only say what would be applied.")
@click.option(
    "--status", is_flag=True, help="Say where the schema stands; exit 1 when migrations are missing."
)
@json_option
def command(dry_run: bool, status: bool, as_json: bool) -> None:  # noqa: ARG001  (it is JSON always)
    """Bring the database's schema up to date. Safe to run again and at the same time. Always JSON.

    Prints what was applied. Exits 1 when a migration fails, 69 when the database cannot be reached.
    """
    import psycopg

    from webhook_api import db
    from webhook_api.config import NEEDS_MIGRATE
    from webhook_api.migrate import MigrationError
    from webhook_api.migrate import migrate as run

    loaded = settings(NEEDS_MIGRATE)
    try:
        with db.connect(loaded.database_url, "webhook-migrate") as connection:
            if dry_run or status:
                missing = _look(connection)
                if status and missing:
                    sys.exit(EX_FAILED)
                return
            outcome = run(connection)
    except MigrationError as error:
        fail(f"migration failed ({error.reason}): {error}")
    except psycopg.OperationalError as error:
        fail(f"the database cannot be reached: {first_line(error)}", EX_UNAVAILABLE)
    click.echo(line({"applied": list(outcome.applied), "version": outcome.version}))


def _look(connection: Connection) -> list[str]:
    """Print where the schema stands, and return what is missing."""
    from webhook_api.migrate import applied_versions, packaged, pending

    applied = applied_versions(connection)
    missing = [migration.name for migration in pending(packaged(), applied)]
    click.echo(line({"version": max(applied, default=0), "packaged": len(packaged()), "missing": missing}))
    return missing
