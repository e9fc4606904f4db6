"""Role secrets: which files it keeps for the release that serves, and which secrets the service is given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[3]
GIVEN = {
    "postgres_webhook_password": "password-of-postgres",
    "redis_password": "password-of-redis",
    "minio_access_key": "access-key",
    "minio_secret_key": "secret-key-of-minio",
    "fal_webhook_secret": "0123456789abcdef",
}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


class Site:
    """A site's directory on this machine, and runs of the role."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "site"
        self.groups = ["webhook"]
        self.variables: dict[str, Any] = {}

    def run(self, *options: str, **given: str) -> dict[str, Any]:
        """One run: the facts that the role leaves, and whether the files were changed."""
        host = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        inventory = {name: {"hosts": {"here": host}} for name in self.groups}
        shown = (
            "{{ {'kept': secrets_kept, 'service': secrets_service, 'names': secrets_values.keys() | list, "
            "'changed': __secrets_written is changed} | to_json }}"
        )
        tasks = [
            {"ansible.builtin.include_role": {"name": "secrets"}},
            {
                "ansible.builtin.copy": {"content": shown, "dest": str(self.root / "facts"), "mode": "0600"},
                "check_mode": False,
            },
        ]
        variables = {"site_dir": str(self.home), "secrets_given": GIVEN | given, **self.variables}
        play = [{"hosts": "webhook", "gather_facts": False, "vars": variables, "tasks": tasks}]
        (self.root / "hosts.json").write_text(json.dumps(inventory))
        (self.root / "play.yml").write_text(json.dumps(play))
        command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(self.root / "hosts.json")]
        environment = os.environ | {"ANSIBLE_CONFIG": str(REPO / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        run = subprocess.run(
            [*command, *options, str(self.root / "play.yml")],
            cwd=REPO, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        assert not [value for value in (GIVEN | given).values() if value and value in run.stdout]
        facts: dict[str, Any] = json.loads((self.root / "facts").read_text())
        return facts

    def serves(self) -> None:
        """From now on a release is current."""
        (self.home / "releases/r-000000000001").mkdir(parents=True)
        (self.home / "current").symlink_to("releases/r-000000000001")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_what_the_release_mounts_is_kept_when_it_is_replaced(site: Site) -> None:
    first = site.run()
    assert (first["kept"], first["changed"]) == ([], True)
    site.serves()
    new = {"redis_password": "another-password", "fal_webhook_secret": "another-0123456789"}
    wanted = ["api/fal_webhook_secret", "api/redis_password", "fal_webhook_secret"]
    for options in (["--check"], []):
        rotated = site.run(*options, **new)
        assert (rotated["kept"], rotated["changed"]) == (wanted, True)
    again = site.run(**new)
    assert (again["kept"], again["changed"]) == (wanted, False)
    assert (site.home / "secrets/.before/api/redis_password").read_text() == GIVEN["redis_password"]


@pytest.mark.parametrize(
    ("variables", "kept"),
    [
        ({}, ["api/fal_webhook_secret", "fal_webhook_secret"]),
        (
            {"stack_redis_url": "redis://192.168.0.3:6379/0"},
            ["api/fal_webhook_secret", "api/redis_password", "fal_webhook_secret"],
        ),
    ],
)
def test_what_an_embedded_backend_has_taken_already_is_not_kept(
    site: Site, variables: dict[str, str], kept: list[str]
) -> None:
    """To put the old password back would shut the old release out of its own backend."""
    site.groups, site.variables = ["webhook", "backends"], variables
    site.run()
    site.serves()
    changed = {name: f"{value}-changed" for name, value in GIVEN.items() if name != "minio_access_key"}
    if variables:
        changed = {name: changed[name] for name in ("redis_password", "fal_webhook_secret")}
    assert site.run(**changed)["kept"] == kept


def test_the_previous_secret_is_given_and_retired(site: Site) -> None:
    site.run()
    site.serves()
    file = site.home / "secrets/api/fal_webhook_secret_previous"
    setting = "FAL_WEBHOOK_SECRET_PREVIOUS"
    assert not file.exists()
    both = {"fal_webhook_secret": "another-0123456789", "fal_webhook_secret_previous": "0123456789abcdef"}
    overlap = site.run(**both)
    assert overlap["service"][setting] == "api/fal_webhook_secret_previous"
    assert file.read_text() == "0123456789abcdef"
    over = site.run(fal_webhook_secret="another-0123456789")
    assert setting not in over["service"]
    assert "api/fal_webhook_secret_previous" not in over["names"]
    assert file.read_text().startswith("retired-"), "kept releases mount it, and it lets nobody in"
    assert site.run(fal_webhook_secret="another-0123456789")["changed"] is False
