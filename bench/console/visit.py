"""A person with a browser, and a program with a token, as the console sees them: sessions, forms, one connection each."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from typing import Final
from urllib.parse import urlencode

from bench.console.pages import Asked
from bench.console.place import PASSWORD

SECONDS: Final = 30.0
_FORM: Final = re.compile(r'name="csrf" value="(\w+)"')


class Refused(Exception):
    """A page was not answered as it should be."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came, and how long it took from the request's first byte to the answer's last one."""

    status: int
    body: bytes
    seconds: float


@dataclass
class Visitor:
    """One connection that stays, and what belongs to it."""

    port: int
    token: str = ""
    cookies: dict[str, str] = field(default_factory=dict)
    form: str = ""

    def __post_init__(self) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)

    def log_in(self, name: str) -> None:
        """As the login's page does."""
        self._take_form(self._send("GET", "/login"))
        answer = self._send("POST", "/login", form={"name": name, "password": PASSWORD, "csrf": self.form})
        if answer.status != 303:
            raise Refused(f"the login of {name} was answered with {answer.status}")
        self._take_form(self._send("GET", "/"))

    def ask(self, asked: Asked) -> Answer:
        """Ask for a page. Raises Refused unless it is there."""
        if asked.form is not None:
            answer = self._send("POST", asked.path, form={**asked.form, "csrf": self.form})
        elif asked.json is not None:
            answer = self._send("POST", asked.path, document=asked.json)
        else:
            answer = self._send("GET", asked.path)
        if answer.status != 200:
            raise Refused(
                f"{asked.name} ({asked.path}) was answered with {answer.status}: {answer.body[-600:]!r}"
            )
        return answer

    def _take_form(self, answer: Answer) -> None:
        found = _FORM.search(answer.body.decode())
        if found is None:
            raise Refused("the page has no form")
        self.form = found[1]

    def _send(
        self,
        method: str,
        path: str,
        form: Mapping[str, str] | None = None,
        document: Mapping[str, object] | None = None,
    ) -> Answer:
        headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())}
        body = None
        if self.token:
            headers = {"Authorization": f"Bearer {self.token}"}
        if form is not None:
            body, headers["Content-Type"] = urlencode(form), "application/x-www-form-urlencoded"
        if document is not None:
            body, headers["Content-Type"] = json.dumps(document), "application/json"
        started = time.perf_counter()
        self._connection.request(method, path, body, headers)
        response = self._connection.getresponse()
        text = response.read()
        seconds = time.perf_counter() - started
        for given in response.headers.get_all("Set-Cookie") or ():
            self.cookies |= {name: morsel.value for name, morsel in SimpleCookie(given).items()}
        return Answer(response.status, text, seconds)
