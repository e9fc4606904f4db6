"""A TCP proxy that makes a backend slow, unreliable or unreachable, while it runs and in every way at once.

Unlike a stopped server, it can lose the answer to a statement that has taken effect: the fault that makes exactly once hard.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.support.ports import reserve

CHUNK = 65536


@dataclass
class Faults:
    """What is wrong with the line at the moment. Chances are per piece of data, 0 to 1."""

    delay: float = 0.0
    """Seconds by which each answer comes late."""
    bytes_per_second: float = 0.0
    """0: as fast as it goes. Both directions, each for itself."""
    lose_request: float = 0.0
    """Chance that a connection is reset before what the client sent gets through."""
    lose_answer: float = 0.0
    """Chance that a connection is reset after the server has answered and before the client hears of it."""
    cut_after: int = 0
    """Reset a connection after so many bytes from the client; 0: never."""


class Trouble:
    """Forwards a loopback port to a backend. Change `faults` at any time; `down`, `up`, `cut` act at once."""

    def __init__(self, host: str, port: int, seed: int = 0) -> None:
        self.faults = Faults()
        self.cuts = 0
        """Connections that it has reset."""
        self._reserved = reserve()
        self.port: int = self._reserved.getsockname()[1]
        self._backend = (host, port)
        self._random = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trouble", daemon=True)
        self._thread.start()
        self.up()

    @property
    def address(self) -> str:
        """`host:port` to use instead of the backend's."""
        return f"127.0.0.1:{self.port}"

    def up(self) -> None:
        """Take connections, as before `down`."""
        self._call(self._up())

    def down(self) -> None:
        """Refuse connections and reset the present ones."""
        self._call(self._down())

    def cut(self) -> None:
        """Reset the present connections; new ones are taken."""
        self._call(self._cut())

    def calm(self) -> None:
        """No faults any more."""
        self.faults = Faults()
        self.up()

    def close(self) -> None:
        """End everything."""
        self._call(self._down())
        # Transports end a turn after they were told to.
        self._call(asyncio.sleep(0.05))
        self._call(self._cut())
        self._call(asyncio.sleep(0.05))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self._reserved.close()

    def _call(self, coroutine: object) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(15)  # type: ignore[arg-type]

    async def _up(self) -> None:
        if self._listener is None:
            # Not asyncio's server: closed while it takes a connection, it leaves that one open.
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=512)
            self._listener.setblocking(False)
            self._loop.add_reader(self._listener, self._accept, self._listener)

    async def _down(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        await self._cut()

    async def _cut(self) -> None:
        # One that is cancelled before it has begun would clean nothing up.
        while self._waiting:
            await asyncio.sleep(0)
        tasks = list(self._tasks)
        self.cuts += len(tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            near, _ = listener.accept()
            near.setblocking(False)
            task = asyncio.create_task(self._connection(near))
            self._waiting.add(near)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connection(self, near: socket.socket) -> None:
        self._waiting.discard(near)
        with contextlib.ExitStack() as open_lines:
            open_lines.callback(_reset, near)
            try:
                far_reader, far_writer = await asyncio.open_connection(*self._backend, limit=CHUNK)
            except OSError:
                return
            open_lines.callback(_abort, far_writer)
            reader, writer = await asyncio.open_connection(sock=near, limit=CHUNK)
            open_lines.pop_all()
        await self._carry(reader, writer, far_reader, far_writer)

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> None:
        pumps = {
            asyncio.create_task(self._pump(reader, far_writer, answers=False)),
            asyncio.create_task(self._pump(far_reader, writer, answers=True)),
        }
        end: Callable[[asyncio.StreamWriter], None] = _abort
        try:
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if all(pump.exception() is None and pump.result() for pump in done):
                end = asyncio.StreamWriter.close
        finally:
            for pump in pumps:
                pump.cancel()
            try:
                await asyncio.gather(*pumps, return_exceptions=True)
            finally:  # also when it is cancelled just now: a cut that meets a goodbye
                end(writer)
                end(far_writer)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, answers: bool) -> bool:
        """Carry one direction. True: until one side said goodbye; False: until a fault struck."""
        carried = 0
        while data := await source.read(CHUNK):
            faults = self.faults
            if self._random.random() < (faults.lose_answer if answers else faults.lose_request):
                self.cuts += 1
                return False
            if answers and faults.delay:
                await asyncio.sleep(faults.delay)
            if faults.bytes_per_second:
                await asyncio.sleep(len(data) / faults.bytes_per_second)
            carried += len(data)
            if not answers and 0 < faults.cut_after <= carried:
                self.cuts += 1
                sink.write(data[: len(data) // 2])
                await sink.drain()
                return False
            sink.write(data)
            await sink.drain()
        return True


def _reset(sock: socket.socket) -> None:
    """End a connection as a dead machine's router does: by a reset, not by a goodbye."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def _abort(writer: asyncio.StreamWriter) -> None:
    """The same for one that a transport has."""
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.contextmanager
def trouble(host: str, port: int, seed: int = 0) -> Iterator[Trouble]:
    """A proxy for the length of a block."""
    made = Trouble(host, port, seed)
    try:
        yield made
    finally:
        made.close()
