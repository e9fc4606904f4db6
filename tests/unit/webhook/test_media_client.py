"""The media client's rules: what is asked, where it connects, what it says of itself, and what it takes."""

from __future__ import annotations

import datetime
import hashlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from webhook_api import wire
from webhook_api.media import MediaClient, MediaError, MediaPolicy, check_url, decode_data_uri, is_public
from webhook_api.states import Failure

from tests.support.mediahost import File, MediaHost

POLICY = MediaPolicy(
    frozenset({"v3.fal.media"}), frozenset({"127.0.0.1:8123", "[::1]:8123", "plain.test:80"})
)
PUBLIC = "93.184.216.34"


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("https://v3.fal.media/files/a.bin", "v3.fal.media", 443, "/files/a.bin"),
        ("https://V3.FAL.MEDIA:443?x=1#part", "v3.fal.media", 443, "/?x=1"),
        ("http://127.0.0.1:8123/a", "127.0.0.1", 8123, "/a"),
        ("http://[::1]:8123/a", "::1", 8123, "/a"),
        ("http://plain.test/a", "plain.test", 80, "/a"),
    ],
)
def test_allowed_addresses(url: str, host: str, port: int, path: str) -> None:
    target = check_url(url, POLICY)
    assert (target.host, target.port, target.path) == (host, port, path)


@pytest.mark.parametrize(
    "url",
    [
        "https://fal.media/a",
        "https://v3.fal.media.evil.test/a",
        "https://evil.test/v3.fal.media",
        "https://v3.fal.media.:443/a",
        "https://v3.fal.media:8443/a",
        "https://v3.fal.media@evil.test/a",
        "https://user:pass@v3.fal.media/a",
        "https://v3.fal.media%2eevil.test/a",
        "https://v3.fal.media\\@evil.test/a",
        "https://v3.fal.media/a b",
        "https://v3.fal.media/a\r\nHost: evil",
        "https://v3.fal.media:notaport/a",
        "https://v3.fal.mediа/cyrillic",
        "https:///a",
        "http://v3.fal.media/a",
        "http://127.0.0.1:8124/a",
        "http://127.0.0.1/a",
        "ftp://v3.fal.media/a",
        "file:///etc/passwd",
        "gopher://v3.fal.media",
        "//v3.fal.media/a",
        "v3.fal.media/a",
        "",
        "https://v3.fal.media/" + "a" * 5000,
    ],
)
def test_every_other_address_is_refused_for_good(url: str) -> None:
    with pytest.raises(MediaError) as refused:
        check_url(url, POLICY)
    assert refused.value.kind is Failure.PERMANENT


OLD = MediaPolicy(frozenset({"v3.fal.media", "storage.googleapis.com/falserverless/"}))


def test_a_host_that_others_use_as_well_is_allowed_below_a_prefix() -> None:
    target = check_url("https://storage.googleapis.com/falserverless/a/b.bin?x=..", OLD)
    assert (target.host, target.path) == ("storage.googleapis.com", "/falserverless/a/b.bin?x=..")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/falserverless",
        "/falserverless2/a",
        "/other/falserverless/a",
        "/?/falserverless/",
        "/falserverless/../other/a",
        "/falserverless/%2e%2E/other/a",
        "/falserverless/..%2fother/a",
        "/falserverless//other/a",
        "/falserverless/./a",
    ],
)
def test_nothing_else_of_such_a_host(path: str) -> None:
    with pytest.raises(MediaError) as refused:
        check_url(f"https://storage.googleapis.com{path}", OLD)
    assert (refused.value.kind, refused.value.reason) == (Failure.PERMANENT, "media_host_refused")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        (PUBLIC, True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.31.240.11", False),
        ("192.168.0.4", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::5db8:d822", True),
        ("2002:7f00:1::", False),
        ("ff02::1", False),
        ("nonsense", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_a_host_with_one_private_address_is_refused_as_a_whole() -> None:
    client = MediaClient(POLICY, resolver=lambda *_: [PUBLIC, "10.0.0.1"])
    with pytest.raises(MediaError) as refused, client.open("https://v3.fal.media/a"):
        pass
    assert refused.value.reason == "media_address_refused"


def test_a_host_without_address_may_have_one_later() -> None:
    def fails(*_: object) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    with (
        pytest.raises(MediaError) as refused,
        MediaClient(POLICY, resolver=fails).open("https://v3.fal.media/a"),
    ):
        pass
    assert (refused.value.kind, refused.value.reason) == (Failure.UNREACHABLE, "media_host_unknown")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of v3.fal.media, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "v3.fal.media")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("v3.fal.media")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "pair.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def names() -> list[str | None]:
    return []


@pytest.fixture
def secure_host(
    certificate: Path, names: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[MediaHost]:
    """A TLS host on loopback that stands for the public address, and for no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda _sock, name, _context: names.append(name)
    with MediaHost(context) as host:
        real = socket.create_connection

        def connect(address: tuple[str, int], **options: float) -> socket.socket:
            assert address == (PUBLIC, 443), "connects to the address that was checked"
            return real(("127.0.0.1", host.port), **options)

        monkeypatch.setattr(wire.socket, "create_connection", connect)
        yield host


def test_it_connects_to_the_checked_address_under_the_hosts_name(
    secure_host: MediaHost, certificate: Path, names: list[str | None]
) -> None:
    content = b"weights" * 1000
    secure_host.files = {"/a": File(content)}
    lookups: list[str] = []

    def resolver(host: str, _port: int) -> list[str]:
        # A second look-up would be given a private address (DNS rebinding).
        lookups.append(host)
        return [PUBLIC] if len(lookups) == 1 else ["127.0.0.1"]

    client = MediaClient(POLICY, resolver, ssl.create_default_context(cafile=str(certificate)))
    with client.open("https://v3.fal.media/a?b=c") as stream:
        read = stream.read(1024 * 1024)
        assert stream.sha256 == hashlib.sha256(content).hexdigest()
    assert read == content
    assert lookups == ["v3.fal.media"]
    assert names == ["v3.fal.media"]
    [request] = secure_host.requests
    assert (request["host"], request["path"]) == ("v3.fal.media", "/a?b=c")
    assert request["accept-encoding"] == "identity"


def test_a_certificate_that_is_not_trusted_is_refused(secure_host: MediaHost) -> None:
    client = MediaClient(POLICY, lambda *_: [PUBLIC])
    with pytest.raises(MediaError) as refused, client.open("https://v3.fal.media/a"):
        pass
    assert refused.value.reason == "media_certificate"
    assert secure_host.requests == []


def test_a_tls_connection_cut_without_notice_is_no_end_of_file(
    secure_host: MediaHost, certificate: Path
) -> None:
    secure_host.files = {"/a": File(b"x" * 100_000, stop_after=50_000)}
    client = MediaClient(POLICY, lambda *_: [PUBLIC], ssl.create_default_context(cafile=str(certificate)))
    with pytest.raises(MediaError) as refused, client.open("https://v3.fal.media/a") as stream:
        stream.read(1024 * 1024)
    assert refused.value.kind is Failure.THEIRS


def test_what_the_reader_throws_is_not_the_hosts_fault() -> None:
    with MediaHost() as host:
        host.files = {"/a": File(b"x")}
        client = MediaClient(MediaPolicy(frozenset(), frozenset({host.address})))
        with pytest.raises(OSError, match="the store is away"), client.open(host.url("/a")):
            raise OSError("the store is away")


def test_a_declared_length_serves_where_the_server_names_none() -> None:
    with MediaHost() as host:
        host.files = {"/a": File(b"x" * 100, length=False)}
        client = MediaClient(MediaPolicy(frozenset(), frozenset({host.address})))
        with client.open(host.url("/a"), declared_size=100) as stream:
            assert len(stream.read(1000)) == 100
        with pytest.raises(MediaError, match="100 of 101"), client.open(host.url("/a"), 101) as stream:
            stream.read(1000)


def test_stop_ends_a_waiting_download() -> None:
    with MediaHost() as host:
        host.files = {"/a": File(b"x" * 100, gate=threading.Event())}
        client = MediaClient(MediaPolicy(frozenset(), frozenset({host.address})))
        stop = host.half_sent.is_set
        with pytest.raises(MediaError) as ended, client.open(host.url("/a"), stop=stop) as stream:
            stream.read(1000)
    assert ended.value.kind is Failure.INTERRUPTED


@pytest.mark.parametrize(
    ("uri", "data", "kind"),
    [
        ("data:image/png;base64,AAEC", b"\x00\x01\x02", "image/png"),
        ("data:;base64,QQ==", b"A", "text/plain"),
        ("data:text/plain;charset=utf-8,a%20b", b"a b", "text/plain"),
        ("DATA:Application/X;BASE64,QUI%3D", b"AB", "application/x"),
        ("data:,", b"", "text/plain"),
    ],
)
def test_data_uris(uri: str, data: bytes, kind: str) -> None:
    assert decode_data_uri(uri) == (data, kind)


@pytest.mark.parametrize(
    "uri", ["data:image/png;base64,A", "data:image/png;base64,AA EC", "data:image/png", "data:"]
)
def test_malformed_data_uris(uri: str) -> None:
    with pytest.raises(MediaError) as refused:
        decode_data_uri(uri)
    assert refused.value.kind is Failure.PERMANENT


def test_the_limit_holds_for_data_uris() -> None:
    client = MediaClient(MediaPolicy(frozenset(), max_bytes=2))
    with pytest.raises(MediaError, match="larger than 2"), client.open("data:,abc") as stream:
        stream.read(10)
