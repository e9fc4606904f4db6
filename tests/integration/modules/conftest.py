"""Real engine, real registry, and modules run as Ansible runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ansible.module_utils
import pytest

ROOT = Path(__file__).resolve().parents[3]
for directory, path in ((ROOT / "module_utils", ansible.module_utils.__path__), (ROOT / "library", sys.path)):
    if str(directory) not in path:
        path.insert(0, str(directory))

import docker  # noqa: E402
from module_support import tar_of  # noqa: E402

from tests.support.images import tags_of  # noqa: E402

BASE_CANDIDATES = ("aisha-base", "dev-base")
REGISTRY_DOCKERFILE = """
ARG BASE
FROM ${BASE}
RUN apt-get update \\
    && apt-get install -y --no-install-recommends docker-registry \\
    && rm -rf /var/lib/apt/lists/*
"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several runs of ansible-playbook are one test here, and each of them may take a minute on a busy machine."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    client = docker.from_env()
    client.ping()
    yield client
    client.close()


@pytest.fixture(scope="session")
def base_image(engine) -> str:
    """An image with a shell: TEST_BASE_IMAGE, or the newest that role base_image has made."""
    if named := os.environ.get("TEST_BASE_IMAGE"):
        return named
    for name in BASE_CANDIDATES:
        if tags := tags_of(engine, name):
            return tags[0]
    pytest.fail("no base image: run `make up` once, or name one in TEST_BASE_IMAGE")


@pytest.fixture(scope="session")
def registry_image(engine, base_image, tmp_path_factory) -> str:
    """Debian's docker-registry on the base image; layers are cached from run to run."""
    context = tmp_path_factory.mktemp("registry-image")
    (context / "Dockerfile").write_text(REGISTRY_DOCKERFILE)
    tag = "test-modules-registry:latest"
    command = ["docker", "build", "-q", "--build-arg", f"BASE={base_image}", "-t", tag, str(context)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return tag


@pytest.fixture
def project() -> str:
    """A name of this test's own, for containers, networks and Compose projects."""
    return f"test-mod-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def session_containers(engine) -> Iterator[Callable[..., Any]]:
    yield from _container_factory(engine)


@pytest.fixture
def containers(engine) -> Iterator[Callable[..., Any]]:
    """Start containers that are removed, with their volumes, after the test."""
    yield from _container_factory(engine)


def _container_factory(engine) -> Iterator[Callable[..., Any]]:
    made = []

    def start(image: str, command: Any = None, files: dict[str, bytes] | None = None, **options: Any) -> Any:
        options.setdefault("name", f"test-mod-{uuid.uuid4().hex[:8]}")
        container = engine.containers.create(image, command, **options)
        made.append(container)
        if files:
            container.put_archive("/", tar_of(files))
        container.start()
        container.reload()
        return container

    yield start
    for container in made:
        container.remove(force=True, v=True)


@pytest.fixture(scope="session")
def run_module(tmp_path_factory) -> Callable[..., dict[str, Any]]:
    """Run a module by ansible-playbook with the repository's ansible.cfg; give back its result."""
    inventory = tmp_path_factory.mktemp("inventory") / "hosts.yml"
    interpreter = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    inventory.write_text(json.dumps({"all": {"hosts": {"localhost": interpreter}}}))

    def run(name: str, /, check: bool = False, diff: bool = False, **args: Any) -> dict[str, Any]:
        play = [
            {
                "hosts": "localhost",
                "gather_facts": False,
                "tasks": [{name: args, "register": "result", "ignore_errors": True}],
            }
        ]
        playbook = tmp_path_factory.mktemp("play") / "play.yml"
        playbook.write_text(json.dumps(play))
        command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(inventory), str(playbook)]
        command += ["--check"] * check + ["--diff"] * diff
        env = os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        env["ANSIBLE_STDOUT_CALLBACK"] = "ansible.posix.json"
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
        output = json.loads(done.stdout[done.stdout.index("{") :])
        result: dict[str, Any] = output["plays"][0]["tasks"][0]["hosts"]["localhost"]
        result["output"] = done.stdout + done.stderr
        return result

    return run
