"""Releases: what makes their id, that they appear whole, are repaired, switched and pruned."""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime, timedelta

import pytest
from ansible.module_utils import release
from ansible.module_utils.release import Outcome, ReleaseError, ReleaseStore, WantedFile, plan_release

IMAGES = {"webhook-api": "127.0.0.1:5000/webhook-api@sha256:" + "1" * 64}


class Ticking:
    """A clock that never gives one time twice."""

    def __init__(self):
        self.now = datetime(2026, 11, 22, tzinfo=UTC)

    def __call__(self):
        self.now += timedelta(seconds=1)
        return self.now


def files_of(text="x", edge="h1"):
    return [
        WantedFile("@release@/compose.yml", f"name: @release@\nimage: @image:webhook-api@\n{text}\n"),
        WantedFile("@release@/sub/prod.env", "A=1\n", 0o640),
        WantedFile(f"edge/{edge}/nginx.conf", f"conf {edge}\n"),
    ]


@pytest.fixture
def clock():
    return Ticking()


@pytest.fixture
def store(tmp_path, clock):
    return ReleaseStore(str(tmp_path), now=clock)


def write(store, text="x", edge="h1", keep=5, activate=False, images=None) -> tuple[str, Outcome]:
    plan = plan_release(files_of(text, edge), images or IMAGES)
    return plan.id, store.write(plan, {"revision": text}, keep, activate=activate)


def snapshot(root) -> dict[str, str]:
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_the_id_depends_on_content_mode_path_and_images_and_on_nothing_else():
    one = plan_release(files_of(), IMAGES).id
    assert plan_release(list(reversed(files_of())), IMAGES).id == one
    assert release.RELEASE_ID.match(one)
    others = [
        plan_release(files_of("y"), IMAGES).id,
        plan_release(files_of(edge="h2"), IMAGES).id,
        plan_release(files_of(), IMAGES | {"nginx-webhook": "x@sha256:1"}).id,
        plan_release([*files_of(), WantedFile("@release@/more", "")], IMAGES).id,
        plan_release([WantedFile(f.path, f.content, 0o600) for f in files_of()], IMAGES).id,
    ]
    assert len({one, *others}) == 6


def test_a_written_release_has_everything(store, tmp_path):
    identity, outcome = write(store)
    directory = tmp_path / "releases" / identity
    assert (directory / "compose.yml").read_text() == f"name: {identity}\nimage: {IMAGES['webhook-api']}\nx\n"
    assert (directory / "sub/prod.env").stat().st_mode & 0o7777 == 0o640
    assert (tmp_path / "edge/h1/nginx.conf").read_text() == "conf h1\n"
    description = json.loads((directory / "release.json").read_text())
    assert description["images"] == IMAGES
    assert description["metadata"] == {"revision": "x"}
    assert set(description["files"]) == {
        f"releases/{identity}/compose.yml",
        f"releases/{identity}/sub/prod.env",
        "edge/h1/nginx.conf",
    }
    assert os.readlink(tmp_path / "staged") == f"releases/{identity}"
    assert not (tmp_path / "current").exists()
    assert outcome.changed
    assert not list(tmp_path.rglob(".tmp-*"))


def test_directories_can_be_entered_whatever_the_umask_is(store, tmp_path):
    old = os.umask(0o077)
    try:
        identity, _ = write(store)
    finally:
        os.umask(old)
    for directory in ("releases", f"releases/{identity}", f"releases/{identity}/sub", "edge", "edge/h1"):
        assert (tmp_path / directory).stat().st_mode & 0o777 == 0o755, directory


def test_the_second_time_nothing_changes(store, tmp_path):
    write(store)
    before = snapshot(tmp_path)
    _, outcome = write(store)
    assert not outcome.changed
    assert outcome.diff == []
    assert snapshot(tmp_path) == before


def test_check_mode_says_the_same_and_touches_nothing(store, tmp_path, clock):
    for text in ("1", "2", "3"):
        write(store, text, edge=text, activate=True)
    before = snapshot(tmp_path)
    checked = write(ReleaseStore(str(tmp_path), check=True, now=clock), "4", "4", keep=2, activate=True)
    assert snapshot(tmp_path) == before
    done = write(store, "4", "4", keep=2, activate=True)
    assert checked[0] == done[0]
    for field in ("written", "links", "pruned", "diff"):
        assert getattr(checked[1], field) == getattr(done[1], field), field


def test_check_mode_where_nothing_stands_yet(tmp_path):
    _, outcome = write(ReleaseStore(str(tmp_path / "nothing"), check=True))
    assert outcome.changed
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("harm", ["change", "delete", "mode", "link", "description"])
def test_a_damaged_file_is_repaired(store, tmp_path, harm):
    identity, _ = write(store)
    path = tmp_path / "releases" / identity / "compose.yml"
    right = path.read_text()
    if harm == "change":
        path.write_text("changed by hand\n")
    elif harm == "mode":
        path.chmod(0o600)
    elif harm == "description":
        (path.parent / "release.json").write_text("{")
    else:
        path.unlink()
        if harm == "link":
            path.symlink_to("/etc/hostname")
    _, outcome = write(store)
    assert outcome.changed
    assert len(outcome.written) == 1
    assert path.read_text() == right
    assert not path.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o644
    assert store.describe(identity)["whole"]
    assert not write(store)[1].changed


def test_a_write_that_fails_leaves_no_half_release(store, tmp_path, monkeypatch):
    written = []

    def fails(path, file):
        if written:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        path.write_bytes(file.data)

    monkeypatch.setattr(release, "_write_file", fails)
    with pytest.raises(ReleaseError) as caught:
        store.write(plan_release(files_of()[:2], IMAGES), {}, 5, activate=True)
    assert caught.value.reason == "io"
    assert "No space left" in str(caught.value)
    assert list((tmp_path / "releases").iterdir()) == []
    assert not (tmp_path / "staged").is_symlink()
    assert not (tmp_path / "current").is_symlink()


def test_nobody_ever_sees_a_link_that_leads_nowhere(store, tmp_path):
    write(store, "0", activate=True)
    missing, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            if not (tmp_path / "current" / "compose.yml").exists():
                missing.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(40):
        write(store, str(number), keep=2, activate=True)
    stop.set()
    watcher.join()
    assert missing == []


def test_switching_keeps_what_was_current_as_previous(store):
    first, _ = write(store, "1", activate=True)
    second, _ = write(store, "2")
    assert (store.linked("staged"), store.linked("current"), store.linked("previous")) == (
        second,
        first,
        None,
    )
    chosen, outcome = store.activate(None)
    assert chosen == second
    assert outcome.changed
    assert (store.linked("current"), store.linked("previous")) == (second, first)
    assert not store.activate(second)[1].changed
    store.activate(first)  # a rollback is the same path
    assert [store.linked(link) for link in ("current", "previous", "staged")] == [first, second, first]


def test_a_damaged_or_unknown_release_is_not_switched_to(store, tmp_path):
    with pytest.raises(ReleaseError, match="there is no staged release"):
        store.activate(None)
    identity, _ = write(store)
    (tmp_path / "releases" / identity / "compose.yml").write_text("by hand")
    with pytest.raises(ReleaseError) as caught:
        store.activate(identity)
    assert caught.value.reason == "damaged"
    with pytest.raises(ReleaseError) as caught:
        store.activate("r-000000000000")
    assert caught.value.reason == "no_release"
    assert identity in str(caught.value)
    with pytest.raises(ReleaseError):
        store.activate("../../etc")


def test_the_oldest_are_pruned_but_never_one_that_is_linked(store, tmp_path):
    first, _ = write(store, "1", edge="a", activate=True)
    second, _ = write(store, "2", edge="b", activate=True)
    third, _ = write(store, "3", edge="a")
    fourth, outcome = write(store, "4", edge="c", keep=1)
    assert outcome.pruned == [f"releases/{third}"]
    assert {entry["id"] for entry in store.releases()} == {first, second, fourth}
    fifth, outcome = write(store, "5", edge="d", keep=1, activate=True)
    # first is no longer previous; the tree a was its alone by now.
    assert set(outcome.pruned) == {f"releases/{first}", "edge/a", f"releases/{fourth}", "edge/c"}
    assert {entry["id"] for entry in store.releases()} == {second, fifth}
    assert sorted(path.name for path in (tmp_path / "edge").iterdir()) == ["b", "d"]


def test_what_no_release_has_written_is_never_pruned(store, tmp_path):
    for foreign in ("edge/state/1.down", "edge/certificates/key.pem", "secrets/x/y"):
        path = tmp_path / foreign
        path.parent.mkdir(parents=True)
        path.write_text("keep me")
    for text in ("1", "2", "3"):
        write(store, text, edge=text, keep=1, activate=True)
    assert (tmp_path / "edge/state/1.down").exists()
    assert (tmp_path / "edge/certificates/key.pem").exists()
    assert (tmp_path / "secrets/x/y").exists()


def test_a_prune_that_fails_is_only_a_warning(store, monkeypatch):
    write(store, "1")

    def fails(path, **_):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(release.shutil, "rmtree", fails)
    with monkeypatch.context() as patch:
        patch.setattr(
            release.shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else fails(path)
        )
        _, outcome = write(store, "2", keep=1)
    assert outcome.warnings
    assert "could not be removed" in outcome.warnings[0]


def test_images_of_the_release_that_is_there(store):
    with pytest.raises(ReleaseError) as caught:
        store.known_images()
    assert caught.value.reason == "no_images"
    assert "--tags build,push,stack" in str(caught.value)
    write(store, activate=True)
    assert store.known_images() == IMAGES
    newer = {"webhook-api": "x@sha256:2"}
    write(store, images=newer)
    assert store.known_images() == newer


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../x/y/z", "@release@/../../x", "x", "edge/x", "@release@", "releases/r-1/x", "secrets/a/b",
     "current/a/b", "@release@/release.json", ""],
)  # fmt: skip
def test_paths_that_are_refused(path):
    with pytest.raises(ReleaseError) as caught:
        plan_release([WantedFile(path, "")], {})
    assert caught.value.reason == "bad_path"


def test_contents_that_are_refused():
    with pytest.raises(ReleaseError, match="shared by releases"):
        plan_release([WantedFile("edge/h/nginx.conf", "@release@")], {})
    with pytest.raises(ReleaseError, match="known: none"):
        plan_release([WantedFile("@release@/x", "@image:webhook-api@")], {})
    with pytest.raises(ReleaseError, match="given twice"):
        plan_release([WantedFile("@release@/x", ""), WantedFile("@release@/x", "")], {})


def test_an_unknown_owner_is_named_before_anything_is_written(store, tmp_path):
    plan = plan_release([WantedFile("@release@/x", "", owner="no-such-user")], {})
    with pytest.raises(ReleaseError) as caught:
        store.write(plan, {}, 5, activate=False)
    assert caught.value.reason == "unknown_owner"
    assert "no-such-user" in str(caught.value)
    assert not (tmp_path / "staged").is_symlink()


def test_the_diff_is_against_the_release_that_serves(store):
    write(store, "old", edge="h1", activate=True)
    plan = plan_release([*files_of("new", "h2")[:1], *files_of("new", "h2")[2:]], IMAGES)
    diff = store.write(plan, {}, 5, activate=False).diff
    by_name = {entry["after_header"].split("/")[-1]: entry for entry in diff}
    assert by_name["compose.yml"]["before"].endswith("old\n")
    assert by_name["compose.yml"]["after"].endswith("new\n")
    assert by_name["nginx.conf"]["before"] == "conf h1\n"
    assert by_name["nginx.conf"]["after"] == "conf h2\n"
    assert by_name["prod.env"]["after"] == ""
    assert "sha256" in by_name["prod.env"]["before"]
    assert by_name["staged"]["after"] == f"{plan.id}\n"


def test_the_diff_can_hide_a_file(store):
    plan = plan_release([WantedFile("@release@/x", "delicate", show=False)], {})
    diff = store.write(plan, {}, 5, activate=False).diff
    assert "delicate" not in json.dumps(diff)
    assert "sha256" in json.dumps(diff)


def test_a_leftover_of_a_killed_run_goes_away(store, tmp_path):
    leftover = tmp_path / "releases" / ".tmp-r-000000000000-1"
    leftover.mkdir(parents=True)
    write(store)
    assert not leftover.exists()


def test_a_link_name_that_is_taken_by_a_directory(store, tmp_path):
    (tmp_path / "staged").mkdir()
    with pytest.raises(ReleaseError, match="is not a link"):
        write(store)
