"""A host in memory: an engine with Compose, two releases, and a fuse at every call.

For what must hold wherever a run breaks off. It knows just what module `rollout` does to a host; that the real engine,
Compose and nginx do the same is proven in tests/integration/modules/test_rollout_real.py and tests/cluster/test_rollout.py.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ansible.module_utils.deploy_record import DeployRecords
from ansible.module_utils.docker_cli import Result
from ansible.module_utils.docker_engine import EngineError
from ansible.module_utils.release import ReleaseStore, WantedFile, plan_release
from ansible.module_utils.rollout.gates import Answer
from ansible.module_utils.rollout.model import Settings
from ansible.module_utils.rollout.run import Rollout
from ansible.module_utils.rollout.signals import StopRequest

PROJECT, COMPOSE = "wht", "docker-compose.webhook.prod.yml"
HTTP, HTTPS = 80, 443
BAD = "bad"
"""A container that starts with such a secret crashes again and again."""
PREFIX = "com.docker.compose."
NGINX = """
events {}
http {
    server { listen 80 reuseport; listen 443 ssl reuseport; }
    server { listen unix:/tmp/edge.sock; }
}
"""


class Killed(BaseException):
    """SIGKILL."""


class World:
    """Containers, releases and switches of one host; `Engine` and `Docker` of the module in one."""

    def __init__(self, site: Path) -> None:
        self.site = site
        self.containers: list[dict[str, Any]] = []
        self.calls, self.fuse, self.broken, self.signal = 0, 0, 0, 0
        self.guarded = self.dead = False
        self.refused: set[str] = set()
        """What is refused before a container is touched: pull, test (nginx's configuration), migrate."""
        self.warnings: list[str] = []
        self.options: dict[str, Any] = {}
        self.stop = StopRequest()
        self._serial = itertools.count(1)
        self.store = ReleaseStore(str(site))

    # Releases

    def release(self, name: str, edge: str, **more: dict[str, Any]) -> str:
        """Write a release; `more`: settings of a service, such as ``api_1={"crash": True}``."""
        image = f"registry/webhook-api@sha256:{name}"
        mounted = more.pop("secrets", {})
        kinds = {"api-1": "api", "api-2": "api", "worker": "worker", "nginx": "edge"}
        compose: dict[str, Any] = {"services": {}}
        services = []
        for name_, kind in kinds.items():
            label = {"org.aisha.edge": edge} if kind == "edge" else {"org.aisha.release": name}
            services.append({"name": name_, "kind": kind, "container": f"{PROJECT}-{name_}", "image": image})
            services[-1] |= {"label": label, "port": {"api-1": 8001, "api-2": 8002}.get(name_, 0)}
            compose["services"][name_] = {"image": image, "labels": label, "says": name}
            compose["services"][name_] |= more.get(name_.replace("-", "_"), {})
            if kind != "edge":
                compose["services"][name_]["container_name"] = f"{PROJECT}-{name_}"
                compose["services"][name_]["secrets"] = list(mounted)
                compose["services"][name_]["labels"] = label | {"org.aisha.secrets": json.dumps(mounted)}
        place = self.site / "edge" / edge
        place.mkdir(parents=True, exist_ok=True)
        (place / "nginx.conf").write_text(NGINX)
        rollout = {
            "webhook_release": name, "project": PROJECT, "services": services, "edge": edge, "edge_path": str(place),
            "certificate_directory": "/c", "ports": {"http": HTTP, "https": [HTTPS]}, "keepalive_seconds": 60,
        }  # fmt: skip
        named = "".join(f"    file: {self.site}/secrets/{secret}\n" for secret in mounted)
        text = f"{json.dumps(compose)}\n---\n{named}"
        plan = plan_release([WantedFile(f"@release@/{COMPOSE}", text)], {"webhook-api": image})
        self.store.write(plan, {"webhook_release": name, "rollout": rollout}, 100, activate=False)
        return plan.id

    def run(self, release: str, kind: str = "deploy", *, settle: bool = True) -> dict[str, Any]:
        """A run of the module in a process of its own."""
        self.stop = StopRequest()
        self.stop.listen = lambda: None
        self.dead, self.warnings = False, []
        settings = Settings(
            site_dir=self.site,
            kind=kind,
            host="h",
            gate_interval=0,
            gate_timeout=0.01,
            drain_seconds=0,
            wait=0,
            settle=settle,
            **self.options,
        )
        options = {"stop": self.stop, "sleep": lambda _seconds: None, "warn": self.warnings.append}
        rollout = Rollout(settings, self, self, proc=self.site / "proc", **options)
        return rollout.run(rollout.load(release))

    def foresee(self, release: str) -> dict[str, Any]:
        """The module in check mode."""
        rollout = Rollout(Settings(site_dir=self.site), self, self, proc=self.site / "proc")
        return rollout.foresee(rollout.load(release), {})

    def confirm(self, release: str, run: str = "") -> dict[str, Any]:
        """The module where it is expected that nothing differs."""
        settings = Settings(site_dir=self.site, host="h", run=run)
        rollout = Rollout(settings, self, self, proc=self.site / "proc", warn=self.warnings.append)
        return rollout.confirm(rollout.load(release))

    # What is looked at

    def of(self, service: str) -> list[dict[str, Any]]:
        """Containers of a service; one-off ones are none of them."""
        labels = ((c, c["Config"]["Labels"]) for c in self.containers)
        return [c for c, own in labels if own[PREFIX + "service"] == service and PREFIX + "oneoff" not in own]

    def serves(self) -> bool:
        """Whether a request is answered now: one nginx, and one instance that is healthy."""
        edge = any(c["State"]["Status"] == "running" for c in self.of("nginx"))
        return edge and any(_healthy(c) for name in ("api-1", "api-2") for c in self.of(name))

    def state(self) -> dict[str, Any]:
        """All that must be right after a run."""
        return {
            "containers": {c["Name"]: (c["Config"]["Image"], c["State"]["Status"]) for c in self.containers},
            "switches": sorted(p.name for p in (self.site / "state").glob("*")),
            "current": self.store.linked("current"),
            "rehearsal": (self.site / "run" / "rehearsal").exists(),
            "in hand": (self.site / "run" / "deployment.json").exists(),
        }

    def at(self, release: str) -> dict[str, Any]:
        """The state of a host that is wholly at a release."""
        services = (self.store.describe(release) or {})["metadata"]["rollout"]["services"]
        return {
            "containers": {f"/{s['container']}": (s["image"], "running") for s in services},
            "switches": [],
            "current": release,
            "rehearsal": False,
            "in hand": False,
        }

    def records(self) -> list[dict[str, Any]]:
        """Deployment records, the oldest first."""
        return list(DeployRecords(self.site).read())

    def result(self) -> str:
        """What the last record says."""
        return str(self.records()[-1]["result"])

    # The fuse

    def tick(self) -> bool:
        """A moment at which anything may happen. Whether the call is to fail."""
        self.calls += 1
        assert not self.guarded or self.serves(), f"nobody serves at call {self.calls}"
        self.dead = self.dead or self.calls == self.fuse
        if self.dead:  # whatever would still be done on the way out is not done
            raise Killed
        if self.calls == self.signal:
            self.stop._asked(15, None)
        return self.calls == self.broken

    # The command line

    def holding(self, _descriptor: int) -> World:
        return self

    def call(self, *arguments: str, **options: Any) -> str:
        result = self.attempt(*arguments, **options)
        if result.code:
            raise EngineError("engine_error", result.err)
        return result.out

    def attempt(self, *arguments: str, **options: Any) -> Result:
        if self.tick():
            return Result(1, "", "boom")
        result = self._do(list(arguments), options)
        self.tick()
        return result

    def _do(self, arguments: list[str], options: dict[str, Any]) -> Result:
        if arguments[0] == "compose":
            return self._compose(arguments, options)
        if arguments[0] in ("run", "ps", "pull"):
            refused = {"run": "test", "pull": "pull"}.get(arguments[0]) in self.refused
            return Result(int(refused), "", "it is refused" if refused else "")
        found = self._found(arguments[-1])
        if arguments[0] == "rename":
            found = self._found(arguments[1])
            assert f"/{arguments[2]}" not in [c["Name"] for c in self.containers], "the name is taken"
            found["Name"] = f"/{arguments[2]}"
        elif found is None:
            return Result(1, "", "No such container")
        elif arguments[0] == "stop":
            found["State"] = {"Status": "exited", "ExitCode": 0}
        elif arguments[0] == "rm":
            self.containers.remove(found)
        return Result(0, "", "")

    def _compose(self, arguments: list[str], options: dict[str, Any]) -> Result:
        text = options.get("stdin") or Path(arguments[4]).read_text()
        text = text.partition("\n---\n")[0]
        services = json.loads(text)["services"]
        if "--name" in arguments:
            return self._run(arguments, services)
        if arguments[-1] == "json":
            return Result(0, text, "")
        if "--hash" in arguments:
            return Result(0, "\n".join(f"{name} {_hash(service)}" for name, service in services.items()), "")
        if "run" in arguments:
            return Result(int("migrate" in self.refused), "{}", "")
        count = (
            int(arguments[arguments.index("--scale") + 1].partition("=")[2]) if "--scale" in arguments else 1
        )
        for name in [word for word in arguments[5:] if word in services]:
            missing = [path for path in self._secrets(services[name]) if not path.exists()]
            if missing:
                return Result(1, "", f"bind source path does not exist: {missing[0]}")
            for container in self.of(name):
                if container["State"]["Status"] == "exited":
                    self._start(container, services[name])
            while len(self.of(name)) < count:
                self._create(name, services[name])
                self.tick()
                self._start(self.containers[-1], services[name])
        return Result(0, "", "")

    def _run(self, arguments: list[str], services: dict[str, Any]) -> Result:
        """A container beside the lasting ones: a service, and what a second Compose file says of it."""
        name = arguments[-1]
        more = json.loads(Path(arguments[6]).read_text())["services"][name]
        labels = services[name]["labels"] | more["labels"] | {PREFIX + "oneoff": "True"}
        called = arguments[arguments.index("--name") + 1]
        self._create(name, services[name] | {"labels": labels, "container_name": called})
        self.tick()
        self._start(self.containers[-1], {**services[name], "crash": False})
        self.containers[-1]["Listens"] = Path(more["volumes"][0]["source"], "nginx.conf").read_text()
        return Result(0, called, "")

    def _create(self, name: str, service: dict[str, Any]) -> None:
        number = next(self._serial)
        labels = {PREFIX + "service": name, PREFIX + "config-hash": _hash(service), **service["labels"]}
        called = "/" + service.get("container_name", f"{PROJECT}-{name}-{number}")
        assert called not in [c["Name"] for c in self.containers], f"the name {called} is taken"
        config = {"Image": service["image"], "Labels": labels, "Says": service["says"]}
        config["LeadsNowhere"] = service.get("leads_nowhere", False)
        self.containers.append(
            {"Id": f"{number:064x}", "Name": called, "Image": service["image"], "Config": config,
             "RestartCount": 0, "State": {"Status": "created", "ExitCode": 0},
             "Mounts": [{"Type": "bind", "Source": str(path), "Destination": f"/run/secrets/{path.name}"}
                        for path in self._secrets(service)]}
        )  # fmt: skip

    def _secrets(self, service: dict[str, Any]) -> list[Path]:
        return [self.site / "secrets" / name for name in service.get("secrets", [])]

    def _start(self, container: dict[str, Any], service: dict[str, Any]) -> None:
        pid = next(self._serial)
        container["State"] = {"Status": "running", "ExitCode": 0, "Health": {"Status": "healthy"}, "Pid": pid}
        seen = [self._mount(mount, pid) for mount in container["Mounts"]]
        if service.get("crash") or any(text.startswith(BAD) for text in seen):
            times = {"StartedAt": "2026-11-23T00:00:00Z", "FinishedAt": "2026-11-23T00:00:01Z"}
            container["State"] = {"Status": "restarting", "ExitCode": 3, **times}
            container["RestartCount"] = 3

    def _mount(self, mount: dict[str, Any], pid: int) -> str:
        """A file that a container goes on seeing whatever takes its place. What is in it."""
        inside = Path(f"{self.site}/proc/{pid}/root{mount['Destination']}")
        inside.parent.mkdir(parents=True, exist_ok=True)
        os.link(mount["Source"], inside)
        return inside.read_text()

    def restart(self, name: str) -> None:
        """The engine or the host starts a container again: it sees what stands now."""
        (container,) = self.of(name)
        self._start(container, {})

    # The engine

    def inspect(self, name: str) -> dict[str, Any] | None:
        self._ask()
        return json.loads(json.dumps(self._found(name)))

    def _found(self, name: str) -> dict[str, Any] | None:
        return next((c for c in self.containers if name in (c["Id"], c["Name"].lstrip("/"))), None)

    def project_containers(self, _project: str) -> list[dict[str, Any]]:
        self._ask()
        return json.loads(json.dumps(self.containers))

    def image_names(self, image: str) -> list[str]:
        return [] if "pull" in self.refused else [image]

    def info(self) -> dict[str, Any]:
        return {"LiveRestoreEnabled": True}

    def last_lines(self, _name: str, _lines: int) -> list[str]:
        return ["last words"]

    def events(self, *_arguments: Any) -> Any:
        raise EngineError("unreachable", "no events here")

    def run_in(self, identity: str, command: list[str]) -> tuple[int, str, str]:
        self._ask()
        found = self._found(identity)
        if found is None or found["State"]["Status"] != "running":
            raise EngineError("engine_error", "it does not run")
        marks = [part.partition("%{http_code}")[2] for part in command if "%{http_code}" in part]
        urls = [part for part in command if part.startswith("http")]
        return 0, "".join(f"{self._nginx(found, url)}{end}" for url, end in zip(urls, marks, strict=True)), ""

    def _nginx(self, found: dict[str, Any], url: str) -> str:
        """Answer of an nginx, and its status on a line of its own."""
        path = "/" + url.split("/", 3)[3]
        if path == "/edge_alive":
            return f"{found['Config']['Labels']['org.aisha.edge']}\n200"
        if found["Config"]["LeadsNowhere"]:
            return "bad gateway\n502"
        if path.startswith("/api"):
            return '{"error": "missing_credentials"}\n401'
        one = path.startswith("/instance")
        answer = self._health(self.of(path.split("/")[2]) if one else [*self.of("api-1"), *self.of("api-2")])
        return f"{answer.text}\n{answer.status or 502}"

    def _ask(self) -> None:
        if self.tick():
            raise EngineError("unreachable", "the engine does not answer")

    # HTTP

    def local(self, port: int, path: str = "/health", *, tls: bool = False) -> Answer:
        """In the place of `Asking.local`."""
        self.tick()
        if path == "/metrics":
            return Answer(404, "")
        names = {8001: ["api-1"], 8002: ["api-2"]}.get(port, ["api-1", "api-2"])
        if port in (HTTP, HTTPS) and not any(c["State"]["Status"] == "running" for c in self.of("nginx")):
            return Answer(0, "refused")
        assert tls == (port == HTTPS)
        return self._health([c for name in names for c in self.of(name)])

    def _health(self, containers: list[dict[str, Any]]) -> Answer:
        for container in containers:
            if _healthy(container):
                return Answer(200, json.dumps({"status": "healthy", "release": container["Config"]["Says"]}))
        return Answer(0, "refused")


def _healthy(container: dict[str, Any]) -> bool:
    """Whether it answers: when docker says so, or (`Answers`) before docker knows."""
    return bool(container.get("Answers")) or container["State"].get("Health", {}).get("Status") == "healthy"


def _hash(service: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(service, sort_keys=True).encode()).hexdigest()


def quietly(world: World, release: str) -> bool:
    """A run that may be killed. Whether it was."""
    with suppress(Killed):
        world.run(release)
        return False
    return True
