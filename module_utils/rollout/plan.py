"""What a run will do, before it does anything: services in order, preparations, risks. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ansible.module_utils.compose_plan import Planned
from ansible.module_utils.rollout.model import Release, Service

NOT_RUNNING = ("create", "start")


@dataclass(frozen=True)
class Task:
    """One service that is not as the release says."""

    service: Service
    action: str
    reason: str

    def as_result(self) -> dict[str, str]:
        """As the module returns it."""
        return {
            "name": self.service.name,
            "kind": self.service.kind,
            "action": self.action,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class RolloutPlan:
    """All that differs from a release, in the order in which it is brought to it."""

    release: Release
    current: str | None
    tasks: tuple[Task, ...]
    orphans: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    idle: bool = False
    out: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def changed(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.tasks or self.orphans or self.out or self.current != self.release.id)

    @property
    def edge(self) -> Task | None:
        """What is to be done with nginx."""
        return next((task for task in self.tasks if task.service.kind == "edge"), None)

    @property
    def instances(self) -> list[Task]:
        """What is to be done with API instances."""
        return [task for task in self.tasks if task.service.kind == "api"]

    @property
    def others(self) -> list[Task]:
        """What is to be done with workers."""
        return [task for task in self.tasks if task.service.kind == "worker"]

    @property
    def migrate(self) -> bool:
        """Whether code is about to run that may want another schema."""
        return self.release.migrate and any(task.service.kind != "edge" for task in self.tasks)

    def lines(self, kind: str = "deploy") -> list[str]:
        """The plan in words, one line a step."""
        told = [
            f"{task.service.name}: {_how(task, self.idle)} ({task.reason})"
            for task in self.instances + self.others + ([self.edge] if self.edge else [])
        ]
        if self.migrate and kind == "deploy":
            told.insert(0, "the database is migrated, if the release brings migrations")
        told += [f"{name}: is removed (no service of the release)" for name in self.orphans]
        told += [f"{name}: is taken into use again" for name in self.out]
        if self.current != self.release.id:
            told.append(f"release {self.release.id} becomes the current one, after {self.current or 'none'}")
        return told


def _how(task: Task, idle: bool) -> str:
    if task.action != "replace":
        return task.action
    if task.service.kind == "edge":
        return "replace, two side by side for a while"
    return "replace" if idle or task.service.kind == "worker" else "replace, out of use meanwhile"


def make_rollout_plan(
    release: Release,
    current: str | None,
    planned: Sequence[Planned],
    orphans: Sequence[Mapping[str, str]],
    healthy: Collection[str],
    out: Sequence[str] = (),
) -> RolloutPlan:
    """Put the services that differ in order: instances (those that do not serve first), worker, nginx.

    `healthy`: names of the services that serve; `out`: services that are switched off, and so serve nobody.
    """
    by_name = {entry.name: entry for entry in planned}
    tasks = [
        Task(service, action, reason)
        for service in release.services
        for action, reason in [_action(service, by_name.get(service.name))]
        if action != "none"
    ]
    position = {"api": 0, "worker": 1, "edge": 2}
    serving = set(healthy) - set(out)
    tasks.sort(key=lambda task: (position[task.service.kind], task.service.name in serving))
    pending = {task.service.name for task in tasks}
    running = [
        service
        for service in release.instances
        if service.name in by_name and by_name[service.name].action not in NOT_RUNNING
    ]
    return RolloutPlan(
        release=release,
        current=current,
        tasks=tuple(tasks),
        orphans=tuple(entry["name"] for entry in orphans),
        idle=not running,
        out=tuple(name for name in out if release.service(name) and name not in pending),
    )


def _action(service: Service, planned: Planned | None) -> tuple[str, str]:
    if planned is None:
        return "create", "there is no container"
    misnamed = [name for name in planned.containers if name != service.container]
    if planned.action == "none" and service.kind != "edge" and misnamed:
        return "replace", f"its container is called {misnamed[0]}, not {service.container}"
    return planned.action, planned.reason


def risks(plan: RolloutPlan, *, migrate_requests: bool | None, live_restore: bool | None) -> list[str]:
    """What can go wrong on this host that the project cannot prevent; only of what this plan touches."""
    told = []
    edge = plan.edge
    if edge and edge.action == "replace" and migrate_requests is not True:
        why = "is off" if migrate_requests is False else "is not known to this kernel"
        told.append(
            f"net.ipv4.tcp_migrate_req {why}: while nginx is replaced, connections that wait in the old one's queue are "
            "reset when it ends (measured: 12 of 117,672). Role edge sets it where the kernel has it (5.14 and newer)."
        )
    if len(plan.release.instances) == 1 and any(task.action == "replace" for task in plan.instances):
        told.append(
            "there is one instance only (site_api_ports): while it is replaced nobody answers, and senders get 502 or 503 "
            "and must come again. With two, none does."
        )
    if plan.tasks and live_restore is False:
        told.append(
            "the engine has no live-restore: should it be restarted or updated, every container stops, with or without a "
            "deployment. Role engine sets it where it installs the engine (engine_live_restore)."
        )
    return told


def as_result(plan: RolloutPlan, kind: str) -> dict[str, Any]:
    """The plan as the module returns it."""
    return {
        "services": [task.as_result() for task in plan.tasks],
        "pending": [task.service.name for task in plan.tasks],
        "orphans": list(plan.orphans),
        "plan": plan.lines(kind),
        "from": plan.current,
        "to": plan.release.id,
    }
