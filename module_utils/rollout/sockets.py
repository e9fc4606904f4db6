"""Who is still connected to a process, from /proc: its sockets by inode, and their states.

Formats: proc(5), ``/proc/PID/fd`` and ``/proc/net/tcp``; states as in the kernel's include/net/tcp_states.h.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

ESTABLISHED = "01"
PROC = Path("/proc")


def family(root: int, proc: Path = PROC) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def _parent(entry: Path) -> int | None:
    try:  # the name in parentheses may hold spaces and parentheses itself
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None


def sockets_of(pids: Iterable[int], proc: Path = PROC) -> set[str]:
    """Inodes of the sockets that these processes have open. Raises PermissionError when that may not be seen."""
    inodes = set()
    for pid in pids:
        try:
            names = os.listdir(proc / str(pid) / "fd")
        except (FileNotFoundError, ProcessLookupError):
            continue
        for name in names:
            try:
                target = os.readlink(proc / str(pid) / "fd" / name)
            except (FileNotFoundError, ProcessLookupError):
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    return inodes


def established(pid: int, ports: Collection[int], proc: Path = PROC) -> set[str]:
    """Inodes of established connections to these local ports, in the network of the process `pid`."""
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / str(pid) / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if (
                len(fields) > 9
                and fields[3] == ESTABLISHED
                and int(fields[1].rpartition(":")[2], 16) in ports
            ):
                found.add(fields[9])
    return found


def connections(root: int, ports: Collection[int], proc: Path = PROC) -> set[str] | None:
    """Connections of clients that a process and its descendants hold; None when that cannot be seen."""
    try:
        return sockets_of(family(root, proc), proc) & established(root, ports, proc)
    except OSError:
        return None
