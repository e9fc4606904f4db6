"""Kernel settings: what is compared, what is written, and what a failure says."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible.module_utils.kernel_settings import (
    HEADER,
    KernelSettingsError,
    Setting,
    differences,
    file_text,
    kept_settings,
    read_setting,
    write_setting,
)
from kernel_settings import ensure, forget

PORT = "net.ipv4.ip_unprivileged_port_start"
MIGRATE = "net.ipv4.tcp_migrate_req"
WANTED = [Setting(PORT, 80, at_most=True), Setting(MIGRATE, 1, optional=True)]


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A tree like /proc/sys with the values of a fresh machine."""
    directory = tmp_path / "sys" / "net" / "ipv4"
    directory.mkdir(parents=True)
    (directory / "ip_unprivileged_port_start").write_text("1024\n")
    (directory / "tcp_migrate_req").write_text("0\n")
    return tmp_path / "sys"


def test_a_missing_setting_is_a_fault_unless_optional() -> None:
    with pytest.raises(KernelSettingsError, match=MIGRATE) as failure:
        differences([Setting(MIGRATE, 1)], {MIGRATE: None})
    assert failure.value.reason == "missing"
    assert differences([Setting(MIGRATE, 1, optional=True)], {MIGRATE: None}) == []


def test_text_that_is_no_number_is_named(kernel: Path) -> None:
    (kernel / "net/ipv4/tcp_migrate_req").write_text("32768\t60999\n")
    with pytest.raises(KernelSettingsError, match="not one number") as failure:
        read_setting(kernel, MIGRATE)
    assert failure.value.reason == "not_a_number"


def test_an_unwritable_setting_says_what_to_do(kernel: Path) -> None:
    with pytest.raises(KernelSettingsError, match="remount,rw") as failure:
        write_setting(kernel, "net.ipv4", 1)
    assert failure.value.reason == "unwritable"


@pytest.mark.parametrize(("value", "changes"), [(1024, 1), (81, 1), (80, 0), (0, 0)])
def test_at_most_accepts_a_lower_value(value: int, changes: int) -> None:
    assert len(differences([Setting(PORT, 80, at_most=True)], {PORT: value})) == changes


def test_check_run_check_again_run_again(kernel: Path, tmp_path: Path) -> None:
    file = tmp_path / "sysctl.d" / "60-edge.conf"
    checked = ensure(WANTED, [], file, check=True, root=kernel)
    assert checked["changed"]
    assert not file.exists()
    assert read_setting(kernel, PORT) == 1024

    ran = ensure(WANTED, ["net.ipv6.conf.all.disable_ipv6"], file, check=False, root=kernel)
    assert ran["changed"]
    assert ran["values"] == {PORT: 80, MIGRATE: 1, "net.ipv6.conf.all.disable_ipv6": None}
    assert file.read_text() == f"{HEADER}#{PORT} was 1024\n{PORT} = 80\n#{MIGRATE} was 0\n{MIGRATE} = 1\n"
    assert file.stat().st_mode & 0o777 == 0o644
    assert ran["diff"] == checked["diff"]

    assert not ensure(WANTED, [], file, check=True, root=kernel)["changed"]
    assert not ensure(WANTED, [], file, check=False, root=kernel)["changed"]


def test_after_a_reboot_without_sysctl_d_only_the_kernel_is_set_again(kernel: Path, tmp_path: Path) -> None:
    file = tmp_path / "60-edge.conf"
    ensure(WANTED, [], file, check=False, root=kernel)
    (kernel / "net/ipv4/ip_unprivileged_port_start").write_text("1024\n")
    again = ensure(WANTED, [], file, check=False, root=kernel)
    assert again["changed"]
    assert again["diff"][1]["before"] == again["diff"][1]["after"]
    assert read_setting(kernel, PORT) == 80


def test_the_kernel_gets_back_what_it_had(kernel: Path, tmp_path: Path) -> None:
    file = tmp_path / "60-edge.conf"
    ensure(WANTED, [], file, check=False, root=kernel)
    ensure([Setting(PORT, 70, at_most=True)], [], file, check=False, root=kernel)
    assert forget(file, check=True, root=kernel)["changed"]
    assert read_setting(kernel, PORT) == 70
    forget(file, check=False, root=kernel)
    assert read_setting(kernel, PORT) == 1024
    assert not file.exists()
    assert not forget(file, check=False, root=kernel)["changed"]


def test_what_somebody_has_changed_since_is_left_alone(kernel: Path, tmp_path: Path) -> None:
    file = tmp_path / "60-edge.conf"
    ensure(WANTED, [], file, check=False, root=kernel)
    (kernel / "net/ipv4/ip_unprivileged_port_start").write_text("0\n")
    forget(file, check=False, root=kernel)
    assert (read_setting(kernel, PORT), read_setting(kernel, MIGRATE)) == (0, 0)


def test_a_file_of_an_older_version_does_not_say_what_was(kernel: Path, tmp_path: Path) -> None:
    file = tmp_path / "60-edge.conf"
    file.write_text(f"{HEADER}{PORT} = 80\n")
    (kernel / "net/ipv4/ip_unprivileged_port_start").write_text("80\n")
    forget(file, check=False, root=kernel)
    assert read_setting(kernel, PORT) == 80
    assert not file.exists()


def test_what_the_system_has_right_is_left_to_it(kernel: Path, tmp_path: Path) -> None:
    (kernel / "net/ipv4/ip_unprivileged_port_start").write_text("0\n")
    file = tmp_path / "60-edge.conf"
    ensure(WANTED, [], file, check=False, root=kernel)
    assert kept_settings(file.read_text()) == {MIGRATE: 1}


def test_what_is_right_because_of_another_site_outlives_that_site(kernel: Path, tmp_path: Path) -> None:
    (tmp_path / "99-own.conf").write_text(f"{PORT} = 1024\n")
    beside, file = tmp_path / "60-beside.conf", tmp_path / "60-edge.conf"
    ensure(WANTED, [], beside, check=False, root=kernel)
    assert ensure(WANTED, [], file, check=True, root=kernel)["changed"]
    ensure(WANTED, [], file, check=False, root=kernel)
    assert file.read_text() == beside.read_text()
    beside.unlink()
    assert not ensure(WANTED, [], file, check=False, root=kernel)["changed"]
    forget(file, check=False, root=kernel)
    assert (read_setting(kernel, PORT), read_setting(kernel, MIGRATE)) == (1024, 0)


def test_a_file_with_foreign_lines_is_read_without_them() -> None:
    text = "# a = 1\n; b = 2\nc\nnet.x = y\nnet.ipv4.tcp_migrate_req=1\n"
    assert kept_settings(text) == {MIGRATE: 1}
    assert file_text(text, WANTED, [], {PORT: 0, MIGRATE: 1}) == f"{HEADER}{MIGRATE} = 1\n"
