"""content_images against the real engine and a real registry: built once, pushed once, proven, and never in doubt."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from ansible.module_utils import image_referrers, image_signature, sbom
from ansible.module_utils.registry_api import RegistryClient, RegistryError
from ansible.module_utils.secret_files import generate
from module_support import host_port, wait_for

from tests.support.images import tags_of

pytestmark = pytest.mark.engine

PASSWORD = "only-a-test"
HTPASSWD = b"deploy:$2b$04$2kVkFskmVMKBMcxBLJt6IOcN50QWja.WYhTYbspI4m3HpIL8Y0akq\n"  # bcrypt of PASSWORD
CONFIG = {
    "version": 0.1,
    "storage": {"filesystem": {"rootdirectory": "/var/lib/registry"}, "delete": {"enabled": True}},
    "http": {"addr": ":5000"},
}
DOCKERFILE = """ARG BASE
FROM ${BASE}
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip \\
    test -s /run/secrets/ca && test -e /run/secrets/pip && cp /run/secrets/pip /pip-of-the-build
COPY . /srv
ARG VERSION=none
ENV VERSION=${VERSION}
"""


@pytest.fixture(scope="module")
def registry(session_containers, registry_image) -> dict[str, Any]:
    """A registry on loopback that wants a login; as parameters of the module."""
    config = CONFIG | {"auth": {"htpasswd": {"realm": "test", "path": "/htpasswd"}}}
    files = {"/config.yml": json.dumps(config).encode(), "/htpasswd": HTPASSWD}
    return start(session_containers, registry_image, files, {"username": "deploy", "password": PASSWORD})


@pytest.fixture(scope="module")
def open_registry(session_containers, registry_image) -> dict[str, Any]:
    """A registry on loopback without a login; as parameters of the module."""
    return start(session_containers, registry_image, {"/config.yml": json.dumps(CONFIG).encode()}, {})


def start(containers, image: str, files: dict[str, bytes], login: dict[str, str]) -> dict[str, Any]:
    container = containers(
        image,
        ["docker-registry", "serve", "/config.yml"],
        files=files,
        ports={"5000/tcp": ("127.0.0.1", None)},
    )
    parameters = {"registry": f"127.0.0.1:{host_port(container, 5000)}", "plain_http": True, **login}
    wait_for(lambda: answers(client_of(parameters)), what="the registry")
    return parameters


def client_of(parameters: dict[str, Any]) -> RegistryClient:
    login = (parameters["username"], parameters["password"]) if "username" in parameters else None
    return RegistryClient(f"http://{parameters['registry']}", login, plain_http=True)


def answers(client: RegistryClient) -> bool:
    try:
        client.ping()
    except RegistryError:
        return False
    return True


@pytest.fixture
def source(tmp_path: Path, base_image: str, engine) -> Iterator[dict[str, Any]]:
    """A build context under a name of its own; its images are removed afterwards."""
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(DOCKERFILE)
    (context / "app.py").write_text("print(1)\n")
    (context / ".dockerignore").write_text("notes\n")
    name = f"test-cimg-{uuid.uuid4().hex[:8]}"
    yield {"name": name, "context": str(context), "base": base_image, "args": {"VERSION": "@tag@"}}
    for tag in tags_of(engine):
        if name in tag:
            engine.images.remove(tag, force=True)


@pytest.fixture
def make(run_module, source) -> Callable[..., dict[str, Any]]:
    """Run the module for the one image; give back its result with that image's report as `image`."""

    def run(check: bool = False, **parameters: Any) -> dict[str, Any]:
        result = run_module("content_images", check=check, images=[source], **parameters)
        result["image"] = (result.get("images") or {}).get(source["name"])
        return result

    return run


def test_built_pushed_proven_and_then_left_alone(make, source, registry, engine) -> None:
    planned = make(check=True, **registry)
    assert planned["changed"]
    assert (planned["image"]["built"], planned["image"]["pushed"]) == (True, True)
    assert client_of(registry).tags(source["name"]) == []
    assert not tags_of(engine, f"{registry['registry']}/{source['name']}")

    first = make(revision="0123abc", **registry)
    image = first["image"]
    assert first["changed"], first["output"]
    client = client_of(registry)
    assert sorted(client.tags(source["name"])) == sorted([image["tag"], "latest"])
    assert client.manifest_digest(source["name"], image["tag"]) == image["digest"]
    assert client.manifest_digest(source["name"], "latest") == image["digest"]
    assert image["tag"] == planned["image"]["tag"]
    assert image["ref"] == f"{registry['registry']}/{source['name']}@{image['digest']}"
    attributes = engine.images.get(f"{registry['registry']}/{source['name']}:{image['tag']}").attrs
    assert f"VERSION={image['tag']}" in attributes["Config"]["Env"]
    labels = attributes["Config"]["Labels"]
    assert labels["org.opencontainers.image.revision"] == "0123abc"
    assert labels["org.aisha.content.digest"] == image["content_digest"]
    assert 0 < image["size_over_base"] < 1_000_000
    assert PASSWORD not in first["output"]

    again = make(revision="another commit", **registry)
    assert not again["changed"]
    assert again["image"]["digest"] == image["digest"]
    assert not make(check=True, **registry)["changed"]


def test_a_registry_without_a_login_will_do(make, open_registry, source) -> None:
    first = make(**open_registry)
    assert first["changed"], first["output"]
    assert client_of(open_registry).manifest_digest(source["name"], "latest") == first["image"]["digest"]
    assert not make(**open_registry)["changed"]


def test_what_the_registry_has_is_not_built_on_a_host_that_lacks_it(make, source, registry, engine) -> None:
    first = make(**registry)["image"]
    for tag in (first["tag"], "latest"):
        engine.images.remove(f"{registry['registry']}/{source['name']}:{tag}", force=True)
    again = make(**registry)
    assert not again["changed"]
    assert again["image"]["ref"] == first["ref"]
    assert not tags_of(engine, f"{registry['registry']}/{source['name']}")


def test_an_ignored_file_changes_nothing_and_another_one_does(make, source, registry) -> None:
    first = make(**registry)["image"]
    Path(source["context"], "notes").write_text("to myself")
    assert not make(**registry)["changed"]
    Path(source["context"], "app.py").write_text("print(2)\n")
    second = make(**registry)
    assert second["changed"]
    assert second["image"]["tag"] != first["tag"]
    Path(source["context"], "app.py").write_text("print(1)\n")
    back = make(**registry)
    assert back["changed"]
    assert (back["image"]["built"], back["image"]["pushed"], back["image"]["tagged"]) == (False, False, True)
    assert back["image"]["digest"] == first["digest"]
    assert client_of(registry).manifest_digest(source["name"], "latest") == first["digest"]


def test_an_image_that_the_registry_lost_is_pushed_again(make, source, registry) -> None:
    first = make(**registry)["image"]
    client_of(registry).delete_manifest(source["name"], first["digest"])
    again = make(**registry)
    assert again["changed"], again["output"]
    assert (again["image"]["built"], again["image"]["pushed"]) == (False, True)
    assert again["image"]["digest"] == first["digest"]


def test_somebody_elses_image_under_our_tag_is_refused(make, source, registry) -> None:
    first = make(**registry)["image"]
    Path(source["context"], "app.py").write_text("print('other')\n")
    other = make(**registry)["image"]
    client_of(registry).add_tag(source["name"], other["digest"], first["tag"])
    Path(source["context"], "app.py").write_text("print(1)\n")
    refused = make(**registry)
    assert refused["failed"]
    assert refused["reason"] == "tag_occupied"


def test_a_failed_build_leaves_registry_and_engine_as_they_were(make, source, registry, engine) -> None:
    Path(source["context"], "Dockerfile").write_text(DOCKERFILE + "RUN echo the-very-cause >&2; exit 3\n")
    failed = make(**registry)
    assert failed["failed"]
    assert failed["reason"] == "build_failed"
    assert "the-very-cause" in failed["msg"]
    assert "Traceback" not in failed["output"]
    assert client_of(registry).tags(source["name"]) == []
    assert not tags_of(engine, f"{registry['registry']}/{source['name']}")


def test_the_hosts_pip_index_reaches_the_build_and_not_the_history(
    make, source, engine, tmp_path, monkeypatch
) -> None:
    # Secrets are no part of BuildKit's cache key, so this build must be one of its own.
    Path(source["context"], "Dockerfile").write_text(
        DOCKERFILE.replace("test -s", f": {source['name']}; test -s")
    )
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://u:p@index.example/simple\nfind-links = /x\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    built = make(state="built")
    assert built["changed"], built["output"]
    seen = engine.containers.run(built["image"]["ref"], ["cat", "/pip-of-the-build"], remove=True).decode()
    assert seen == "[global]\nindex-url = https://u:p@index.example/simple\n"
    assert "index.example" not in json.dumps(engine.images.get(built["image"]["ref"]).history())
    assert not make(state="built")["changed"]


def test_a_wrong_login_is_told_before_anything_is_built(make, source, registry, engine) -> None:
    refused = make(**registry | {"password": "wrong"})
    assert refused["failed"]
    assert refused["reason"] == "unauthorized"
    assert not tags_of(engine, f"{registry['registry']}/{source['name']}")


def test_a_missing_base_is_a_fault_and_in_check_mode_none(run_module, source) -> None:
    missing = source | {"base": "no-such-base:here"}
    failed = run_module("content_images", images=[missing], state="built")
    assert failed["failed"]
    assert failed["reason"] == "no_base"
    planned = run_module("content_images", check=True, images=[missing], state="built")
    assert planned["changed"]
    assert not planned["images"][source["name"]]["tag_known"]


def test_the_registrys_answer_is_what_counts(make, source, registry) -> None:
    """The digest is that of the bytes that the registry serves."""
    image = make(**registry)["image"]
    served = requests.get(
        f"http://{registry['registry']}/v2/{source['name']}/manifests/{image['tag']}",
        headers={"Accept": "application/vnd.docker.distribution.manifest.v2+json"},
        auth=(registry["username"], registry["password"]),
        timeout=10,
    )
    assert f"sha256:{hashlib.sha256(served.content).hexdigest()}" == image["digest"]


def test_a_bill_of_materials_stands_beside_the_image(make, run_module, source, registry) -> None:
    plain = make(**registry)["image"]
    client = client_of(registry)
    described = make(sbom=True, **registry)
    image = described["image"]
    assert described["changed"], described["output"]
    assert (image["tag"], image["digest"]) == (plain["tag"], plain["digest"]), "the image is what it was"
    assert (image["built"], image["pushed"], image["described"]) == (False, False, True)
    assert f"sha256-{image['digest'][7:]}" in client.tags(source["name"])

    read = run_module("image_sbom", image=image["ref"], **login_of(registry))
    document = json.loads(read["document"])
    assert read["digest"] == image["sbom"]
    assert document["metadata"]["component"]["hashes"][0]["content"] == image["digest"][7:]
    assert any(line.startswith("deb    libc6 ") for line in read["lines"])

    # One that the registry lost is made again, with the same bytes.
    index = f"sha256-{image['digest'][7:]}"
    client.delete_manifest(source["name"], client.manifest_digest(source["name"], index))
    assert make(check=True, sbom=True, **registry)["image"]["described"]
    assert image_referrers.find(client, source["name"], image["digest"], sbom.MEDIA_TYPE) is None
    again = make(sbom=True, **registry)["image"]
    assert (again["described"], again["sbom"]) == (True, image["sbom"])


def test_with_a_key_only_what_the_site_signed_counts(make, run_module, source, registry, tmp_path) -> None:
    (tmp_path / "ours").write_text(generate("p256", 0))
    signing = {**registry, "sbom": True, "signing_key": str(tmp_path / "ours")}
    client, name = client_of(registry), source["name"]
    first = make(**signing)
    image, key = first["image"], first["public_key"]
    assert image["signed"], first["output"]
    assert "PRIVATE" not in first["output"]
    assert not make(**signing)["changed"]
    host = {"key_file": str(tmp_path / "host/image-signing.pub"), "kept": str(tmp_path / "host/signatures")}
    proven = run_module(
        "image_signatures", images=[image["ref"]], public_key=key, **host, **login_of(registry)
    )
    assert proven["verified"] == {image["ref"]: "registry"}, proven["output"]

    # Somebody who may write to the registry puts an image of theirs, with our labels, under our tag: it does not count.
    Path(source["context"], "app.py").write_text("print('theirs')\n")
    theirs = make(**registry)["image"]
    client.add_tag(name, theirs["digest"], image["tag"])
    refused = run_module("image_signatures", images=[theirs["ref"]], **host, **login_of(registry))
    assert refused["reason"] == "unsigned"
    assert "Traceback" not in refused["output"]
    Path(source["context"], "app.py").write_text("print(1)\n")
    mended = make(**signing)
    assert (mended["image"]["pushed"], mended["image"]["digest"]) == (True, image["digest"]), mended["output"]
    assert client.manifest_digest(name, image["tag"]) == image["digest"]

    # Our own signature of another image does not count either.
    content, media_type = client.stored_manifest(name, image_signature.tag_of(image["digest"]))
    client.put_manifest(name, image_signature.tag_of(theirs["digest"]), content, media_type)
    moved = image_signature.Reference.parse(theirs["ref"])
    with pytest.raises(image_signature.SignatureError) as caught:
        image_signature.verify(moved, image_signature.stored(client, moved), key)
    assert caught.value.reason == "other_image"


def login_of(registry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in registry.items() if key != "registry"}
