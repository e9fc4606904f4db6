"""One cut-over of one host, from the first check to the record.

Nothing is touched before everything that can be refused was tried. What fails after that is undone by itself, through the
same path, to the release that `current` names. A kill at any moment leaves a host that serves; the next run completes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ansible.module_utils.deploy_record import RecordError
from ansible.module_utils.docker_cli import Docker, DockerError
from ansible.module_utils.docker_engine import Engine, EngineError
from ansible.module_utils.release import ReleaseError, ReleaseStore
from ansible.module_utils.rollout.compose import Project, is_healthy
from ansible.module_utils.rollout.edge import Edge
from ansible.module_utils.rollout.evidence import collect, tell
from ansible.module_utils.rollout.gates import Asking, Gate, health_fault
from ansible.module_utils.rollout.instances import Instances
from ansible.module_utils.rollout.journal import Journal, only_one
from ansible.module_utils.rollout.leftovers import Leftovers
from ansible.module_utils.rollout.model import (
    Release,
    RolloutError,
    Service,
    Settings,
    parse_release,
    unlike,
)
from ansible.module_utils.rollout.plan import RolloutPlan, as_result, make_rollout_plan, risks
from ansible.module_utils.rollout.prepare import Preparation
from ansible.module_utils.rollout.rehearsal import Rehearsal
from ansible.module_utils.rollout.secrets import PROC, Rotation
from ansible.module_utils.rollout.signals import StopRequest
from ansible.module_utils.rollout.switch import Switches
from ansible.module_utils.rollout.undo import plan_undo

MIGRATE_REQUESTS = Path("/proc/sys/net/ipv4/tcp_migrate_req")
#: Seconds that the way back gives a container and a gate at least.
BACK_HEALTH, BACK_GATE = 300.0, 60.0
#: What engine, command line, releases and records raise: all of it stops a run, and starts the way back.
FAULTS = (RolloutError, EngineError, DockerError, ReleaseError, RecordError, OSError)


class Rollout:
    """One run. `probe` proves the whole from outside; it raises `RolloutError` (probe_failed)."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        docker: Docker,
        *,
        probe: Callable[[Release], None] | None = None,
        warn: Callable[[str], None] = lambda _text: None,
        stop: StopRequest | None = None,
        sleep: Callable[[float], None] = time.sleep,
        proc: Path = PROC,
    ) -> None:
        self._settings, self._engine, self._docker = settings, engine, docker
        self._probe, self._warn = probe, warn
        self._stop = stop or StopRequest()
        self._sleep = sleep
        self._store = ReleaseStore(str(settings.site_dir))
        self._journal = Journal(settings)
        self._switches = Switches(settings.site_dir / "state")
        self._asking = Asking(engine)
        self._preparation = Preparation(docker, engine, settings)
        self._rotation = Rotation(settings.site_dir, engine, warn, proc)

    # Reading

    def load(self, identity: str, like: Release | None = None) -> Release:
        """A release of this host, whole. `like`: a newer one, for one that does not yet say how it is rolled out."""
        description = self._store.describe(identity)
        if description is None:
            known = ", ".join(release["id"] for release in self._store.releases()) or "none"
            raise RolloutError(
                "no_release",
                f"there is no release {identity} on this host (there are: {known})",
                "Render it first (--tags stack), or name one of these",
            )
        if not description["whole"]:
            raise RolloutError(
                "damaged",
                f"files of release {identity} are missing or were changed by hand",
                "Render it again (ansible-playbook site.yml --tags stack)",
            )
        metadata, path = description["metadata"], Path(description["path"])
        if like and "rollout" not in metadata and metadata.get("webhook_release"):
            return unlike(like, identity, path, description["images"], str(metadata["webhook_release"]))
        return parse_release(identity, path, metadata.get("rollout") or {})

    def current(self, target: Release) -> Release | None:
        """The release to go back to; None when there is none, or when it cannot be gone back to."""
        identity = self._store.linked("current")
        if identity is None or identity == target.id:
            return target if identity else None
        try:
            return self.load(identity, target)
        except RolloutError as error:
            self._warn(f"There is no way back from this rollout: {error}")
            return None

    def plan(self, target: Release, contents: Mapping[str, str] | None = None) -> RolloutPlan:
        """What differs."""
        planned, orphans = self._project(target).plan(target, contents)
        serving = [service.name for service in target.services if self._serves(service)]
        current = self._store.linked("current")
        return make_rollout_plan(target, current, planned, orphans, serving, self._switches.out())

    def _serves(self, service: Service) -> bool:
        """An instance that answers now, a worker that docker calls healthy: it cannot be asked."""
        if service.kind == "api":
            return bool(self._asking.local(service.port).status == 200)
        return bool(service.kind == "worker" and is_healthy(self._engine.inspect(service.container)))

    def foresee(self, target: Release, contents: Mapping[str, str]) -> dict[str, Any]:
        """Check mode: the plan, with what would be pulled, and nothing else."""
        plan = self.plan(target, contents)
        self._tell_risks(plan)
        missing = self._preparation.missing(target)
        settles = not plan.changed and self._settings.settle and self._rotation.settles(target)
        return {
            **as_result(plan, self._settings.kind),
            "changed": (plan.changed or settles) and self._settings.kind != "prepare",
            "pulled": missing,
            "result": "planned",
        }

    # Doing

    def prepare(self, target: Release) -> dict[str, Any]:
        """All that can be refused, and no container touched."""
        self._journal.check_lock()
        plan = self.plan(target)
        self._tell_risks(plan)
        pulled = self._bring_images(target)
        if plan.edge:
            self._preparation.test_edge(target)
        done = {"changed": bool(pulled), "pulled": pulled, "result": "prepared"}
        return {**as_result(plan, "prepare"), **done}

    def confirm(self, target: Release) -> dict[str, Any]:
        """The record of a run that has nothing to do here. Touches nothing; `RolloutError` (differs) where there is."""
        self._journal.check_nobody_else()
        with only_one(self._settings.site_dir, 0, self._sleep):
            edge, _ = self._rooms(target)
            leftovers = Leftovers(
                self._project(target), self._docker, edge, self._switches, self._rehearsal()
            )
            plan = self.plan(target)
            if (
                plan.changed
                or leftovers.are_there(target)
                or self._rotation.names()
                or self._journal.troubled()
            ):
                raise RolloutError("differs", f"This host is not as release {target.id} wants it")
            return self._result(plan, self._journal.as_unchanged(target), [], changed=False)

    def run(self, target: Release) -> dict[str, Any]:
        """Bring the host to the release. `RolloutError` when that failed; its evidence says whether it was undone."""
        self._journal.check_lock()
        with only_one(self._settings.site_dir, self._settings.wait, self._sleep) as descriptor:
            # A command of a module that was killed goes on to its end, and the next run waits for that.
            self._docker = self._docker.holding(descriptor)
            self._preparation = Preparation(self._docker, self._engine, self._settings)
            self._stop.listen()
            try:
                return self._run(target)
            except Exception as error:
                raise _as_error(error) from error

    def _run(self, target: Release) -> dict[str, Any]:
        self._check_current(target)
        current = self.current(target)
        interrupted = self._journal.recover()
        if interrupted:
            self._warn(
                f"Run {interrupted['id'] or '(unknown)'} was interrupted ({interrupted['reason']}): it is recorded, and "
                "this run completes or undoes it."
            )
        edge, instances = self._rooms(target)
        leftovers = Leftovers(self._project(target), self._docker, edge, self._switches, self._rehearsal())
        cleared = leftovers.clear(target, current, throwaways=interrupted is not None)
        for text in cleared:
            self._warn(f"Left by a run that did not end: {text}.")
        plan = self.plan(target)
        if not plan.changed:
            after_failure = self._journal.after_failure()
            record = self._journal.unchanged(target)
            before, kept = self._rotation.names(), self._settle(target)
            result = self._result(plan, record, kept, changed=bool(cleared) or before != kept)
            return result | {"after_failure": after_failure}
        self._tell_risks(plan)
        self._journal.begin(target, plan.current)
        try:
            self._bring(plan, edge, instances)
        except Exception as error:  # whatever it is, the host is not left half way
            raise self._failed(_as_error(error), target, current) from error
        kept = self._settle(target)
        return self._result(plan, self._recorded("done", self._settings.reason), kept, changed=True)

    def _check_current(self, target: Release) -> None:
        """Under the lock: while this run waited for it, another one may have deployed, and the release of before would be
        another one than was meant."""
        expected, found = self._settings.expect_current, self._store.linked("current")
        if expected and found != expected:
            raise RolloutError(
                "moved_on",
                f"While this run waited for the lock, release {found} came after {expected}, so the release of before is "
                "another one now. Nothing was changed",
                'Look (make rollback ARGS="-e list=true") and say which one: '
                f"-e release={target.id} for the one that was meant",
            )

    def _bring(self, plan: RolloutPlan, edge: Edge, instances: Instances) -> None:
        release = plan.release
        with self._journal.step("pull"):
            self._bring_images(release)
        if plan.edge:
            with self._journal.step("test", "nginx"):
                self._preparation.test_edge(release)
        self._stop.check()
        if plan.migrate and self._settings.kind == "deploy":
            self._migrate(release)
        if plan.current and self._settings.kind == "rollback":
            self._rotation.hand_over(release, plan.current)
        if plan.idle:
            self._start_all(plan, edge, instances)
        else:
            self._one_by_one(plan, edge, instances)
        self._final(release)
        if self._probe:
            with self._journal.step("probe"):
                self._probe(release)
        self._stop.ignore()
        with self._journal.step("current"):
            self._store.activate(release.id)
        self._remove_orphans(plan)
        self._take_in_what_is_no_service(release)

    def _migrate(self, release: Release) -> None:
        try:
            with self._journal.step("migrate"), self._stop.waiting():
                self._journal.take_long(self._settings.migrate_timeout)
                self._preparation.migrate(release)
        except RolloutError:
            for found in self._project(release).one_offs():  # of one that took too long, or was not to go on
                self._project(release).remove(found)
            raise

    def _one_by_one(self, plan: RolloutPlan, edge: Edge, instances: Instances) -> None:
        release = plan.release
        asked = plan.instances or plan.out
        control = edge.control(release) if asked else ""
        if asked and not control:
            self._warn(
                "The nginx that runs has no control socket (it is down, or of an older release): instances are proven by "
                "themselves, and a request may meet one that is just being replaced."
            )
        for name in plan.out:  # first: one that is switched off counts as none that serves
            service_out = release.service(name)
            if service_out is not None:
                instances.prove(service_out, release, control)
        others = [task.service for task in plan.others]

        def renew_others() -> None:
            while others:
                instances.renew(others.pop(0), release)

        for number, task in enumerate(plan.instances):
            through = control if edge.knows(control, task.service.name) else ""
            # What shows that a release is bad is an instance that no client has met yet, and not the worker's effects: the
            # worker's turn is while the second instance starts.
            instances.replace(task.service, release, through, renew_others if number else lambda: None)
        renew_others()
        for task in plan.others:
            instances.prove(task.service, release)
        if plan.edge:
            self._replace_edge(release, edge)

    def _replace_edge(self, release: Release, edge: Edge) -> None:
        """Where clients have an nginx, the new one shows first, out of their sight, that it leads to the release."""
        if edge.serving(release):
            self._rehearsal().hold(release)
        edge.replace(release)

    def _start_all(self, plan: RolloutPlan, edge: Edge, instances: Instances) -> None:
        """No instance runs: nothing is served that could be interrupted, so all start at once."""
        release = plan.release
        project = self._project(release)
        tasks = [task for task in plan.tasks if task.service.kind != "edge" or task.action != "replace"]
        services = [task.service for task in tasks]
        with self._journal.step("start"):
            for service in services:
                self._journal.touching(service.name)
                project.clear(service.name)
            if services:
                instances.start(services, release)
        with self._journal.step("health"):
            instances.healthy([service for service in services if service.kind != "edge"])
        for service in release.instances:
            instances.prove(service, release)
        nginx = plan.edge
        if nginx and nginx.action == "replace":
            self._replace_edge(release, edge)
        elif nginx:
            edge.adopt(release)

    def _final(self, release: Release, settings: Settings | None = None) -> None:
        """What the world sees: every public port leads to this release, N times in a row."""
        gate = self._gate(settings or self._settings)
        with self._journal.step("final gate"), self._stop.waiting():
            try:
                gate.hold("the site", lambda: self._everywhere(release), service=release.nginx.name)
            except RolloutError as error:
                name = release.nginx.container
                error.evidence = error.evidence or collect(self._engine, name, self._settings.log_lines)
                raise

    def _everywhere(self, release: Release) -> str:
        faults = (self._asking.instance(service, release) for service in release.instances)
        return next(filter(None, faults), "") or self._asking.public(release)

    def _remove_orphans(self, plan: RolloutPlan) -> None:
        """Containers of services that are no more. The release serves already, so what fails here is a warning."""
        project = self._project(plan.release)
        for name in plan.orphans:
            found = self._engine.inspect(name)
            if found is None:
                continue
            with self._journal.step("remove", name):
                try:
                    project.stop(found)
                    project.remove(found)
                except FAULTS as error:
                    self._warn(
                        f"{name} belongs to no service of the release, and could not be removed: {error}"
                    )

    def _settle(self, release: Release) -> list[str]:
        """Nothing of before is kept of the secrets that the release has proven. Names of those that stay kept."""
        kept: list[str] = []
        try:
            kept = self._rotation.settle(release, forget=self._settings.settle)
        except FAULTS as error:
            self._warn(
                f"What was kept of replaced secrets could not be removed; the next run does it: {error}"
            )
        return kept

    # When it fails

    def _failed(self, error: RolloutError, target: Release, current: Release | None) -> RolloutError:
        """Undo, record, and say all of it in one error."""
        self._stop.ignore()
        result, done, remedy = self._undo(target, current)
        told = [
            f"Release {target.id} failed{f' at {error.service}' if error.service else ''}: {error.message.rstrip('.')}."
        ]
        told += tell(error.evidence)
        told += [f"What was done: {done}.", f"What to do: {_sentence(error.remedy, remedy)}"]
        self._recorded(result, error.message, error.service)
        evidence = {
            "result": result,
            "rolled_back": result == "rolled_back",
            "failed_at": error.service or None,
            "container": error.evidence,
            "record": self._journal.record,
        }
        return RolloutError(error.reason, "\n".join(told), service=error.service, evidence=evidence)

    def _undo(self, target: Release, current: Release | None) -> tuple[str, str, str]:
        """(result, what was done, what to do next)."""
        again = "run the deployment again"
        if not self._journal.touched:
            self._take_all_in(current or target)
            told = _again(self._put_back_unused(current))
            return "failed", f"no container was replaced, what served goes on as it was{told}", again
        if current is None or (current.id == target.id and not self._rotation.is_kept_for(current)):
            look = f"docker compose -f {target.compose_file} logs"
            done = "nothing: there is no other release to go back to, so what was started stays for you to look at"
            self._take_all_in(target)
            return "failed", done, f"{look}, mend what it names, and {again}"
        try:
            names, secrets = self._go_back(target, current)
        except Exception as fault:
            second = _as_error(fault)
            reason = "\n".join([f"{second.message}.", *tell(second.evidence)])
            done = f"the way back to {current.id} was tried and FAILED as well: {reason}"
            look = "see which containers are healthy (docker ps), mend what is named above, and"
            return "failed", done, f"{look} {again}, or go back with playbooks/rollback.yml"
        back = ", ".join(names) or "nothing had to be replaced"
        text = f"release {current.id} was put back ({back}); it served throughout, and `current` names it"
        return "rolled_back", text + _again(secrets), f"{again} when it is mended"

    def _put_back_unused(self, current: Release | None) -> list[str]:
        """What the files say is what the current release uses. That it cannot be done hides no fault."""
        try:
            return self._rotation.put_back_unused(current) if current else []
        except FAULTS as fault:
            self._warn(f"The secrets of before could not be put back: {fault}")
            return []

    def _go_back(self, target: Release, current: Release) -> tuple[list[str], list[str]]:
        """The current release everywhere, by the same switches and gates: (what was replaced, secrets of before)."""
        with self._journal.step("undo"):
            # First: a container that is started has the files that stand then.
            secrets = self._rotation.put_back(current)
            behind = self._rotation.behind(current, secrets)
            edge, instances = self._rooms(current, self._patient())
            edge.resolve(current, target)
            planned, _ = self._project(current).plan(current)
            back = plan_undo(current, self._journal.touched, planned, behind)
            self._preparation.pull(self._preparation.missing(current) if back.replace else [])
            for service in back.keep:  # first: one that is switched off counts as none that serves
                if service.kind == "api":
                    instances.prove(service, current)
            for service in _in_order(back.replace, self._switches.out()):
                if service.kind == "edge":
                    edge.replace(current, settled=False)
                else:
                    instances.replace(service, current, self._way_through(edge, current, service))
            self._take_all_in(current)
            for name in back.remove:
                self._project(current).clear(name)
            # `staged` as well: a run that renders nothing is not to try the release again that has just failed.
            self._store.activate(current.id)
        self._final(current, self._patient())
        return [service.name for service in back.replace], secrets

    def _way_through(self, edge: Edge, release: Release, service: Service) -> str:
        """The nginx through which an instance is proven on the way back, which one that cannot be asked does not hold up."""
        if service.kind != "api":
            return ""
        try:
            nginx = edge.control(release)
            return nginx if edge.knows(nginx, service.name) else ""
        except RolloutError as error:
            self._warn(f"{service.name} is put back without a look through nginx: {error.message}")
            return ""

    def _take_all_in(self, release: Release) -> None:
        """Use again what answers for the release. What does not stays out, until a rollout has proven it."""
        self._take_in_what_is_no_service(release)
        for name in self._switches.out():
            service = release.service(name)
            if service and not health_fault(self._asking.local(service.port), release.webhook_release):
                self._switches.take_in(name)

    def _take_in_what_is_no_service(self, release: Release) -> None:
        for name in self._switches.out():
            if release.service(name) is None:
                self._switches.take_in(name)

    def _recorded(self, result: str, reason: str, failed_at: str = "") -> dict[str, Any]:
        """The record, which is no reason to call a rollout bad."""
        try:
            self._journal.finish(result, reason, failed_at)
        except RecordError as error:
            self._warn(f"This run could not be recorded: {error}")
        return dict(self._journal.record)

    # Small things

    def _project(self, release: Release) -> Project:
        return Project(release.project, self._docker, self._engine)

    def _patient(self) -> Settings:
        """For the way back: what has served before is known to become healthy, on a busy machine too."""
        settings = self._settings
        health, gate = max(settings.health_timeout, BACK_HEALTH), max(settings.gate_timeout, BACK_GATE)
        return replace(settings, health_timeout=health, gate_timeout=gate)

    def _rooms(self, release: Release, settings: Settings | None = None) -> tuple[Edge, Instances]:
        settings = settings or self._settings
        gate = self._gate(settings)
        shared = (self._project(release), self._engine, self._asking, gate, self._switches, self._journal)
        instances = Instances(*shared, self._stop, settings, sleep=self._sleep)
        return Edge(*shared, self._stop, settings, instances, sleep=self._sleep), instances

    def _rehearsal(self) -> Rehearsal:
        gate = self._gate(self._settings)
        shared = (self._journal, self._stop, self._settings, self._warn)
        return Rehearsal(self._docker, self._engine, gate, *shared)

    def _gate(self, settings: Settings) -> Gate:
        return Gate(settings.gate_count, settings.gate_interval, settings.gate_timeout, sleep=self._sleep)

    def _bring_images(self, release: Release) -> list[str]:
        missing: list[str] = self._preparation.missing(release)
        self._preparation.pull(missing)
        return missing

    def _tell_risks(self, plan: RolloutPlan) -> None:
        if not plan.tasks:
            return
        try:
            migrate_requests: bool | None = MIGRATE_REQUESTS.read_text().strip() == "1"
        except OSError:
            migrate_requests = None
        live = self._engine.info().get("LiveRestoreEnabled")
        for text in risks(plan, migrate_requests=migrate_requests, live_restore=live):
            self._warn(f"Risk: {text}")

    def _result(
        self, plan: RolloutPlan, record: Mapping[str, Any], kept: list[str], *, changed: bool
    ) -> dict[str, Any]:
        return {
            **as_result(plan, self._settings.kind),
            "changed": changed,
            "result": record["result"],
            "kept_secrets": kept,
            "record": dict(record),
            "seconds": record["seconds"],
        }


def _in_order(services: Iterable[Service], out: Collection[str]) -> list[Service]:
    """nginx first; then what is out of use: one in use could not be taken out while it is the only one."""
    return sorted(services, key=lambda service: (service.kind != "edge", service.name not in out))


def _as_error(error: BaseException) -> RolloutError:
    """Whatever stopped a run, as this boundary's exception."""
    if isinstance(error, RolloutError):
        return error
    if isinstance(error, (EngineError, DockerError)):
        return RolloutError("engine", str(error).rstrip("."))
    if isinstance(error, (ReleaseError, RecordError, OSError)):
        return RolloutError("io", str(error).rstrip("."))
    remedy = "This is a fault of the rollout itself: report it with this message"
    return RolloutError("defect", f"{type(error).__name__}: {error}", remedy)


def _again(names: list[str]) -> str:
    return f"; secrets of before stand again: {', '.join(names)}" if names else ""


def _sentence(*parts: str) -> str:
    return "; ".join(part.rstrip(".") for part in parts if part) + "."
