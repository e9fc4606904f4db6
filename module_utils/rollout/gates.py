"""Gates: N healthy answers in a row that name the expected release, from every place that matters."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ansible.module_utils.docker_engine import EngineError
from ansible.module_utils.rollout.model import Release, RolloutError, Service

SOCKET = "/tmp/edge.sock"  # noqa: S108 - inside nginx's own tmpfs
PROC = "/proc"
ASK_SECONDS = 5.0
SHOWN = 300


class Commands(Protocol):
    """What is needed of an engine."""

    def inspect(self, name: str) -> dict[str, Any] | None:
        """What the engine knows of a container; None when there is none."""
        ...

    def run_in(self, name: str, command: list[str]) -> tuple[int, str, str]:
        """Run an argument list in a container: exit code, output, error output."""


@dataclass(frozen=True)
class Answer:
    """An answer, or (status 0) why there is none."""

    status: int
    text: str

    def json(self) -> dict[str, Any]:
        """The answer's object; empty when it is none."""
        try:
            document = json.loads(self.text)
        except ValueError:
            return {}
        return document if isinstance(document, dict) else {}


def health_fault(answer: Answer, release: str | None) -> str:
    """What is wrong with an answer of /health; empty when it is healthy and of the release (None: of whichever)."""
    document = answer.json()
    if answer.status == 0:
        return f"no answer ({answer.text})"
    if answer.status != 200:
        bad = [
            f"{name} ({check.get('error', 'not ok')})"
            for name, check in (document.get("checks") or {}).items()
            if isinstance(check, dict) and not check.get("ok", True)
        ]
        shown = f"status {document.get('status')!r}" if document else repr(answer.text[:SHOWN])
        return f"HTTP {answer.status}, {shown}" + (f"; not ok: {', '.join(bad)}" if bad else "")
    if release is not None and document.get("release") != release:
        return f"it names release {document.get('release')!r}, expected {release!r}"
    return ""


def edge_fault(answer: Answer, edge: str) -> str:
    """What is wrong with an answer of /edge_alive over the control socket; empty when it is that edge's."""
    if answer.status != 200:
        return f"nginx's control socket: {answer.text.strip()[:SHOWN] or f'HTTP {answer.status}'}"
    found = answer.text.strip()
    return "" if found == edge else f"nginx has configuration {found!r}, expected {edge!r}"


class SocketConnection(http.client.HTTPConnection):
    """HTTP over a socket of the file system."""

    def __init__(self, path: str) -> None:
        super().__init__("edge", timeout=ASK_SECONDS)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Asking:
    """Asks instances on loopback, nginx on its public ports, and nginx over its control socket."""

    def __init__(self, engine: Commands) -> None:
        self._engine = engine
        self._unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._unverified.check_hostname = False
        self._unverified.verify_mode = ssl.CERT_NONE  # loopback: which release answers, not who it is

    def local(self, port: int, path: str = "/health", *, tls: bool = False) -> Answer:
        """GET on a loopback port, over a connection of its own."""
        connection: http.client.HTTPConnection
        if tls:
            connection = http.client.HTTPSConnection(
                "127.0.0.1", port, timeout=ASK_SECONDS, context=self._unverified
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ASK_SECONDS)
        return _ask(connection, path)

    def control(self, container: str, path: str) -> Answer:
        """GET over nginx's control socket, which only its own container reaches, and root through that one's process.

        A command in the container takes 0.1 s, and a rollout asks some ten times; it is for where the short way is closed.
        """
        connection = self._connected(container)
        if connection is None:
            return self._by_curl(container, path)
        return _ask(connection, path)

    def _connected(self, container: str) -> SocketConnection | None:
        try:
            pid = int(((self._engine.inspect(container) or {}).get("State") or {}).get("Pid") or 0)
        except EngineError:
            return None
        connection = SocketConnection(f"{PROC}/{pid}/root{SOCKET}")
        try:
            connection.connect()
        except OSError:
            connection.close()
            return None
        return connection

    def _by_curl(self, container: str, path: str) -> Answer:
        command = [
            "curl",
            "--silent",
            "--show-error",
            "--max-time",
            f"{ASK_SECONDS:g}",
            "--unix-socket",
            SOCKET,
        ]
        command += ["--write-out", "\n%{http_code}", f"http://edge{path}"]
        try:
            code, out, err = self._engine.run_in(container, command)
        except EngineError as error:
            return Answer(0, str(error))
        text, _, status = out.rpartition("\n")
        if code != 0 or not status.isdigit():
            return Answer(0, (err or out).strip()[:SHOWN] or f"curl ended with {code}")
        return Answer(int(status), text)

    # What is wrong, in words; empty: nothing

    def instance(self, service: Service, release: Release) -> str:
        """The instance itself. Another release under its own port will not change by waiting: that is raised."""
        answer = self.local(service.port)
        fault = health_fault(answer, release.webhook_release)
        if fault and answer.status == 200 and answer.json().get("release"):
            raise RolloutError(
                "wrong_release",
                f"{service.container} is healthy, but {fault}",
                "The image or its settings are not what the release says: build and render it again",
                service=service.name,
            )
        return fault and f"127.0.0.1:{service.port}/health: {fault}"

    def through(self, container: str, service: Service, release: Release) -> str:
        """That instance, through nginx."""
        fault = health_fault(
            self.control(container, f"/instance/{service.name}/health"), release.webhook_release
        )
        return fault and f"{service.name} through nginx: {fault}"

    def edge(self, container: str, release: Release) -> str:
        """nginx answers with the configuration of the release."""
        return edge_fault(self.control(container, "/edge_alive"), release.edge)

    def public(self, release: Release) -> str:
        """Every public port leads to the release."""
        for port, tls in ((release.http, False), *((port, True) for port in release.https)):
            fault = health_fault(self.local(port, tls=tls), release.webhook_release)
            if fault:
                return f"{'https' if tls else 'http'}://127.0.0.1:{port}/health: {fault}"
        return ""


def _ask(connection: http.client.HTTPConnection, path: str) -> Answer:
    """One question over a connection of its own."""
    try:
        connection.request("GET", path, headers={"Connection": "close", "User-Agent": "rollout"})
        answer = connection.getresponse()
        return Answer(answer.status, answer.read(65536).decode("utf-8", "replace"))
    except (OSError, http.client.HTTPException) as error:
        return Answer(0, str(error) or type(error).__name__)
    finally:
        connection.close()


@dataclass
class Gate:
    """Opens after `count` answers in a row without a fault, `interval` seconds apart; gives up after `timeout` seconds."""

    count: int
    interval: float
    timeout: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def hold(self, what: str, ask: Callable[[], str], *, service: str = "") -> None:
        """Return when it is open; `RolloutError` (gate_failed) with the last fault when it stays shut."""
        deadline, good = self.clock() + self.timeout, 0
        while good < self.count:
            fault = ask()
            good = 0 if fault else good + 1
            # Good answers that come slowly are good: time alone shuts no gate.
            if fault and self.clock() >= deadline:
                raise RolloutError(
                    "gate_failed",
                    f"{what} did not give {self.count} good answers in a row within {self.timeout:g} s: {fault}",
                    service=service,
                )
            if good < self.count:
                self.sleep(self.interval)
