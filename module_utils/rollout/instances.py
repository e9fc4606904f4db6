"""Replacing instances and workers, one at a time, behind health and gate."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from functools import partial

from ansible.module_utils.container_health import HealthGate, Wanted, failure_message
from ansible.module_utils.docker_engine import Engine
from ansible.module_utils.rollout.compose import Project, is_healthy, is_running
from ansible.module_utils.rollout.evidence import collect
from ansible.module_utils.rollout.gates import Asking, Gate
from ansible.module_utils.rollout.journal import Journal
from ansible.module_utils.rollout.model import Release, RolloutError, Service, Settings
from ansible.module_utils.rollout.signals import StopRequest
from ansible.module_utils.rollout.switch import Switches

#: Answered requests by endpoint, as the service counts them; asking for health or metrics is none of them.
_ANSWERED = "webhook_request_seconds"
_COUNT = re.compile(rf"^{_ANSWERED}_count\{{([^}}]*)\}} ([0-9.e+]+)$", re.MULTILINE)
_OWN = re.compile(r'endpoint="[^"]*(health|metrics)"')
_IN_PROGRESS = re.compile(r"^webhook_deliveries_in_progress ([0-9.e+]+)$", re.MULTILINE)
QUIET_PAUSE, LOOK, SOON = 0.15, 0.5, 0.05

Load = tuple[float, float | None]


def load_of(metrics: str) -> Load | None:
    """Requests that an instance has answered, without ours, and deliveries in progress (None: a release that does not count
    them); None when it does not say."""
    if _ANSWERED not in metrics:
        return None
    counts = [float(value) for labels, value in _COUNT.findall(metrics) if not _OWN.search(labels)]
    in_progress = _IN_PROGRESS.search(metrics)
    return sum(counts), float(in_progress[1]) if in_progress else None


class Instances:
    """The API instances and workers of one site."""

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
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._project, self._engine, self._asking, self._gate = project, engine, asking, gate
        self._switches, self._journal, self._stop, self._settings = switches, journal, stop, settings
        self._clock, self._sleep = clock, sleep

    def replace(
        self,
        service: Service,
        release: Release,
        nginx: str = "",
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Bring one service to the release. `nginx`: the container through which it is proven; empty for none.

        `meanwhile`: what may be done while it starts.
        """
        self.renew(service, release)
        meanwhile()
        self.prove(service, release, nginx)

    def renew(self, service: Service, release: Release) -> None:
        """Make one service's container anew, and start it: `prove` says later whether it is good."""
        self._stop.check()
        if service.kind == "api" and len(release.instances) > 1:
            self._take_out(service, release)
        self._journal.touching(service.name)
        with self._journal.step("replace", service.name):
            self._project.clear(service.name)
            self.start([service], release)

    def start(self, services: Sequence[Service], release: Release) -> None:
        """Make and start containers that are not there."""
        try:
            self._project.up(release, [service.name for service in services])
        except RolloutError as error:
            for service in services:
                error.evidence = error.evidence or collect(
                    self._engine, service.container, self._settings.log_lines
                )
            raise

    def prove(self, service: Service, release: Release, nginx: str = "") -> None:
        """Healthy, of the release, by itself and through nginx; then it is in use."""
        if service.kind == "api":
            with self._journal.step("start", service.name), self._stop.waiting():
                if not self._answers_soon(service):
                    self.healthy([service])
            with self._journal.step("gate", service.name), self._stop.waiting():
                self.gate(service, partial(self._both_ways, service, release, nginx))
        with self._journal.step("health", service.name):
            self.healthy([service])
        if service.kind == "api":
            self._switches.take_in(service.name)

    def _answers_soon(self, service: Service) -> bool:
        """Whether it answers before docker has a verdict. It does within a second, and docker looks once a second: the gate
        need not wait for that, and what never answers is docker's to explain."""
        deadline = self._clock() + self._settings.health_timeout
        while self._clock() < deadline:
            if self._answers(service):
                return True
            state = (self._engine.inspect(service.container) or {"State": {}})["State"]
            if state.get("Status") != "running" or (state.get("Health") or {}).get("Status") != "starting":
                return False
            self._stop.check()
            self._sleep(SOON)
        return False

    def _both_ways(self, service: Service, release: Release, nginx: str) -> str:
        fault: str = self._asking.instance(service, release)
        return fault or (self._asking.through(nginx, service, release) if nginx else "")

    def gate(self, service: Service, ask: Callable[[], str]) -> None:
        """Hold the gate; what fails carries the container's log."""
        try:
            self._gate.hold(service.container, ask, service=service.name)
        except RolloutError as error:
            error.evidence = error.evidence or collect(
                self._engine, service.container, self._settings.log_lines
            )
            raise

    def healthy(self, services: Sequence[Service], names: Sequence[str] = ()) -> None:
        """Wait until the containers are healthy and as the release says (`names`: where they are called otherwise)."""
        called = list(names) or [service.container for service in services]
        wanted = [
            Wanted(
                name,
                timeout=self._settings.health_timeout,
                require_healthcheck=True,
                expect_image=service.image,
                expect_labels=service.labels,
            )
            for service, name in zip(services, called, strict=True)
        ]
        with self._stop.waiting():
            results = HealthGate(self._engine, wanted).wait()
        for service, name, result in zip(services, called, results, strict=True):
            if not result["ok"]:
                message = failure_message([result | {"log": [], "health_log": []}]).partition("\n")[2]
                raise RolloutError(
                    "unhealthy",
                    message or f"{name} is not ready",
                    service=service.name,
                    evidence=collect(self._engine, name, self._settings.log_lines),
                )

    def _take_out(self, service: Service, release: Release) -> None:
        found = self._engine.inspect(service.container)
        in_use = service.name not in self._switches.out()
        # Docker's verdict is up to an interval old: it may protect one that serves, never give one away.
        if in_use and (is_healthy(found) or self._answers(service)):
            with self._journal.step("others", service.name):
                self._another_serves(service, release)
        self._journal.touching(service.name)
        with self._journal.step("drain", service.name), self._stop.waiting():
            self._switches.take_out(service.name)
            if is_running(found):
                self._wait_quiet(service)

    def _another_serves(self, service: Service, release: Release) -> None:
        """Never below one healthy instance: another one answers now and is in use, or this one stays."""
        out = self._switches.out()
        others = [other for other in release.instances if other.name != service.name]
        deadline = self._clock() + self._settings.health_timeout
        while True:
            self._stop.check()
            if any(self._answers(other) for other in others if other.name not in out):
                return
            if self._clock() >= deadline:
                raise RolloutError(
                    "no_other_instance",
                    f"{service.container} is the only healthy instance that is in use: it was not replaced",
                    f"See why {', '.join(other.container for other in others)} is not healthy",
                    service=service.name,
                )
            self._sleep(LOOK)

    def _answers(self, service: Service) -> bool:
        """Whether it can take deliveries at this moment."""
        return bool(self._asking.local(service.port).status == 200)

    def _wait_quiet(self, service: Service) -> None:
        """Wait until it has nothing in progress and answers nothing any more: what nginx had sent is done.

        Bounded; then comes its own grace period. One that does not say what it does is given all the time: it may be busy.
        """
        deadline = self._clock() + self._settings.drain_seconds
        self._sleep(self._settings.drain_settle)
        before = self._load(service)
        while self._clock() < deadline:
            self._sleep(QUIET_PAUSE)
            now = self._load(service)
            if now is not None and now == before and not now[1]:
                return
            before = now

    def _load(self, service: Service) -> Load | None:
        answer = self._asking.local(service.port, "/metrics")
        return load_of(answer.text) if answer.status == 200 else None
