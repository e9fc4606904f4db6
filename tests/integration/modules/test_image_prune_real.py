"""image_prune against a real registry and the real engine: what is needed stays, the rest is gone."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.registry_api import RegistryClient, RegistryError
from module_support import host_port, wait_for

pytestmark = pytest.mark.engine

CONFIG = {
    "version": 0.1,
    "storage": {"filesystem": {"rootdirectory": "/var/lib/registry"}, "delete": {"enabled": True}},
    "http": {"addr": ":5000"},
}


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def address(session_containers, registry_image) -> str:
    """A registry of this module's own."""
    container = session_containers(
        registry_image,
        ["docker-registry", "serve", "/config.yml"],
        files={"/config.yml": json.dumps(CONFIG).encode()},
        ports={"5000/tcp": ("127.0.0.1", None)},
    )
    address = f"127.0.0.1:{host_port(container, 5000)}"

    def answers() -> bool:
        try:
            client(address).ping()
        except RegistryError:
            return False
        return True

    wait_for(answers, what="the registry")
    return address


def client(address: str) -> RegistryClient:
    return RegistryClient(f"http://{address}", plain_http=True)


class Shelf:
    """Versions of one image, built from nothing, pushed, and known by number."""

    def __init__(self, address: str, directory: Path) -> None:
        self.address = address
        self.name = f"test-prune-{uuid.uuid4().hex[:8]}"
        self.repository = f"{address}/{self.name}"
        self.directory = directory

    def build(self, number: int) -> str:
        """Build and push version `number`; its digest."""
        (self.directory / "Dockerfile").write_text('FROM scratch\nCOPY number /\nCMD ["/number"]\n')
        (self.directory / "number").write_text(f"{self.name} {number}\n")
        name = f"{self.repository}:{self.tag(number)}"
        labels = {
            "org.aisha.content.digest": f"{number:064x}",
            "org.opencontainers.image.created": f"2026-01-{number:02}T00:00:00Z",
        }
        options = [f"--label={key}={value}" for key, value in labels.items()]
        docker("build", "--quiet", "--provenance=false", *options, "--tag", name, str(self.directory))
        docker("push", "--quiet", name)
        return client(self.address).manifest_digest(self.name, self.tag(number))

    def tag(self, number: int) -> str:
        return f"c-{number:016x}"

    def in_registry(self) -> list[str]:
        return sorted(client(self.address).tags(self.name))

    def in_engine(self) -> list[str]:
        listed = docker("image", "ls", "--format", "{{.Tag}}", "--filter", f"reference={self.repository}")
        return sorted(tag for tag in listed.split() if tag != "<none>")

    def remove(self) -> None:
        names = docker("image", "ls", "--quiet", "--filter", f"reference={self.repository}").split()
        if names:
            docker("image", "rm", "--force", *dict.fromkeys(names))


@pytest.fixture
def shelf(address, tmp_path) -> Iterator[Shelf]:
    shelf = Shelf(address, tmp_path)
    yield shelf
    shelf.remove()


@pytest.fixture
def prune(run_module, shelf, address) -> Callable[..., dict[str, Any]]:
    def run(scope: str, check: bool = False, **parameters: Any) -> dict[str, Any]:
        return run_module(
            "image_prune",
            check=check,
            scope=scope,
            registry=address,
            plain_http=True,
            repositories=[shelf.name],
            **parameters,
        )

    return run


def test_the_registry_keeps_what_is_needed_and_the_newest(prune, shelf, address) -> None:
    digests = {number: shelf.build(number) for number in range(1, 6)}
    other = f"{address}/aisha/bot-{shelf.name}"
    docker("tag", f"{shelf.repository}:{shelf.tag(1)}", f"{other}:c-0000000000000001")
    docker("push", "--quiet", f"{other}:c-0000000000000001")
    docker("image", "rm", f"{other}:c-0000000000000001")
    client(address).add_tag(shelf.name, digests[2], "staging")
    needed = [f"{shelf.repository}@{digests[1]}"]

    planned = prune("registry", check=True, needed=needed, keep=1)
    assert planned["removed"] == [f"{shelf.name}:{shelf.tag(3)}", f"{shelf.name}:{shelf.tag(4)}"]
    assert len(shelf.in_registry()) == 6

    done = prune("registry", needed=needed, keep=1)
    assert done["changed"]
    assert done["removed"] == planned["removed"]
    assert shelf.in_registry() == sorted([shelf.tag(1), shelf.tag(2), "staging", shelf.tag(5)])
    # Not only its name: the bytes of what is needed are still to be had.
    docker("image", "rm", f"{shelf.repository}:{shelf.tag(1)}")
    docker("pull", "--quiet", needed[0])
    assert client(address).tags(f"aisha/bot-{shelf.name}") == ["c-0000000000000001"]
    assert not prune("registry", needed=needed, keep=1)["changed"]


def test_the_engine_keeps_releases_containers_and_the_newest(prune, shelf, containers, tmp_path) -> None:
    digests = {number: shelf.build(number) for number in range(1, 6)}
    site = tmp_path / "sites" / "one"
    beside = tmp_path / "sites" / "two"
    for directory, number in ((site, 1), (beside, 2)):
        release = directory / "releases" / f"r-{number:012x}"
        release.mkdir(parents=True)
        images = {shelf.name: f"{shelf.repository}@{digests[number]}"}
        (release / "release.json").write_text(json.dumps({"images": images}))
    # Made and never started: it needs its image all the same.
    docker("create", "--name", f"{shelf.name}-used", f"{shelf.repository}:{shelf.tag(3)}")
    try:
        planned = prune("engine", check=True, path=str(site), keep=1)
        assert len(shelf.in_engine()) == 5
        done = prune("engine", path=str(site), keep=1)
        assert done["changed"], done["output"]
        assert done["removed"] == planned["removed"]
        assert done["needed"] == sorted(f"{shelf.repository}@{digests[n]}" for n in (1, 2))
        assert shelf.in_engine() == sorted(shelf.tag(number) for number in (1, 2, 3, 5))
        assert not prune("engine", path=str(site), keep=1)["changed"]
    finally:
        docker("rm", "--force", f"{shelf.name}-used")


def test_a_release_that_says_nothing_stops_the_engines_pruning(prune, shelf, tmp_path) -> None:
    for number in (1, 2):
        shelf.build(number)
    release = tmp_path / "sites" / "one" / "releases" / "r-000000000001"
    release.mkdir(parents=True)
    site = str(release.parent.parent)
    done = prune("engine", path=site, keep=1)
    assert not done["changed"]
    assert "does not say which images it needs" in done["faults"][0]
    assert "needed" not in done
    assert len(shelf.in_engine()) == 2
    assert prune("engine", path=site, keep=1, strict=True)["reason"] == "not_all_removed"


def test_a_registry_that_is_away_fails_nothing_but_a_strict_run(run_module) -> None:
    parameters = {"scope": "registry", "registry": "127.0.0.1:1", "plain_http": True, "repositories": ["x"]}
    away = run_module("image_prune", **parameters, needed=[])
    assert not away.get("failed")
    assert "no registry answers" in away["faults"][0]
    assert run_module("image_prune", **parameters, needed=[], strict=True)["reason"] == "not_all_removed"
