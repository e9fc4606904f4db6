"""Backups on the disk: whole or without a name, kept in number, and never a way out of the site's directory."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from ansible.module_utils.kept_secrets import KeptSecrets
from ansible.module_utils.site_backup import (
    PARTIAL,
    Backups,
    SiteBackupError,
    collect,
    new_id,
    run_from,
    run_into,
    tar_files,
    untar_files,
    verify,
)


def at(second: int) -> str:
    return new_id("wht", datetime(2026, 11, 23, 4, 0, second, tzinfo=UTC))


def made(backups: Backups, identity: str, text: bytes = b"content", keep: int = 7) -> dict:
    backups.begin(identity, 0)
    backups.write(identity, "one", "one.bin", lambda meter: meter.write(text) and None)
    return backups.finish(identity, {"database": {"schema": 16}}, keep)


def test_a_backup_is_whole_private_and_readable_by_sha256sum(tmp_path: Path) -> None:
    root = tmp_path / "backups"
    done = made(Backups(root, "wht"), at(1))
    place = Path(done["path"])
    assert verify(place)["parts"][0]["bytes"] == 7
    assert {path.name for path in place.iterdir()} == {"one.bin", "manifest.json", "SHA256SUMS"}
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o600}
    assert place.stat().st_mode & 0o777 == root.stat().st_mode & 0o777 == 0o700
    assert (
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=place, check=False).returncode
        == 0
    )


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "manifest", "sums"])
def test_damage_is_told(tmp_path: Path, damage: str) -> None:
    place = Path(made(Backups(tmp_path, "wht"), at(1))["path"])
    file = place / {"manifest": "manifest.json", "sums": "SHA256SUMS"}.get(damage, "one.bin")
    if damage in ("missing", "sums"):
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-2] + (b"" if damage == "cut" else b"xy"))
    with pytest.raises(SiteBackupError) as caught:
        verify(place)
    assert caught.value.reason == "damaged"


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    backups = Backups(tmp_path, "wht")
    backups.begin(at(1), 0)
    place = Path(backups.finish(at(1), {"format": 99}, 7)["path"])
    with pytest.raises(SiteBackupError) as caught:
        verify(place)
    assert caught.value.reason == "newer"


def test_the_newest_are_kept_and_those_of_others_left_alone(tmp_path: Path) -> None:
    backups = Backups(tmp_path, "wht")
    other = made(Backups(tmp_path, "wht-other"), new_id("wht-other", datetime(2020, 1, 1, tzinfo=UTC)))
    for second in range(1, 5):
        done = made(backups, at(second), keep=2)
    assert done["removed"] == [at(2)]
    assert backups.names() == [at(4), at(3)]
    assert backups.find("latest").name == at(4)
    assert Path(other["path"]).is_dir()


def test_a_run_that_died_leaves_no_backup_and_is_cleared_away(tmp_path: Path) -> None:
    backups = Backups(tmp_path, "wht")
    backups.begin(at(1), 0)
    assert backups.names() == []
    with pytest.raises(SiteBackupError) as caught:
        backups.find("latest")
    assert caught.value.reason == "no_backup"
    left = tmp_path / f"{PARTIAL}{at(1)}"
    made(backups, at(2))
    assert left.exists(), "another run may be at it"
    os.utime(left, (time.time() - 7200, time.time() - 7200))
    made(backups, at(3))
    assert not left.exists()


def test_no_room_is_no_beginning(tmp_path: Path) -> None:
    with pytest.raises(SiteBackupError) as caught:
        Backups(tmp_path / "backups", "wht").begin(at(1), 10**18)
    assert caught.value.reason == "no_space"
    assert not (tmp_path / "backups").exists()


def test_files_come_back_with_modes_and_links(tmp_path: Path) -> None:
    here, there = tmp_path / "a", tmp_path / "b"
    (here / "releases" / "r-1").mkdir(parents=True)
    (here / "releases" / "r-1" / "prod.env").write_text("A=1\n")
    (here / "releases" / "r-1" / "prod.env").chmod(0o640)
    (here / "current").symlink_to("releases/r-1")
    there.mkdir()
    sink = io.BytesIO()
    assert tar_files(here, ["releases", "current", "nothing"], sink) == 4
    sink.seek(0)
    untar_files(sink, there, ["releases", "current"])
    assert (there / "current" / "prod.env").read_text() == "A=1\n"
    assert (there / "current" / "prod.env").stat().st_mode & 0o777 == 0o640
    assert os.readlink(there / "current") == "releases/r-1"
    assert collect(here, ["current"])


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "other/evil", "releases/../../evil"])
def test_nothing_is_written_elsewhere(tmp_path: Path, name: str) -> None:
    site = tmp_path / "site"
    site.mkdir()
    sink = io.BytesIO()
    with tarfile.open(mode="w", fileobj=sink) as tar:
        tar.addfile(tarfile.TarInfo(name))
    sink.seek(0)
    with pytest.raises(SiteBackupError) as caught:
        untar_files(sink, site, ["releases"])
    assert caught.value.reason == "foreign"
    assert list(tmp_path.iterdir()) == [site]


def test_a_link_is_no_way_out(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for target in ("/etc", "../.."):
        sink = io.BytesIO()
        with tarfile.open(mode="w", fileobj=sink) as tar:
            member = tarfile.TarInfo("releases")
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
        sink.seek(0)
        with pytest.raises(SiteBackupError):
            untar_files(sink, site, ["releases"])
    (tmp_path / "elsewhere").mkdir()
    (site / "releases").symlink_to(tmp_path / "elsewhere")
    sink = io.BytesIO()
    with tarfile.open(mode="w", fileobj=sink) as tar:
        tar.addfile(tarfile.TarInfo("releases/evil"))
    sink.seek(0)
    with pytest.raises(SiteBackupError):
        untar_files(sink, site, ["releases"])
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_commands_that_fail_or_hang_are_told_and_killed(tmp_path: Path) -> None:
    sink = io.BytesIO()
    run_into(["sh", "-c", "printf content"], sink, 30)
    assert sink.getvalue() == b"content"
    with pytest.raises(SiteBackupError, match="no such database"):
        run_into(["sh", "-c", "printf half; echo no such database >&2; exit 3"], sink, 30)
    begun = time.monotonic()
    with pytest.raises(SiteBackupError, match="took longer"):
        run_into(["sh", "-c", "sleep 60"], sink, 0.3)
    assert time.monotonic() - begun < 30
    with pytest.raises(SiteBackupError, match="nobody reads"):
        run_from(["sh", "-c", "echo nobody reads; exit 1"], io.BytesIO(b"x" * 10_000_000), 30)
    assert run_from(["wc", "-c"], io.BytesIO(b"x" * 3_000_000), 30) == "3000000"


def test_a_part_that_fails_writes_no_note(tmp_path: Path) -> None:
    backups = Backups(tmp_path, "wht")
    backups.begin(at(1), 0)
    with pytest.raises(SiteBackupError):
        backups.write(at(1), "one", "one.bin", lambda meter: run_into(["false"], meter, 30))
    done = backups.finish(at(1), {}, 7)
    assert json.loads((Path(done["path"]) / "manifest.json").read_text())["parts"] == []


def test_a_command_that_fails_is_named_without_the_script_in_it() -> None:
    script = "exit 3\n" + "-- a long script\n" * 50
    with pytest.raises(SiteBackupError, match="ended with 3") as failure:
        run_from(["bash", "-c", script, "restore"], io.BytesIO(b""), 10)
    assert str(failure.value).startswith("`bash -c exit 3 restore` ended")


def test_a_rotation_that_is_not_proven_is_in_the_sealed_part_alone_and_comes_back_with_it(
    tmp_path: Path,
) -> None:
    variables = Path(__file__).resolve().parents[3] / "roles/backup/vars/main.yml"
    paths = yaml.safe_load(variables.read_text())
    assert "secrets" in paths["backup_sealed_paths"]
    assert "secrets" not in paths["backup_plain_paths"]
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "secrets/api").mkdir(parents=True)
    (here / "secrets/api/key").write_text("old")
    KeptSecrets(here / "secrets").keep("api/key", "r-000000000001")
    sealed = collect(here, paths["backup_sealed_paths"])
    there.mkdir()
    untar_files(io.BytesIO(sealed), there, paths["backup_sealed_paths"])
    kept = KeptSecrets(there / "secrets")
    assert (kept.release(), kept.names()) == ("r-000000000001", ["api/key"])
    assert (there / "secrets/.before").stat().st_mode & 0o777 == 0o700
