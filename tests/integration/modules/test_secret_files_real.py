"""secret_files as Ansible runs it: nothing of a secret leaves the task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SECRET = "a-very-secret-value"
FILES = [
    {"name": "given", "value": SECRET, "owner": os.geteuid(), "group": os.getegid()},
    {"name": "made", "generate": {"kind": "password"}, "owner": os.geteuid(), "group": os.getegid()},
    {"name": "key", "generate": {"kind": "ed25519"}, "owner": os.geteuid(), "group": os.getegid()},
    {
        "name": "api/jwks.json",
        "derive": {"kind": "jwks", "from": "key"},
        "owner": os.geteuid(),
        "group": os.getegid(),
    },
]


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the module in a play with no_log, as verbose as can be, and a task that uses what it returned."""

    def run(
        *options: str, files: list[dict[str, Any]] = FILES, no_log: bool = True
    ) -> subprocess.CompletedProcess[str]:
        host = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        tasks: list[dict[str, Any]] = [
            {
                "secret_files": {
                    "path": str(tmp_path / "secrets"),
                    "files": files,
                    "site_dir": str(tmp_path),
                },
                "register": "secrets",
                "no_log": no_log,
            },
            {
                "ansible.builtin.assert": {
                    "that": "secrets['values'].given | hash('sha1') == wanted | hash('sha1')"
                },
                "no_log": True,
            },
            {
                "ansible.builtin.debug": {
                    "msg": "version={{ secrets.version }} actions={{ secrets.actions | to_json }} "
                    "kept={{ secrets.kept | to_json }}"
                }
            },
        ]
        (tmp_path / "hosts.json").write_text(json.dumps({"all": {"hosts": {"localhost": host}}}))
        book = [
            {
                "hosts": "localhost",
                "gather_facts": False,
                "vars": {"wanted": files[0].get("value", "")},
                "tasks": tasks,
            }
        ]
        (tmp_path / "play.yml").write_text(json.dumps(book))
        command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(tmp_path / "hosts.json")]
        environment = os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        return subprocess.run(
            [*command, *options, str(tmp_path / "play.yml")],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def test_check_run_check_run(play, tmp_path: Path) -> None:
    planned = play("--check", "--diff")
    assert planned.returncode == 0, planned.stdout
    assert "changed=1" in planned.stdout
    assert not (tmp_path / "secrets").exists()
    done = play("--diff", "-vvvv")
    assert done.returncode == 0, done.stdout
    assert "changed=1" in done.stdout
    values = [path.read_text() for path in (tmp_path / "secrets").iterdir() if path.is_file()]
    assert len(values) == 4
    assert not [value for value in values if value in done.stdout + done.stderr]
    for options in (("--check",), ()):
        assert "changed=0" in play(*options).stdout


def test_a_replaced_secret_is_another_version_and_nothing_else_is_told(play, tmp_path: Path) -> None:
    first = play()
    replaced = [{**FILES[0], "value": "another-secret-value"}, *FILES[1:]]
    second = play("--diff", "-vvv", files=replaced)
    assert '"given": ["replace"]' in second.stdout.replace("\\", "")
    assert "another-secret-value" not in second.stdout
    version = [line for line in first.stdout.splitlines() if "version=" in line]
    assert version
    assert version[0].split()[1] not in second.stdout


def test_a_task_that_would_show_secrets_is_refused(play, tmp_path: Path) -> None:
    refused = play("-vvv", no_log=False)
    assert refused.returncode != 0
    assert "no_log: true" in refused.stdout
    assert not (tmp_path / "secrets").exists()


def test_a_rotation_keeps_the_value_of_before_and_tells_its_name_alone(play, tmp_path: Path) -> None:
    kept = [{**FILES[0], "keep": True}, *FILES[1:]]
    assert "changed=1" in play(files=kept).stdout
    (tmp_path / "releases/r-000000000001").mkdir(parents=True)
    (tmp_path / "current").symlink_to("releases/r-000000000001")
    replaced = [{**kept[0], "value": "another-secret-value"}, *kept[1:]]
    for options in (("--check", "--diff", "-vvv"), ("--diff", "-vvvv")):
        told = play(*options, files=replaced)
        assert "changed=1" in told.stdout, options
        assert 'kept=["given"]' in told.stdout.replace("\\", "")
        assert not [text for text in (SECRET, "another-secret-value") if text in told.stdout + told.stderr]
    assert (tmp_path / "secrets/.before/given").read_text() == SECRET
    assert (tmp_path / "secrets/.before").stat().st_mode & 0o777 == 0o700
    assert "changed=0" in play(files=replaced).stdout
    assert (tmp_path / "secrets/.before/given").read_text() == SECRET
