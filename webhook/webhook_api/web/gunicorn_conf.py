"""gunicorn's configuration of the console, used as ``-c python:webhook_api.web.gunicorn_conf``.

One process with threads: who tried to log in is counted in its memory. Live views keep a thread each.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from gunicorn.glogging import Logger

from webhook_api import jsonlog
from webhook_api.config import NEEDS_CONSOLE, load_settings

_settings = load_settings(needs=NEEDS_CONSOLE)


class JsonLogger(Logger):  # type: ignore[misc]
    """gunicorn's own messages through the process's JSON log."""

    def setup(self, cfg: Any) -> None:  # noqa: ARG002  (gunicorn's signature)
        """Leave formatting and level to the root logger."""
        jsonlog.configure(_settings.log_level, instance=_settings.instance_id)
        self.error_log.propagate = True
        self.error_log.handlers[:] = []


wsgi_app = "webhook_api.web.app:create_app()"
bind = [f"{_settings.host}:{_settings.port}"]
worker_class = "gthread"
workers = 1
threads = 16
keepalive = 75
timeout = 60
# A stream may have no end for longer; its browser comes again.
graceful_timeout = 5
limit_request_line = 8190
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
control_socket_disable = True
logger_class = JsonLogger
accesslog = None
proc_name = "webhook-console"


def post_worker_init(worker: Any) -> None:
    """Open pools and threads after the fork."""
    worker.app.callable.extensions["services"].start()


def worker_exit(server: Any, worker: Any) -> None:  # noqa: ARG001  (gunicorn's signature)
    """Close them again."""
    with contextlib.suppress(AttributeError, TypeError):
        worker.app.callable.extensions["services"].stop()
