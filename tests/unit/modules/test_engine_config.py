"""Engine settings: what is merged, what is refused, reload or restart, what is installed where, stale pid files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.docker_cli import Result
from ansible.module_utils.engine_config import (
    Engine,
    EngineConfigError,
    action_for,
    changed_keys,
    engine_pid,
    merge,
    not_in_effect,
    packages_for,
    parse,
    remove_stale_pid_files,
    start_command,
    stop_command,
    wait_for,
    without_flags,
)

WANTED = {"live-restore": True, "insecure-registries": ["10.0.0.9:5000"]}
#: `docker info --format '{{json .}}'` of engine 26.1.5 with Debian's plugins, shortened.
RUNNING = {
    "ServerVersion": "26.1.5+dfsg1",
    "LiveRestoreEnabled": True,
    "RegistryConfig": {
        "IndexConfigs": {"docker.io": {"Secure": True}, "10.0.0.9:5000": {"Secure": False}},
        "InsecureRegistryCIDRs": ["127.0.0.0/8"],
    },
    "ClientInfo": {
        "Plugins": [{"Name": "buildx", "Version": "0.13.1+ds1"}, {"Name": "compose", "Version": "v2.26.1-4"}],
    },
}


@pytest.mark.parametrize("text", ['{"live-restore": true,', "[1]", '"x"', "live-restore: true"])
def test_what_is_no_json_object_is_refused_with_the_file_named(text: str) -> None:
    with pytest.raises(EngineConfigError, match=r"/etc/docker/daemon\.json.*Nothing was written") as failure:
        parse(text, "/etc/docker/daemon.json")
    assert failure.value.reason == "bad_json"


@pytest.mark.parametrize("text", ["", " \n", "{}"])
def test_an_empty_file_holds_no_settings(text: str) -> None:
    assert parse(text, "x") == {}


@pytest.mark.parametrize(
    ("existing", "wanted", "merged"),
    [
        ({}, WANTED, WANTED),
        ({"data-root": "/d"}, {"live-restore": True}, {"data-root": "/d", "live-restore": True}),
        (
            {"insecure-registries": ["a:1"]},
            {"insecure-registries": ["b:2"]},
            {"insecure-registries": ["a:1", "b:2"]},
        ),
        (
            {"insecure-registries": ["a:1"]},
            {"insecure-registries": ["a:1"]},
            {"insecure-registries": ["a:1"]},
        ),
        ({"live-restore": False}, {"live-restore": True}, {"live-restore": True}),
        (
            {"log-opts": {"max-file": "3"}},
            {"log-opts": {"max-size": "7m"}},
            {"log-opts": {"max-file": "3", "max-size": "7m"}},
        ),
    ],
)
def test_merging_loses_nothing(
    existing: dict[str, Any], wanted: dict[str, Any], merged: dict[str, Any]
) -> None:
    before = json.dumps(existing)
    assert merge(existing, wanted) == merged
    assert json.dumps(existing) == before, "the argument was changed"
    assert not changed_keys(merged, merge(merged, wanted)), "a second merge finds something to do"


@pytest.mark.parametrize(
    ("keys", "action"),
    [
        (set(), "none"),
        ({"live-restore", "insecure-registries"}, "reload"),
        ({"live-restore", "log-opts"}, "restart"),
        ({"data-root"}, "restart"),
    ],
)
def test_only_what_a_reload_takes_is_reloaded(keys: set[str], action: str) -> None:
    assert action_for(keys) == action


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["-H", "fd://"], WANTED),
        (["--live-restore"], {"insecure-registries": ["10.0.0.9:5000"]}),
        (["--live-restore=true", "--insecure-registry", "10.0.0.9:5000"], {}),
    ],
)
def test_what_the_command_line_says_stays_out_of_the_file(options: list[str], kept: dict[str, Any]) -> None:
    assert without_flags(WANTED, ["dockerd", *options]) == kept


@pytest.mark.parametrize("options", [["--live-restore=false"], ["--insecure-registry=other:5000"]])
def test_a_command_line_that_says_otherwise_is_a_fault(options: list[str]) -> None:
    with pytest.raises(EngineConfigError, match="into daemon") as failure:
        without_flags(WANTED, ["dockerd", *options])
    assert failure.value.reason == "flag_conflict"


def test_what_a_running_engine_lacks_is_seen() -> None:
    assert not_in_effect(RUNNING, WANTED) == set()
    assert not_in_effect({**RUNNING, "LiveRestoreEnabled": False}, WANTED) == {"live-restore"}
    assert not_in_effect(RUNNING, {"insecure-registries": ["192.168.0.4:5000"]}) == {"insecure-registries"}
    assert not_in_effect(RUNNING, {"insecure-registries": ["127.0.0.0/8"], "log-driver": "local"}) == set()


def test_an_engine_that_answers_is_read() -> None:
    engine = Engine.from_answer(Result(0, json.dumps(RUNNING), ""), daemon=True, client=True)
    assert engine.facts() == {
        "installed": True,
        "client": True,
        "running": True,
        "version": "26.1.5+dfsg1",
        "compose": "2.26.1-4",
        "buildx": "0.13.1+ds1",
    }


def test_an_engine_that_does_not_answer_keeps_its_error_and_plugins() -> None:
    answer = {"ServerErrors": ["Cannot connect to the Docker daemon"], "ClientInfo": RUNNING["ClientInfo"]}
    engine = Engine.from_answer(Result(1, json.dumps(answer), ""), daemon=True, client=True)
    assert (engine.installed, engine.running, engine.compose) == (True, False, "2.26.1-4")
    assert "Cannot connect" in engine.error


def test_a_plugin_that_cannot_run_counts_as_missing() -> None:
    plugins = {"Plugins": [{"Name": "compose", "Err": "exec format error"}]}
    answer = Result(0, json.dumps({**RUNNING, "ClientInfo": plugins}), "")
    assert Engine.from_answer(answer, daemon=True, client=True).compose == ""


COMPLETE = Engine(installed=True, client=True, compose="2", buildx="0.13")


@pytest.mark.parametrize(
    ("engine", "system", "owner", "packages", "suite"),
    [
        (COMPLETE, ("fedora", "44"), "", (), ""),
        (
            Engine(),
            ("debian", "13"),
            "",
            ("docker.io", "iptables", "docker-cli", "docker-compose", "docker-buildx"),
            "",
        ),
        (
            Engine(),
            ("ubuntu", "24.04"),
            "",
            ("docker.io", "iptables", "docker-compose-v2", "docker-buildx"),
            "",
        ),
        (
            Engine(installed=True, client=True, buildx="1"),
            ("debian", "12"),
            "docker.io",
            ("docker-compose",),
            "trixie",
        ),
        (
            Engine(installed=True, client=True, buildx="1"),
            ("debian", "12"),
            "docker-ce",
            ("docker-compose-plugin",),
            "",
        ),
        (Engine(installed=True, client=True, compose="2"), ("ubuntu", "26.04"), "", ("docker-buildx",), ""),
    ],
)
def test_what_is_missing_is_installed_from_where_it_fits(
    engine: Engine, system: tuple[str, str], owner: str, packages: tuple[str, ...], suite: str
) -> None:
    plan = packages_for(engine, *system, owner)
    assert (plan.packages, plan.suite) == (packages, suite)


def test_on_debian_12_runc_is_its_own_and_the_rest_is_pinned() -> None:
    plan = packages_for(Engine(), "debian", "12")
    assert "runc" in plan.packages
    assert set(plan.pinned) == {"docker.io", "docker-cli", "docker-compose", "docker-buildx", "containerd"}


@pytest.mark.parametrize("system", [("fedora", "44"), ("debian", "11"), ("ubuntu", "22.04"), ("debian", "")])
def test_an_unknown_system_is_told_what_to_install(system: tuple[str, str]) -> None:
    with pytest.raises(EngineConfigError, match="Compose v2") as failure:
        packages_for(Engine(installed=True, client=True, buildx="1"), *system)
    assert failure.value.reason == "unsupported"


def test_commands_without_systemd() -> None:
    start = start_command("/usr/sbin/dockerd", Path("/run"), Path("/var/log/docker.log"))
    line = "start-stop-daemon --start --background --pidfile /run/docker-ssd.pid --make-pidfile"
    assert " ".join(start) == line + " --output /var/log/docker.log --exec /usr/sbin/dockerd"
    assert "--retry" in stop_command(Path("/run"))


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc with process 1, a shell, and process 7, an engine."""
    for pid, name in ((1, "bash"), (7, "dockerd")):
        (tmp_path / "proc" / str(pid)).mkdir(parents=True)
        (tmp_path / "proc" / str(pid) / "comm").write_text(f"{name}\n")
    return tmp_path / "proc"


@pytest.mark.parametrize(("content", "stale"), [("1\n", True), ("99", True), ("", True), ("7", False)])
def test_a_pid_file_that_names_somebody_else_goes(
    tmp_path: Path, proc: Path, content: str, stale: bool
) -> None:
    pid_file = tmp_path / "docker.pid"
    pid_file.write_text(content)
    assert engine_pid(tmp_path, proc) == (0 if stale else 7)
    assert remove_stale_pid_files(tmp_path, proc) == ([str(pid_file)] if stale else [])
    assert pid_file.exists() is not stale


def test_waiting_ends_at_the_deadline() -> None:
    ticks = iter(range(100))
    assert wait_for(lambda: None, 3, lambda: next(ticks)) is None
    assert wait_for(lambda: "up", 0, lambda: next(ticks)) == "up"
