"""A small real HTTP server in the place of an instance: says what it was asked, and can refuse, be silent or drop."""

from __future__ import annotations

import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STUMBLED: set[str] = set()


class Handler(BaseHTTPRequestHandler):
    """Answers every method; the last part of the path says how."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        """Echo what arrived. On instance 1 `drop` closes without an answer, `stumble` does the first time, `silent` is."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        last = self.path.split("?")[0].rpartition("/")[2]
        first = os.environ["INSTANCE"] == "1"
        stumbles = last == "stumble" and self.headers["X-Request-Id"] not in STUMBLED
        if first and (last == "drop" or stumbles):
            STUMBLED.add(self.headers["X-Request-Id"])
            self.close_connection = True
            return
        if last == "silent" and first:
            time.sleep(30)
        seen = {
            "instance": os.environ["INSTANCE"],
            "method": self.command,
            "path": self.path,
            "length": len(body),
            "headers": {name.lower(): value for name, value in self.headers.items()},
        }
        text = json.dumps({"error": "from_the_app", **seen}).encode()
        self.send_response({"refused": 401, "broken": 500, "down": 503}.get(last, 200))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.send_header("X-Request-Id", "made-up-by-the-app")
        self.send_header("Cache-Control", "max-age=60")
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = answer

    def log_message(self, *_: object) -> None:
        """Keep quiet: nginx's log is what is looked at."""


ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()  # noqa: S104
