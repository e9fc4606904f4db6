"""registry_catalog against Debian's docker-registry: plain on loopback, and with TLS and a login."""

from __future__ import annotations

import datetime
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
import requests
from ansible.module_utils.registry_api import RegistryClient, RegistryError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from module_support import host_port, wait_for

pytestmark = pytest.mark.engine

REPOSITORIES = 130
PASSWORD = "only-a-test"
HTPASSWD = b"deploy:$2b$04$2kVkFskmVMKBMcxBLJt6IOcN50QWja.WYhTYbspI4m3HpIL8Y0akq\n"  # bcrypt of PASSWORD
CONFIG = {
    "version": 0.1,
    "storage": {"filesystem": {"rootdirectory": "/var/lib/registry"}, "delete": {"enabled": True}},
    "http": {"addr": ":5000"},
}


@dataclass
class Running:
    url: str
    ca: str = ""
    login: tuple[str, str] | None = None


def blob(content: bytes) -> dict:
    return {"size": len(content), "digest": f"sha256:{hashlib.sha256(content).hexdigest()}"}


def push(registry: Running, repository: str, tag: str, text: str = "") -> str:
    """Push the smallest image that there can be; `text` makes it another one. Returns its digest."""
    session = requests.Session()
    session.trust_env = False
    session.auth, session.verify = registry.login, registry.ca or True
    config = json.dumps({"architecture": "amd64", "os": "linux", "comment": text}).encode()
    upload = session.post(f"{registry.url}/v2/{repository}/blobs/uploads/").headers["Location"]
    session.put(upload, params={"digest": blob(config)["digest"]}, data=config).raise_for_status()
    kind = "application/vnd.oci.image.manifest.v1+json"
    config_type = "application/vnd.oci.image.config.v1+json"
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": kind,
            "config": {"mediaType": config_type, **blob(config)},
            "layers": [],
        }
    ).encode()
    put = session.put(
        f"{registry.url}/v2/{repository}/manifests/{tag}", data=manifest, headers={"Content-Type": kind}
    )
    put.raise_for_status()
    return blob(manifest)["digest"]


@pytest.fixture(scope="module")
def registry(session_containers, registry_image) -> Running:
    container = session_containers(
        registry_image,
        ["docker-registry", "serve", "/config.yml"],
        files={"/config.yml": json.dumps(CONFIG).encode()},
        ports={"5000/tcp": ("127.0.0.1", None)},
    )
    running = Running(f"http://127.0.0.1:{host_port(container, 5000)}")
    wait_for(lambda: answers(RegistryClient(running.url, plain_http=True)), what="the registry")
    return running


def answers(client: RegistryClient) -> bool:
    try:
        client.ping()
    except RegistryError:
        return False
    return True


def certificates(directory: Path) -> dict[str, bytes]:
    """A private authority, and a certificate of it for 127.0.0.1."""
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name: str, key, issuer: str, issuer_key, *, authority: bool) -> x509.Certificate:
        subject, signer = (
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer)
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(signer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        if authority:
            usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
            builder = builder.add_extension(usage, critical=True)
        else:
            names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(issuer_key, hashes.SHA256())

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    (directory / "ca.pem").write_bytes(
        certificate("test CA", ca_key, "test CA", ca_key, authority=True).public_bytes(pem)
    )
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = certificate("registry", key, "test CA", ca_key, authority=False).public_bytes(pem)
    return {"/tls/key.pem": private, "/tls/cert.pem": public}


@pytest.fixture(scope="module")
def private_registry(session_containers, registry_image, tmp_path_factory) -> Running:
    directory = tmp_path_factory.mktemp("ca")
    config = CONFIG | {
        "http": {"addr": ":5000", "tls": {"certificate": "/tls/cert.pem", "key": "/tls/key.pem"}},
        "auth": {"htpasswd": {"realm": "test", "path": "/htpasswd"}},
    }
    container = session_containers(
        registry_image,
        ["docker-registry", "serve", "/config.yml"],
        files={"/config.yml": json.dumps(config).encode(), "/htpasswd": HTPASSWD, **certificates(directory)},
        ports={"5000/tcp": ("127.0.0.1", None)},
    )
    running = Running(
        f"https://127.0.0.1:{host_port(container, 5000)}", str(directory / "ca.pem"), ("deploy", PASSWORD)
    )
    wait_for(lambda: answers(RegistryClient(running.url, running.login, running.ca)), what="the TLS registry")
    return running


@pytest.fixture(scope="module")
def many(registry) -> dict[str, str]:
    """More repositories than any page holds, and the digest of each one's tag."""
    names = [f"many/r{number:03}" for number in range(REPOSITORIES)]
    with ThreadPoolExecutor(8) as pool:
        digests = pool.map(lambda name: push(registry, name, "t", name), names)
        return dict(zip(names, digests, strict=True))


def test_the_catalogue_of_more_than_100_repositories_is_complete(run_module, registry, many):
    expect = [{"repository": name, "tag": "t", "digest": digest} for name, digest in many.items()][-5:]
    result = run_module("registry_catalog", url=registry.url, plain_http=True, expect=expect)
    assert not result.get("failed"), result.get("msg")
    assert result["changed"] is False
    assert set(many) <= set(result["repositories"])
    assert result["digests"] == {f"{entry['repository']}:t": entry["digest"] for entry in expect}


def test_pages_of_any_size_make_the_same_catalogue(registry, many):
    one, seven = (
        RegistryClient(registry.url, plain_http=True, page_size=size).catalog() for size in (1000, 7)
    )
    assert one == seven
    assert len(one) >= REPOSITORIES


def test_all_that_is_wrong_is_named_at_once(run_module, registry):
    digest = push(registry, "webhook-api", "right")
    wrong = "sha256:" + "0" * 64
    result = run_module(
        "registry_catalog",
        url=registry.url,
        plain_http=True,
        check=True,
        expect=[
            {"repository": "webhook-api", "tag": "right", "digest": digest},
            {"repository": "webhook-api", "tag": "right", "digest": wrong},
            {"repository": "webhook-api", "tag": "missing"},
            {"repository": "nginx-webhook", "tag": "latest"},
        ],
    )
    assert result["failed"]
    assert result["reason"] == "not_as_expected"
    assert len(result["faults"]) == 3
    for words in (digest, "no tag missing", "no repository nginx-webhook", "--tags build,push"):
        assert words in result["msg"]


def test_a_repository_whose_only_image_was_deleted_is_no_proof(run_module, registry):
    digest = push(registry, "emptied", "t")
    assert RegistryClient(registry.url, plain_http=True).delete_manifest("emptied", digest)
    result = run_module(
        "registry_catalog", url=registry.url, plain_http=True, expect=[{"repository": "emptied"}]
    )
    assert "emptied" in result["repositories"]
    assert result["failed"]
    assert "has no tag" in result["msg"]


def test_plain_http_is_refused_unless_allowed(run_module, registry):
    result = run_module("registry_catalog", url=registry.url)
    assert result["failed"]
    assert result["reason"] == "plain_http_refused"


def test_private_authority_and_login(run_module, private_registry):
    digest = push(private_registry, "aisha/bot", "1.0")
    arguments = {
        "url": private_registry.url,
        "ca": private_registry.ca,
        "username": "deploy",
        "expect": [{"repository": "aisha/bot", "tag": "1.0", "digest": digest}],
    }
    result = run_module("registry_catalog", password=PASSWORD, **arguments)
    assert not result.get("failed"), result.get("msg")
    assert PASSWORD not in result["output"]

    wrong = run_module("registry_catalog", password="wrong-pass-word", **arguments)
    assert wrong["reason"] == "unauthorized"
    assert "username" in wrong["msg"]
    assert "wrong-pass-word" not in wrong["output"]


def test_an_authority_that_is_not_trusted(run_module, private_registry):
    result = run_module("registry_catalog", url=private_registry.url, username="deploy", password=PASSWORD)
    assert result["reason"] == "tls"
    assert "'ca'" in result["msg"]


def test_http_asked_of_a_tls_registry(private_registry):
    client = RegistryClient(private_registry.url.replace("https", "http"), plain_http=True)
    with pytest.raises(RegistryError) as caught:
        client.ping()
    assert caught.value.reason == "tls"


def test_it_waits_for_a_registry_that_is_still_starting(run_module, session_containers, registry_image):
    container = session_containers(
        registry_image,
        ["sh", "-c", "sleep 3; exec docker-registry serve /config.yml"],
        files={"/config.yml": json.dumps(CONFIG).encode()},
        ports={"5000/tcp": ("127.0.0.1", None)},
    )
    url = f"http://127.0.0.1:{host_port(container, 5000)}"
    result = run_module("registry_catalog", url=url, plain_http=True, wait=30)
    assert not result.get("failed"), result.get("msg")
    assert result["repositories"] == []
