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


def plan_undo(current: Release, touched: Sequence[str], planned: Sequence[Planned]) -> Back:
    """Of the services that were touched, in the reverse order: those that are not as the current release says are replaced,
    those that it does not have are removed, and the others are only put into use again."""
    pending = {entry.name for entry in planned if entry.action != "none"}
    replace, remove, keep = [], [], []
    for name in reversed(list(dict.fromkeys(touched))):
        service = current.service(name)
        if service is None:
            remove.append(name)
        elif name in pending:
            replace.append(service)
        else:
            keep.append(service)
    return Back(tuple(replace), tuple(remove), tuple(keep))
