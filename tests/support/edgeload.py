"""Clients of every sort that deliver through an edge while something is done to it, and an account of each delivery.

HTTP/1.1 is spoken here, byte by byte, because a client library would hide what is looked for: it opens a connection
again and repeats the request. As every such library does, a client looks before it uses an idle connection again whether
the other side has closed it; what fails after that counts. HTTP/2 is spoken by curl.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import ssl
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

PATH = "/api/v1/avatar/status_update"
DEFERRED = "deferred"
ERROR = re.compile(rb'"error": ?"(\w+)".*?"request_id": ?"(\w{32})"')
OF_THE_EDGE = b"unavailable"
"""What nginx itself calls a 503; the service has other words."""
TIMEOUT = 15.0
"""Seconds that fal waits for an answer."""


@dataclass(frozen=True)
class Client:
    """One sort of client of HTTP/1.1. `pause`: up to how many seconds it waits between two deliveries."""

    name: str
    number: int
    tls: bool = False
    keeps: bool = True
    pause: float = 0.0


CLIENTS = (
    Client("plain, kept", 6),
    Client("plain, kept, idle between", 12, pause=2.0),
    Client("plain, one each", 6, keeps=False),
    Client("TLS, kept", 4, tls=True),
    Client("TLS, kept, idle between", 8, tls=True, pause=2.0),
    Client("TLS, one each", 2, tls=True, keeps=False),
)
HTTP2 = (
    ("HTTP/2, 6 streams", ["--parallel", "--parallel-max", "6"]),
    ("HTTP/2, one a second", ["--rate", "1/s"]),
)
"""Sorts of curl: each is one process, which keeps its connections as long as it runs."""
BATCH = 20_000
"""Deliveries that one curl has on its list; it is ended before it has sent them all."""


@dataclass
class Account:
    """What became of the deliveries."""

    sent: Counter[str] = field(default_factory=Counter)
    failed: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """By sort of client: what came instead of a 200, and how often."""
    deferred: Counter[str] = field(default_factory=Counter)
    """By sort of client: 503 of the service itself, which a busy machine makes it say. The sender would come again."""
    accepted: set[str] = field(default_factory=set)
    """Request ids that were answered with 200."""
    slowest: float = 0.0

    @property
    def failures(self) -> int:
        """All of them."""
        return sum(sum(kinds.values()) for kinds in self.failed.values())

    def __str__(self) -> str:
        """One line a sort of client."""
        lines = [
            f"{name}: {count} sent, {sum(self.failed[name].values())} failed {dict(self.failed[name])},"
            f" {self.deferred[name]} told to come again"
            for name, count in sorted(self.sent.items())
        ]
        total = (
            f"all: {sum(self.sent.values())} sent, {self.failures} failed, "
            f"{sum(self.deferred.values())} told to come again, slowest answer {self.slowest:.1f} s"
        )
        return "\n".join([*lines, total])


class Load:
    """Deliveries from all clients at once, until the block ends.

    :param ports: of plain HTTP and of TLS.
    :param image: of nginx; curl in it speaks HTTP/2. Without one nobody does.
    :param pace: seconds between two deliveries of a client that has no pause of its own.
    """

    def __init__(
        self,
        host: str,
        ports: tuple[int, int],
        secret: str,
        image: str = "",
        clients: tuple[Client, ...] = CLIENTS,
        pace: float = 0.0,
    ) -> None:
        self.run = uuid.uuid4().hex[:8]
        self.account = Account()
        self._host, self._ports, self._clients, self._pace, self._image = host, ports, clients, pace, image
        self._head = (
            f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"X-Webhook-Secret: {secret}\r\nContent-Length: %d\r\n\r\n"
        )
        self._secret = secret
        self._tls = ssl.create_default_context()
        self._tls.check_hostname, self._tls.verify_mode = False, ssl.CERT_NONE
        self._number = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()), daemon=True)

    def __enter__(self) -> Load:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End, when what is on its way is answered."""
        self._ending.set()
        self._thread.join(TIMEOUT + 10)
        assert not self._thread.is_alive(), "the senders do not end"

    @property
    def sent(self) -> int:
        """Deliveries so far. Raises AssertionError when the senders have ended by themselves."""
        assert self._ending.is_set() or self._thread.is_alive(), "the senders have ended"
        return sum(self.account.sent.values())

    async def _all(self) -> None:
        runs: list[Awaitable[None]] = []
        lines: list[Line] = []
        for client in self._clients:
            for _ in range(client.number):
                lines.append(Line(self._host, self._ports[client.tls], self._tls if client.tls else None))
                runs.append(self._run(client, self._over_http1(client, lines[-1])))
        for name, options in HTTP2 if self._image else ():
            runs.append(self._curl(name, options))
        try:
            await asyncio.gather(*runs)
        finally:
            await asyncio.gather(*(line.close() for line in lines))

    async def _run(self, client: Client, deliver: Callable[[bytes], Awaitable[str]]) -> None:
        while not self._ending.is_set():
            request_id, body = self._delivery()
            started = time.monotonic()
            try:
                outcome = await asyncio.wait_for(deliver(body), TIMEOUT)
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                outcome = f"{type(error).__name__}: {error}"[:120]
            self._note(client.name, request_id, outcome, time.monotonic() - started)
            await asyncio.sleep(random.uniform(0, client.pause) if client.pause else self._pace)

    def _note(self, client: str, request_id: str, outcome: str, seconds: float) -> None:
        account = self.account
        account.sent[client] += 1
        account.slowest = max(account.slowest, seconds)
        if outcome == "200":
            account.accepted.add(request_id)
        elif outcome == DEFERRED:
            account.deferred[client] += 1
        else:
            account.failed[client][outcome] += 1

    def _delivery(self) -> tuple[str, bytes]:
        self._number += 1
        request_id = f"swap-{self.run}-{self._number}"
        return request_id, json.dumps({"status": "in_progress", "request_id": request_id}).encode()

    async def _curl(self, name: str, options: list[str]) -> None:
        container = f"wht-edge-curl-{self.run}-{len(options)}"
        command = ["docker", "run", "--rm", "--interactive", "--name", container, "--network", "host"]
        process = await asyncio.create_subprocess_exec(
            *command, self._image, "curl", *options, "--config", "-",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdin
        assert process.stderr
        process.stdin.write("next\n".join(self._asked_of_curl() for _ in range(BATCH)).encode())
        process.stdin.close()
        ending = asyncio.create_task(self._end(container))
        errors: dict[str, re.Match[bytes]] = {}
        async for line in process.stderr:
            errors |= {found[2].decode(): found for found in ERROR.finditer(line)}
            if line.startswith(b"swap-"):
                request_id, status, told, edge_id, seconds = line.decode().strip().split("\t")
                outcome = "200" if (status, told) == ("200", "2 0 ") else f"{status} {told}"
                if status != "200" and told == "2 0 ":
                    outcome = refused(status, errors.get(edge_id))
                self._note(name, request_id, outcome, float(seconds))
        await process.wait()
        await ending

    def _asked_of_curl(self) -> str:
        """One delivery as curl's configuration; what became of it is told on its standard error."""
        request_id, body = self._delivery()
        fields = [
            "%{http_code}",
            "%{http_version} %{exitcode} %{errormsg}",
            "%header{x-request-id}",
            "%{time_total}",
        ]
        told = "%{stderr}\\n" + "\\t".join([request_id, *fields]) + "\\n"
        settings = {
            "url": f"https://{self._host}:{self._ports[1]}{PATH}",
            "data": body.decode(),
            "write-out": told,
            "max-time": str(TIMEOUT),
            "output": "/dev/stderr",
        }
        lines = ["http2", "insecure", "silent", 'header = "Content-Type: application/json"']
        lines.append(f'header = "X-Webhook-Secret: {self._secret}"')
        for setting, value in settings.items():
            quoted = value.replace('"', '\\"')
            lines.append(f'{setting} = "{quoted}"')
        return "\n".join(lines) + "\n"

    async def _end(self, container: str) -> None:
        while not self._ending.is_set():
            await asyncio.sleep(0.1)
        process = await asyncio.create_subprocess_exec(
            "docker", "kill", container, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
        await process.wait()

    def _over_http1(self, client: Client, line: Line) -> Callable[[bytes], Awaitable[str]]:
        async def deliver(body: bytes) -> str:
            try:
                status, closes = await line.ask(self._head.encode() % len(body) + body)
            except BaseException:
                await line.close()
                raise
            if closes or not client.keeps:
                await line.close()
            return status

        return deliver


def refused(status: str, error: re.Match[bytes] | None) -> str:
    """What an answer other than 200 counts as. A 503 of the service is no failure of the edge: the sender comes again."""
    reason = error[1] if error else b"no reason"
    return DEFERRED if status == "503" and error and reason != OF_THE_EDGE else f"{status} {reason.decode()}"


class Line:
    """One connection of HTTP/1.1, opened when it is needed."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self._address, self._tls = (host, port), tls
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> tuple[str, bool]:
        """Status, and whether the other side closes the connection after this answer."""
        if self._streams and self._streams[0].at_eof():
            await self.close()
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address, ssl=self._tls)
        reader, writer = self._streams
        writer.write(request)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        status = head[9:12].decode()
        if status != "200":
            status = refused(status, ERROR.search(body))
        return status, b"\r\nconnection: close\r\n" in head

    async def close(self) -> None:
        """Close it, if it is open."""
        streams, self._streams = self._streams, None
        if streams:
            streams[1].close()
            with suppress(OSError, ssl.SSLError, TimeoutError):
                await asyncio.wait_for(streams[1].wait_closed(), 5)
