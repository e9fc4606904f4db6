"""Requests as WSGI sees them (PEP 3333), for everything that takes the ordinary way through Flask."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from typing import Any, Final

from gunicorn.util import split_request_uri, unquote_to_wsgi_str

from webhook_api.server import answers
from webhook_api.server.request import Request

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
_HOPS: Final = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailers", "upgrade"}
)


def environ(request: Request, client: tuple[str, int], server: tuple[str, int]) -> dict[str, Any]:
    """The environment of a request whose body is there in whole."""
    parts = split_request_uri(request.target)
    made: dict[str, Any] = {
        "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(request.body),
        "wsgi.input_terminated": True, "wsgi.errors": sys.stderr, "wsgi.multithread": True,
        "wsgi.multiprocess": False, "wsgi.run_once": False, "REQUEST_METHOD": request.method, "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_wsgi_str(parts.path or ""), "QUERY_STRING": parts.query or "",
        "RAW_URI": request.target, "SERVER_PROTOCOL": f"HTTP/{request.version}",
        "SERVER_NAME": server[0], "SERVER_PORT": str(server[1]),
        "REMOTE_ADDR": client[0], "REMOTE_PORT": str(client[1]),
    }  # fmt: skip
    for name, value in request.headers.values.items():
        made["HTTP_" + name.upper().replace("-", "_")] = value
    made["CONTENT_TYPE"] = made.pop("HTTP_CONTENT_TYPE", "")
    length = made.pop("HTTP_CONTENT_LENGTH", None)
    if "HTTP_TRANSFER_ENCODING" in made and not request.refused:
        # Decoded here, so its length is known now (RFC 9112, 7.1.3).
        del made["HTTP_TRANSFER_ENCODING"]
        length = str(len(request.body))
    if length is not None:
        made["CONTENT_LENGTH"] = length
    return made


def run(application: Application, environment: dict[str, Any], *, keep_alive: bool) -> bytes:
    """Call the application and return its whole answer."""
    begun: list[tuple[str, list[tuple[str, str]]]] = []
    written: list[bytes] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:  # noqa: ARG001
        begun[:] = [(status, headers)]
        return written.append

    result = application(environment, start_response)
    try:
        written.extend(result)
    finally:
        close = getattr(result, "close", None)
        if close is not None:
            close()
    status, headers = begun[0]
    body = b"".join(written)
    kept = [(name, value) for name, value in headers if name.lower() not in _HOPS]
    if not any(name.lower() in {"content-length", "transfer-encoding"} for name, _ in kept):
        kept.append(("Content-Length", str(len(body))))
    return answers.answer(
        status, kept, body, keep_alive=keep_alive, head=environment["REQUEST_METHOD"] == "HEAD"
    )
