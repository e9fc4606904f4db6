"""``health``: the container's health check. It runs every few seconds, so it imports next to nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

import click

from webhook_api.cli.common import EX_UNAVAILABLE, WRITABLE, fail, json_option, line

HEARTBEAT: Final = Path("/tmp/worker.heartbeat")  # noqa: S108  (a tmpfs of the worker's own container)
HEARTBEAT_MAX_AGE: Final = 30.0
"""Seconds after which a worker that has not touched its heartbeat counts as stuck."""


@click.command("health")
@click.option("--worker", "of_worker", is_flag=True, help="Check the worker's heartbeat instead of the API.")
@click.option("--url", help="Address to ask.  [default: http://127.0.0.1:$PORT/health]")
@click.option("--heartbeat", type=WRITABLE, default=HEARTBEAT, show_default=True)
@json_option
def command(of_worker: bool, url: str | None, heartbeat: Path, as_json: bool) -> None:  # noqa: ARG001
    """Say whether the process of this container is well (for the container's health check). Always JSON."""
    if of_worker:
        _worker_health(heartbeat)
    else:
        _api_health(url or f"http://127.0.0.1:{os.environ.get('PORT') or '8000'}/health")


def _worker_health(heartbeat: Path) -> None:
    try:
        age = time.time() - heartbeat.stat().st_mtime
    except OSError:
        fail(f"there is no heartbeat at {heartbeat}: the worker has not started")
    if age > HEARTBEAT_MAX_AGE:
        fail(f"the worker's last heartbeat is {age:.0f} s old (limit {HEARTBEAT_MAX_AGE:.0f} s): it is stuck")
    click.echo(line({"status": "healthy", "heartbeat_age_seconds": round(age, 1)}))


def _api_health(url: str) -> None:
    import urllib.error
    import urllib.request

    if not url.startswith(("http://", "https://")):
        raise click.BadParameter("give an http or https address", param_hint="--url")
    # A proxy of the environment has no business between a container and itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=3) as response:
            click.echo(response.read(20_000).decode("utf-8", "replace").strip())
    except urllib.error.HTTPError as error:
        click.echo(error.read(20_000).decode("utf-8", "replace").strip())
        fail(f"{url} answered {error.code}")
    except OSError as error:
        fail(f"{url} does not answer: {getattr(error, 'reason', error)}", EX_UNAVAILABLE)
