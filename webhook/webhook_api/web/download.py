"""A file of a delivery, given to an operator: recorded first, then sent as bytes that no browser opens by itself."""

from __future__ import annotations

import logging
import socket
from typing import Any, Final

from flask import Blueprint, Response, abort, g, request

from webhook_api.web import deeds, gate, lists
from webhook_api.web.files import FileFault, find

LOG: Final = logging.getLogger(__name__)
SEND_SECONDS: Final = 30.0
"""A client that takes nothing for so long has gone."""
CSP: Final = "default-src 'none'; frame-ancestors 'none'; sandbox"

blueprint = Blueprint("download", __name__)


@blueprint.get("/deliveries/<int:identifier>/files/<mark>")
@gate.page
@gate.operators
def file(identifier: int, mark: str) -> Response:
    """One of the files of a delivery."""
    return send(identifier, mark)


def send(identifier: int, mark: str) -> Response:
    """The answer with the file. Ends the request when there is none, or none can be given just now."""
    services = gate.services()
    with services.read() as connection:
        row = lists.delivery(connection, identifier, bodies=False) if identifier < 2**63 else None
    item = find(row, mark) if row else None
    if item is None or services.files is None:
        abort(404)
    if not services.downloads.acquire(blocking=False):
        abort(503, "downloads")
    try:
        found = services.files.open(item)
    except FileFault as fault:
        services.downloads.release()
        LOG.warning(
            "file_refused",
            extra={"delivery_id": identifier, "reason": fault.reason, "error": str(fault)[:300]},
        )
        abort(fault.status, fault.reason)
    except BaseException:
        services.downloads.release()
        raise

    def end() -> None:
        found.close()
        services.downloads.release()

    try:
        with services.write() as connection:
            deeds.fetched(connection, g.who, services.settings.instance_id, identifier, item.key, found.size)
        response = Response(found.pieces, mimetype="application/octet-stream")
        response.headers["Content-Length"] = str(found.size)
        response.headers["Content-Disposition"] = f'attachment; filename="{item.name}"'
        response.headers["Content-Security-Policy"] = CSP
        response.headers["Accept-Ranges"] = "none"
        # nginx must not keep two gigabytes of it in its small /tmp.
        response.headers["X-Accel-Buffering"] = "no"
        _bound(request.environ)
    except BaseException:
        end()
        raise
    response.call_on_close(end)
    return response


def _bound(environ: dict[str, Any]) -> None:
    """Give up a client that no longer reads. gunicorn sets its socket anew for the next request."""
    connection = environ.get("gunicorn.socket")
    if isinstance(connection, socket.socket):
        connection.settimeout(SEND_SECONDS)
