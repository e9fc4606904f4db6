"""fal's queue API over fal-client, one attempt a call and bounded in time and size.

fal-client knows the addresses (of a model id only owner and app count, a sub-path is left out), the key's header and
fal's backup domains. Its own ``status()`` and ``result()`` are not used: they try ten times with up to 120 s each,
``result()`` polls without an end, and both parse what has to stay as it is. Decision 0451.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from webhook_api.reconcile.answers import Answer, Kind, Response, of_result, of_status

if TYPE_CHECKING:
    import httpx
    from fal_client import SyncClient

CONNECT_SECONDS: Final = 5.0
READ_SECONDS: Final = 10.0
TOTAL_SECONDS: Final = 60.0
"""Longest transfer of one answer."""


class Unanswered(Exception):
    """No answer came. ``reason``: timeout, connection, tls, protocol, too_large, stopped."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class FalQueue:
    """Asks for one request at a time. Imports fal-client when it is made."""

    def __init__(
        self,
        key: str,
        host: str,
        *,
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        total_seconds: float = TOTAL_SECONDS,
    ) -> None:
        import fal_client

        # Each request would otherwise be a line of the log.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        self._client: SyncClient = fal_client.SyncClient(key=key)
        self._used: set[httpx.Client] = set()
        self._host = host
        self._max_bytes = max_bytes
        self._clock = clock
        self._total_seconds = total_seconds

    def close(self) -> None:
        """Close its connections."""
        for client in self._used:
            client.close()

    def ask(self, model: str, request_id: str, pace: Callable[[], None]) -> Answer:
        """Ask how a request is, and for its result when it has ended. ``pace`` is called before each HTTP request.

        Whatever goes wrong is an answer as well (:class:`~webhook_api.reconcile.answers.Kind`).
        """
        handle = self._client.get_handle(model, request_id)
        self._used.add(handle.client)
        url = handle.status_url
        try:
            pace()
            ended = of_status(self._get(handle.client, url))
            if isinstance(ended, Answer):
                return ended
            url = handle.response_url
            pace()
            return of_result(request_id, ended, self._get(handle.client, url))
        except Unanswered as error:
            kind = Kind.UNUSABLE if error.reason == "too_large" else Kind.UNAVAILABLE
            return Answer(kind, f"{error.reason}: {error}", url)

    def _get(self, client: httpx.Client, url: str) -> Response:
        import httpx

        ends = self._clock() + self._total_seconds
        timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        try:
            with client.stream("GET", self._placed(url), timeout=timeout) as answer:
                if answer.url.scheme != "https":
                    raise Unanswered("protocol", "the answer came from an address without https")
                return Response(
                    str(answer.url), answer.status_code, _lower(answer.headers), self._read(answer, ends)
                )
        except httpx.TimeoutException as error:
            raise Unanswered("timeout", f"{type(error).__name__} after at most {READ_SECONDS:g} s") from error
        except httpx.TransportError as error:
            reason = "tls" if "CERTIFICATE" in str(error).upper() else "connection"
            raise Unanswered(reason, f"{type(error).__name__}: {error}"[:300]) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unanswered("protocol", f"{type(error).__name__}: {error}"[:300]) from error

    def _read(self, answer: httpx.Response, ends: float) -> bytes:
        pieces, size = [], 0
        for piece in answer.iter_bytes():
            pieces.append(piece)
            size += len(piece)
            if size > self._max_bytes:
                raise Unanswered("too_large", f"the answer has more than {self._max_bytes} bytes")
            if self._clock() > ends:
                raise Unanswered("timeout", f"the answer took more than {self._total_seconds:g} s")
        return b"".join(pieces)

    def _placed(self, url: str) -> httpx.URL:
        """The address at the host of the settings. fal-client reads its own once, when it is imported."""
        import httpx

        return httpx.URL(url).copy_with(netloc=self._host.encode("ascii"))


def _lower(headers: Any) -> dict[str, str]:
    return {str(name).lower(): str(value) for name, value in headers.items()}
