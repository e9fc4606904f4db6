"""What is in a bundle: the project, and nothing else that happens to lie in it."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest
from ansible.module_utils.site_bundle import Contents, project_files, read, write

#: Never shared, whether git knows the directory or not.
PRIVATE = (
    "site-bundle.tar",
    "tls/privkey.pem",
    "inventory/x/registry.key",
    "inventory/x/group_vars/all/vault.yml",
)
SHARED = ("Makefile", "inventory/x/hosts.yml", "docs/new.md")


@pytest.fixture(params=["checkout", "unpacked"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    directory = tmp_path / "project"
    for name in (*PRIVATE, *SHARED, ".cache/x"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    if request.param == "checkout":
        subprocess.run(["git", "init", "--quiet", str(directory)], check=True)
        subprocess.run(["git", "-C", str(directory), "add", "Makefile"], check=True)
    return directory


def test_the_project_is_shared_and_what_is_private_is_not(project: Path) -> None:
    assert project_files(project) == sorted(SHARED)


def test_what_git_knows_is_part_of_the_project_whatever_its_name(project: Path) -> None:
    if (project / ".git").exists():
        subprocess.run(["git", "-C", str(project), "add", "--force", "tls/privkey.pem"], check=True)
        assert "tls/privkey.pem" in project_files(project)


@pytest.mark.parametrize("name", ["aisha-webhook-bundle.tar", "other.tar"])
def test_a_bundle_that_is_written_into_the_project_is_not_in_itself(project: Path, name: str) -> None:
    path = project / name
    for _ in range(2):
        write(path, Contents(project))
        read(path)
        with tarfile.open(path) as tar:
            names = {
                member.name.removeprefix("project/") for member in tar if member.name.startswith("project/")
            }
        assert names == set(SHARED)
