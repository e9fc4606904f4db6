"""gunicorn's configuration, used as ``-c python:webhook_api.gunicorn_conf``.

One process with threads is the default: the instances are the processes (two of them behind nginx), Ed25519 and
libpq release the interpreter's lock, and metrics need no files. WEBHOOK_WORKERS > 1 works as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from typing import Any

from gunicorn.glogging import Logger
from prometheus_client import multiprocess

from webhook_api import jsonlog, tracing
from webhook_api.config import load_settings

_settings = load_settings()
tracing.keep_out(_settings)


class JsonLogger(Logger):  # type: ignore[misc]
    """gunicorn's own messages through the process's JSON log."""

    def setup(self, cfg: Any) -> None:  # noqa: ARG002  (gunicorn's signature)
        """Leave formatting and level to the root logger."""
        jsonlog.configure(_settings.log_level, instance=_settings.instance_id)
        self.error_log.propagate = True
        self.error_log.handlers[:] = []


wsgi_app = "webhook_api.app:create_app()"
bind = [f"{_settings.host}:{_settings.port}"]
worker_class = "webhook_api.server.worker.EventWorker"
workers = _settings.workers
threads = _settings.threads
# Longer than nginx keeps an idle upstream connection (60 s), so that nginx always closes first and never
# sends a delivery into a connection that is just being closed.
keepalive = 75
timeout = 30
graceful_timeout = 30
# The root file system is read-only, and a heartbeat file on a disk blocks with the disk.
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
control_socket_disable = True
logger_class = JsonLogger
accesslog = None
proc_name = "webhook-api"


_M_MMAP_THRESHOLD = -3
_MMAP_BYTES = 1024 * 1024


def _give_memory_back() -> None:
    """Have memory of large bodies go back to the system when it is freed.

    glibc would learn from the first one that such sizes are usual, and keep each thread's for the next.
    """
    # musl has no mallopt, and does so by itself.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)


def post_worker_init(worker: Any) -> None:
    """Open pool and threads: this process is the one that keeps them."""
    _give_memory_back()
    # What stands now lives as long as the process: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    worker.app.callable.extensions["services"].start()
    worker.app.callable.extensions["quick"].start()


def worker_exit(server: Any, worker: Any) -> None:  # noqa: ARG001  (gunicorn's signature)
    """Close them again."""
    with contextlib.suppress(AttributeError, TypeError):
        worker.app.callable.extensions["quick"].stop()
        worker.app.callable.extensions["services"].stop()


def child_exit(server: Any, worker: Any) -> None:  # noqa: ARG001  (gunicorn's signature)
    """Forget the gauges of a process that has ended."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
