"""playbooks/unlock.yml, run by somebody who knows that a run is dead: it takes the named lock and no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible.module_utils.deploy_lock import DeployLock

ROOT = Path(__file__).resolve().parents[3]
ONE, TWO = "d-20261123T040000-aaaaaa", "d-20261123T040001-bbbbbb"
Unlock = Callable[..., tuple[int, str]]


@pytest.fixture
def unlock(tmp_path: Path) -> Unlock:
    host = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "ansible_become": False,
    }
    inventory = tmp_path / "hosts.yml"
    inventory.write_text(json.dumps({"webhook": {"hosts": {"localhost": host}}}))

    def run(*arguments: str) -> tuple[int, str]:
        program = str(Path(sys.executable).parent / "ansible-playbook")
        command = [
            program,
            "-i",
            str(inventory),
            "playbooks/unlock.yml",
            "-e",
            f"site_dir={tmp_path}",
            *arguments,
        ]
        environment = {**os.environ, "ANSIBLE_NOCOLOR": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    return run


def test_without_a_name_nothing_is_taken(unlock: Unlock, tmp_path: Path) -> None:
    DeployLock(tmp_path).acquire(ONE, "aida@laptop")
    code, said = unlock()
    assert code == 2
    assert "Say whose lock: -e lock_break=d-…" in said
    assert (DeployLock(tmp_path).read() or pytest.fail("the lock is gone")).run == ONE


def test_another_ones_lock_stays(unlock: Unlock, tmp_path: Path) -> None:
    DeployLock(tmp_path).acquire(ONE, "aida@laptop")
    code, said = unlock("-e", f"lock_break={TWO}")
    assert code == 2
    assert ONE in said
    assert "aida@laptop" in said
    assert (DeployLock(tmp_path).read() or pytest.fail("the lock is gone")).run == ONE


@pytest.mark.parametrize("name", [ONE, "any"])
def test_the_named_lock_is_free_and_it_is_told_whose_it_was(
    unlock: Unlock, tmp_path: Path, name: str
) -> None:
    DeployLock(tmp_path).acquire(ONE, "aida@laptop")
    code, said = unlock("-e", f"lock_break={name}", "--check")
    assert code == 0
    assert DeployLock(tmp_path).read() is not None, "a dry run takes nothing"
    code, said = unlock("-e", f"lock_break={name}")
    assert code == 0, said
    assert f"Run {ONE} of aida@laptop no longer has it" in said
    assert "changed=1" in said
    assert DeployLock(tmp_path).read() is None
    code, said = unlock("-e", "lock_break=any")
    assert (code, "Nobody had the lock." in said, "changed=0" in said) == (0, True, True)


def test_a_lock_file_that_cannot_be_read_is_taken_by_any(unlock: Unlock, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "deployment.lock").write_text("{")
    code, said = unlock("-e", "lock_break=any")
    assert code == 0, said
    assert DeployLock(tmp_path).read() is None
