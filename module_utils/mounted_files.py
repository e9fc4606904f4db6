"""What a container has mounted, against what stands on the host (decision 0523)."""

from __future__ import annotations

import filecmp
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
    """Whether a container sees what stands at a mount's source now: the same file, or one that says the same.

    False where it does not run. OSError where one of them is not there, or may not be looked into.
    """
    if not has_process(found):
        return False
    inside = f"{proc / str(found['State']['Pid'])}/root{mount['Destination']}"
    # shallow=False: never by time and size alone.
    return os.path.samefile(inside, mount["Source"]) or (
        os.path.isfile(inside)
        and os.path.isfile(mount["Source"])
        and filecmp.cmp(inside, mount["Source"], shallow=False)
    )
