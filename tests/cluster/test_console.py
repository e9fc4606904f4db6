"""A site with `stack_console: true`: the console is served through nginx on a port of its own, and nowhere else.

Its pages themselves are tested in tests/integration/webhook/test_web_console.py and in a browser (tests/browser).
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from tests.e2e.conftest import Stack, docker, wait_for
from tests.support import hardening
from tests.support.sites import Site

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
NAME, NUMBER = "wht-console", 18
LOOPBACK, EDGE = 20_000 + 100 * NUMBER + 3, 20_000 + 100 * NUMBER + 45
PASSWORD = "correct horse battery"
OUTSIDE, OUTSIDE_SUBNET, OUTSIDE_HOST = f"{NAME}-outside", "198.51.100.0/24", "198.51.100.1"
PATHS = ("/", "/login", "/deliveries", "/live", "/live/events", "/static/console.css", "/charts/latency-dark.svg",
         "/api/v1/console/overview", "/api/v1/console/openapi.json", "/actions/dead-letters.replay")  # fmt: skip


@dataclass
class Consoled:
    """The site, its console as a person reaches it, and an account."""

    stack: Stack

    @property
    def site(self) -> Site:
        return self.stack.site

    @property
    def address(self) -> str:
        return f"https://localhost:{EDGE}"

    def command(self, *arguments: str, answer: str = "") -> str:
        """A command of the service in an instance."""
        done = subprocess.run(
            ["docker", "exec", "--interactive", f"{NAME}-api-1", "webhook-api", *arguments],
            input=answer, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def log_in(
        self, name: str = "maria", password: str = PASSWORD, **headers: str
    ) -> tuple[requests.Session, Any]:
        """Through nginx, as a browser does."""
        session = requests.Session()
        # Else requests prefers REQUESTS_CA_BUNDLE of the environment to what the session says of certificates.
        session.trust_env = False
        session.verify = False
        csrf = re.search(r'name="csrf" value="(\w+)"', session.get(f"{self.address}/login", timeout=20).text)
        assert csrf
        answer = session.post(
            f"{self.address}/login", data={"csrf": csrf[1], "name": name, "password": password}, headers=headers,
            allow_redirects=False, timeout=20,
        )  # fmt: skip
        return session, answer

    def deliver(self) -> str:
        """A delivery of fal; returns its request."""
        request_id = str(uuid.uuid4())
        payload = {"request_id": request_id, "status": "OK", "payload": {"finetune_id": "x"}}
        assert self.stack.deliver(payload).status_code == 200
        return request_id


@pytest.fixture(scope="module")
def consoled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consoled]:
    directory = tmp_path_factory.mktemp(NAME)
    variables = {
        "stack_console": True, "stack_console_port": LOOPBACK, "edge_console_port": EDGE, "edge_keepalive_seconds": 5,
        "verify_validate_certs": False,
    }  # fmt: skip
    site = Site(NAME, directory / "inventory", NUMBER, variables)
    try:
        site.site().must_pass()
        made = Consoled(Stack(site, directory))
        made.command("accounts", "add", "maria", "--role", "operator", "--as", "test", answer=PASSWORD + "\n")
        yield made
    finally:
        subprocess.run(["docker", "network", "rm", OUTSIDE], capture_output=True, check=False)
        site.teardown()


def test_it_is_hardened_and_listens_where_it_should(consoled: Consoled) -> None:
    assert hardening.faults(f"{NAME}-console") == []
    listening = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=True).stdout
    addresses = {line.split()[3] for line in listening.splitlines()}
    assert {address for address in addresses if address.endswith(f":{LOOPBACK}")} == {f"127.0.0.1:{LOOPBACK}"}
    assert any(address.endswith(f":{EDGE}") for address in addresses)


def test_a_person_logs_in_through_nginx_and_finds_a_delivery_with_its_file(consoled: Consoled) -> None:
    request_id = consoled.deliver()
    session, answer = consoled.log_in()
    assert answer.status_code == 303
    cookie = next(
        value for name, value in answer.raw.headers.items() if name == "Set-Cookie" and "session" in value
    )
    for part in ("__Host-console_session=", "Secure", "HttpOnly", "SameSite=Strict"):
        assert part in cookie
    page = session.get(consoled.address + "/", timeout=20)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert page.headers["Strict-Transport-Security"]

    def seen() -> bool:
        text = session.get(consoled.address + "/", timeout=20).text
        healthy = text.count('class="pill healthy"') == len(consoled.site.settings["site_api_ports"])
        return healthy and bool(re.search(r"Certificate ends</dt><dd><time ", text))

    wait_for("instances and certificate are seen", seen)

    def found() -> str:
        text = session.get(f"{consoled.address}/deliveries?request_id={request_id}", timeout=20).text
        match = re.search(r'href="(/deliveries/\d+)"', text)
        shown = session.get(consoled.address + match[1], timeout=20).text if match else ""
        return shown if "/files/" in shown else ""

    shown = wait_for("the delivery is there and archived", found)
    assert "verdict-valid" in shown
    (link,) = re.findall(r'href="(/deliveries/\d+/files/\w+)"', shown)
    file = session.get(consoled.address + link, timeout=20)
    assert file.headers["Content-Disposition"].startswith("attachment; ")
    assert json.loads(base64.b64decode(file.json()["body_base64"]))["request_id"] == request_id
    audited = [json.loads(line) for line in consoled.command("audit", "list", "--json").splitlines()]
    done = {(row["who"], row["action"]) for row in audited}
    assert {("maria", "console.login"), ("maria", "archive.download")} <= done


def test_the_public_ports_never_lead_to_it(consoled: Consoled) -> None:
    session, _ = consoled.log_in()
    ports = {
        name: consoled.site.settings[name]
        for name in ("site_http_port", "site_https_port", "site_https_alt_port")
    }
    for name, port in ports.items():
        for path in PATHS:
            for host in ("localhost", f"localhost:{EDGE}", f"{NAME}-console"):
                address = f"{'http' if name == 'site_http_port' else 'https'}://localhost:{port}{path}"
                answer = requests.get(
                    address, headers={"Host": host, "Cookie": "; ".join(f"{k}={v}" for k, v in session.cookies.items())},
                    verify=False, allow_redirects=False, timeout=20,
                )  # fmt: skip
                # What the service itself shows of itself at its root is all that is there.
                shown = [200] if path == "/" else []
                assert answer.status_code in (301, 308, 403, 404, 405, *shown), (
                    name,
                    path,
                    answer.status_code,
                )
                assert "Set-Cookie" not in answer.headers
                assert "console" not in answer.text.lower(), (name, path)


def test_its_port_is_for_the_local_networks_alone(consoled: Consoled) -> None:
    docker("network", "create", "--subnet", OUTSIDE_SUBNET, OUTSIDE)
    image = docker("inspect", "--format", "{{.Config.Image}}", f"{NAME}-api-1")
    script = (
        "import ssl, sys, urllib.request as u, urllib.error as e\n"
        "context = ssl._create_unverified_context()\n"
        "for address in sys.argv[1:]:\n"
        "    try: print(u.urlopen(address, context=context, timeout=10).status)\n"
        "    except e.HTTPError as error: print(error.code)\n"
    )
    addresses = [
        f"https://{OUTSIDE_HOST}:{port}/login" for port in (EDGE, consoled.site.settings["site_https_port"])
    ]
    answers = docker(
        "run", "--rm", "--network", OUTSIDE, "--entrypoint", "python3", image, "-c", script, *addresses
    ).split()
    assert answers == ["403", "404"]


def test_live_comes_through_nginx_at_once_and_goes_on_after_a_break(consoled: Consoled) -> None:
    session, _ = consoled.log_in()

    def follow(last: str, until: Any) -> list[tuple[str, str]]:
        """Numbers and requests of the events, from the one after ``last``, until they are enough."""
        found: list[tuple[str, str]] = []
        number = ""
        with session.get(
            consoled.address + "/live/events", headers={"Last-Event-ID": last}, stream=True, timeout=30
        ) as stream:
            for line in stream.iter_lines(chunk_size=1):
                if line.startswith(b"id: "):
                    number = line[4:].decode()
                if line.startswith(b"data: "):
                    found.append((number, json.loads(line[6:])["request"]))
                if until(found, line):
                    return found
        raise AssertionError(f"the stream has ended: {found}")

    started = time.monotonic()
    follow("0", lambda _, line: line.startswith(b"retry"))
    assert time.monotonic() - started < 5
    first = consoled.deliver()
    seen = follow("0", lambda found, _: any(request == first for _, request in found))
    missed = [consoled.deliver(), consoled.deliver()]
    again = follow(seen[-1][0], lambda found, _: {request for _, request in found} >= set(missed))
    assert [request for _, request in again if request in missed] == missed
    assert first not in [request for _, request in again]


def test_second_run_changes_nothing(consoled: Consoled) -> None:
    assert consoled.site.site().must_pass().recap["changed"] == 0
    assert consoled.site.site("--check", "--diff").must_pass().recap["changed"] == 0


def test_attempts_are_counted_by_the_address_that_nginx_sees(consoled: Consoled) -> None:
    """Last, because this address has to wait then."""
    answers = []
    for index in range(21):
        forged = {"X-Real-IP": f"10.9.8.{index}", "X-Forwarded-For": f"10.9.8.{index}"}
        answers.append(consoled.log_in(f"nobody-{index}", "wrong password!", **forged)[1].status_code)
    assert set(answers[:10]) == {403}
    assert answers[-1] == 429
    log = docker("logs", f"{NAME}-console")
    assert "10.9.8." not in log
