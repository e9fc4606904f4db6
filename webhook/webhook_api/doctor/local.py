"""What stands in this container: settings, disk, spool, and the API itself."""

from __future__ import annotations

import json
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from webhook_api.config import Settings
from webhook_api.doctor import Finding, fail, ok, skip, warn

FREE_WARN: Final = 256 * 1024**2
"""Bytes that should be left where bodies and deliveries are put down."""
_SECONDS: Final = 4.0


def settings_in_force(settings: Settings) -> Iterator[Finding]:
    """They could be read; what stands out in them."""
    sources = [sender.name for sender in settings.sources]
    yield ok("settings", f"release {settings.release}, version {settings.version}, instance {settings.instance_id}, "
             f"environment {settings.environment}, senders: {', '.join(['fal', 'manual', *sources])}")  # fmt: skip
    if settings.fal_webhook_secret is None:
        yield warn("settings", "no FAL_WEBHOOK_SECRET: the bot's own and manual calls are refused",
                   "set it, unless nothing but fal delivers here")  # fmt: skip
    if settings.fal_webhook_secret_previous is not None:
        yield warn("settings", "FAL_WEBHOOK_SECRET_PREVIOUS is set: two secrets are accepted",
                   "take it away when every caller has the new one (docs/rotation.md)")  # fmt: skip
    if not settings.production:
        yield warn("settings", f"ENVIRONMENT is {settings.environment}: some strict rules do not hold",
                   "set it to production where real deliveries arrive")  # fmt: skip


def disk(settings: Settings) -> Iterator[Finding]:
    """Bodies, spool and key cache have room, and may be written."""
    places = {Path(tempfile.gettempdir()): "temporary files"}
    if settings.fal_jwks_cache_file:
        places[settings.fal_jwks_cache_file.parent] = "key cache"
    if settings.spool_dir:
        places[settings.spool_dir] = "spool"
    for path, purpose in places.items():
        yield _place(path, purpose)


def _place(path: Path, purpose: str) -> Finding:
    try:
        found = os.statvfs(path)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".doctor-") as probe:
            probe.write(b"doctor")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return fail("disk", f"{path} ({purpose}) cannot be written: {error.strerror}",
                    "mount a volume there that this container's user may write to")  # fmt: skip
    free = found.f_bavail * found.f_frsize
    said = f"{path} ({purpose}): {free / 1024**2:,.0f} MiB free"
    if free < min(FREE_WARN, found.f_blocks * found.f_frsize // 10) or (
        found.f_files and found.f_favail == 0
    ):
        return warn("disk", said, "make room", free_bytes=free)
    return ok("disk", said, free_bytes=free)


def spool(settings: Settings) -> Iterator[Finding]:
    """What waits on the disk for the database."""
    directory = settings.spool_dir
    if directory is None:
        yield skip("spool", "SPOOL_DIR is not set: without the database deliveries are answered 503")
        return
    try:
        sizes = [entry.stat().st_size for entry in os.scandir(directory) if entry.is_file()]
    except OSError as error:
        yield fail("spool", f"{directory} cannot be read: {error.strerror}", "mount the spool's volume")
        return
    used = sum(sizes)
    said = f"{len(sizes)} file(s), {used / 1024**2:,.1f} of {settings.spool_max_bytes / 1024**2:,.0f} MiB"
    if used > 0.8 * settings.spool_max_bytes:
        yield warn(
            "spool", f"nearly full: {said}", "bring the database back, or raise SPOOL_MAX_BYTES", bytes=used
        )
    else:
        yield ok("spool", f"{said}; webhook-api spool status counts what waits", bytes=used)


def api(settings: Settings) -> Iterator[Finding]:
    """The API of this container, if this is one."""
    url = f"http://127.0.0.1:{settings.port}/health"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_SECONDS) as response:
            document = json.loads(response.read(100_000))
    except urllib.error.HTTPError as error:
        yield fail("api", f"{url} answers {error.code}: deliveries are refused", "the other findings say why")
        return
    except (OSError, ValueError):
        yield skip(
            "api", f"{url} does not answer", "run this in a container of the API, or look at why it is down"
        )
        return
    status = str(document.get("status"))
    bad = sorted(name for name, check in document.get("checks", {}).items() if not check.get("ok", True))
    if status == "healthy":
        yield ok("api", f"{url}: healthy")
    else:
        yield warn(
            "api", f"{url}: {status} ({', '.join(bad) or 'see /health'})", "the other findings say why"
        )
