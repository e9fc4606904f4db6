"""base_image against the real engine and the host's own mirror."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from ansible.module_utils.base_image import BaseImages, BaseSpec, public_registry_answers
from ansible.module_utils.docker_cli import Docker, find_program

from tests.support.images import tags_of

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def bootstrapped(run_module, engine) -> Iterator[dict[str, Any]]:
    """A base image of this module's own, as the module returned it, with its repository as `repository`."""
    if os.geteuid() != 0 or not find_program("mmdebstrap"):
        pytest.fail(
            "bootstrapping needs root and mmdebstrap: `make up` installs it, or apt-get install mmdebstrap"
        )
    repository = f"test-base-{uuid.uuid4().hex[:8]}"
    planned = run_module("base_image", check=True, name=repository, method="bootstrap")
    assert planned["changed"]
    assert planned["name"] == f"{repository}:trixie-unknown"
    assert not tags_of(engine, repository)
    made = run_module("base_image", name=repository, method="bootstrap")
    assert made.get("changed"), made["output"]
    yield made | {"repository": repository}
    for tag in tags_of(engine, repository):
        engine.images.remove(tag, force=True)


def test_a_second_run_changes_nothing(run_module, bootstrapped) -> None:
    again = run_module("base_image", name=bootstrapped["repository"], method="bootstrap")
    assert not again["changed"]
    assert again["name"] == bootstrapped["name"]
    assert again["needs"] == "none"
    assert not run_module("base_image", name=bootstrapped["repository"], method="auto")["changed"]


def test_other_packages_or_another_age_ask_for_another_image(run_module, bootstrapped) -> None:
    planned = run_module(
        "base_image", check=True, name=bootstrapped["repository"], method="bootstrap", packages=["tzdata"]
    )
    assert planned["changed"]
    assert "packages differs" in planned["why"]


@pytest.mark.cluster  # two more bootstraps: a minute and a half
def test_a_refresh_with_nothing_new_keeps_name_digest_and_layers(bootstrapped, engine, monkeypatch) -> None:
    """Two weeks later: the same packages. The name stays, so nothing that was built on it is built again."""
    later = datetime.now(UTC) + timedelta(days=14)
    spec = BaseSpec(name=bootstrapped["repository"], method="bootstrap", refresh_days=7)
    images = BaseImages(spec, Docker(), later, reachable=lambda host: False)
    plan = images.plan()
    assert plan.action == "bootstrap"
    assert "days old" in plan.why
    layers = engine.images.get(bootstrapped["name"]).attrs["RootFS"]["Layers"]
    renewed = images.make(plan.action)
    assert (renewed.name, renewed.digest) == (bootstrapped["name"], bootstrapped["digest"])
    assert engine.images.get(renewed.name).attrs["RootFS"]["Layers"] == layers
    assert images.plan().action == "none"


def test_the_image_gets_security_updates_and_has_a_sane_environment(bootstrapped, engine) -> None:
    script = "cat /etc/apt/sources.list; echo $LANG; ls /etc/ssl/certs/ca-certificates.crt; ls /var/lib/apt/lists; id -u"
    output = engine.containers.run(
        bootstrapped["name"], ["sh", "-c", script], remove=True, network_mode="none"
    ).decode()
    assert " trixie main" in output
    assert " trixie-updates main" in output
    assert "C.UTF-8" in output
    assert "/etc/ssl/certs/ca-certificates.crt" in output
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(LABEL)"], capture_output=True, text=True, check=True
    )
    if "Debian-Security" in targets.stdout:
        assert " trixie-security main" in output
    assert bootstrapped["size"] < 130_000_000


def test_a_public_registry_that_refuses_is_told_with_the_remedy(run_module) -> None:
    repository = f"test-base-{uuid.uuid4().hex[:8]}"
    refused = run_module(
        "base_image", name=repository, method="pull", pull_image="127.0.0.1:9/debian:trixie", timeout=60
    )
    assert refused["failed"]
    assert refused["reason"] == "pull_failed"
    assert "bootstrap" in refused["msg"]
    assert "Traceback" not in refused["output"]


def test_a_silent_public_registry_costs_auto_only_the_probe(run_module) -> None:
    """192.0.2.0/24 is reserved for documentation: nothing answers there."""
    planned = run_module(
        "base_image",
        name=f"test-base-{uuid.uuid4().hex[:8]}",
        pull_image="192.0.2.1/debian:trixie",
        state="resolved",
        probe_timeout=1,
    )
    assert planned["needs"] == "bootstrap", planned["output"]
    started = time.monotonic()
    assert not public_registry_answers(Docker(), "192.0.2.1", 1.0)
    assert time.monotonic() - started < 20


def test_pull_adds_the_packages_and_gets_the_same_kind_of_name(run_module, bootstrapped, engine) -> None:
    """A local image stands in for the public one: the engine is asked for it like for any other."""
    made = None
    spec = BaseSpec(name=f"{bootstrapped['repository']}-pull", method="pull", pull_image=bootstrapped["name"])
    docker = Docker()

    class WithoutNetwork(Docker):
        def attempt(self, *arguments: str, **options: Any) -> Any:
            if arguments[0] == "pull":
                return docker.attempt("version")
            return docker.attempt(*arguments, **options)

    try:
        made = BaseImages(spec, WithoutNetwork(), datetime.now(UTC), reachable=lambda host: True).make("pull")
        assert made.name == f"{spec.name}:trixie-{made.digest.removeprefix('sha256:')[:12]}"
        assert made.method == "pull"
        assert not [tag for tag in tags_of(engine, spec.name) if tag.endswith("-pulled")]
        assert (
            BaseImages(spec, Docker(), datetime.now(UTC), reachable=lambda host: True).plan().action == "none"
        )
    finally:
        for tag in tags_of(engine, spec.name):
            engine.images.remove(tag, force=True)
