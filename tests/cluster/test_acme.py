"""A certificate by ACME: fetched from pebble, renewed under load, refused, and what is served meanwhile.

pebble and the site are real; names lead to this machine because pebble is told so. One site for all tests, in their order.
"""

from __future__ import annotations

import json
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import docker
import pytest
import requests
from cryptography import x509

from tests.support import hardening
from tests.support.images import tags_of
from tests.support.sites import Site

NUMBER = 16
NAMES = ["hook.wht.test", "www.wht.test"]
# Not below the site's own name: what is left of a site is looked for by it.
PEBBLE = "wht-pebble"
PORT = 20000 + 100 * NUMBER + 14
DOCKERFILE = (
    "ARG BASE\nFROM ${BASE}\nRUN apt-get -q update && apt-get -qy install --no-install-recommends pebble\n"
)


def output(*command: str, **options: str) -> str:
    """Output of a command; an AssertionError with all it said when it failed."""
    run = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert run.returncode == 0, f"{' '.join(command[:4])}: {run.stdout}{run.stderr}"
    return str(run.stdout)


def gateway(number: int) -> str:
    """The host's address on the site's network, where its containers find what listens on the host."""
    return f"172.31.{100 + 2 * number}.1"


@pytest.fixture(scope="module")
def pebble(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Let's Encrypt's test server, from Debian, on the host's network; gives the certificate of its own address."""
    files = tmp_path_factory.mktemp("pebble")
    files.chmod(0o755)
    certificate = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    certificate += ["-subj", "/CN=pebble", "-addext", f"subjectAltName=IP:{gateway(NUMBER)},IP:127.0.0.1"]
    output("openssl", *certificate, "-keyout", str(files / "key.pem"), "-out", str(files / "cert.pem"))
    for path in files.iterdir():
        path.chmod(0o644)
    engine = docker.from_env()
    base = tags_of(engine, "aisha-base")[0]
    engine.close()
    output("docker", "build", "-q", "--build-arg", f"BASE={base}", "-t", PEBBLE, "-", input=DOCKERFILE)
    with authority(files, PEBBLE, PORT, life=90 * 86400):
        yield files / "cert.pem"
    subprocess.run(["docker", "image", "rm", "--force", PEBBLE], capture_output=True, check=False)


@contextmanager
def authority(files: Path, name: str, port: int, *, life: int) -> Iterator[str]:
    """A pebble whose certificates are valid for so many seconds; the address of its directory."""
    settings = {
        "listenAddress": f"0.0.0.0:{port}",
        "managementListenAddress": f"127.0.0.1:{port + 1}",
        "certificate": "/files/cert.pem",
        "privateKey": "/files/key.pem",
        "httpPort": 20000 + 100 * NUMBER + 80,
        "tlsPort": 20000 + 100 * NUMBER + 43,
        "ocspResponderURL": "",
        "externalAccountBindingRequired": False,
        "retryAfter": {"authz": 1, "order": 1},
        "certificateValidityPeriod": life,
    }
    (files / f"{name}.json").write_text(json.dumps({"pebble": settings}))
    (files / f"{name}.json").chmod(0o644)
    hosts = [word for known in NAMES for word in ("--add-host", f"{known}:127.0.0.1")]
    output(
        "docker", "run", "--detach", "--name", name, "--network", "host", *hosts, "--user", "65534", "--env",
        "PEBBLE_VA_NOSLEEP=1", "--volume", f"{files}:/files:ro", PEBBLE, "pebble", "-config", f"/files/{name}.json",
    )  # fmt: skip
    try:
        yield f"https://{gateway(NUMBER)}:{port}/dir"
    finally:
        subprocess.run(["docker", "rm", "--force", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, pebble: Path) -> Iterator[Site]:
    """A site with a certificate by ACME, made in one run from nothing."""
    variables = {
        "site_acme_names": NAMES,
        "stack_acme_server": f"https://{gateway(NUMBER)}:{PORT}/dir",
        "stack_acme_ca": str(pebble),
        "stack_acme_retry_seconds": 600,
        # The machine may be busy with other hosts of other tests.
        "rollout_health_timeout": 600,
    }
    made = Site("wht-acme", tmp_path_factory.mktemp("wht-acme"), NUMBER, variables)
    try:
        result = made.site(timeout=2000).must_pass()
        assert "valid until" in result.output
        yield made
    finally:
        made.teardown()


def served(site: Site) -> x509.Certificate:
    """The certificate that a new connection gets."""
    address = ("127.0.0.1", site.settings["site_https_alt_port"])
    return x509.load_pem_x509_certificate(ssl.get_server_certificate(address, timeout=20).encode())


def nginx_started(site: Site) -> str:
    return output("docker", "inspect", "--format", "{{.Id}} {{.State.StartedAt}}", f"{site.name}-nginx")


def client(site: Site, command: str) -> tuple[int, dict]:
    """What the ACME client answers to a command."""
    run = subprocess.run(
        ["docker", "exec", f"{site.name}-acme", "acme-client", command],
        capture_output=True,
        text=True,
        check=False,
    )
    return run.returncode, json.loads(run.stdout)


def test_the_first_deployment_ends_with_the_cas_certificate(site: Site) -> None:
    found = served(site)
    assert "Pebble" in found.issuer.rfc4514_string()
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == set(NAMES)
    files = sorted((site.home / "acme" / "certificate").glob("*.pem"))
    assert {(path.stat().st_uid, path.stat().st_mode & 0o777) for path in files} == {(10002, 0o400)}
    assert hardening.faults(f"{site.name}-acme") == []
    assert hardening.faults(f"{site.name}-nginx", host_network=True) == []


def test_challenges_are_served_and_nothing_beside_them(site: Site) -> None:
    place = site.home / "acme" / "challenges" / ".well-known" / "acme-challenge"
    (place / "token").write_text("answer")
    (place / "token").chmod(0o644)
    base = f"http://127.0.0.1:{site.settings['site_http_port']}/.well-known/acme-challenge"
    answer = requests.get(f"{base}/token", timeout=20)
    assert (answer.status_code, answer.text) == (200, "answer")
    (place / "token").unlink()
    for path in ("token", "", "../../certificate/privkey.pem", "%2e%2e/%2e%2e/certificate/privkey.pem"):
        assert requests.get(f"{base}/{path}", timeout=20).status_code in (400, 403, 404), path
    assert requests.post(f"{base}/token", timeout=20).status_code in (403, 404, 405)


def test_a_run_without_changes_asks_no_ca(site: Site) -> None:
    before = nginx_started(site), served(site).serial_number
    assert site.site().must_pass().recap["changed"] == 0
    assert (nginx_started(site), served(site).serial_number) == before


class Load(threading.Thread):
    """Deliveries that ask for /health, half of them over connections that stay; counts what failed."""

    def __init__(self, site: Site, *, keep: bool) -> None:
        super().__init__(daemon=True)
        self._url = f"https://127.0.0.1:{site.settings['site_https_alt_port']}/health"
        self._keep, self._ended = keep, threading.Event()
        self.sent, self.failed = 0, []

    def run(self) -> None:
        session = requests.Session()
        while not self._ended.is_set():
            try:
                answer = (session if self._keep else requests).get(self._url, verify=False, timeout=30)
                if answer.status_code != 200:
                    self.failed.append(str(answer.status_code))
            except requests.RequestException as error:
                self.failed.append(repr(error))
            self.sent += 1

    def end(self) -> None:
        self._ended.set()
        self.join(60)


def test_a_renewal_fails_no_request_and_replaces_nothing(site: Site) -> None:
    loads = [Load(site, keep=keep) for keep in (True, True, False, False)]
    started, key = nginx_started(site), served(site).public_key()
    for load in loads:
        load.start()
    try:
        for _ in range(3):
            before = served(site).serial_number
            code, state = client(site, "renew")
            assert code == 0, state
            assert served(site).serial_number == int(state["serial"], 16) != before
            sent = sum(load.sent for load in loads)
            deadline = time.monotonic() + 60
            while sum(load.sent for load in loads) < sent + 40 and time.monotonic() < deadline:
                time.sleep(0.05)
    finally:
        for load in loads:
            load.end()
    assert [failure for load in loads for failure in load.failed] == []
    assert min(load.sent for load in loads) > 10
    assert nginx_started(site) == started
    assert served(site).public_key() == key, "certificate and key can't be of two renewals"


def test_after_a_renewal_a_run_changes_nothing(site: Site) -> None:
    assert site.site("--tags", "stack,rollout,acme").must_pass().recap["changed"] == 0


def test_a_ca_that_refuses_is_told_and_the_site_serves_on(site: Site) -> None:
    """A name that leads nowhere: the run says why; the certificate that is there goes on being served."""
    before = served(site).serial_number
    site.variables["site_acme_names"] = [*NAMES, "nowhere.wht.test"]
    site.write_variables()
    refused = site.site("--tags", "stack,rollout,acme")
    site.variables["site_acme_names"] = NAMES
    site.write_variables()
    assert refused.code != 0
    assert "nowhere.wht.test" in refused.output
    assert "see that each name leads to this host" in " ".join(refused.output.split())
    assert "Traceback" not in refused.output
    assert served(site).serial_number == before
    url = f"https://127.0.0.1:{site.settings['site_https_alt_port']}/health"
    assert requests.get(url, verify=False, timeout=30).status_code == 200
    site.site("--tags", "stack,rollout,acme").must_pass()


def test_a_certificate_near_its_end_is_renewed_by_itself_and_no_request_fails(
    site: Site, pebble: Path
) -> None:
    """Of an authority whose certificates live for 90 s: half of so short a life is the time. It looks every 15 s."""
    with authority(pebble.parent, f"{PEBBLE}-short", PORT + 4, life=90) as directory:
        site.variables |= {"stack_acme_server": directory, "stack_acme_interval_seconds": 15}
        site.write_variables()
        site.site("--tags", "stack,rollout,acme").must_pass()
        code, state = client(site, "renew")
        assert code == 0, state
        assert served(site).not_valid_after_utc - datetime.now(UTC) < timedelta(seconds=91)
        started, seen = nginx_started(site), [served(site).serial_number]
        loads = [Load(site, keep=keep) for keep in (True, False)]
        for load in loads:
            load.start()
        try:
            deadline = time.monotonic() + 180
            while len(seen) < 3 and time.monotonic() < deadline:
                if (now := served(site).serial_number) != seen[-1]:
                    seen.append(now)
                time.sleep(0.5)
        finally:
            for load in loads:
                load.end()
    assert len(seen) == 3, "two renewals that nobody asked for"
    assert [failure for load in loads for failure in load.failed] == []
    assert nginx_started(site) == started
