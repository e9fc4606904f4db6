"""The registry client against recorded answers of docker-registry 2.8.3, and of what is no registry."""

from __future__ import annotations

import hashlib
import json
import socket

import pytest
from ansible.module_utils.registry_api import MANIFEST_TYPES, RegistryClient, RegistryError, next_page

from tests.support.recorded_server import Answer, Recorded, serve

DIGEST = "sha256:" + "a" * 64
V2 = Answer(headers={"Docker-Distribution-Api-Version": "registry/2.0"})


def page(names: list[str], link: str = "") -> Answer:
    headers = {"Link": link} if link else {}
    return Answer(body=json.dumps({"repositories": names}).encode(), headers=headers)


@pytest.fixture
def recorded():
    with serve(Recorded({"GET /v2/": V2})) as server:
        yield server


@pytest.fixture
def client(recorded):
    return RegistryClient(recorded.url, plain_http=True, read_timeout=5)


def reason_of(call) -> str:
    with pytest.raises(RegistryError) as caught:
        call()
    return caught.value.reason


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://registry:5000", "plain_http_refused"),
        ("registry:5000", "invalid_url"),
        ("ftp://registry", "invalid_url"),
        ("https://", "invalid_url"),
        ("https://user:secret@registry", "invalid_url"),
        ("https://registry/v2/", "invalid_url"),
    ],
)
def test_addresses_that_are_refused_before_anything_is_sent(url, reason):
    with pytest.raises(RegistryError) as caught:
        RegistryClient(url)
    assert caught.value.reason == reason
    assert caught.value.remedy
    assert "secret" not in str(caught.value)


def test_the_catalogue_follows_links_to_the_last_page(recorded, client):
    recorded.routes |= {
        "GET /v2/_catalog?n=100": page(["a", "b"], '</v2/_catalog?last=b&n=100>; rel="next"'),
        "GET /v2/_catalog?last=b&n=100": page(["c"], "</v2/_catalog?last=c&n=100>; rel=next"),
        "GET /v2/_catalog?last=c&n=100": page(["d"]),
    }
    assert client.catalog() == ["a", "b", "c", "d"]


def test_a_list_without_end_is_given_up(recorded, client):
    recorded.routes["GET /v2/_catalog?n=100"] = page(["a"], '</v2/_catalog?n=100>; rel="next"')
    assert reason_of(client.catalog) == "unexpected_answer"


def test_a_link_to_another_host_never_gets_the_login(recorded):
    recorded.routes["GET /v2/_catalog?n=100"] = page(["a"], '<https://evil.example/v2/_catalog>; rel="next"')
    client = RegistryClient(recorded.url, ("user", "secret"), plain_http=True)
    assert reason_of(client.catalog) == "unexpected_answer"


def test_a_link_of_a_registry_behind_a_tls_proxy_keeps_https():
    link = '<http://registry:5000/v2/_catalog?last=x>; rel="next"'
    assert next_page(link, "https://registry:5000/v2/_catalog") == "https://registry:5000/v2/_catalog?last=x"


@pytest.mark.parametrize("header", ["", '</v2/_catalog?last=x>; rel="prev"', "nonsense"])
def test_no_next_link_is_the_last_page(header):
    assert next_page(header, "https://registry/v2/_catalog") is None


def test_tags_of_a_repository_without_any(recorded, client):
    recorded.routes["GET /v2/empty/tags/list?n=100"] = Answer(body=b'{"name":"empty","tags":null}')
    assert client.tags("empty") == []
    assert client.tags("unknown") == []


def test_a_digest_is_asked_by_head_with_all_manifest_types(recorded, client):
    recorded.routes["HEAD /v2/aisha/bot/manifests/latest"] = Answer(headers={"Docker-Content-Digest": DIGEST})
    assert client.manifest_digest("aisha/bot", "latest") == DIGEST
    accept = recorded.asked[-1].headers["Accept"]
    assert all(kind in accept for kind in MANIFEST_TYPES)


def test_a_registry_that_sends_no_digest_header_is_asked_for_the_bytes(recorded, client):
    body = b'{"schemaVersion":2}'
    recorded.routes["HEAD /v2/a/manifests/t"] = Answer()
    recorded.routes["GET /v2/a/manifests/t"] = Answer(body=body)
    assert client.manifest_digest("a", "t") == f"sha256:{hashlib.sha256(body).hexdigest()}"


def test_a_missing_manifest(client):
    assert client.find_digest("a", "missing") is None
    assert reason_of(lambda: client.manifest_digest("a", "missing")) == "not_found"


@pytest.mark.parametrize("name", ["UPPER", "host:5000/x", "../x", "a b", "", "a/../b"])
def test_names_that_would_change_the_address_are_refused(client, recorded, name):
    assert reason_of(lambda: client.tags(name)) == "invalid_name"
    assert reason_of(lambda: client.manifest_digest("a", f"{name}?x=1")) == "invalid_name"
    assert recorded.asked == []


@pytest.mark.parametrize(
    ("answer", "reason", "words"),
    [
        (
            Answer(401, b'{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}'),
            "unauthorized",
            "username",
        ),
        (Answer(401, headers={"WWW-Authenticate": 'Bearer realm="x"'}), "unauthorized", "token"),
        (Answer(403), "forbidden", "right"),
        (Answer(429), "rate_limited", "Wait"),
        (Answer(503), "server_error", "log"),
        (Answer(302, headers={"Location": "https://elsewhere/"}), "unexpected_answer", "address"),
        (Answer(400, b"Client sent an HTTP request to an HTTPS server.\n"), "tls", "https://"),
        (Answer(200, b"<html>"), "unexpected_answer", "web server"),
        (Answer(200, b"[]"), "unexpected_answer", "JSON object"),
        (Answer(200, b'{"repositories": "a"}'), "unexpected_answer", "list"),
    ],
)
def test_each_fault_has_its_reason_and_remedy(recorded, client, answer, reason, words):
    recorded.routes["GET /v2/_catalog?n=100"] = answer
    with pytest.raises(RegistryError) as caught:
        client.catalog()
    assert caught.value.reason == reason
    assert words in str(caught.value)


def test_a_web_server_is_no_registry(recorded, client):
    recorded.routes["GET /v2/"] = Answer(body=b"<html>welcome</html>")
    assert reason_of(client.ping) == "unexpected_answer"


def test_deleting(recorded, client):
    path = f"DELETE /v2/a/manifests/{DIGEST}"
    assert client.delete_manifest("a", DIGEST) is False
    recorded.routes[path] = Answer(202)
    assert client.delete_manifest("a", DIGEST) is True
    recorded.routes[path] = Answer(
        405, b'{"errors":[{"code":"UNSUPPORTED","message":"The operation is unsupported."}]}'
    )
    assert reason_of(lambda: client.delete_manifest("a", DIGEST)) == "deletion_disabled"
    assert reason_of(lambda: client.delete_manifest("a", "latest")) == "invalid_name"


def test_basic_auth_is_sent_and_the_password_is_in_no_error(recorded):
    recorded.routes["GET /v2/"] = Answer(401)
    client = RegistryClient(recorded.url, ("user", "s3cr3t-pw"), plain_http=True)
    with pytest.raises(RegistryError) as caught:
        client.ping()
    assert recorded.asked[0].headers["Authorization"].startswith("Basic ")
    assert "s3cr3t-pw" not in str(caught.value)


def test_nobody_listens():
    # Bound as long as it is asked: nobody else can begin to listen there.
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(RegistryError) as caught:
            RegistryClient(f"http://127.0.0.1:{bound.getsockname()[1]}", plain_http=True).ping()
    assert caught.value.reason == "unreachable"
    assert "object at 0x" not in str(caught.value)


def test_a_listener_that_never_answers_times_out():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        client = RegistryClient(url, plain_http=True, read_timeout=0.2)
        assert reason_of(client.ping) == "timeout"


def test_tls_asked_of_a_plain_http_server(recorded):
    client = RegistryClient(recorded.url.replace("http://", "https://"))
    with pytest.raises(RegistryError) as caught:
        client.ping()
    assert caught.value.reason == "tls"
    assert "plain http" in caught.value.remedy


def test_a_missing_ca_file_is_named():
    with pytest.raises(RegistryError) as caught:
        RegistryClient("https://127.0.0.1:1", ca="/nonexistent/ca.pem").ping()
    assert caught.value.reason == "tls"
    assert "/nonexistent/ca.pem" in str(caught.value)


def test_a_proxy_is_never_asked_for_a_registry_on_loopback(recorded, client, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    client.ping()
    assert len(recorded.asked) == 1
