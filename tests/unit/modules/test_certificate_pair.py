"""A certificate and its key: what a server could not use, or others could read, is named; nothing of the key is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from ansible.module_utils import certificate_pair
from ansible.module_utils.certificate_pair import look

ME = os.geteuid()


def make(directory: Path, name: str) -> tuple[Path, Path]:
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-subj", f"/CN={name}", "-days", "2", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    key.chmod(0o400)
    return certificate, key


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make(tmp_path, "ours")


def faults(certificate: Path, key: Path, owner: int = ME, *, ours: bool = True) -> str:
    found = look(certificate, key, owner, ours=ours)
    assert "PRIVATE" not in found.certificate + "".join(found.faults)
    return " ".join(found.faults)


def test_a_pair_is_read_and_without_fault(pair: tuple[Path, Path]) -> None:
    assert look(*pair, ME, ours=True) == (pair[0].read_text(), [])


def test_a_key_that_is_gone_is_named(pair: tuple[Path, Path]) -> None:
    pair[1].unlink()
    assert "ours.key can't be read: No such file" in faults(*pair)


def test_a_certificate_that_is_gone_is_named(pair: tuple[Path, Path]) -> None:
    pair[0].unlink()
    assert look(*pair, ME, ours=True).certificate == ""
    assert "ours.pem can't be read" in faults(*pair)


def test_the_key_of_another_certificate_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, foreign = make(tmp_path, "foreign")
    assert "foreign.key is not the key of" in faults(pair[0], foreign)


@pytest.mark.parametrize("name", ["certificate", "key"])
def test_what_is_neither_certificate_nor_key_is_named(pair: tuple[Path, Path], name: str) -> None:
    path = pair[name == "key"]
    path.chmod(0o600)
    path.write_text("something else")
    path.chmod(0o400)
    assert f"{path} is no " in faults(*pair)


def test_a_key_that_others_may_read_is_named(pair: tuple[Path, Path]) -> None:
    pair[1].chmod(0o444)
    assert f"belongs to user {ME} with mode 0444" in faults(*pair)
    assert faults(*pair, ours=False) == ""


def test_a_key_that_nginx_may_not_read_is_named(pair: tuple[Path, Path]) -> None:
    """In a directory that somebody else fills."""
    assert "can't be read by user 10002" in faults(*pair, owner=10002, ours=False)
    pair[1].chmod(0o444)
    assert faults(*pair, owner=10002, ours=False) == ""


def test_where_there_is_no_openssl_the_two_are_not_compared(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, foreign = make(tmp_path, "foreign")
    monkeypatch.setattr(certificate_pair, "find_program", lambda _name: None)
    assert faults(pair[0], foreign) == ""
