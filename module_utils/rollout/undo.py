"""The way back: what this run (or a killed one before it) has begun to change becomes the current release's again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ansible.module_utils.compose_plan import Planned
from ansible.module_utils.rollout.model import Release, Service


@dataclass(frozen=True)
class Back:
    """What the way back consists of, in its order."""

    replace: tuple[Service, ...]
    remove: tuple[str, ...]
    keep: tuple[Service, ...]


def plan_undo(
    current: Release, touched: Sequence[str], planned: Sequence[Planned], behind: Sequence[str] = ()
) -> Back:
    """Of the services that were touched, in the reverse order: those that are not as the current release says are replaced,
    those that it does not have are removed, and the others are only put into use again.

    `behind`: services that have other secrets than the current release's; they are replaced as well, the last.
    """
    pending = {entry.name for entry in planned if entry.action != "none"} | set(behind)
    replace, remove, keep = [], [], []
    begun = list(dict.fromkeys(touched))
    for name in [*reversed(begun), *(name for name in behind if name not in begun)]:
        service = current.service(name)
        if service is None:
            remove.append(name)
        elif name in pending:
            replace.append(service)
        else:
            keep.append(service)
    return Back(tuple(replace), tuple(remove), tuple(keep))
