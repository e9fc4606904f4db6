"""Images by digest, out of a real registry, into another one and into the engine: the digest is the same everywhere."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import time
import uuid
from pathlib import Path

import pytest
from ansible.module_utils.docker_cli import Docker
from ansible.module_utils.image_store import (
    BlobRegistry,
    ImageStoreError,
    Layout,
    Pinned,
    Saver,
    image_bytes,
    load,
    missing_images,
    send,
)
from ansible.module_utils.registry_api import RegistryError
from ansible.module_utils.site_bundle import BundleError, Contents, read, write
from module_support import host_port

pytestmark = pytest.mark.engine
CONFIG = {
    "version": "0.1",
    "storage": {"filesystem": {"rootdirectory": "/var/lib/registry"}, "delete": {"enabled": True}},
    "http": {"addr": ":5000"},
}


def docker(*arguments: str, stdin: str | None = None) -> str:
    done = subprocess.run(["docker", *arguments], input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def registry(registry_image: str, session_containers) -> str:
    started = session_containers(
        registry_image,
        ["docker-registry", "serve", "/config.yml"],
        files={"/config.yml": json.dumps(CONFIG).encode()},
        ports={"5000/tcp": ("127.0.0.1", None)},
    )
    address = f"127.0.0.1:{host_port(started, 5000)}"
    deadline = time.monotonic() + 60
    while True:
        try:
            BlobRegistry(f"http://{address}", plain_http=True).ping()
            return address
        except RegistryError:
            assert time.monotonic() < deadline, "the registry does not answer"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def image(registry: str, base_image: str) -> Pinned:
    """An image that is in the registry, and no longer in the engine."""
    name = f"{registry}/wht-store:c-1"
    stage = (
        f"FROM {base_image}\nRUN echo {uuid.uuid4()} > /mark\nLABEL org.opencontainers.image.version=c-1\n"
    )
    docker("build", "--quiet", "--tag", name, "-", stdin=stage)
    docker("push", "--quiet", name)
    digests = docker("image", "inspect", "--format", "{{index .RepoDigests 0}}", name)
    docker("image", "rm", "--force", name, digests)
    return Pinned.parse(digests)


@pytest.fixture(scope="module")
def layout(registry: str, image: Pinned, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    path = tmp_path_factory.mktemp("store") / "images.tar"
    client = BlobRegistry(f"http://{registry}", plain_http=True)
    with path.open("wb") as stream, tarfile.open(mode="w|", fileobj=stream) as tar:
        saver = Saver(tar, "images/")
        saver.save(client, [image, image])
        saver.finish()
    assert abs(path.stat().st_size - image_bytes(client, [image])) < 100_000
    return Layout(path, "images/")


def test_the_engine_knows_it_by_its_digest(layout: Layout, image: Pinned) -> None:
    engine = Docker()
    wanted = f"127.0.0.1:5098/wht-store@{image.digest}"
    assert missing_images(engine, [wanted]) == [wanted]
    try:
        assert load(engine, layout, [wanted], 120) == [wanted]
        assert docker("image", "inspect", "--format", "{{.RepoDigests}}", wanted) == f"[{wanted}]"
        assert load(engine, layout, [wanted], 120) == []
        with pytest.raises(ImageStoreError) as caught:
            load(engine, layout, [f"127.0.0.1:5098/wht-store@sha256:{'0' * 64}"], 120)
        assert caught.value.reason == "failed"
    finally:
        subprocess.run(["docker", "image", "rm", "--force", wanted], capture_output=True, check=False)


def test_another_registry_has_it_under_digest_and_tag(layout: Layout, image: Pinned, registry: str) -> None:
    client = BlobRegistry(f"http://{registry}", plain_http=True)
    client.delete_manifest("wht-store", image.digest)
    assert client.find_digest("wht-store", image.digest) is None
    assert send(layout, client) == [f"wht-store@{image.digest}"]
    assert client.manifest_digest("wht-store", image.digest) == image.digest
    assert client.manifest_digest("wht-store", "c-1") == image.digest
    assert send(layout, client) == []


def test_what_was_changed_or_cut_off_is_refused(
    layout: Layout, image: Pinned, registry: str, tmp_path: Path
) -> None:
    whole = layout.path.read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageStoreError) as caught:
        Layout(cut, "images/")
    assert caught.value.reason == "damaged"
    offset, size = layout.find(image.digest) or (0, 0)
    changed = bytearray(whole)
    changed[offset + size - 3] ^= 1
    cut.write_bytes(bytes(changed))
    with pytest.raises(ImageStoreError) as caught:
        Layout(cut, "images/")
    assert caught.value.reason == "damaged"
    client = BlobRegistry(f"http://{registry}", plain_http=True)
    with pytest.raises(RegistryError) as missing, tarfile.open(mode="w|", fileobj=io.BytesIO()) as tar:
        Saver(tar).save(client, [Pinned(registry, "wht-store", f"sha256:{'1' * 64}")])
    assert missing.value.reason == "not_found"


def test_a_bundle_is_proven(image: Pinned, registry: str, base_image: str, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / ".venv").mkdir(parents=True)
    (project / ".venv" / "big").write_text("x")
    (project / "site.yml").write_text("---\n")
    path = tmp_path / "bundle.tar"
    client = BlobRegistry(f"http://{registry}", plain_http=True)
    contents = Contents(project, None, [image], {registry: client}, [base_image], {"site": "wht"})
    made = write(path, contents)
    assert made["images"] == {"wht-store": {"digest": image.digest, "tag": "c-1"}}
    assert read(path) == made
    with tarfile.open(path) as tar:
        names = tar.getnames()
    assert "project/site.yml" in names
    assert "engine.tar" in names
    assert not [name for name in names if ".venv" in name]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20_000])
    with pytest.raises(BundleError) as caught:
        read(path)
    assert caught.value.reason == "damaged"
    place = whole.index(b"---\n")
    path.write_bytes(whole[:place] + b"-+-\n" + whole[place + 4 :])
    with pytest.raises(BundleError, match=r"project/site\.yml differs"):
        read(path)
