"""The engine as these modules need it: a few read-only questions through the Docker SDK, with errors that help.

Works with `docker` from PyPI and with Debian's python3-docker (5.0 and newer).
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DOCKER_IMPORT_ERROR: str | None = None
try:
    import docker
    import docker.errors
    import requests
except ImportError:  # reported by the module, with the package to install
    DOCKER_IMPORT_ERROR = traceback.format_exc()

LINE_LIMIT = 2000


class EngineError(Exception):
    """The engine did not answer, or not as asked. `reason`: unreachable, forbidden, not_found, engine_error."""

    def __init__(self, reason: str, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}. {remedy}".strip() if remedy else message)
        self.reason = reason


@contextmanager
def engine_errors(action: str) -> Iterator[None]:
    """Turn whatever the SDK raises inside into an `EngineError` that says what was being done."""
    try:
        yield
    except docker.errors.NotFound as error:
        raise EngineError("not_found", f"cannot {action}: {_text(error)}") from error
    except docker.errors.APIError as error:
        raise EngineError(
            "engine_error", f"cannot {action}: the engine answered {_text(error)}", "Look at the engine's log"
        ) from error
    except (docker.errors.DockerException, requests.RequestException, OSError) as error:
        text = _text(error)
        if "Permission denied" in text or "PermissionError" in text:
            raise EngineError(
                "forbidden",
                f"cannot {action}: this user may not speak to the engine",
                "Run the task with become: true, or put the user into the group docker",
            ) from error
        raise EngineError(
            "unreachable",
            f"cannot {action}: the engine does not answer ({text})",
            "Start it (ansible-playbook site.yml --tags engine), or correct docker_host",
        ) from error


def _text(error: Exception) -> str:
    explanation = getattr(error, "explanation", None)
    return str(explanation or error)[:500]


class Engine:
    """A connection to one engine.

    :param docker_host: address such as ``unix:///var/run/docker.sock``; None takes DOCKER_HOST or the usual socket.
    :param timeout: seconds until an answer that does not come is given up.
    """

    def __init__(self, docker_host: str | None = None, timeout: float = 30.0) -> None:
        with engine_errors("connect to the Docker engine"):
            options = docker.utils.kwargs_from_env()
            if docker_host:
                options = {"base_url": docker_host}
            self._api = docker.APIClient(version="auto", timeout=timeout, **options)

    def close(self) -> None:
        """Close the connection."""
        self._api.close()

    def info(self) -> dict[str, Any]:
        """What ``docker info`` says of the engine."""
        with engine_errors("ask the engine about itself"):
            found: dict[str, Any] = self._api.info()
            return found

    def inspect(self, name: str) -> dict[str, Any] | None:
        """What ``docker inspect`` says of a container, or None when there is none of that name."""
        try:
            with engine_errors(f"inspect container {name}"):
                found: dict[str, Any] = self._api.inspect_container(name)
                return found
        except EngineError as error:
            if error.reason == "not_found":
                return None
            raise

    def image_names(self, image: str) -> list[str]:
        """Id, tags and digests by which an image is known here; empty when it is not here."""
        try:
            with engine_errors(f"inspect image {image}"):
                found = self._api.inspect_image(image)
        except EngineError as error:
            if error.reason == "not_found":
                return []
            raise
        return [found["Id"], *(found.get("RepoTags") or []), *(found.get("RepoDigests") or [])]

    def project_containers(self, project: str) -> list[dict[str, Any]]:
        """All containers, also stopped ones, that carry the label of a Compose project, inspected."""
        with engine_errors(f"list the containers of project {project}"):
            listed = self._api.containers(
                all=True, filters={"label": f"com.docker.compose.project={project}"}
            )
        found = (self.inspect(container["Id"]) for container in listed)
        return [container for container in found if container is not None]  # one may vanish in between

    def last_lines(self, name: str, lines: int) -> list[str]:
        """The last log lines of a container, bounded in length; empty when there is no container or no log."""
        if lines < 1:
            return []
        try:
            with engine_errors(f"read the log of {name}"):
                raw: bytes = self._api.logs(name, tail=lines, stdout=True, stderr=True)
        except EngineError:
            return []
        return [line[:LINE_LIMIT] for line in raw.decode("utf-8", "replace").splitlines()]

    def events(self, since: int, names: list[str], actions: list[str]) -> Any:
        """A stream of container events from Unix time `since` on; `close()` ends it from another thread."""
        filters = {"type": ["container"], "container": names, "event": actions}
        with engine_errors("subscribe to events"):
            return self._api.events(since=since, decode=True, filters=filters)

    def run_in(self, name: str, command: list[str]) -> tuple[int, str, str]:
        """Run a command (an argument list, no shell) in a container: exit code, output, error output."""
        with engine_errors(f"run {command[0]} in container {name}"):
            created = self._api.exec_create(name, command, stdout=True, stderr=True)
            out, err = self._api.exec_start(created["Id"], demux=True)
            code = self._api.exec_inspect(created["Id"])["ExitCode"]
        return int(code), (out or b"").decode("utf-8", "replace"), (err or b"").decode("utf-8", "replace")
