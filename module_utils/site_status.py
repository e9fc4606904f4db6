"""The state of a site on one host: what runs, since when, its health, and what is not as the current release says.

Only looks. Each look is a small function over one source; what it finds wrong it adds to the findings. A source that cannot
be asked is a finding as well, never an exception.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from ansible.module_utils.certificate_dates import CertificateUnreadable, first_certificate, validity
from ansible.module_utils.deploy_lock import DeployLock, LockError, iso
from ansible.module_utils.deploy_record import DeployRecords, RecordError
from ansible.module_utils.docker_cli import Docker, DockerError
from ansible.module_utils.docker_engine import EngineError
from ansible.module_utils.mounted_files import bind_mounts, has_process, has_what_stands
from ansible.module_utils.release import ReleaseStore
from ansible.module_utils.rollout.compose import Project
from ansible.module_utils.rollout.journal import at_work
from ansible.module_utils.rollout.model import Release, RolloutError, Service, parse_release

STATE, SERVICE_LABEL = "state", "com.docker.compose.service"
ONEOFF_LABEL = "com.docker.compose.oneoff"
LEFT_BEHIND = (".down", ".draining")
#: Compose projects beside the service's own, by the end of their names.
EMBEDDED = ("registry", "backends", "monitoring")
#: Kinds of findings that keep deliveries from being taken or processed.
FAILING = frozenset({"release", "container", "health", "nginx", "secret", "instance", "switch"})
#: Seconds that an instance has to answer.
ASK_SECONDS = 3.0
MEGABYTE = 1_000_000

Get = Callable[[str, float], tuple[int, Any]]


class EngineView(Protocol):
    """What is asked of the engine."""

    def inspect(self, name: str) -> dict[str, Any] | None: ...  # noqa: D102
    def project_containers(self, project: str) -> list[dict[str, Any]]: ...  # noqa: D102
    def image_names(self, image: str) -> list[str]: ...  # noqa: D102
    def info(self) -> dict[str, Any]: ...  # noqa: D102


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    `kind`: release, file, edge, container, image, health, secret, switch, nginx, orphan, lock, certificate, disk, instance,
    run, engine.
    """

    kind: str
    name: str
    what: str
    verdict: str = ""
    """fail, or warn; by its kind when it is not given."""

    def shown(self) -> dict[str, str]:
        """As the module returns it."""
        verdict = self.verdict or ("fail" if self.kind in FAILING else "warn")
        return {"kind": self.kind, "name": self.name, "what": self.what, "verdict": verdict}


@dataclass
class Bounds:
    """From when on something is a finding."""

    certificate_days: int = 21
    certificate_fail_days: int = 7
    disk_free_mb: int = 2000
    deployments: int = 5


@dataclass
class SiteStatus:
    """Looks at one site. `get(url, seconds)` asks over HTTP: (status, JSON document); `pem(port)` is what nginx serves."""

    site_dir: Path
    engine: EngineView
    docker: Docker
    bounds: Bounds
    get: Get
    pem: Callable[[int], str]
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    proc: Path = Path("/proc")
    findings: list[Finding] = field(default_factory=list)
    busy: bool = False

    def look(self) -> dict[str, Any]:
        """The whole state."""
        store = ReleaseStore(str(self.site_dir))
        shown: dict[str, Any] = {"site_dir": str(self.site_dir), "time": iso(self.now())}
        # A rollout goes on to its end when the run that began it was killed, or ended with Ctrl-C.
        shown["at_work"] = at_work(self.site_dir)
        shown["lock"] = self._lock(shown["at_work"])
        # While a deployment is at work, its switches and its second nginx are as they should be.
        self.busy = bool(shown["at_work"] or (shown["lock"] and not shown["lock"]["dead"]))
        release, shown["release"] = self._release(store)
        shown["releases"] = [_brief(entry) for entry in store.releases()]
        containers = self._containers(release)
        shown["services"] = (
            [self._service(service, containers) for service in release.services] if release else []
        )
        if release:
            shown["embedded"] = self._embedded(release)
            self._drift(release)
            self._more_than_one(release, containers)
            shown["instances"] = {
                service.name: self._instance(release, service) for service in release.instances
            }
            shown["certificate"] = self._certificate(release)
        shown["deployments"] = self._deployments()
        shown["left_behind"] = self._left_behind()
        shown["disk"] = self._disk()
        shown["findings"] = [finding.shown() for finding in self.findings]
        shown["ok"] = not self.findings
        return shown

    def _note(self, kind: str, name: str, what: str, verdict: str = "") -> None:
        self.findings.append(Finding(kind, name, what, verdict))

    # Releases

    def _release(self, store: ReleaseStore) -> tuple[Release | None, dict[str, Any] | None]:
        identity = store.linked("current")
        if identity is None:
            self._note("release", "current", "no release is current: nothing was deployed here yet")
            return None, None
        described = store.describe(identity)
        if described is None:
            self._note("release", identity, "its directory is gone")
            return None, None
        shown = {
            "id": identity,
            "since": _changed_at(self.site_dir / "current"),
            "previous": store.linked("previous"),
            "staged": store.linked("staged"),
            "images": described["images"],
            "webhook_release": described["metadata"].get("webhook_release", ""),
        }
        self._files(described)
        try:
            rollout = described["metadata"].get("rollout") or {}
            release = parse_release(identity, Path(described["path"]), rollout)
        except RolloutError as error:
            self._note("release", identity, str(error))
            return None, shown
        self._edge_tree(release, described["files"])
        if shown["staged"] not in (None, identity) and not self.busy:
            self._note(
                "release",
                str(shown["staged"]),
                "is rendered and was not rolled out (or its rollout was undone)",
            )
        return release, shown

    def _files(self, described: Mapping[str, Any]) -> None:
        if not described["files"]:
            self._note("file", f"releases/{described['id']}/release.json", "is missing or cannot be read")
        for name, wanted in described["files"].items():
            try:
                digest = hashlib.sha256((self.site_dir / name).read_bytes()).hexdigest()
            except OSError as error:
                self._note("file", name, f"cannot be read: {error.strerror}")
                continue
            if digest != wanted["sha256"]:
                self._note("file", name, "is not what the release wrote: it was changed by hand")

    def _edge_tree(self, release: Release, files: Mapping[str, Any]) -> None:
        tree = Path(release.edge_path)
        for path in sorted(tree.rglob("*")) if tree.is_dir() else []:
            if path.is_file() and str(path.relative_to(self.site_dir)) not in files:
                self._note(
                    "edge",
                    str(path.relative_to(self.site_dir)),
                    "is no file of the release, and nginx may read it",
                )

    # Containers

    def _containers(self, release: Release | None) -> list[dict[str, Any]]:
        if release is None:
            return []
        try:
            found = self.engine.project_containers(release.project)
        except EngineError as error:
            self._note("engine", "docker", str(error))
            return []
        return [entry for entry in found if _label(entry, ONEOFF_LABEL).lower() != "true"]

    def _service(self, service: Service, containers: list[dict[str, Any]]) -> dict[str, Any]:
        found = next((entry for entry in containers if entry["Name"].lstrip("/") == service.container), None)
        shown: dict[str, Any] = {"name": service.name, "container": service.container, "image": service.image}
        if found is None:
            return {
                **shown,
                "status": "missing",
                "health": None,
                "since": None,
                "restarts": 0,
                "running_image": None,
            }
        shown |= self._state(service.name, found)
        self._mounts(service, found)
        for name, value in service.labels.items():
            if _label(found, name) != value:
                self._note(
                    "container",
                    service.name,
                    f"label {name} is {_label(found, name) or 'missing'}, not {value}",
                )
        return shown | {
            "running_image": found["Config"].get("Image"),
            "release": _label(found, "org.aisha.release") or None,
        }

    def _embedded(self, release: Release) -> list[dict[str, Any]]:
        """Registry, backends and monitoring of the project's own, where they are on this host."""
        shown = []
        for part in EMBEDDED:
            with suppress(EngineError):  # said by the look at the service's containers
                for found in self.engine.project_containers(f"{release.project}-{part}"):
                    name = found["Name"].lstrip("/")
                    shown.append({"container": name, **self._state(name, found)})
        return sorted(shown, key=lambda entry: str(entry["container"]))

    def _state(self, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
        """How a container is; what is wrong with it is a finding."""
        state = found["State"]
        health = (state.get("Health") or {}).get("Status")
        if state["Status"] != "running" or health not in (None, "healthy"):
            log = ((state.get("Health") or {}).get("Log") or [{}])[-1].get("Output", "").strip()
            what = f"is {state['Status']}{f', {health}' if health else ''}{f': {log[:300]}' if log else ''}"
            # One that has just started is not ill: it says so itself when it is.
            starts = state["Status"] == "running" and health == "starting"
            self._note("health", name, what, "warn" if starts else "")
        restarts = found.get("RestartCount", 0)
        return {
            "status": state["Status"],
            "health": health,
            "since": state.get("StartedAt"),
            "restarts": restarts,
        }

    def _mounts(self, service: Service, found: Mapping[str, Any]) -> None:
        """Files and directories that were replaced since the container started: it still sees the old ones."""
        for mount in bind_mounts(found) if has_process(found) else ():
            try:
                has_it = has_what_stands(found, mount, self.proc)
            except OSError as error:
                if not Path(mount["Source"]).exists():
                    self._note(
                        "file", mount["Source"], f"is gone; {service.name} has it mounted ({error.strerror})"
                    )
                continue
            if not has_it:
                kind = "secret" if mount["Destination"].startswith("/run/secrets/") else "file"
                self._note(
                    kind,
                    mount["Source"],
                    f"was replaced since {service.name} started, which still has the old one",
                )

    def _drift(self, release: Release) -> None:
        try:
            planned, orphans = Project(release.project, self.docker, self.engine).plan(release)
        except (RolloutError, DockerError, EngineError) as error:
            self._note("engine", "compose", str(error))
            return
        for entry in planned:
            if entry.action != "none":
                kind = "image" if "image" in entry.reason else "container"
                self._note(kind, entry.name, f"{entry.reason}: a rollout would {entry.action} it")
        for orphan in orphans:
            self._note("orphan", orphan["name"], "belongs to no service of the release")

    def _more_than_one(self, release: Release, containers: list[dict[str, Any]]) -> None:
        names = [
            entry["Name"].lstrip("/")
            for entry in containers
            if _label(entry, SERVICE_LABEL) == release.nginx.name
        ]
        if len(names) > 1 and not self.busy:
            self._note(
                "nginx", ", ".join(sorted(names)), "are there side by side: a rollout of nginx did not end"
            )

    # Instances, certificate

    def _instance(self, release: Release, service: Service) -> dict[str, Any]:
        base = f"http://127.0.0.1:{service.port}"
        try:
            code, health = self.get(f"{base}/health", ASK_SECONDS)
        except OSError as error:
            self._note("instance", service.name, f"does not answer at {base}: {error}")
            return {"status": "unreachable"}
        health = health if isinstance(health, dict) else {}
        shown = {"status": health.get("status"), "release": health.get("release"), "version": health.get("version"),
                 "spool": (health.get("checks") or {}).get("spool")}  # fmt: skip
        wrong = [name for name, check in (health.get("checks") or {}).items() if not check.get("ok", True)]
        if code != 200 or wrong:
            said = "; ".join(f"{name}: {health['checks'][name].get('error', 'not ok')}" for name in wrong)
            self._note(
                "instance",
                service.name,
                f"/health says {code} {health.get('status', '')}{f' ({said})' if said else ''}",
            )
        if health and health.get("release") != release.webhook_release:
            what = f"/health names release {health.get('release')}, not {release.webhook_release}"
            self._note("instance", service.name, what)
        if (waiting := (shown["spool"] or {}).get("rows") or 0) > 0:
            self._note("instance", service.name, f"{waiting} deliveries wait in its spool for the database")
        return shown | {"inbox": self._inbox(base)}

    def _inbox(self, base: str) -> Any:
        try:
            code, document = self.get(f"{base}/api/v1/webhook/status", ASK_SECONDS)
        except OSError:
            return None
        return document.get("inbox") if code == 200 and isinstance(document, dict) else None

    def _certificate(self, release: Release) -> dict[str, Any] | None:
        directory = Path(release.certificate_directory)
        path = (
            _certificate_file(Path(release.edge_path) / "nginx.conf", directory)
            or directory / "fullchain.pem"
        )
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
            begins, ends = validity(text)
        except (OSError, CertificateUnreadable) as error:
            self._note("certificate", str(path), str(error), "fail")
            return None
        days = (ends - self.now()).days
        if days < self.bounds.certificate_days:
            said = f"ends in {days} days ({iso(ends)})" if days >= 0 else f"ended at {iso(ends)}"
            late = days < self.bounds.certificate_fail_days
            self._note(
                "certificate", str(path), f"{said}: replace it (docs/tls.md)", "fail" if late else "warn"
            )
        if begins > self.now():
            self._note("certificate", str(path), f"holds only from {iso(begins)} on", "fail")
        for port in release.https:
            self._served(port, text)
        return {"file": str(path), "not_before": iso(begins), "not_after": iso(ends), "days_left": days}

    def _served(self, port: int, text: str) -> None:
        try:
            served = self.pem(port)
        except OSError as error:
            self._note("certificate", f"port {port}", f"nginx does not answer: {error}")
            return
        if first_certificate(served) != first_certificate(text):
            self._note("certificate", f"port {port}", "nginx serves another certificate than the file has")

    # The site's own state

    def _lock(self, rollout: str) -> dict[str, Any] | None:
        lock = DeployLock(self.site_dir)
        try:
            holder = lock.read()
        except LockError as error:
            self._note("lock", "deployment.lock", str(error))
            return None
        if holder is None:
            return None
        shown = lock.facts(holder) or {}
        if shown["dead"]:
            follows = (
                f"Its rollout is still at work on this host ({rollout}), and goes on to its end: look again then"
                if rollout
                else "The next run takes it"
            )
            self._note(
                "lock",
                holder.run or "unreadable",
                f"is held by a run that is over: {holder.described()}. {follows}",
            )
        return shown | {"described": holder.described()}

    def _deployments(self) -> list[dict[str, Any]]:
        records = DeployRecords(self.site_dir)
        try:
            hand, last = records.in_hand(), records.read(self.bounds.deployments)
        except RecordError as error:
            self._note("run", "deployments.jsonl", str(error))
            return []
        if hand is not None and not self.busy:
            self._note(
                "run", str(hand["id"]) or "unknown", "did not end: the next run completes or undoes it"
            )
        newest_first: list[dict[str, Any]] = last[::-1]
        return newest_first

    def _left_behind(self) -> list[str]:
        try:
            names = sorted(name for name in os.listdir(self.site_dir / STATE) if name.endswith(LEFT_BEHIND))
        except FileNotFoundError:
            return []
        for name in names if not self.busy else []:
            what = (
                "takes that instance out of use"
                if name.endswith(".down")
                else "makes that nginx close its connections"
            )
            self._note("switch", f"{STATE}/{name}", f"{what}, and no deployment is at work")
        return names

    def _disk(self) -> list[dict[str, Any]]:
        paths = {str(self.site_dir): "site"}
        with suppress(EngineError):  # said by the look at its containers
            paths.setdefault(str(self.engine.info().get("DockerRootDir") or "/var/lib/docker"), "engine")
        shown = []
        for path, purpose in paths.items():
            try:
                usage = shutil.disk_usage(path)
            except OSError:
                continue
            free = usage.free // MEGABYTE
            shown.append(
                {"path": path, "purpose": purpose, "free_mb": free, "total_mb": usage.total // MEGABYTE}
            )
            if free < self.bounds.disk_free_mb:
                self._note("disk", path, f"{free} MB are free, {self.bounds.disk_free_mb} MB should be")
        return shown


def _certificate_file(conf: Path, directory: Path) -> Path | None:
    """The certificate that nginx's configuration names, in the directory that is mounted at /etc/nginx/ssl."""
    try:
        lines = conf.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.strip().rstrip(";").split()
        if len(words) == 2 and words[0] == "ssl_certificate":
            return directory / Path(words[1]).name
    return None


def _brief(release: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("id", "created", "whole", "current", "previous", "staged", "images")
    return {key: release[key] for key in keys} | {
        "webhook_release": release["metadata"].get("webhook_release", "")
    }


def _label(container: Mapping[str, Any], name: str) -> str:
    return str((container["Config"].get("Labels") or {}).get(name) or "")


def _changed_at(link: Path) -> str:
    return str(iso(datetime.fromtimestamp(link.lstat().st_mtime, UTC)))


def get_json(url: str, seconds: float) -> tuple[int, Any]:
    """Ask over HTTP, past any proxy: (status, JSON document or None). OSError when nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=seconds) as answer:
            code, body = answer.status, answer.read(1_000_000)
    except urllib.error.HTTPError as error:
        with error:
            code, body = error.code, error.read(1_000_000)
    try:
        return code, json.loads(body)
    except ValueError:
        return code, None


def served_certificate(port: int) -> str:
    """The certificate that this host serves on a port, whoever signed it."""
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=ASK_SECONDS)
