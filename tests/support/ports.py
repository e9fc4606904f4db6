"""Loopback ports that stay a test's own while nothing listens on them."""

from __future__ import annotations

import socket


def reserve() -> socket.socket:
    """A socket that is bound and never listens: its port refuses connections, and nobody else is given it.

    Whoever sets SO_REUSEADDR may listen there beside it.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    return kept
