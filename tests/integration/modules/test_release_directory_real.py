"""release_directory as Ansible runs it: check, run, check again, run again; diff; switching; reading."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

API = "127.0.0.1:5000/webhook-api@sha256:" + "1" * 64
FILES = [
    {
        "path": "@release@/docker-compose.webhook.prod.yml",
        "content": "image: @image:webhook-api@\n# @release@\n",
    },
    {"path": "@release@/prod.env", "content": "TZ=Asia/Almaty\n", "mode": "0640"},
    {"path": "edge/abc123/nginx.conf", "content": "events {}\n"},
]


@pytest.fixture
def site(tmp_path):
    return tmp_path / "site"


def test_checked_run_checked_again_run_again(run_module, site):
    arguments = {"path": str(site), "files": FILES, "images": {"webhook-api": {"ref": API, "size": 1}}}
    checked = run_module("release_directory", check=True, diff=True, **arguments)
    assert checked["changed"]
    assert not site.exists()
    first = run_module("release_directory", diff=True, **arguments)
    assert first["changed"]
    assert [checked[key] for key in ("id", "written", "diff")] == [
        first[key] for key in ("id", "written", "diff")
    ]
    assert not run_module("release_directory", check=True, **arguments)["changed"]
    again = run_module("release_directory", **arguments)
    assert not again["changed"]
    assert again["id"] == first["id"] == os.path.basename(os.readlink(site / "staged"))
    assert again["current"] is None
    compose = again["files"]["@release@/docker-compose.webhook.prod.yml"]
    assert Path(compose).read_text() == f"image: {API}\n# {first['id']}\n"
    assert os.stat(again["files"]["@release@/prod.env"]).st_mode & 0o777 == 0o640

    # Without images, as in a run of --tags stack: those of the staged release.
    assert run_module("release_directory", path=str(site), files=FILES)["id"] == first["id"]

    # A file that somebody changed is put right, and only then does anything change.
    with open(compose, "a") as handle:
        handle.write("# by hand\n")
    repaired = run_module("release_directory", diff=True, **arguments)
    assert repaired["changed"]
    assert "# by hand" in repaired["diff"][0]["before"]
    assert "by hand" not in Path(compose).read_text()


def test_directories_beside_the_releases(run_module, site):
    arguments = {"path": str(site), "files": FILES, "images": {"webhook-api": API}}
    assert run_module("release_directory", **arguments)["changed"]
    arguments["directories"] = {"state": "0755"}
    checked = run_module("release_directory", check=True, diff=True, **arguments)
    assert (checked["changed"], checked["written"]) == (True, ["state/"])
    assert not (site / "state").exists()
    assert run_module("release_directory", **arguments)["changed"]
    (site / "state" / "api-1.down").touch()
    assert not run_module("release_directory", check=True, **arguments)["changed"]
    # nginx, which is not root, could no longer look: it would take every switch for off.
    (site / "state").chmod(0o700)
    repaired = run_module("release_directory", diff=True, **arguments)
    assert (repaired["changed"], repaired["diff"][0]["before"]) == (True, "0700\n")
    assert (site / "state").stat().st_mode & 0o777 == 0o755
    assert (site / "state" / "api-1.down").exists()
    for name in ("../state", "a/b", "releases", "secrets"):
        refused = run_module("release_directory", **arguments | {"directories": {name: "0755"}})
        assert (refused["failed"], refused["reason"]) == (True, "bad_path"), name


def test_switching_and_reading(run_module, site):
    ids = []
    for text in ("one", "two"):
        files = [*FILES, {"path": "@release@/text", "content": text}]
        ids.append(
            run_module("release_directory", path=str(site), files=files, images={"webhook-api": API})["id"]
        )
        switched = run_module("release_directory", path=str(site), state="active", diff=True)
        assert switched["changed"]
        assert switched["id"] == ids[-1]
        assert f"current -> {ids[-1]}" in switched["diff"]["after"]
    assert not run_module("release_directory", path=str(site), state="active", release=ids[1])["changed"]
    read = run_module("release_directory", path=str(site), state="read")
    assert not read["changed"]
    assert [entry["id"] for entry in read["releases"]] == ids[::-1]
    assert (read["current"], read["previous"], read["staged"]) == (ids[1], ids[0], ids[1])
    assert read["images"] == {"webhook-api": API}


def test_faults_say_what_to_do(run_module, site):
    none = run_module("release_directory", path=str(site), files=FILES)
    assert none["failed"]
    assert none["reason"] == "no_images"
    assert "--tags build,push,stack" in none["msg"]
    assert not site.exists()

    checked = run_module("release_directory", path=str(site), files=FILES, check=True)
    assert checked["changed"]
    assert "No image is built yet" in checked["output"]

    escape = run_module(
        "release_directory", path=str(site), images={"a": "b"}, files=[{"path": "/etc/x", "content": ""}]
    )
    assert escape["reason"] == "bad_path"
    empty = run_module("release_directory", path=str(site), state="active", release="r-0123456789ab")
    assert empty["reason"] == "no_release"
    assert "Traceback" not in empty["output"]


def test_what_may_not_be_shown_is_not_shown(run_module, site):
    files = [{"path": "@release@/x", "content": "delicate-content", "show": False}]
    result = run_module("release_directory", diff=True, path=str(site), files=files, images={"a": "b"})
    assert result["changed"]
    assert "delicate-content" not in str(result["diff"])
