"""What a container has mounted, against what stands on the host (decision 0523)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Found = Mapping[str, Any]


def has_process(found: Found) -> bool:
    """Whether there is a process that sees anything: not in a container that has ended, or waits to be started again."""
    return bool(found["State"].get("Pid"))


def bind_mounts(found: Found) -> Iterator[Found]:
    """Files and directories of the host that the container has mounted when it runs."""
    return (mount for mount in found.get("Mounts") or [] if mount.get("Type") == "bind")


def has_what_stands(found: Found, mount: Found, proc: Path) -> bool:
    """Whether a container sees what stands at a mount's source now, and not what stood there when it started.

    False where it does not run. Nothing is read of either. OSError where one of them is not there, or /proc may not be
    looked into.
    """
    if not has_process(found):
        return False
    inside = os.stat(f"{proc / str(found['State']['Pid'])}/root{mount['Destination']}")
    outside = os.stat(mount["Source"])
    return (outside.st_dev, outside.st_ino) == (inside.st_dev, inside.st_ino)
