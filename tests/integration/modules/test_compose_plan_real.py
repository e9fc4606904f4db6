"""compose_plan against what `docker compose up` really does."""

from __future__ import annotations

import subprocess

import pytest
import yaml

pytestmark = pytest.mark.engine


class Project:
    """A Compose project in a directory of its own."""

    def __init__(self, name, directory, image):
        self.name, self.directory = name, directory
        self.file, self.env_file = directory / "compose.yml", directory / "interpolation.env"
        (directory / "conf").mkdir()
        (directory / "secret").write_text("s")
        self.services = {
            service: {
                "image": image,
                "command": ["sleep", "600"],
                "init": True,
                "stop_grace_period": "1s",
                "env_file": ["prod.env"],
                "environment": {"PRICE": "a$$b", "LEVEL": "${LEVEL}"},
                "networks": ["cluster"],
                "secrets": ["key"],
                "volumes": ["./conf:/conf:ro", "data:/data"],
                "mem_limit": "64m",
            }
            for service in ("api-1", "worker", "nginx")
        }
        self.write()

    def write(self, level="info", variable="1"):
        (self.directory / "prod.env").write_text(f"VARIABLE={variable}\n")
        self.env_file.write_text(f"LEVEL={level}\n")
        document = {
            "services": self.services,
            "networks": {"cluster": {"name": f"{self.name}-net"}},
            "volumes": {"data": {"name": f"{self.name}-data"}},
            "secrets": {"key": {"file": "./secret"}},
        }
        self.file.write_text(yaml.safe_dump(document))

    def compose(self, *arguments):
        command = [
            "docker",
            "compose",
            "-p",
            self.name,
            "-f",
            str(self.file),
            "--env-file",
            str(self.env_file),
        ]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def compose(project, tmp_path, base_image):
    made = Project(project, tmp_path, base_image)
    yield made
    made.compose("down", "-v", "--remove-orphans", "-t", "1")


@pytest.fixture
def plan(run_module, compose):
    def run(**options):
        arguments = {"project": compose.name, "file": str(compose.file), "env_file": [str(compose.env_file)]}
        result = run_module("compose_plan", **{**arguments, **options})
        assert not result.get("failed"), result.get("msg")
        assert result["changed"] is False
        return result

    return run


def test_the_plan_and_what_up_does_are_the_same(plan, compose, engine):
    order = ["worker", "nginx", "api-1"]
    fresh = plan(order=order, check=True)
    assert [(item["name"], item["action"]) for item in fresh["services"]] == [
        (name, "create") for name in order
    ]
    assert not engine.networks.list(names=[f"{compose.name}-net"])

    compose.compose("up", "-d")
    settled = plan(order=order)
    assert settled["pending"] == [], settled["services"]

    compose.write(variable="2")  # in an env file, where `config --hash` alone sees nothing
    assert plan(order=order)["pending"] == order
    assert "VARIABLE" in plan()["services"][0]["reason"]
    compose.write()
    assert plan()["pending"] == []

    compose.services["nginx"]["mem_limit"] = "65m"
    compose.write()
    changed = plan(order=order)
    assert changed["pending"] == ["nginx"]
    before = {item.name: item.id for item in engine.containers.list(filters={"name": compose.name})}
    compose.compose("up", "-d")
    after = {item.name: item.id for item in engine.containers.list(filters={"name": compose.name})}
    assert [name for name in after if after[name] != before[name]] == [f"{compose.name}-nginx-1"]
    assert plan()["pending"] == []


def test_check_mode_plans_a_release_that_was_not_written(plan, compose, run_module, tmp_path):
    """The hashes of what release_directory would write are those that a written one would have."""
    for service in compose.services.values():
        service["volumes"], service["secrets"] = ["data:/data"], []
    compose.write()
    compose.compose("up", "-d")
    compose.services["worker"]["mem_limit"] = "65m"
    compose.write()
    files = [
        {"path": f"@release@/{name}", "content": (compose.directory / name).read_text()}
        for name in ("compose.yml", "prod.env")
    ]
    site = tmp_path / "site"
    release = run_module("release_directory", check=True, path=str(site), files=files, images={"a": "b"})
    result = plan(file=f"{release['path']}/compose.yml", contents=release["rendered"], check=True)
    assert result["known"] is True
    assert result["pending"] == ["worker"]
    assert not site.exists()


def test_state_counts_and_orphans_are_named(plan, compose, engine):
    compose.compose("up", "-d")
    engine.containers.get(f"{compose.name}-worker-1").stop(timeout=1)
    engine.containers.get(f"{compose.name}-nginx-1").remove(force=True)
    del compose.services["api-1"]
    compose.write()
    result = plan()
    actions = {item["name"]: (item["action"], item["reason"]) for item in result["services"]}
    assert actions["worker"][0] == "start"
    assert "not running (exited" in actions["worker"][1]
    assert actions["nginx"][0] == "create"
    assert [orphan["name"] for orphan in result["orphans"]] == [f"{compose.name}-api-1-1"]


def test_an_image_that_changed_is_named(plan, compose, engine, base_image):
    compose.compose("up", "-d")
    other = f"{compose.name}:other"
    engine.images.get(base_image).tag(other)
    try:
        compose.services["worker"]["image"] = other
        compose.write()
        result = plan(order=["worker"])
        assert result["pending"] == ["worker"]
        assert f"image changed {base_image} -> {other}" in result["services"][0]["reason"]
    finally:
        engine.images.remove(other)


def test_faults_and_what_is_not_there_yet(run_module, compose, tmp_path):
    missing = str(tmp_path / "none.yml")
    result = run_module("compose_plan", project=compose.name, file=missing)
    assert result["reason"] == "no_file"
    assert "--tags stack" in result["msg"]
    checked = run_module("compose_plan", project=compose.name, file=missing, check=True)
    assert not checked.get("failed")
    assert checked["known"] is False

    compose.services["api-1"]["networks"] = ["nowhere"]
    compose.write()
    bad = run_module("compose_plan", project=compose.name, file=str(compose.file))
    assert bad["reason"] == "bad_file"
    assert "nowhere" in bad["msg"]

    compose.services["api-1"]["networks"] = ["cluster"]
    compose.write()
    unknown = run_module("compose_plan", project=compose.name, file=str(compose.file), order=["typo"])
    assert unknown["reason"] == "unknown_service"
