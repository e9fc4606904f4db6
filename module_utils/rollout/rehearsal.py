"""A new nginx is tried where no client can reach it, before it shares the public ports with the old one.

nginx -t accepts a configuration that leads nowhere, and on shared ports a part of the clients meets it until its gate has
given up. So the release's own service is run once more by Compose, with its image, mounts, user, limits and network, and
with a configuration whose public listeners are sockets in its own tmpfs. It is asked all that a client might ask.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ansible.module_utils.docker_cli import Docker, DockerError, last_lines
from ansible.module_utils.docker_engine import Engine, EngineError
from ansible.module_utils.rollout.compose import UP_SECONDS, is_running
from ansible.module_utils.rollout.evidence import collect
from ansible.module_utils.rollout.gates import (
    ASK_SECONDS,
    SHOWN,
    SOCKET,
    Answer,
    Gate,
    edge_fault,
    health_fault,
)
from ansible.module_utils.rollout.journal import Journal
from ansible.module_utils.rollout.model import Release, RolloutError, Settings
from ansible.module_utils.rollout.prepare import TEST_LABEL
from ansible.module_utils.rollout.private_listeners import Private, UnknownForm, private
from ansible.module_utils.rollout.signals import StopRequest

DELIVERY = "/api/v1/avatar/status_update"
#: Where nginx's configuration is mounted, and where it lies on the host meanwhile.
MOUNTED = "/etc/nginx/site"
DIRECTORY = "run/rehearsal"
#: Ends each answer in curl's output: a body does not hold it.
END = "\x1e"


@dataclass(frozen=True)
class Question:
    """One request over a socket of the container, and what is wrong with its answer."""

    what: str
    socket: str
    url: str
    fault: Callable[[Answer], str]
    delivery: bool = False


def questions(release: Release, sockets: Sequence[tuple[str, bool]]) -> list[Question]:
    """What is asked in each round: nginx itself, each instance through it, and what stands for each public port."""
    healthy = partial(health_fault, release=release.webhook_release)
    asked = [Question("nginx", SOCKET, "http://edge/edge_alive", partial(edge_fault, edge=release.edge))]
    for service in release.instances:
        url = f"http://edge/instance/{service.name}/health"
        asked.append(Question(f"{service.name} through nginx", SOCKET, url, healthy))
    for socket, tls in sockets:
        scheme = "https" if tls else "http"
        asked.append(Question(f"{scheme} /health", socket, f"{scheme}://edge/health", healthy))
        what = f"{scheme} POST {DELIVERY}"
        asked.append(Question(what, socket, f"{scheme}://edge{DELIVERY}", refusal_fault, delivery=True))
    return asked


def refusal_fault(answer: Answer) -> str:
    """What is wrong with the answer to a delivery without credentials: the service itself refuses it, in its own shape."""
    if answer.status in (400, 401) and answer.json().get("error"):
        return ""
    if answer.status == 0:
        return f"no answer ({answer.text})"
    said = answer.text.strip()[:SHOWN]
    return (
        f"HTTP {answer.status} {said!r}; the service itself refuses a delivery without credentials with 401"
    )


def command(asked: Sequence[Question]) -> list[str]:
    """One curl for all of them: each `docker exec` costs more than ten requests. It ends at the first that has no answer."""
    words = ["curl", "--silent", "--show-error", "--fail-early"]
    for number, question in enumerate(asked):
        words += ["--next"] if number else []
        words += ["--max-time", f"{ASK_SECONDS:g}", "--insecure", "--unix-socket", question.socket]
        words += ["--write-out", f"\n%{{http_code}}{END}"]
        words += ["--header", "Content-Type: application/json", "--data", "{}"] if question.delivery else []
        words.append(question.url)
    return words


def first_fault(asked: Sequence[Question], out: str, err: str) -> str:
    """The first thing that is wrong in what curl has written; empty when all is well."""
    given = out.split(END)
    for number, question in enumerate(asked):
        text, _, status = given[number].rpartition("\n") if number < len(given) else ("", "", "")
        answer = (
            Answer(int(status), text) if status.isdigit() and int(status) else Answer(0, err.strip()[:SHOWN])
        )
        if fault := question.fault(answer):
            return f"{question.what}: {fault}"
    return ""


class Rehearsal:
    """Tries the nginx of a release, and leaves nothing behind."""

    def __init__(
        self,
        docker: Docker,
        engine: Engine,
        gate: Gate,
        journal: Journal,
        stop: StopRequest,
        settings: Settings,
        warn: Callable[[str], None],
    ) -> None:
        self._docker, self._engine, self._gate, self._journal = docker, engine, gate, journal
        self._stop, self._settings, self._warn = stop, settings, warn
        self._directory: Path = settings.site_dir / DIRECTORY

    def hold(self, release: Release) -> None:
        """Return when it has answered well, `count` times in a row. `RolloutError` (rehearsal_failed) with its log.

        Every instance must be of the release. A configuration of which it is not certain where it would listen is not
        run: that is a warning, and `nginx -t` has seen it.
        """
        try:
            made = private(_configuration(release), SOCKET)
        except UnknownForm as error:
            self._warn(
                f"nginx is not tried out of the clients' sight before it is replaced ({error}): of the configuration in "
                f"{release.edge_path or 'the release'} it is not certain that it would be. nginx -t accepts it."
            )
            return
        with self._journal.step("rehearse", release.nginx.name):
            try:
                self._start(release, made)
                self._ask(release, made)
            finally:
                self.clear(release)

    def clear(self, release: Release) -> None:
        """Remove its container and its directory, also those that a killed run has left."""
        if self._remove(release) and (fault := self._remove(release)):  # tried again: an engine may be busy
            self._warn(f"{_name(release)} could not be removed: {fault}. The next rollout does so.")
        shutil.rmtree(self._directory, ignore_errors=True)

    def _remove(self, release: Release) -> str:
        try:
            result = self._docker.attempt("rm", "--force", "--volumes", _name(release))
        except DockerError as error:
            return str(error)
        return "" if result.code == 0 or "No such container" in result.err else last_lines(result.err, 2)

    def _start(self, release: Release, made: Private) -> None:
        self.clear(release)
        override = self._write(release, made)
        words = ["compose", "-p", release.project, "-f", str(release.compose_file), "-f", str(override)]
        words += ["run", "--detach", "--no-deps", "-T", "--name", _name(release), release.nginx.name]
        result = self._docker.attempt(*words, timeout=UP_SECONDS)
        if result.code != 0:
            raise self._failed(
                release, f"Compose could not start it: {last_lines(result.err or result.out, 4)}"
            )

    def _write(self, release: Release, made: Private) -> Path:
        """nginx's files with the private configuration, readable for its user, and what differs for Compose."""
        files = self._directory / "site"
        shutil.copytree(release.edge_path, files)
        (files / "nginx.conf").write_text(made.text, encoding="utf-8")
        for place in (self._directory, files, *files.rglob("*")):
            place.chmod(0o755 if place.is_dir() else 0o644)
        path = self._directory / "docker-compose.json"
        path.write_text(json.dumps(override(release, files)), encoding="utf-8")
        return path

    def _ask(self, release: Release, made: Private) -> None:
        asked = questions(release, made.sockets)
        try:
            with self._stop.waiting():
                self._gate.hold("it", partial(self._round, release, asked), service=release.nginx.name)
        except RolloutError as error:
            if error.reason != "gate_failed":
                raise
            raise self._failed(release, error.message) from error

    def _round(self, release: Release, asked: Sequence[Question]) -> str:
        try:
            _, out, err = self._engine.run_in(_name(release), command(asked))
            fault = first_fault(asked, out, err)
        except EngineError as error:
            fault = str(error)
        if fault and not is_running(self._engine.inspect(_name(release))):
            raise self._failed(release, "it ended by itself")
        return fault

    def _failed(self, release: Release, message: str) -> RolloutError:
        return RolloutError(
            "rehearsal_failed",
            f"nginx with {release.edge_path} was tried out of the clients' sight, and failed: {message}",
            "Correct the edge_ or site_ variables, or the certificate, that lead there (--tags edge). No client has met it",
            service=release.nginx.name,
            evidence=collect(self._engine, _name(release), self._settings.log_lines),
        )


def override(release: Release, files: Path) -> dict[str, object]:
    """What differs from the release's own service, as a second Compose file."""
    mount = {"type": "bind", "source": str(files), "target": MOUNTED, "read_only": True}
    service = {
        "volumes": [mount],
        "labels": {TEST_LABEL: release.project},
        "restart": "no",
        "healthcheck": {"disable": True},
    }
    return {"services": {release.nginx.name: service}}


def _configuration(release: Release) -> str:
    with suppress(OSError):
        if release.edge_path:
            return (Path(release.edge_path) / "nginx.conf").read_text(encoding="utf-8")
    raise UnknownForm("there is no nginx.conf")


def _name(release: Release) -> str:
    return f"{release.nginx.container}-rehearsal"
