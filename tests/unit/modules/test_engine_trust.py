"""What was added to an engine for a site's registry is noted, and that alone is taken back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.engine_config import Trust, without

ROOT = Path(__file__).resolve().parents[3]
REGISTRY = "192.168.0.4:5000"
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The module as Ansible runs it, without an engine that could be reached."""
    (tmp_path / "etc").mkdir()

    def call(state: str, **given: object) -> dict[str, Any]:
        arguments = {
            "path": str(tmp_path / "etc" / "daemon.json"),
            "note": str(tmp_path / "site" / "engine.json"),
            "run_dir": str(tmp_path),
            "state": state,
            **given,
        }
        script = (
            "import sys, ansible.module_utils as m; m.__path__.insert(0, 'module_utils'); sys.path.insert(0, 'library');"
            "import engine_config as e; from ansible.module_utils import engine_config as u;"
            "e.observe = lambda: u.Engine(installed=True, client=True, compose='2', buildx='1');"
            "e.find_program = lambda name: None; u.find_program = lambda name: None;"
            "e.Run.effect = lambda self: setattr(self, 'changed', self.changed); e.main()"
        )
        given_text = json.dumps({"ANSIBLE_MODULE_ARGS": arguments})
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            input=given_text,
            capture_output=True,
            text=True,
            check=False,
        )
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        assert not found.get("failed"), found
        return found

    return call


def test_only_what_was_added_is_taken_back(run: Run, tmp_path: Path) -> None:
    daemon, authority = tmp_path / "etc" / "daemon.json", tmp_path / "ca.pem"
    daemon.write_text(json.dumps({"debug": True, "insecure-registries": ["old:5000"]}))
    authority.write_text("authority")
    wanted = {"insecure-registries": ["old:5000", REGISTRY]}
    given = {"settings": wanted, "registry": REGISTRY, "registry_ca": str(authority)}
    run("present", **given)
    run("present", **given)
    certificate = tmp_path / "etc" / "certs.d" / REGISTRY / "ca.crt"
    assert certificate.read_text() == "authority"
    assert run("absent")["changed"]
    assert json.loads(daemon.read_text()) == {"debug": True, "insecure-registries": ["old:5000"]}
    assert not certificate.parent.exists()
    assert not (tmp_path / "site" / "engine.json").exists()
    assert not run("absent")["changed"]


def test_what_was_there_before_stays(run: Run, tmp_path: Path) -> None:
    daemon, authority = tmp_path / "etc" / "daemon.json", tmp_path / "ca.pem"
    daemon.write_text(json.dumps({"insecure-registries": [REGISTRY]}))
    certificate = tmp_path / "etc" / "certs.d" / REGISTRY / "ca.crt"
    certificate.parent.mkdir(parents=True)
    for path in (authority, certificate):
        path.write_text("authority")
    run(
        "present", settings={"insecure-registries": [REGISTRY]}, registry=REGISTRY, registry_ca=str(authority)
    )
    assert not run("absent")["changed"]
    assert json.loads(daemon.read_text()) == {"insecure-registries": [REGISTRY]}
    assert certificate.exists()


def test_a_certificate_that_somebody_has_replaced_stays(run: Run, tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text("authority")
    run("present", registry=REGISTRY, registry_ca=str(authority))
    certificate = tmp_path / "etc" / "certs.d" / REGISTRY / "ca.crt"
    certificate.write_text("another")
    run("absent")
    assert certificate.read_text() == "another"


def test_a_list_that_is_empty_then_goes() -> None:
    assert without({"debug": True, "insecure-registries": ["a"]}, Trust(("a",))) == {"debug": True}
    assert without({"insecure-registries": []}, Trust(("a",))) == {"insecure-registries": []}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"insecure-registries": 1}'])
def test_a_note_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    note = tmp_path / "engine.json"
    note.write_text(text)
    assert Trust.read(note) == Trust()
