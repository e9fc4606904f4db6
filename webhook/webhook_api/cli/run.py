"""``serve``, ``worker`` and ``console``: the processes of the service."""

from __future__ import annotations

import os
import sys
import tempfile

import click

from webhook_api.cli.common import settings


@click.command()
def serve() -> None:
    """Serve HTTP with gunicorn, which takes this process's place (PID 1 of the container)."""
    from webhook_api.config import NEEDS_SERVE

    loaded = settings(NEEDS_SERVE)
    if loaded.workers > 1 and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="webhook-metrics-")
    os.execv(  # noqa: S606  (no shell is wanted)
        sys.executable, [sys.executable, "-m", "gunicorn", "--config", "python:webhook_api.gunicorn_conf"]
    )


@click.command()
def worker() -> None:
    """Process stored deliveries until told to stop."""
    from webhook_api.config import NEEDS_WORKER

    loaded = settings(NEEDS_WORKER)
    from webhook_api import jsonlog, tracing

    tracing.keep_out(loaded)
    from webhook_api import worker as worker_module

    jsonlog.configure(loaded.log_level, instance=loaded.instance_id)
    sys.exit(worker_module.run(loaded))


@click.command()
def console() -> None:
    """Serve the console for operators with gunicorn, which takes this process's place."""
    from webhook_api.config import NEEDS_CONSOLE

    settings(NEEDS_CONSOLE)
    os.execv(  # noqa: S606  (no shell is wanted)
        sys.executable, [sys.executable, "-m", "gunicorn", "--config", "python:webhook_api.web.gunicorn_conf"]
    )
