"""Releases of a standing site that differ from its own in one thing, good or bad, and module `rollout` run on them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ansible.module_utils
import yaml

from tests.support.sites import REPO, Site

if str(REPO / "module_utils") not in ansible.module_utils.__path__:
    ansible.module_utils.__path__.insert(0, str(REPO / "module_utils"))

from ansible.module_utils.deploy_lock import DeployLock
from ansible.module_utils.release import ReleaseStore, WantedFile, plan_release

COMPOSE = "docker-compose.webhook.prod.yml"
Document = dict[str, Any]


@dataclass
class Done:
    """What a run of the module came to."""

    failed: bool
    result: Document
    output: str

    @property
    def message(self) -> str:
        """Why it failed."""
        return str(self.result.get("msg", ""))


class Host:
    """The host that a site stands on, as a rollout sees it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.store = ReleaseStore(str(site.home))
        self._made: list[tuple[Path, Path | None]] = []

    # Releases

    @property
    def current(self) -> str:
        """Id of the release that serves."""
        found = self.store.linked("current")
        assert found, "no release is current"
        return found

    def variant(
        self,
        edit: Callable[[Document, Document], None] = lambda _compose, _rollout: None,
        *,
        of: str = "",
        name: str = "",
        edge: Callable[[str], str] | None = None,
    ) -> str:
        """Write a release that is `of` (default: the current one) after `edit` of its Compose file and metadata.

        It has a name of its own in /health when `name` is given, and with `edge` another configuration of nginx.
        """
        found = self.store.describe(of or self.current)
        assert found
        path = Path(found["path"])
        compose, rollout = yaml.safe_load((path / COMPOSE).read_text()), found["metadata"]["rollout"]
        if name:
            _rename(compose, rollout, name)
        if edge:
            self._edge(compose, rollout, edge)
        edit(compose, rollout)
        files = [
            WantedFile("@release@/" + COMPOSE, yaml.safe_dump(compose, sort_keys=False)),
            WantedFile("@release@/prod.env", (path / "prod.env").read_text()),
            *self._shared(rollout["edge"]),
        ]
        plan = plan_release(files, found["images"])
        metadata = {"webhook_release": rollout["webhook_release"], "rollout": rollout}
        self.store.write(plan, metadata, keep=100, activate=False)
        self._made.append(
            (self.site.home / "releases" / plan.id, Path(rollout["edge_path"]) if edge else None)
        )
        return plan.id

    def forget(self) -> None:
        """Remove the releases that were made, apart from what serves."""
        for release, edge in self._made:
            if release.name != self.current:
                shutil.rmtree(release)
                if edge:
                    shutil.rmtree(edge)
        self._made = []

    def _edge(self, compose: Document, rollout: Document, change: Callable[[str], str]) -> None:
        old, new = rollout["edge"], f"{time.time_ns():x}"[-12:]
        home = self.site.home / "edge"
        shutil.copytree(home / old, home / new)
        for file in (home / new).iterdir():
            file.write_text(change(file.read_text().replace(old, new)))
        nginx = compose["services"]["nginx"]
        nginx["labels"]["org.aisha.edge"] = new
        for volume in nginx["volumes"]:
            volume["source"] = str(volume["source"]).replace(old, new)
        rollout["edge"], rollout["edge_path"] = new, str(home / new)
        for service in rollout["services"]:
            if service["kind"] == "edge":
                service["label"] = {"org.aisha.edge": new}

    def _shared(self, edge: str) -> list[WantedFile]:
        directory = self.site.home / "edge" / edge
        return [WantedFile(f"edge/{edge}/{file.name}", file.read_text()) for file in directory.iterdir()]

    # Running

    def arguments(self, release: str, **options: Any) -> Document:
        """Parameters of the module, patient enough for a busy machine."""
        patient = {"health_timeout": 300, "gate": {"timeout": 60}, "host": "localhost", "wait": 60}
        return {"site_dir": str(self.site.home), "release": release} | patient | options

    def command(self, release: str, **options: Any) -> list[str]:
        """The module as Ansible runs it."""
        program = str(Path(sys.executable).parent / "ansible")
        arguments = json.dumps(self.arguments(release, **options))
        return [program, "-i", str(self.site.directory), "localhost", "-m", "rollout", "-a", arguments, "-o"]

    def rollout(self, release: str, *, timeout: float = 600, check: bool = False, **options: Any) -> Done:
        """Run the module to its end."""
        command = self.command(release, **options) + (["--check"] if check else [])
        run = subprocess.run(
            command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
        )
        head, _, text = run.stdout.partition("=> ")
        assert text, run.stdout + run.stderr
        return Done("FAILED" in head, json.loads(text), run.stdout + run.stderr)

    def start(self, release: str, **options: Any) -> subprocess.Popen[str]:
        """Begin a run, in a session of its own."""
        return subprocess.Popen(
            self.command(release, **options),
            cwd=REPO,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def module_pid(self) -> int:
        """The module that is at work; 0 when none is."""
        guard = self.site.home / "run" / ".rollout"
        try:
            pid = int(guard.read_text().split()[1])
            files = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
        except (OSError, IndexError, ValueError):
            return 0
        return pid if str(guard) in files else 0

    def kill_module(self, number: int = signal.SIGKILL) -> bool:
        """Send a signal to the module that is at work. Whether there was one."""
        pid = self.module_pid()
        with suppress(ProcessLookupError):
            if pid:
                os.kill(pid, number)
                return True
        return False

    # Looking

    @property
    def switches(self) -> list[str]:
        """Switch files that are there."""
        return sorted(path.name for path in (self.site.home / "state").iterdir())

    @property
    def locked(self) -> bool:
        """Whether somebody has the deployment's lock, or left it behind."""
        return DeployLock(self.site.home).read() is not None

    def containers(self) -> dict[str, Document]:
        """The lasting containers of the stack by name: running ones and others."""
        project = f"label=com.docker.compose.project={self.site.name}"
        ids = docker("ps", "--all", "--quiet", "--filter", project).split()
        found = json.loads(docker("inspect", *ids)) if ids else []
        return {container["Name"].lstrip("/"): container for container in found}

    def running_release(self) -> dict[str, str]:
        """Which release (of the service, or of the edge) each container carries in its labels."""
        return {
            name: container["Config"]["Labels"].get("org.aisha.release")
            or container["Config"]["Labels"].get("org.aisha.edge", "")
            for name, container in self.containers().items()
        }

    def records(self) -> list[Document]:
        """Deployment records, the oldest first."""
        file = self.site.home / "deployments.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def must_be(self, release: str) -> None:
        """Assert that the host is wholly at a release, with nothing left of the way there."""
        rollout = (self.store.describe(release) or {})["metadata"]["rollout"]
        wanted = {s["container"]: next(iter(s["label"].values())) for s in rollout["services"]}
        assert self.running_release() == wanted
        states = {name: c["State"]["Status"] for name, c in self.containers().items()}
        assert set(states.values()) == {"running"}, states
        assert self.switches == []
        assert self.current == release
        assert not (self.site.home / "run" / "deployment.json").exists()
        assert self.module_pid() == 0


def _rename(compose: Document, rollout: Document, name: str) -> None:
    """Give the service's release another name, as another image or setting would."""
    for service in compose["services"].values():
        if "WEBHOOK_RELEASE" in (service.get("environment") or {}):
            service["environment"]["WEBHOOK_RELEASE"] = name
            service["labels"]["org.aisha.release"] = name
    rollout["webhook_release"] = name
    for service in rollout["services"]:
        if service["kind"] != "edge":
            service["label"] = {"org.aisha.release": name}


def patient(compose: Document, _rollout: Document) -> None:
    """Health checks that a busy machine does not fail: a container is never unhealthy for being slow."""
    for service in compose["services"].values():
        if "healthcheck" in service:
            service["healthcheck"] |= {"timeout": "60s", "start_period": "300s"}


def of_kind(compose: Document, kind: str) -> list[Document]:
    """Services of a Compose file: api, worker, migrate or nginx."""
    return [service for name, service in compose["services"].items() if name.split("-")[0] == kind]


def environment() -> dict[str, str]:
    """For Ansible, with the repository's configuration."""
    return os.environ | {"ANSIBLE_CONFIG": str(REPO / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}


def docker(*arguments: str) -> str:
    """Output of a docker command; AssertionError with its error text."""
    run = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"docker {' '.join(arguments)}: {run.stderr}"
    return run.stdout.strip()
