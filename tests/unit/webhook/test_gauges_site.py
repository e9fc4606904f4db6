"""What a worker shows of its site: the last delivery, deployments, the disk, and the end of the edge's certificate."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from prometheus_client import CollectorRegistry, generate_latest
from webhook_api import certificate, gauges_site
from webhook_api.config import ConfigError, load_settings
from webhook_api.db import DatabaseUnavailable
from webhook_api.metrics_upkeep import CERTIFICATE_ENDS, CERTIFICATE_UP

from tests.unit.webhook.test_config import GOOD

KEY = ec.generate_private_key(ec.SECP256R1())


def certificate_until(ends: datetime.datetime, name: str = "localhost") -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    begins = min(ends, datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)) - datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(subject, subject, KEY.public_key(), 5, begins, ends)
    return builder.sign(KEY, hashes.SHA256())


@contextmanager
def serving(found: x509.Certificate, directory: Path) -> Iterator[int]:
    """A TLS server on loopback that shows a certificate."""
    path = directory / "server.pem"
    key = KEY.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(key + found.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    plain, _ = server.accept()
                    with plain, context.wrap_socket(plain, server_side=True) as secured:
                        secured.recv(1)
                except (ssl.SSLError, ConnectionError):
                    continue
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "ends",
    [
        datetime.datetime(1999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC),
        datetime.datetime(2026, 2, 28, 1, 2, 3, tzinfo=datetime.UTC),
        datetime.datetime(2049, 12, 31, 23, 59, 59, tzinfo=datetime.UTC),
        # From 2050 on the time has another form.
        datetime.datetime(2050, 1, 1, tzinfo=datetime.UTC),
        datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC),
    ],
)
def test_the_end_of_a_certificate_is_read(ends: datetime.datetime) -> None:
    for name in ("a", "x" * 60):
        der = certificate_until(ends, name).public_bytes(serialization.Encoding.DER)
        assert certificate.not_after(der) == ends.timestamp()


def test_bytes_that_are_no_certificate_are_refused_whatever_they_are() -> None:
    ends = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    der = certificate_until(ends).public_bytes(serialization.Encoding.DER)
    for broken in (b"", b"\x30", b"\x30\x84\xff", b"garbage" * 40, bytes(300)):
        with pytest.raises(certificate.CertificateUnreadable):
            certificate.not_after(broken)
    for length in range(len(der)):
        with pytest.raises(certificate.CertificateUnreadable):
            certificate.not_after(der[:length])


def test_a_server_is_asked_and_one_that_is_away_keeps_the_last_answer(tmp_path: Path) -> None:
    # An end that has passed is told as well: nobody judges here.
    ends = datetime.datetime(2025, 6, 1, tzinfo=datetime.UTC)
    with serving(certificate_until(ends), tmp_path) as port:
        assert certificate.look("127.0.0.1", port)
    assert (CERTIFICATE_UP._value.get(), CERTIFICATE_ENDS._value.get()) == (1, ends.timestamp())
    assert not certificate.look("127.0.0.1", port)
    assert (CERTIFICATE_UP._value.get(), CERTIFICATE_ENDS._value.get()) == (0, ends.timestamp())


def test_without_an_address_nobody_is_asked() -> None:
    certificate.job(load_settings(GOOD), threading.Event())


def test_the_address_of_the_edge() -> None:
    assert load_settings(GOOD).edge_tls_address is None
    read = {
        given: load_settings({**GOOD, "EDGE_TLS_ADDRESS": given}).edge_tls_address
        for given in ("172.31.240.1:443", "[::1]:8443")
    }
    assert read == {"172.31.240.1:443": ("172.31.240.1", 443), "[::1]:8443": ("::1", 8443)}
    for wrong in ("edge", "a:1,b:2", "https://edge:443"):
        with pytest.raises(ConfigError, match="EDGE_TLS_ADDRESS"):
            load_settings({**GOOD, "EDGE_TLS_ADDRESS": wrong})


class Database:
    """Answers as the database would; counts the questions."""

    def __init__(self) -> None:
        self.asked = 0
        self.away = False

    @contextmanager
    def borrow(self) -> Iterator[Any]:
        self.asked += 1
        if self.away:
            raise DatabaseUnavailable("no_connection", "away")
        yield self

    def execute(self, query: str, _values: object = None) -> Any:
        rows = [("h1", "deploy", "rolled_back", 1700.0)] if "deployments" in query else [(1600.5,)]
        return type("Cursor", (), {"fetchall": lambda _: rows, "fetchone": lambda _: rows[0]})()


def shown(collector: gauges_site.SiteCollector) -> str:
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


def test_the_site_is_shown_and_asked_for_seldom(tmp_path: Path) -> None:
    now, database = [0.0], Database()
    collector = gauges_site.SiteCollector(database.borrow, tmp_path, lambda: now[0])
    text = shown(collector)
    shown(collector)
    assert database.asked == 1
    assert "webhook_last_delivery_timestamp_seconds 1600.5" in text
    assert 'webhook_last_deployment_result{host="h1",kind="deploy",result="rolled_back"} 1.0' in text
    assert 'webhook_last_deployment_timestamp_seconds{host="h1"} 1700.0' in text
    assert "webhook_disk_free_bytes" in text
    assert "webhook_disk_size_bytes" in text
    database.away, now[0] = True, gauges_site.TTL
    text = shown(collector)
    assert database.asked == 2
    assert "webhook_last" not in text
    assert "webhook_disk_free_bytes" in text


def test_a_directory_that_is_not_there_is_no_fault(tmp_path: Path) -> None:
    assert "webhook_disk" not in shown(gauges_site.SiteCollector(Database().borrow, tmp_path / "none"))
    assert "webhook_disk" not in shown(gauges_site.SiteCollector(Database().borrow, None))
