"""What a build gets from its host: only what it can use, and only in files that nobody else reads."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from ansible.module_utils.build_environment import (
    host_pip_configuration,
    login_configuration,
    make_login_directory,
    pip_config_files,
    pip_configuration,
    proxy_arguments,
    write_private,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("[global]\nfind-links = /opt/wheels\nextra-index-url = file:///opt/simple\n", ""),
        (
            "[global]\nindex-url = https://a.example/simple\n",
            "[global]\nindex-url = https://a.example/simple\n",
        ),
        (
            "[global]\nextra-index-url =\n  https://a.example/simple\n  file:///x\n  http://b.example/simple\n",
            "[global]\nextra-index-url = https://a.example/simple http://b.example/simple\n",
        ),
        (
            "[install]\ntrusted-host = a.example b.example:8080\n",
            "[global]\ntrusted-host = a.example b.example:8080\n",
        ),
        ("[global]\nproxy = http://proxy.example:3128\n", "[global]\nproxy = http://proxy.example:3128\n"),
        ("[global]\nindex-url = /local/path\n", ""),
        ("[global]\ncert = /etc/ssl/x\ntimeout = 5\n", ""),
        ("this is no configuration", ""),
    ],
)
def test_only_what_a_build_can_reach_is_passed_on(text: str, expected: str) -> None:
    assert pip_configuration([text], {}) == expected


def test_later_files_and_then_the_environment_win() -> None:
    texts = ["[global]\nindex-url = https://one.example/s\n", "[global]\nindex-url = https://two.example/s\n"]
    assert "two.example" in pip_configuration(texts, {})
    assert pip_configuration(texts, {"PIP_INDEX_URL": "https://u:p@env.example/s"}) == (
        "[global]\nindex-url = https://u:p@env.example/s\n"
    )


def test_percent_signs_in_a_password_are_kept() -> None:
    assert "p%40ss" in pip_configuration(["[global]\nindex-url = https://u:p%40ss@a.example/s\n"], {})


def test_pip_reads_its_files_in_this_order(tmp_path: Path) -> None:
    paths = pip_config_files({"PIP_CONFIG_FILE": "/given.conf"}, tmp_path)
    assert (
        paths.index(Path("/etc/pip.conf")) < paths.index(tmp_path / ".config/pip/pip.conf") < len(paths) - 1
    )
    assert paths[-1] == Path("/given.conf")
    assert pip_config_files({"PIP_CONFIG_FILE": "/dev/null"}, tmp_path) == []


def test_the_users_own_file_counts(tmp_path: Path) -> None:
    (tmp_path / ".config/pip").mkdir(parents=True)
    (tmp_path / ".config/pip/pip.conf").write_text("[global]\nindex-url = https://mine.example/simple\n")
    assert "mine.example" in host_pip_configuration({"XDG_CONFIG_DIRS": str(tmp_path)}, tmp_path)


def test_proxies_are_passed_by_name_so_that_no_password_is_in_argv() -> None:
    arguments = proxy_arguments(
        {"https_proxy": "http://user:word@proxy.example", "NO_PROXY": "", "HOME": "/root"}
    )
    assert arguments == ["--build-arg", "https_proxy"]


def test_a_login_keeps_the_proxies_and_drops_the_credential_store() -> None:
    existing = json.dumps(
        {"proxies": {"default": {"httpProxy": "x"}}, "credsStore": "desktop", "auths": {"a": {}}}
    )
    document = json.loads(login_configuration("r.example:5000", "me", "pa:ss", existing))
    assert base64.b64decode(document["auths"]["r.example:5000"]["auth"]) == b"me:pa:ss"
    assert set(document) == {"auths", "proxies"}
    assert list(document["auths"]) == ["r.example:5000"]


@pytest.mark.parametrize("existing", ["no json", "[]", ""])
def test_a_broken_docker_configuration_is_no_obstacle(existing: str) -> None:
    assert "auths" in json.loads(login_configuration("r", "u", "p", existing))


def test_a_login_directory_is_private_and_keeps_the_users_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "usual/cli-plugins").mkdir(parents=True)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "usual"))
    variables = make_login_directory(tmp_path / "login", "r.example", "me", "secret")
    assert variables == {"DOCKER_CONFIG": str(tmp_path / "login")}
    assert (tmp_path / "login").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "login/config.json").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "login/cli-plugins").resolve() == tmp_path / "usual/cli-plugins"


def test_a_private_file_is_never_written_over(tmp_path: Path) -> None:
    write_private(tmp_path / "x", "one")
    with pytest.raises(FileExistsError):
        write_private(tmp_path / "x", "two")
