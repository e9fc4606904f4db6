"""playbooks/teardown.yml run for real, on a machine where `docker` is a program that notes what it is asked for."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
NAME = "wht-gone"
DOCKER = """#!/bin/sh
echo "$*" >> {calls}
case "$*" in
  "ps --all"*) cat {others} ;;
  "image ls --format"*) echo aisha-base:trixie-1 ;;
  "image rm aisha-base:trixie-1") echo "Untagged: aisha-base:trixie-1" ;;
esac
"""


class Machine:
    """A site's directory, an inventory, and a docker that answers nothing."""

    def __init__(self, directory: Path) -> None:
        self.site, self.calls, self.others = directory / "site", directory / "calls", directory / "others"
        (self.site / "releases").mkdir(parents=True)
        (self.site / "secrets").mkdir()
        self.others.write_text("")
        self.calls.write_text("")
        programs = directory / "bin"
        programs.mkdir()
        (programs / "docker").write_text(DOCKER.format(calls=self.calls, others=self.others))
        (programs / "docker").chmod(0o755)
        host = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        groups = {
            name: {"hosts": {"localhost": None}} for name in ("builders", "registry", "backends", "webhook")
        }
        variables = {
            "site_name": NAME,
            "site_dir": str(self.site),
            "site_environment": "development",
            "site_registry_scheme": "http",
            "ansible_become": False,
            "engine_config_path": str(directory / "daemon.json"),
        }
        inventory = {"all": {"hosts": {"localhost": host}, "vars": variables, "children": groups}}
        self.inventory = directory / "hosts.yml"
        self.inventory.write_text(json.dumps(inventory))
        path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "ANSIBLE_NOCOLOR": "1"}

    def command(self, **given: object) -> list[str]:
        program = str(Path(sys.executable).parent / "ansible-playbook")
        return [program, "-i", str(self.inventory), "playbooks/teardown.yml", "-e", json.dumps(given)]

    def without_a_terminal(self, **given: object) -> tuple[int, str]:
        done = subprocess.run(
            self.command(**given),
            cwd=REPO,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    def answered(self, answer: bytes) -> tuple[int, str]:
        """At a terminal, where somebody types once the question stands."""
        process, terminal = pty.fork()
        if process == 0:
            os.chdir(REPO)
            os.execve(self.command()[0], self.command(), self.environment)
        said, typed, deadline = b"", False, time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                block = os.read(terminal, 4096)
            except OSError:
                break
            if not block:
                break
            said += block
            if not typed and b"to go on" in said:
                time.sleep(0.5)
                os.write(terminal, answer)
                typed = True
        _, status = os.waitpid(process, 0)
        os.close(terminal)
        return os.waitstatus_to_exitcode(status), " ".join(said.decode(errors="replace").split())

    def untouched(self) -> bool:
        there = {path.name for path in self.site.iterdir()}
        return self.calls.read_text() == "" and there == {"releases", "secrets"}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_a_terminal_nothing_is_done(machine: Machine) -> None:
    code, said = machine.without_a_terminal()
    assert code != 0
    assert f"Nothing was done: the answer was not {NAME}" in said
    assert machine.untouched()


def test_a_no_on_the_command_line_is_none_to_the_question(machine: Machine) -> None:
    code, _ = machine.without_a_terminal(teardown_confirmed="false")
    assert code != 0
    assert machine.untouched()


@pytest.mark.parametrize("answer", [b"no\r", b"\x03a"], ids=["no", "ctrl-c"])
def test_any_other_answer_than_the_name_stops_it(machine: Machine, answer: bytes) -> None:
    code, said = machine.answered(answer)
    assert code != 0, said
    assert machine.untouched()


def test_the_name_goes_on_and_keeps_the_data(machine: Machine) -> None:
    code, said = machine.answered(f"{NAME}\r".encode())
    assert code == 0, said
    calls = machine.calls.read_text()
    assert f"compose -p {NAME} down" in calls
    assert "--volumes" not in calls
    assert "image" not in calls
    assert [path.name for path in machine.site.iterdir()] == ["secrets"]


def test_images_of_our_own_go_with_the_last_site_only(machine: Machine) -> None:
    answers = {"teardown_confirmed": True, "teardown_images": True}
    machine.others.write_text("other-api-1\n")
    code, said = machine.without_a_terminal(**answers)
    assert code == 0, said
    assert "image rm" not in machine.calls.read_text()
    assert "other-api-1" in said
    machine.others.write_text("")
    assert machine.without_a_terminal(**answers)[0] == 0
    assert "image rm aisha-base:trixie-1" in machine.calls.read_text()
