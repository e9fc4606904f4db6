"""Kept secrets under a real engine: which file a container has, and module kept_secrets as Ansible runs it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from ansible.module_utils.docker_engine import Engine
from ansible.module_utils.kept_secrets import KeptSecrets
from ansible.module_utils.release import ReleaseStore, WantedFile, plan_release
from ansible.module_utils.rollout.model import parse_release
from ansible.module_utils.rollout.secrets import Rotation

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root sees what a container has mounted"),
]
NAME = "api/key"


class Site:
    """A site with one container that has one secret mounted, as Compose mounts it."""

    def __init__(self, home: Path, project: str, image: str, containers) -> None:
        self.home = home
        self.key = home / "secrets" / NAME
        self.key.parent.mkdir(parents=True)
        self.key.write_text("old")
        self.key.chmod(0o400)
        services = [
            {"name": name, "kind": kind, "container": f"{project}-{name}", "image": image}
            for name, kind in (("api-1", "api"), ("nginx", "edge"))
        ]
        rollout = {
            "webhook_release": "one", "project": project, "services": services, "edge": "e", "edge_path": "/e",
            "certificate_directory": "/c", "ports": {"http": 1, "https": [2]},
        }  # fmt: skip
        compose = json.dumps({"name": project}) + f"\n#\n    file: {self.key}\n"
        plan = plan_release([WantedFile("@release@/docker-compose.webhook.prod.yml", compose)], {"i": image})
        ReleaseStore(str(home)).write(plan, {"rollout": rollout}, 5, activate=True)
        self.release = parse_release(plan.id, home / "releases" / plan.id, rollout)
        labels = {"com.docker.compose.project": project, "com.docker.compose.service": "api-1"}
        labels["com.docker.compose.oneoff"] = "False"
        mount = f"{self.key}:/run/secrets/api_key:ro"
        self.container = containers(
            image, ["sleep", "600"], name=f"{project}-api-1", labels=labels, volumes=[mount]
        )
        self.rotation = Rotation(home, Engine())

    def rotate(self) -> None:
        KeptSecrets(self.home / "secrets").keep(NAME, self.release.id)
        beside = self.home / "beside"
        beside.write_text("new")
        beside.chmod(0o400)
        os.rename(beside, self.key)

    def sees(self) -> str:
        code, output = self.container.exec_run(["cat", "/run/secrets/api_key"])
        assert code == 0, output
        return output.decode()

    def has(self) -> tuple[bool, bool]:
        return self.rotation.in_use(self.release), bool(self.rotation.behind(self.release, [NAME]))


@pytest.fixture
def site(tmp_path: Path, project, base_image, containers) -> Site:
    return Site(tmp_path / "site", project, base_image, containers)


def test_a_container_keeps_its_file_and_has_the_one_that_stands_when_it_is_started(site: Site) -> None:
    site.rotate()
    assert (site.sees(), site.has()) == ("old", (False, True))
    assert site.rotation.put_back(site.release) == [NAME]
    assert (site.sees(), site.rotation.behind(site.release, [NAME])) == ("old", []), (
        "the very file that it has"
    )
    site.rotate()
    site.container.restart(timeout=0)
    assert (site.sees(), site.has()) == ("new", (True, False))


def test_check_run_check_run(site: Site, run_module) -> None:
    site.rotate()
    wanted = {"site_dir": str(site.home), "state": "restored"}
    planned = run_module("kept_secrets", check=True, diff=True, **wanted)
    assert (planned["changed"], planned["result"], planned["names"]) == (True, "restored", [NAME])
    assert site.key.read_text() == "new"
    done = run_module("kept_secrets", diff=True, **wanted)
    assert (done["changed"], done["diff"]) == (True, planned["diff"])
    assert site.key.read_text() == "old"
    assert not (site.home / "secrets/.before").exists()
    for check in (True, False):
        again = run_module("kept_secrets", check=check, **wanted)
        assert (again["changed"], again["result"]) == (False, "none")


def test_settled_waits_for_the_containers(site: Site, run_module) -> None:
    site.rotate()
    wanted = {"site_dir": str(site.home), "state": "settled"}
    left = run_module("kept_secrets", **wanted)
    assert (left["changed"], left["result"]) == (False, "left")
    assert "not in use yet by api-1" in left["warnings"][0]
    site.container.restart(timeout=0)
    assert run_module("kept_secrets", **wanted)["result"] == "removed"
    assert not (site.home / "secrets/.before").exists()
