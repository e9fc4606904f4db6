"""What the integration tests of the modules share, apart from fixtures."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable
from typing import Any

import pytest


def tar_of(files: dict[str, bytes]) -> bytes:
    """A tar archive of files, readable by everybody, owned by root."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, content in files.items():
            info = tarfile.TarInfo(path.lstrip("/"))
            info.size, info.mode = len(content), 0o644
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def wait_for(condition: Callable[[], Any], seconds: float = 120, what: str = "the condition") -> Any:
    """Return the first true value of `condition`; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    pytest.fail(f"{what} did not come true within {seconds} s")


def host_port(container: Any, inside: int) -> int:
    container.reload()
    return int(container.ports[f"{inside}/tcp"][0]["HostPort"])
