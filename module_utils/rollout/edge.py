"""Replacing nginx without a gap: the new one beside the old one, the old one drained, ended, removed.

Both listen on the same ports (SO_REUSEPORT) for a while. Every answer of the old one then closes its connection, and it is
ended when the clients that it had are gone: measured in docs/rollout.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ansible.module_utils.docker_engine import Engine
from ansible.module_utils.rollout.compose import Project, is_healthy, is_running, label_of
from ansible.module_utils.rollout.evidence import collect
from ansible.module_utils.rollout.gates import Answer, Asking, Gate, health_fault
from ansible.module_utils.rollout.instances import Instances
from ansible.module_utils.rollout.journal import Journal
from ansible.module_utils.rollout.model import Release, RolloutError, Service, Settings
from ansible.module_utils.rollout.signals import StopRequest
from ansible.module_utils.rollout.sockets import connections
from ansible.module_utils.rollout.switch import Switches

EDGE_LABEL = "org.aisha.edge"
LOOK = 0.2
#: Seconds above nginx's own keepalive_timeout, by which it has closed what is idle.
MARGIN = 1.0

Found = Mapping[str, Any]


class Edge:
    """The nginx of one site: normally one container, two while it is replaced."""

    def __init__(
        self,
        project: Project,
        engine: Engine,
        asking: Asking,
        gate: Gate,
        switches: Switches,
        journal: Journal,
        stop: StopRequest,
        settings: Settings,
        instances: Instances,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._project, self._engine, self._asking, self._gate = project, engine, asking, gate
        self._switches, self._journal, self._stop, self._settings = switches, journal, stop, settings
        self._instances, self._clock, self._sleep = instances, clock, sleep

    def serving(self, release: Release) -> Found | None:
        """The container that runs; of two, the one that has the name."""
        running = [found for found in self._project.containers(release.nginx.name) if is_running(found)]
        named = [found for found in running if _name(found) == release.nginx.container]
        found: Found | None = (named or running or [None])[0]
        return found

    def control(self, release: Release) -> str:
        """Id of the container that is asked over its control socket; empty where there is none: down, or of a release from
        before. `RolloutError` (gate_failed) when one that has a socket does not answer within the time of a gate."""
        found = self.serving(release)
        if found is None or not label_of(found, EDGE_LABEL):
            return ""
        identity = str(found["Id"])
        self._answer(identity, "/edge_alive", lambda given: bool(given.status == 200))
        return identity

    def knows(self, container: str, name: str) -> bool:
        """Whether that nginx has a way to the instance, by its own word. `RolloutError` as above when it gives none."""
        if not container:
            return False
        answer = self._answer(container, f"/instance/{name}/health", lambda given: bool(given.status))
        return bool(answer.status != 404)

    def _answer(self, container: str, path: str, good: Callable[[Answer], bool]) -> Answer:
        """The first good answer. That nginx could not be asked just now says nothing about it: it is asked again."""
        last = Answer(0, "")

        def ask() -> str:
            nonlocal last
            last = self._asking.control(container, path)
            return "" if good(last) else last.text.strip() or f"HTTP {last.status}"

        try:
            with self._stop.waiting():
                replace(self._gate, count=1).hold(path, ask)
        except RolloutError as error:
            if error.reason != "gate_failed":
                raise
            raise self._silent(container, path, last) from error
        return last

    def _silent(self, container: str, path: str, last: Answer) -> RolloutError:
        evidence = collect(self._engine, container, self._settings.log_lines)
        name = evidence.get("name") or container[:12]
        return RolloutError(
            "gate_failed",
            f"{name} has a control socket, and could not be asked for {path} within {self._gate.timeout:g} s: "
            f"{last.text.strip() or f'HTTP {last.status}'}",
            "Nothing is replaced behind an nginx that does not say where it leads. See its log and the machine's load; "
            f"one that hangs: docker restart {name}",
            service="nginx",
            evidence=evidence,
        )

    def replace(self, release: Release, *, settled: bool = True) -> None:
        """Bring nginx to the release. `settled`: every instance is of it already; on the way back they follow."""
        self._stop.check()
        old = [found for found in self._project.containers(release.nginx.name) if is_running(found)]
        self._journal.touching(release.nginx.name)
        self._remove_idle(release)
        if not old:
            with self._journal.step("start", release.nginx.name):
                self._instances.start([release.nginx], release)
        elif _overlaps(release):
            self._beside(release, old, settled=settled)
            return
        else:  # a release from before two could stand side by side
            with self._journal.step("replace", release.nginx.name):
                self._project.clear(release.nginx.name)
                self._instances.start([release.nginx], release)
        self.adopt(release, settled=settled)

    def adopt(self, release: Release, *, settled: bool = True) -> None:
        """The one container that runs is healthy, of the release, and has the name."""
        found = self.serving(release)
        if found is None:
            raise RolloutError("start_failed", "nginx's container is not there", service=release.nginx.name)
        with self._journal.step("gate", release.nginx.name):
            self.prove(found, release, settled=settled)
        self._project.rename(found, release.nginx.container)

    def prove(self, found: Found, release: Release, *, settled: bool = True) -> None:
        """Healthy, with the configuration of the release, and every instance of it is reached."""
        self._instances.healthy([release.nginx], [found["Id"]])
        if not _controlled(release):
            return
        with self._stop.waiting():
            self._hold(found, "nginx", lambda: self._asking.edge(found["Id"], release))
            for service in release.instances:
                self._hold(found, service.name, partial(self._reached, found, service, release, settled))

    def _reached(self, found: Found, service: Service, release: Release, settled: bool) -> str:
        answer = self._asking.control(found["Id"], f"/instance/{service.name}/health")
        fault: str = health_fault(answer, release.webhook_release if settled else None)
        if fault and not settled and self._asking.local(service.port).status != 200:
            return ""  # on the way back one may be dead, and that is not nginx's fault
        return fault and f"{service.name} through the new nginx: {fault}"

    def _hold(self, found: Found, what: str, ask: Callable[[], str]) -> None:
        try:
            self._gate.hold(what, ask, service="nginx")
        except RolloutError as error:
            error.evidence = collect(self._engine, found["Id"], self._settings.log_lines)
            raise

    def _beside(self, release: Release, old: list[Found], *, settled: bool) -> None:
        before = {found["Id"] for found in old}
        try:
            with self._journal.step("start beside", release.nginx.name):
                self._project.up(release, [release.nginx.name], {release.nginx.name: len(old) + 1})
            new = [f for f in self._project.containers(release.nginx.name) if f["Id"] not in before]
            if len(new) != 1:
                raise RolloutError("start_failed", f"Compose made {len(new)} containers of nginx, not one")
            with self._journal.step("gate", release.nginx.name):
                self.prove(new[0], release, settled=settled)
        except RolloutError as error:
            self._withdraw(release, before, error)
            raise
        for found in old:
            self.retire(found, release)
        self._project.rename(new[0], release.nginx.container)

    def _withdraw(self, release: Release, keep: set[str], error: RolloutError) -> None:
        """Take a new nginx away that is not good. It may have clients already: it ends as gently as an old one."""
        self._stop.ignore()  # this is the way back already
        for found in self._project.containers(release.nginx.name):
            if found["Id"] not in keep:
                error.evidence = error.evidence or collect(
                    self._engine, found["Id"], self._settings.log_lines
                )
                self.retire(found, release)
        error.service = error.service or release.nginx.name

    def retire(self, found: Found, release: Release) -> None:
        """Drain an nginx that another one has taken over from, end it, and remove it."""
        edge = label_of(found, EDGE_LABEL)
        with self._journal.step("drain", release.nginx.name):
            if is_running(found) and edge:
                self._switches.drain(edge)
                with self._stop.waiting():
                    self._wait_gone(int(found["State"].get("Pid") or 0), release)
        with self._journal.step("end", release.nginx.name):
            self._project.stop(found)
            self._project.remove(found)
            if edge:
                self._switches.undrain(edge)

    def _wait_gone(self, pid: int, release: Release) -> None:
        """Until the clients that the old one has now are gone, or nginx has closed the idle ones by itself."""
        ports = {release.http, *release.https}
        deadline = self._clock() + (self._settings.keepalive or release.keepalive) + MARGIN
        held = connections(pid, ports) if pid else None
        while self._clock() < deadline:
            if held is not None:
                left = connections(pid, ports)
                if left is not None and not held & left:
                    return
            self._sleep(LOOK)

    def _remove_idle(self, release: Release) -> None:
        for found in self._project.containers(release.nginx.name):
            if not is_running(found):
                self._project.stop(found)
                self._project.remove(found)

    # After a run that was killed

    def resolve(self, target: Release, current: Release | None) -> list[str]:
        """Leave one nginx of several, under its name, and no draining file. What was done, in words."""
        told = []
        found = self._project.containers(target.nginx.name)
        running = [container for container in found if is_running(container)]
        if len(found) > 1 and running:
            keep = self._better(running, target, current)
            for container in found:
                if container["Id"] != keep["Id"]:
                    self.retire(container, target)
                    told.append(f"a second nginx ({_name(container)}) was ended")
            running = [keep]
        if len(running) == 1 and _name(running[0]) != target.nginx.container:
            self._project.rename(running[0], target.nginx.container)
            told.append(f"nginx's container is called {target.nginx.container} again")
        if len(running) <= 1:
            for edge in self._switches.draining():
                self._switches.undrain(edge)
                told.append(f"the nginx {edge} keeps connections again")
        return told

    def is_unresolved(self, target: Release) -> bool:
        """Whether `resolve` would have something to do, or no nginx is there."""
        names = [_name(container) for container in self._project.containers(target.nginx.name)]
        return names != [target.nginx.container] or bool(self._switches.draining())

    def _better(self, running: list[Found], target: Release, current: Release | None) -> Found:
        """Of several: one that answers with the target's configuration, else with the current one's, else the named one."""
        for release in filter(None, (target, current)):
            for found in running:
                if (
                    label_of(found, EDGE_LABEL) == release.edge
                    and found["Config"].get("Image") == release.nginx.image
                    and is_healthy(found)
                    and not self._asking.edge(found["Id"], release)
                ):
                    return found
        named = [found for found in running if _name(found) == target.nginx.container]
        return (named or running)[0]


def _name(found: Found) -> str:
    return str(found["Name"]).lstrip("/")


def _text(release: Release) -> str:
    try:
        return str(release.compose_file.read_text())
    except OSError:
        return ""


def _overlaps(release: Release) -> bool:
    """Whether Compose may make two of its nginx: not where the file gives the container a name."""
    return f"container_name: {release.nginx.container}\n" not in _text(release) + "\n"


def _controlled(release: Release) -> bool:
    """Whether its nginx has a control socket: releases from before have none."""
    return _overlaps(release)
