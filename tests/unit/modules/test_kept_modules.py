"""Modules that a host keeps: the same answers as ever, and nothing that somebody else could have put there is run."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from ansible.module_utils import kept_modules

REPO = Path(__file__).resolve().parents[3]
MODULE = """#!/usr/bin/python
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.words import word

module = AnsibleModule({"who": {"type": "str", "required": True}, "token": {"no_log": True}}, supports_check_mode=True)
if module.params["who"] == "nobody":
    module.fail_json(msg="nobody is not greeted")
module.exit_json(changed=False, greeting=f"{word} {module.params['who']} {module.params['token']}", path=__file__)
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's modules are kept")


class Project:
    """A project of one module, with the plugin, whose host keeps modules in a directory of the test's own."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.place = directory, directory / "kept"
        for name in ("action_plugins", "library", "module_utils"):
            (directory / name).mkdir()
        (directory / "action_plugins" / "normal.py").write_text(
            (REPO / "action_plugins" / "normal.py").read_text()
        )
        host_side = (REPO / "module_utils" / "kept_modules.py").read_text()
        moved = host_side.replace('"/run/ansible-kept-modules"', repr(str(self.place)))
        assert moved != host_side
        (directory / "module_utils" / "kept_modules.py").write_text(moved)
        (directory / "library" / "greet.py").write_text(MODULE)
        self.say("hello")
        (directory / "ansible.cfg").write_text(
            "[defaults]\nlibrary = library\nmodule_utils = module_utils\naction_plugins = action_plugins\n"
            "[connection]\npipelining = true\n"
        )

    def say(self, word: str) -> None:
        (self.directory / "module_utils" / "words.py").write_text(f"word = {word!r}\n")

    def greet(self, *options: str, who: str = "world", module: str = "greet", **environment: str) -> str:
        """What a run of the module printed, whether it failed or not."""
        command = [str(Path(sys.executable).with_name("ansible")), "localhost", "-c", "local", "-vvv"]
        command += ["-i", "localhost,", "-e", f"ansible_python_interpreter={sys.executable}", "-m", module]
        command += ["-a", f"who={who} token=s3cret", *options]
        told = os.environ | {"ANSIBLE_CONFIG": str(self.directory / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        run = subprocess.run(
            command, cwd=self.directory, env=told | environment, capture_output=True, text=True, timeout=120
        )
        return run.stdout + run.stderr

    def kept(self) -> list[Path]:
        return sorted(self.place.glob("*/.greet.kept"))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def came_from(output: str) -> str:
    found = re.search(r'"path": "([^"]+)"', output)
    assert found, output
    return found[1]


@needs_root
def test_the_second_call_runs_what_the_first_one_kept(project: Project) -> None:
    assert '"greeting": "hello world' in project.greet()
    (marker,) = project.kept()
    module = next(marker.parent.rglob("greet.py"))
    module.write_text(module.read_text().replace("{word}", "{word} again,"))
    second = project.greet()
    assert '"greeting": "hello again, world' in second
    assert came_from(second).startswith(str(project.place))
    assert project.place.stat().st_mode & 0o777 == 0o700


@needs_root
def test_a_change_of_what_modules_share_is_a_state_of_its_own(project: Project) -> None:
    project.greet()
    project.say("goodbye")
    assert '"greeting": "goodbye world' in project.greet()
    assert len(project.kept()) == 2


@needs_root
def test_a_failure_and_what_is_secret_are_told_as_ever(project: Project) -> None:
    for _ in range(2):
        output = project.greet(who="nobody")
        assert "FAILED" in output
        assert "nobody is not greeted" in output
    assert "missing required arguments: who" in project.greet("-a", "unknown=1")
    output = project.greet()
    assert '"token": "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER"' in output
    assert "s3cret" not in output


@needs_root
def test_a_dry_run_keeps_nothing(project: Project) -> None:
    assert '"greeting": "hello world' in project.greet("--check")
    assert project.kept() == []


@needs_root
def test_a_directory_that_others_could_write_to_is_not_used(project: Project) -> None:
    project.greet()
    project.place.chmod(0o777)
    output = project.greet()
    assert '"greeting": "hello world' in output
    assert not came_from(output).startswith(str(project.place))


@needs_root
def test_a_link_in_its_place_is_not_followed(project: Project, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    project.place.symlink_to(elsewhere)
    output = project.greet()
    assert '"greeting": "hello world' in output
    assert not came_from(output).startswith((str(project.place), str(elsewhere)))


@needs_root
def test_without_pipelining_a_module_runs_as_ever(project: Project) -> None:
    output = project.greet(ANSIBLE_PIPELINING="false")
    assert '"greeting": "hello world' in output
    assert project.kept() == []


@needs_root
def test_a_collections_module_of_the_same_name_is_not_taken_for_it(project: Project) -> None:
    theirs = project.directory / "collections/ansible_collections/some/where/plugins/modules/greet.py"
    theirs.parent.mkdir(parents=True)
    theirs.write_text(MODULE.replace("{word}", "theirs"))
    project.greet()
    output = project.greet(
        module="some.where.greet", ANSIBLE_COLLECTIONS_PATH=str(project.directory / "collections")
    )
    assert '"greeting": "theirs world' in output


@needs_root
def test_what_is_kept_in_part_is_kept_again(project: Project) -> None:
    project.greet()
    (marker,) = project.kept()
    marker.unlink()
    next(marker.parent.rglob("words.py")).write_text("")
    assert '"greeting": "hello world' in project.greet()
    assert project.kept() == [marker]


# The host's side alone


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kept_modules, "PLACE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def archive(**files: str) -> str:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as content:
        for name, text in files.items():
            content.writestr(name.replace("__", "/") + ".py", text)
    return base64.b64encode(packed.getvalue()).decode()


def test_who_is_not_root_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    kept_modules.run("state", "greet", "{}")
    assert "only root's modules are kept" in capsys.readouterr().out
    assert not place.exists()


@pytest.mark.parametrize("name", ["..__..__greet", "__etc__greet"])
def test_an_archive_writes_nowhere_else(place: Path, name: str) -> None:
    with pytest.raises(ValueError, match="leaves the directory"):
        kept_modules.keep(str(place / "state"), "greet", archive(**{name: ""}))
    assert [path for path in place.rglob("*") if path.is_file()] == []


def test_two_modules_of_one_name_are_refused(place: Path) -> None:
    both = archive(ansible__modules__greet="", ansible__legacy__greet="")
    with pytest.raises(ValueError, match="greet is 2 times"):
        kept_modules.keep(str(place / "state"), "greet", both)


def test_what_a_module_shares_a_name_with_is_not_it(place: Path) -> None:
    sent = archive(ansible__modules__file="", ansible__module_utils__common__file="")
    kept_modules.keep(str(place / "state"), "file", sent)
    assert kept_modules.kept(str(place / "state"), "file") == "ansible.modules.file"


def test_only_states_that_nobody_used_for_a_day_go_away(place: Path) -> None:
    sent = archive(ansible__modules__greet="")
    for name in ("old", "young", "used"):
        kept_modules.keep(str(place / name), "greet", sent)
    long_ago = time.time() - kept_modules.UNUSED - 60
    for name in ("old", "used"):
        os.utime(place / name, (long_ago, long_ago))
    kept_modules.kept(str(place / "used"), "greet")
    kept_modules.keep(str(place / "new"), "greet", sent)
    assert sorted(path.name for path in place.iterdir()) == ["new", "used", "young"]


def test_a_full_disk_leaves_no_marker(place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(_source: str, _target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "replace", full)
    kept_modules.run("state", "greet", "{}", archive(ansible__modules__greet=""))
    assert "No space left" in capsys.readouterr().out
    assert not list(place.rglob(".greet.kept"))
