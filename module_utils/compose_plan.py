"""What a Compose file asks for against what runs: which services to create, replace or start, and why.

Compose itself decides by a hash of each service's configuration, which it writes into a label of the container. The
hash is asked for in two steps, because `config --hash` up to at least Compose 2.26 leaves out what an `env_file`
says, while `up` counts it (measured; see docs/decisions/0200-compose-hash-in-two-steps.md): first the whole model
with everything resolved, then the hashes of that model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Action = Literal["none", "create", "replace", "start"]

HASH_LABEL = "com.docker.compose.config-hash"
SERVICE_LABEL = "com.docker.compose.service"
ONEOFF_LABEL = "com.docker.compose.oneoff"
STOPPED = ("created", "exited", "dead")


class PlanError(Exception):
    """The plan cannot be made. `reason`: no_file, bad_file, unknown_service, unexpected_answer."""

    def __init__(self, reason: str, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}. {remedy}".strip() if remedy else message)
        self.reason = reason


def model_command(
    project: str, file: str, env_files: Iterable[str] = (), profiles: Iterable[str] = ()
) -> list[str]:
    """Arguments behind `docker` that print the whole model as JSON, everything resolved."""
    command = ["compose", "-p", project, "-f", file]
    for env_file in env_files:
        command += ["--env-file", env_file]
    for profile in profiles:
        command += ["--profile", profile]
    return [*command, "config", "--format", "json"]


def hash_command(project: str, profiles: Iterable[str] = ()) -> list[str]:
    """Arguments behind `docker` that print ``SERVICE HASH`` lines for a model on standard input."""
    command = ["compose", "-p", project, "-f", "-"]
    for profile in profiles:
        command += ["--profile", profile]
    return [*command, "config", "--hash", "*"]


def parse_model(text: str) -> dict[str, dict[str, Any]]:
    """The services of a model, by name."""
    try:
        services = json.loads(text).get("services") or {}
    except (ValueError, AttributeError) as error:
        raise PlanError("unexpected_answer", "docker compose config printed no JSON") from error
    if not isinstance(services, dict):
        raise PlanError("unexpected_answer", "docker compose config printed no services")
    return services


def parse_hashes(text: str) -> dict[str, str]:
    """Hashes by service, of lines such as ``api-1 c2a8…``."""
    pairs = (line.split() for line in text.splitlines() if line.strip())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def in_order(services: Iterable[str], order: Iterable[str], file: str) -> list[str]:
    """Names in the order wanted; those that it leaves out follow, sorted as Compose sorts them."""
    known, wanted = list(services), list(order)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise PlanError(
            "unknown_service",
            f"{file} has no service {', '.join(unknown)} (it has: {', '.join(sorted(known))})",
            "Correct 'order'",
        )
    return [*dict.fromkeys(wanted), *(name for name in known if name not in wanted)]


@dataclass(frozen=True)
class Planned:
    """What is to be done with one service."""

    name: str
    action: Action
    reason: str
    image: str
    running_image: str
    containers: tuple[str, ...]

    def as_result(self) -> dict[str, Any]:
        """As the module returns it."""
        return {
            "name": self.name,
            "action": self.action,
            "reason": self.reason,
            "image": self.image,
            "running_image": self.running_image,
            "containers": list(self.containers),
        }


class Images(Protocol):
    """What the plan needs to know of images."""

    def image_names(self, image: str) -> list[str]:
        """Id (first), tags and digests of an image; empty when it is not here."""


def plan_service(
    name: str,
    service: Mapping[str, Any],
    wanted_hash: str,
    containers: list[Mapping[str, Any]],
    images: Images,
    *,
    replace_unhealthy: bool,
) -> Planned:
    """Compare one service with its containers (as ``docker inspect`` shows them)."""
    wanted_image = str(service.get("image") or "")
    running_image = _image_of(containers[0]) if containers else ""
    action, reason = _decide(service, wanted_hash, containers, images, replace_unhealthy=replace_unhealthy)
    names = tuple(sorted(container["Name"].lstrip("/") for container in containers))
    return Planned(name, action, reason, wanted_image, running_image, names)


def _decide(
    service: Mapping[str, Any],
    wanted_hash: str,
    containers: list[Mapping[str, Any]],
    images: Images,
    *,
    replace_unhealthy: bool,
) -> tuple[Action, str]:
    count = _scale(service)
    if not containers:
        return ("create", "there is no container") if count else ("none", "none is wanted")
    for container in containers:
        if _labels(container).get(HASH_LABEL) != wanted_hash:
            return "replace", _why_other(service, container)
        if changed := _set_by_hand(service, container):
            return "replace", f"changed by hand ({', '.join(changed)})"
    wanted_image = str(service.get("image") or "")
    here = images.image_names(wanted_image)
    for container in containers:
        if here and container["Image"] != here[0]:  # a tag that names another image by now
            return (
                "replace",
                f"image changed {_short(container['Image'])} -> {_short(here[0])} ({wanted_image})",
            )
    if len(containers) > count:
        return "replace", f"{len(containers)} containers, {count} wanted"
    worst = max(
        (_state(container, replace_unhealthy) for container in containers), key=lambda state: state[0]
    )
    if worst[1] != "none":
        return worst[1], worst[2]
    if len(containers) < count:
        return "create", f"{len(containers)} of {count} containers are there"
    return "none", worst[2]


def _state(container: Mapping[str, Any], replace_unhealthy: bool) -> tuple[int, Action, str]:
    """(weight, action, reason) for a container whose configuration is right."""
    state = container["State"]
    status = state.get("Status", "")
    health = (state.get("Health") or {}).get("Status", "none")
    if replace_unhealthy and status == "restarting":
        return 3, "replace", f"restarting again and again (exit code {state.get('ExitCode')})"
    if replace_unhealthy and status == "running" and health == "unhealthy":
        return 3, "replace", "unhealthy"
    if status in STOPPED:
        return 2, "start", f"not running ({status}, exit code {state.get('ExitCode')})"
    if status == "paused":
        return 3, "replace", "paused"
    return 0, "none", f"unchanged ({status}{'' if health == 'none' else ', ' + health})"


def _why_other(service: Mapping[str, Any], container: Mapping[str, Any]) -> str:
    old, new = _image_of(container), str(service.get("image") or "")
    parts = [f"image changed {_short(old)} -> {_short(new)}"] if old != new else []
    parts += _changed_parts(service, container)
    return "; ".join(parts) or "configuration changed"


def _changed_parts(service: Mapping[str, Any], container: Mapping[str, Any]) -> list[str]:
    """Names (never values) of environment and labels that differ, as far as a container shows them."""
    config = container.get("Config", {})
    running = dict(entry.partition("=")[::2] for entry in config.get("Env") or [])
    wanted = {
        name: str(value) for name, value in (service.get("environment") or {}).items() if value is not None
    }
    env = [name for name, value in wanted.items() if running.get(name) != value]
    labels = [
        name
        for name, value in (service.get("labels") or {}).items()
        if (config.get("Labels") or {}).get(name) != str(value)
    ]
    parts = []
    if env:
        parts.append(f"environment changed ({', '.join(sorted(env))})")
    if labels:
        parts.append(f"labels changed ({', '.join(sorted(labels))})")
    return parts


def _set_by_hand(service: Mapping[str, Any], container: Mapping[str, Any]) -> list[str]:
    """What `docker update` has given a container, which no hash shows.

    A limit that the container has not got at all is one that its kernel does not know, and no other container would have.
    """
    host = container.get("HostConfig") or {}
    memory, pids = str(service.get("mem_limit") or ""), str(service.get("pids_limit") or "")
    policy = (host.get("RestartPolicy") or {}).get("Name")
    differs = {
        "memory": memory.isdigit() and host.get("Memory") and host["Memory"] != int(memory),
        "number of processes": pids.isdigit() and host.get("PidsLimit") and host["PidsLimit"] != int(pids),
        "restart policy": service.get("restart") and policy and policy != service["restart"],
    }
    return [name for name, differ in differs.items() if differ]


def _scale(service: Mapping[str, Any]) -> int:
    replicas = (service.get("deploy") or {}).get("replicas")
    return int(service.get("scale", 1 if replicas is None else replicas))


def _labels(container: Mapping[str, Any]) -> Mapping[str, str]:
    return container.get("Config", {}).get("Labels") or {}


def _image_of(container: Mapping[str, Any]) -> str:
    return str(container.get("Config", {}).get("Image", ""))


def _short(reference: str) -> str:
    """A reference with its digest cut to 12 digits: readable, and still telling two apart."""
    head, separator, digest = reference.rpartition("sha256:")
    return f"{head}{separator}{digest[:12]}" if separator else reference


def make_plan(
    services: Mapping[str, Mapping[str, Any]],
    hashes: Mapping[str, str],
    containers: list[dict[str, Any]],
    images: Images,
    order: list[str],
    *,
    replace_unhealthy: bool = True,
) -> tuple[list[Planned], list[dict[str, str]]]:
    """Plan every service in `order`, and list orphans: containers of the project that no service asks for.

    One-off containers (`docker compose run`) are neither.
    """
    lasting = [found for found in containers if _labels(found).get(ONEOFF_LABEL, "False").lower() != "true"]
    planned = []
    for name in order:
        if name not in hashes:
            raise PlanError("unexpected_answer", f"docker compose printed no hash of service {name}")
        own = [found for found in lasting if _labels(found).get(SERVICE_LABEL) == name]
        planned.append(
            plan_service(
                name, services[name], hashes[name], list(own), images, replace_unhealthy=replace_unhealthy
            )
        )
    orphans = [
        {
            "name": found["Name"].lstrip("/"),
            "service": _labels(found).get(SERVICE_LABEL, ""),
            "status": found["State"].get("Status", ""),
        }
        for found in lasting
        if _labels(found).get(SERVICE_LABEL) not in services
    ]
    return planned, sorted(orphans, key=lambda orphan: orphan["name"])
