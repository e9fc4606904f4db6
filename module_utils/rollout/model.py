"""What a release consists of, as ``release.json`` describes it, and what a run was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Kind = Literal["api", "worker", "edge"]
KINDS = ("api", "worker", "edge")
COMPOSE_FILE = "docker-compose.webhook.prod.yml"


class RolloutError(Exception):
    """A rollout cannot go on. `str()` gives fault and remedy.

    `reason`: bad_setting, no_release, damaged, bad_release, locked, image_missing, edge_refused, rehearsal_failed,
    migration_failed, start_failed, unhealthy, wrong_release, gate_failed, no_other_instance, probe_failed, moved_on,
    interrupted, engine, io, defect.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        remedy: str = "",
        *,
        service: str = "",
        evidence: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(f"{message}. {remedy}".strip() if remedy else message)
        self.reason = reason
        self.message = message
        self.remedy = remedy
        self.service = service
        self.evidence = dict(evidence or {})


@dataclass(frozen=True)
class Service:
    """One lasting service of a release. `port`: on the host's loopback, for an API instance."""

    name: str
    kind: Kind
    container: str
    image: str
    labels: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    address: str = ""


@dataclass(frozen=True)
class Release:
    """One release of a site, as far as replacing containers is concerned. `webhook_release` is what /health names."""

    id: str
    path: Path
    project: str
    webhook_release: str
    services: tuple[Service, ...]
    edge: str
    edge_path: str
    certificate_directory: str
    http: int
    https: tuple[int, ...]
    keepalive: float
    migrate: bool = True
    compose_name: str = COMPOSE_FILE

    @property
    def compose_file(self) -> Path:
        """Path of its Compose file."""
        return self.path / self.compose_name

    @property
    def names(self) -> list[str]:
        """Names of the services in the order in which they are replaced."""
        return [service.name for service in self.services]

    @property
    def instances(self) -> list[Service]:
        """The API instances."""
        return [service for service in self.services if service.kind == "api"]

    @property
    def nginx(self) -> Service:
        """The service at the edge."""
        return next(service for service in self.services if service.kind == "edge")

    def service(self, name: str) -> Service | None:
        """A service by name; None when the release has none of that name."""
        return next((service for service in self.services if service.name == name), None)

    @property
    def images(self) -> dict[str, str]:
        """Digest-pinned reference of each service's image."""
        return {service.name: service.image for service in self.services}


def parse_release(identity: str, path: Path, rollout: Mapping[str, Any]) -> Release:
    """A release from ``metadata.rollout``. `RolloutError` (bad_release) when it does not say enough."""
    try:
        services = tuple(_service(entry) for entry in rollout["services"])
        ports = rollout["ports"]
        release = Release(
            id=identity,
            path=path,
            project=str(rollout["project"]),
            webhook_release=str(rollout["webhook_release"]),
            services=services,
            edge=str(rollout["edge"]),
            edge_path=str(rollout["edge_path"]),
            certificate_directory=str(rollout["certificate_directory"]),
            http=int(ports["http"]),
            https=tuple(dict.fromkeys(int(port) for port in ports["https"])),
            keepalive=float(rollout.get("keepalive_seconds") or 60),
            migrate=bool(rollout.get("migrate", True)),
            compose_name=str(rollout.get("compose_file") or COMPOSE_FILE),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RolloutError(
            "bad_release",
            f"release {identity} does not say how it is rolled out ({type(error).__name__}: {error})",
            "Render it again with this version of the project (ansible-playbook site.yml --tags stack)",
        ) from error
    kinds = [service.kind for service in services]
    if kinds.count("edge") != 1 or "api" not in kinds:
        raise RolloutError("bad_release", f"release {identity} needs one nginx and at least one instance")
    return release


def unlike(target: Release, identity: str, path: Path, images: Mapping[str, str], name: str) -> Release:
    """A release from before releases said how they are rolled out: the target's services, with its own images and name.

    What it does not say (the edge's id) is not expected of it.
    """
    services = tuple(
        replace(
            service,
            image=images.get(_repository(service.image), service.image),
            labels={} if service.kind == "edge" else {"org.aisha.release": name},
        )
        for service in target.services
    )
    return replace(
        target, id=identity, path=path, webhook_release=name, services=services, edge="", edge_path=""
    )


def _repository(image: str) -> str:
    return image.partition("@")[0].rpartition("/")[2]


def _service(entry: Mapping[str, Any]) -> Service:
    kind = entry["kind"]
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}")
    return Service(
        name=str(entry["name"]),
        kind=kind,
        container=str(entry["container"]),
        image=str(entry["image"]),
        labels={str(key): str(value) for key, value in (entry.get("label") or {}).items()},
        port=int(entry.get("port") or 0),
        address=str(entry.get("address") or ""),
    )


AT_LEAST = {"gate_count": 1, "gate_interval": 0, "drain_seconds": 0, "drain_settle": 0, "wait": 0}
MORE_THAN_0 = ("gate_timeout", "health_timeout", "migrate_timeout")


@dataclass(frozen=True)
class Settings:
    """What a run was asked for. Times in seconds."""

    site_dir: Path
    kind: str = "deploy"
    run: str = ""
    host: str = ""
    owner: str = ""
    controller: str = ""
    reason: str = ""
    version: str = ""
    gate_count: int = 3
    gate_interval: float = 0.15
    gate_timeout: float = 30.0
    drain_seconds: float = 10.0
    drain_settle: float = 0.2
    health_timeout: float = 90.0
    migrate_timeout: float = 1800.0
    log_lines: int = 30
    docker_config: str = ""
    keepalive: float = 0.0
    wait: float = 60.0
    settle: bool = True
    expect_current: str = ""
    probe: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """`RolloutError` (bad_setting) names every number with which a gate would be none, or a wait without end."""
        low = [f"{name} is {getattr(self, name):g}, at least {least}" for name, least in AT_LEAST.items()
               if getattr(self, name) < least]  # fmt: skip
        low += [
            f"{name} is {getattr(self, name):g}, more than 0"
            for name in MORE_THAN_0
            if getattr(self, name) <= 0
        ]
        if low:
            remedy = "Correct them in the inventory (rollout_gate_count and so on: docs/configuration.md)"
            raise RolloutError("bad_setting", "; ".join(low), remedy)
