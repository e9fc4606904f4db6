"""A site with `monitoring: true`: each alarm is provoked for real, told to a real HTTP server by Alertmanager, and cleared.

The disk that fills is a small one of the test's own, under the volume of the instances: nobody fills the machine's.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.e2e.conftest import Stack, docker, wait_for
from tests.support import hardening
from tests.support.recorded_server import Answer, Recorded, serve
from tests.support.sites import Site

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
NAME, NUMBER = "wht-mon", 17
PROMETHEUS, ALERTMANAGER = 20_000 + 100 * NUMBER + 90, 20_000 + 100 * NUMBER + 93
QUICK = {
    "monitoring": True,
    "edge_keepalive_seconds": 5,
    # The certificates of these tests have signed themselves.
    "verify_validate_certs": False,
    "monitoring_prometheus_port": PROMETHEUS,
    "monitoring_alertmanager_port": ALERTMANAGER,
    "monitoring_scrape_seconds": 1,
    "monitoring_for_urgent": "2s",
    "monitoring_for_patient": "2s",
    "monitoring_window": "30s",
    "monitoring_intake_failures": 2,
    "monitoring_rejects": 5,
    "monitoring_oldest_delivery_seconds": 8,
    "monitoring_no_delivery_hours": 0,
    "monitoring_disk_free_percent": 20,
    "monitoring_alert_group_wait": "1s",
    "monitoring_alert_group_interval": "1s",
    # A dead letter within seconds; a spool that three large bodies fill, on a disk that is smaller than what it leaves free.
    "stack_environment": {
        "PARKED_MAX_SECONDS": "6",
        "SPOOL_MAX_BYTES": "1048576",
        "SPOOL_RESERVE_BYTES": "1048576",
    },
}
SECONDS = 120.0
DISK_MB = 64


def small_disk() -> None:
    """The volume of the instances' state, before the site makes it: as Compose would, but on a disk that a test can fill."""
    docker(
        "volume", "create", "--opt", "type=tmpfs", "--opt", "device=tmpfs",
        "--opt", f"o=size={DISK_MB}m,uid=10001,gid=10001,mode=700",
        "--label", f"com.docker.compose.project={NAME}", "--label", "com.docker.compose.volume=api-state",
        f"{NAME}-api-state",
    )  # fmt: skip


def write_certificate(directory: Path, days: int) -> dict[str, str]:
    """A certificate of our own for so many days, and the variables that name it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(),
                                now - datetime.timedelta(hours=1), now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    paths = {
        "edge_certificate_src": directory / "fullchain.pem",
        "edge_certificate_key_src": directory / "privkey.pem",
    }
    paths["edge_certificate_src"].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths["edge_certificate_key_src"].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return {variable: str(path) for variable, path in paths.items()}


@dataclass
class Watched:
    """The site, and the server that Alertmanager tells."""

    stack: Stack
    server: Recorded
    mark: int = 0
    """How much had been told when a test began."""

    @property
    def site(self) -> Site:
        return self.stack.site

    def told(self, since: int = 0) -> list[tuple[str, str, dict[str, str]]]:
        """Name, status and labels of every alert that was told."""
        return [
            (alert["labels"]["alertname"], alert["status"], alert["labels"])
            for asked in self.server.asked[since:]
            for alert in json.loads(asked.body)["alerts"]
        ]

    def wait(self, name: str, status: str, since: int, **labels: str) -> None:
        """Until Alertmanager has told it."""

        def probe() -> bool:
            return any(
                (found, how) == (name, status) and labels.items() <= known.items()
                for found, how, known in self.told(since)
            )

        wait_for(f"{name} {status}, told: {[entry[:2] for entry in self.told(since)]}", probe, SECONDS)

    @contextmanager
    def alarm(self, name: str, **labels: str) -> Iterator[None]:
        """What is done before brings the alarm; what is done inside takes it away again."""
        self.wait(name, "firing", self.mark, **labels)
        since = len(self.server.asked)
        yield
        self.wait(name, "resolved", since, **labels)

    def deliver(self, *, filler: int = 0, **options: Any) -> requests.Response:
        """One delivery of a training that nobody waits for."""
        payload = {
            "request_id": str(uuid.uuid4()),
            "status": "OK",
            "payload": {"finetune_id": "x" * (filler or 5)},
        }
        return self.stack.deliver(payload, **options)

    def console(self, *arguments: str) -> str:
        return docker("exec", f"{NAME}-api-1", "webhook-api", *arguments)

    def discard(self, *which: str) -> None:
        """Dead letters are closed, whatever state the last one is in on its way there."""
        self.console("dead-letters", "discard", *which, "--why", "a test", "--yes", "--as", "test")

    def unfinished(self) -> dict[str, int]:
        """Deliveries by state, as the service shows them."""
        address = f"http://127.0.0.1:{self.site.settings['site_api_ports'][0]}/api/v1/webhook/status"
        states: dict[str, int] = requests.get(address, timeout=5).json()["inbox"]["states"]
        return states

    def firing(self) -> set[str]:
        """What Prometheus says is firing at this moment."""
        answer = requests.get(f"http://127.0.0.1:{PROMETHEUS}/api/v1/alerts", timeout=5).json()
        return {a["labels"]["alertname"] for a in answer["data"]["alerts"] if a["state"] == "firing"}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp(NAME)
    with serve(Recorded({"POST /alarms": Answer(200)})) as server:
        variables = {
            **QUICK,
            **write_certificate(directory, days=1),
            "monitoring_alert_webhook_url": f"{server.url}/alarms",
        }
        site = Site(NAME, directory / "inventory", NUMBER, variables)
        try:
            small_disk()
            site.site().must_pass()
            yield Watched(Stack(site, directory), server)
        finally:
            site.teardown()


@pytest.fixture
def quiet(watched: Watched) -> Watched:
    """The site without anything that the test before has left: no delivery unfinished, no alarm."""

    def probe() -> bool:
        unfinished = watched.unfinished()
        if unfinished["dead"]:
            watched.discard("--all")
        if unfinished["aside"]:
            watched.discard("--aside", "any")
        return not any(unfinished.values()) and not watched.firing()

    wait_for("nothing is left of the test before", probe, SECONDS)
    watched.mark = len(watched.server.asked)
    return watched


def test_a_certificate_that_ends_soon_and_one_that_was_renewed(watched: Watched, tmp_path: Path) -> None:
    watched.wait("WebhookCertificateExpiring", "firing", 0, severity="critical")
    since = len(watched.server.asked)
    watched.site.variables.update(write_certificate(tmp_path, days=90))
    watched.site.write_variables()
    watched.site.site("--tags", "edge").must_pass()
    # The worker looks once an hour, and when it starts.
    docker("restart", f"{NAME}-worker")
    watched.wait("WebhookCertificateExpiring", "resolved", since, severity="critical")
    wait_for("the warning is over too", lambda: "WebhookCertificateExpiring" not in watched.firing(), SECONDS)


def test_it_is_hardened_and_stays_on_loopback(watched: Watched) -> None:
    for name in ("prometheus", "alertmanager"):
        assert hardening.faults(f"{NAME}-{name}", host_network=True) == []
    listening = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=True).stdout
    mine = [
        line.split()[3]
        for line in listening.splitlines()
        if line.split()[3].endswith((f":{PROMETHEUS}", f":{ALERTMANAGER}"))
    ]
    assert sorted(mine) == [f"127.0.0.1:{PROMETHEUS}", f"127.0.0.1:{ALERTMANAGER}"]


def test_everything_is_read_and_every_query_of_the_alarms_has_metrics(watched: Watched) -> None:
    def down() -> list[str]:
        answer = requests.get(f"http://127.0.0.1:{PROMETHEUS}/api/v1/targets", timeout=5).json()["data"]
        return [t["labels"]["instance"] for t in answer["activeTargets"] if t["health"] != "up"]

    wait_for("all targets answer", lambda: not down(), SECONDS)
    watched.deliver()
    names = set(
        requests.get(f"http://127.0.0.1:{PROMETHEUS}/api/v1/label/__name__/values", timeout=5).json()["data"]
    )
    assert {
        "webhook_certificate_not_after_timestamp_seconds",
        "webhook_disk_free_bytes",
        "webhook_inbox_deliveries",
        "webhook_jwks_keys",
        "webhook_jwks_stale",
        "webhook_last_deployment_result",
        "webhook_rejected_total",
        "webhook_spool_rows",
    } <= names


def test_second_run_changes_nothing(watched: Watched) -> None:
    assert watched.site.site().must_pass().recap["changed"] == 0
    result = watched.site.site("--check", "--diff").must_pass()
    assert result.recap["changed"] == 0
    assert watched.site.site("--tags", "monitoring").must_pass().recap["changed"] == 0


def test_what_prometheus_refuses_is_not_written_over_what_stands(watched: Watched) -> None:
    """Running processes would not notice; at their next start there would be none."""
    place = watched.site.home / "monitoring"
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    too_long = "99999999999y"  # a duration by its form
    refused = watched.site.site("--tags", "monitoring", "-e", f"monitoring_for_urgent={too_long}")
    assert refused.code != 0
    assert "Nothing of the monitoring was changed" in refused.output
    assert "duration out of range" in refused.output
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_dead_letters(quiet: Watched) -> None:
    assert quiet.deliver().status_code == 200
    with quiet.alarm("WebhookDeadLetters"):
        quiet.discard("--all")


def test_kept_aside(quiet: Watched) -> None:
    assert quiet.deliver(at=time.time() - 7200).status_code == 200
    with quiet.alarm("WebhookKeptAside"):
        quiet.discard("--aside", "any")


def test_refusals_that_rise(quiet: Watched) -> None:
    ends = time.monotonic() + 6
    while time.monotonic() < ends:
        assert requests.post(quiet.stack.url(), json={}, verify=False, timeout=10).status_code == 401
        time.sleep(0.4)
    with quiet.alarm("WebhookRejectsRising", reason="missing_credentials"):
        pass


def test_a_delivery_that_waits_too_long(quiet: Watched) -> None:
    docker("stop", f"{NAME}-worker")
    try:
        assert quiet.deliver().status_code == 200
        quiet.wait("WebhookInstanceDown", "firing", quiet.mark, instance="worker")
        quiet.wait("WebhookDeliveriesTooOld", "firing", quiet.mark, state="pending")
        since = len(quiet.server.asked)
    finally:
        docker("start", f"{NAME}-worker")
    quiet.wait("WebhookDeliveriesTooOld", "resolved", since, state="pending")
    quiet.wait("WebhookInstanceDown", "resolved", since, instance="worker")


def test_postgresql_away_the_spool_and_a_spool_that_is_full(quiet: Watched) -> None:
    docker("stop", f"{NAME}-postgres")
    try:
        quiet.wait("WebhookInboxUnknown", "firing", quiet.mark)
        wait_for("a delivery is spooled", lambda: quiet.deliver().status_code == 200, SECONDS)
        quiet.wait("WebhookSpoolInUse", "firing", quiet.mark)
        answers = []
        for _ in range(12):
            answers.append(quiet.deliver(filler=400_000).status_code)
            time.sleep(1)
        assert 503 in answers
        quiet.wait("WebhookIntakeFailing", "firing", quiet.mark)
    finally:
        docker("start", f"{NAME}-postgres")
    since = len(quiet.server.asked)
    for name in ("WebhookInboxUnknown", "WebhookSpoolInUse", "WebhookIntakeFailing"):
        quiet.wait(name, "resolved", since)


def test_one_instance_down_and_all_of_them(quiet: Watched) -> None:
    docker("stop", f"{NAME}-api-1")
    try:
        quiet.wait("WebhookInstanceDown", "firing", quiet.mark, instance="api-1")
        docker("stop", f"{NAME}-api-2")
        quiet.wait("WebhookAllInstancesDown", "firing", quiet.mark)
        since = len(quiet.server.asked)
    finally:
        docker("start", f"{NAME}-api-1", f"{NAME}-api-2")
    quiet.wait("WebhookAllInstancesDown", "resolved", since)
    wait_for("all answer", lambda: "WebhookInstanceDown" not in quiet.firing(), SECONDS)


def test_nginx_that_shows_no_certificate(quiet: Watched) -> None:
    docker("stop", f"{NAME}-nginx")
    try:
        docker("restart", f"{NAME}-worker")
        quiet.wait("WebhookCertificateUnknown", "firing", quiet.mark)
    finally:
        docker("start", f"{NAME}-nginx")
    since = len(quiet.server.asked)
    quiet.wait("WebhookCertificateUnknown", "resolved", since)


def again(watched: Watched, **variables: Any) -> Callable[[], None]:
    """Run the role with other thresholds; returns what takes them back."""
    watched.site.playbook("site.yml", "--tags", "monitoring", "-e", json.dumps(variables)).must_pass()
    return lambda: watched.site.site("--tags", "monitoring").must_pass() and None


def test_no_deliveries_for_long(quiet: Watched) -> None:
    back = again(quiet, monitoring_no_delivery_hours=0.006)
    try:
        with quiet.alarm("WebhookNoDeliveries"):
            quiet.deliver()
    finally:
        back()


def test_a_disk_that_fills(quiet: Watched) -> None:
    filler = "/var/lib/webhook/filler"
    fill = f"head --bytes={DISK_MB * 9 // 10}M /dev/zero >{filler}"
    docker("exec", f"{NAME}-api-1", "sh", "-c", fill)
    with quiet.alarm("WebhookDiskFilling"):
        docker("exec", f"{NAME}-api-1", "rm", filler)


def test_keys_that_nobody_can_renew(quiet: Watched) -> None:
    """As after an hour without the source of the keys: an instance starts with those that were kept, and gets no others."""
    source = quiet.site.home / "secrets" / "api" / "fal_jwks.json"
    good = source.read_text()
    make_old = (
        "import json, pathlib; path = pathlib.Path('/var/lib/webhook/fal-jwks.json'); "
        "kept = json.loads(path.read_text()); kept['fetched_at'] -= 7200; path.write_text(json.dumps(kept))"
    )
    try:
        # Written in place: a mounted file keeps its inode.
        source.write_text("gone")
        docker("exec", f"{NAME}-api-1", "python3", "-c", make_old)
        docker("restart", f"{NAME}-api-1")
        quiet.wait("WebhookKeysStale", "firing", quiet.mark, instance="api-1")
        assert quiet.deliver().status_code == 200
        since = len(quiet.server.asked)
    finally:
        source.write_text(good)
        quiet.console("keys", "refresh")
    quiet.wait("WebhookKeysStale", "resolved", since, instance="api-1")


def test_a_rollout_that_fails(quiet: Watched) -> None:
    broken = {**QUICK["stack_environment"], "NOTICE_EVERY_SECONDS": "never"}  # type: ignore[dict-item]
    failed = quiet.site.site("-e", json.dumps({"stack_environment": broken}))
    assert failed.code != 0
    with quiet.alarm("WebhookRolloutFailed"):
        quiet.site.site().must_pass()


def test_off_nothing_of_it_stands(watched: Watched) -> None:
    off = json.dumps({"monitoring": False})
    assert watched.site.site("--tags", "monitoring", "-e", off).must_pass().recap["changed"] > 0
    assert (
        docker(
            "ps",
            "--all",
            "--quiet",
            "--filter",
            f"name={NAME}-prometheus",
            "--filter",
            f"name={NAME}-alertmanager",
        )
        == ""
    )
    assert (
        docker("volume", "ls", "--quiet", "--filter", f"label=com.docker.compose.project={NAME}-monitoring")
        == ""
    )
    assert not (watched.site.home / "monitoring").exists()
    assert not (watched.site.home / "secrets" / "alertmanager").exists()
    assert watched.site.site("--tags", "monitoring", "-e", off).must_pass().recap["changed"] == 0
