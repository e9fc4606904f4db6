"""A Compose project as a rollout uses it: what differs, one service up, containers of a service away."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ansible.module_utils.compose_plan import (
    ONEOFF_LABEL,
    SERVICE_LABEL,
    PlanError,
    Planned,
    hash_command,
    in_order,
    make_plan,
    model_command,
    parse_hashes,
    parse_model,
)
from ansible.module_utils.docker_cli import Docker, DockerError, last_lines
from ansible.module_utils.docker_engine import Engine
from ansible.module_utils.rollout.model import Release, RolloutError

#: Seconds for a container to be made and started, and to end (its own grace period is shorter).
UP_SECONDS, STOP_SECONDS = 120.0, 180.0


class Project:
    """One Compose project on one engine."""

    def __init__(self, name: str, docker: Docker, engine: Engine) -> None:
        self.name = name
        self._docker = docker
        self._engine = engine

    def plan(
        self, release: Release, contents: Mapping[str, str] | None = None
    ) -> tuple[list[Planned], list[dict[str, str]]]:
        """(what differs by service, containers of services that the release does not have)."""
        with _compose_file(release, contents or {}) as path:
            try:
                model = self._docker.call(*model_command(self.name, path), action=f"read {path}")
                hashes = self._docker.call(
                    *hash_command(self.name), action=f"take the hashes of {path}", stdin=model
                )
            except DockerError as error:
                if error.reason != "failed":
                    raise
                raise RolloutError("bad_release", str(error), "Mend what Compose names") from error
        services = parse_model(model)
        try:
            order = in_order(services, release.names, str(release.compose_file))
            containers = self._engine.project_containers(self.name)
            planned, orphans = make_plan(services, parse_hashes(hashes), containers, self._engine, order)
            return list(planned), list(orphans)
        except PlanError as error:
            raise RolloutError("bad_release", str(error)) from error

    def containers(self, service: str) -> list[dict[str, Any]]:
        """All containers of a service, inspected; one-off ones are none of them."""
        return [
            found
            for found in self._engine.project_containers(self.name)
            if _label(found, SERVICE_LABEL) == service and _label(found, ONEOFF_LABEL).lower() != "true"
        ]

    def one_offs(self) -> list[dict[str, Any]]:
        """Containers of `docker compose run`."""
        found = self._engine.project_containers(self.name)
        return [container for container in found if _label(container, ONEOFF_LABEL).lower() == "true"]

    def up(self, release: Release, services: Sequence[str], scale: Mapping[str, int] | None = None) -> None:
        """Make and start containers of these services, and touch nothing that is there."""
        command = ["compose", "-p", self.name, "-f", str(release.compose_file), "up", "--detach", "--no-deps"]
        command += ["--no-recreate", "--no-build", "--pull", "never"]
        for name, count in (scale or {}).items():
            command += ["--scale", f"{name}={count}"]
        result = self._docker.attempt(*command, *services, timeout=UP_SECONDS)
        if result.code != 0:
            raise RolloutError(
                "start_failed",
                f"Compose could not start {', '.join(services)}: {last_lines(result.err or result.out, 5)}",
                "Mend what it names",
                service=services[0],
            )

    def stop(self, container: Mapping[str, Any]) -> None:
        """End a container with its own signal and grace period."""
        if container["State"].get("Status") not in ("exited", "created", "dead"):
            self._ignoring_absence("stop", container["Id"], timeout=STOP_SECONDS)

    def remove(self, container: Mapping[str, Any]) -> None:
        """Remove a container and the volumes without a name that it has."""
        self._ignoring_absence("rm", "--force", "--volumes", container["Id"])

    def rename(self, container: Mapping[str, Any], name: str) -> None:
        """Give a container another name."""
        if container["Name"].lstrip("/") != name:
            self._docker.call("rename", container["Id"], name, action=f"name nginx's container {name}")

    def clear(self, service: str) -> None:
        """End and remove every container of a service."""
        for container in self.containers(service):
            self.stop(container)
            self.remove(container)

    def _ignoring_absence(self, *command: str, **options: Any) -> None:
        result = self._docker.attempt(*command, **options)
        if result.code != 0 and "No such container" not in result.err:
            if "already in progress" in result.err:
                return
            raise RolloutError(
                "engine",
                f"`docker {command[0]}` failed: {last_lines(result.err, 3)}",
                "Look at the engine's log",
            )


def _label(container: Mapping[str, Any], name: str) -> str:
    return str((container.get("Config", {}).get("Labels") or {}).get(name, ""))


def label_of(container: Mapping[str, Any], name: str) -> str:
    """A label of an inspected container; empty when it has none."""
    return _label(container, name)


def is_running(container: Mapping[str, Any] | None) -> bool:
    """Whether an inspected container runs."""
    return container is not None and container["State"].get("Status") == "running"


def is_healthy(container: Mapping[str, Any] | None) -> bool:
    """Whether an inspected container runs and its own check says that it is healthy."""
    if container is None or not is_running(container):
        return False
    return bool((container["State"].get("Health") or {}).get("Status") == "healthy")


@contextmanager
def _compose_file(release: Release, contents: Mapping[str, str]) -> Iterator[str]:
    """Path of the Compose file; in check mode, if need be, in a directory that stands for one that was only planned."""
    if release.compose_file.is_file():
        yield str(release.compose_file)
        return
    if release.compose_name not in contents:
        raise RolloutError(
            "no_release", f"there is no file {release.compose_file}", "Render the release first"
        )
    with tempfile.TemporaryDirectory(prefix="rollout-") as directory:
        for name, text in contents.items():
            place = os.path.join(directory, os.path.normpath(f"/{name}").lstrip("/"))
            os.makedirs(os.path.dirname(place), exist_ok=True)
            Path(place).write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
        yield os.path.join(directory, release.compose_name)
