"""What a replaced secret leaves behind until its successor is proven: who may read it, how it comes back, when it goes."""

from __future__ import annotations

import os
import stat

import pytest
from ansible.module_utils.kept_secrets import KeptSecrets

OLD, NEW = "r-000000000001", "r-000000000002"


@pytest.fixture
def home(tmp_path):
    """A directory of secrets with one of them."""
    (tmp_path / "api").mkdir()
    (tmp_path / "api/key").write_text("old")
    (tmp_path / "api/key").chmod(0o400)
    return tmp_path


def replace(home, name, text):
    (home / "new").write_text(text)
    os.rename(home / "new", home / name)


def names(home):
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


def inode(path):
    return path.stat().st_ino


def test_what_is_replaced_is_kept_for_root_alone_and_as_the_same_file(home):
    before = inode(home / "api/key")
    kept = KeptSecrets(home)
    kept.keep("api/key", OLD)
    replace(home, "api/key", "new")
    assert (kept.release(), kept.names()) == (OLD, ["api/key"])
    assert inode(home / ".before/api/key") == before, "a container that runs has this very file mounted"
    assert stat.S_IMODE((home / ".before/api/key").stat().st_mode) == 0o400
    for directory in (home / ".before", home / ".before/api"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_the_first_one_kept_stays(home):
    kept = KeptSecrets(home)
    kept.keep("api/key", OLD)
    replace(home, "api/key", "bad")
    kept.keep("api/key", OLD)
    replace(home, "api/key", "bad as well")
    assert (home / ".before/api/key").read_text() == "old"


def test_it_comes_back_as_the_same_file_and_nothing_is_left(home):
    before = inode(home / "api/key")
    kept = KeptSecrets(home)
    kept.keep("api/key", OLD)
    replace(home, "api/key", "bad")
    assert kept.put_back() == ["api/key"]
    assert (home / "api/key").read_text() == "old"
    assert inode(home / "api/key") == before
    assert names(home) == ["api/key"]
    assert (kept.names(), kept.release()) == ([], "")
    assert not (home / ".before").exists()


def test_killed_between_keeping_and_replacing_it_still_comes_back_and_goes(home):
    """Both names are one file then, and a rename of one onto the other does nothing."""
    kept = KeptSecrets(home)
    kept.keep("api/key", OLD)
    assert kept.put_back() == ["api/key"]
    assert names(home) == ["api/key"]


def test_what_did_not_stand_before_goes_again_unless_it_is_needed(home):
    kept = KeptSecrets(home)
    for name in ("api/more", "api/needed"):
        kept.keep(name, OLD)
        replace(home, name, "new")
    assert kept.put_back(needed=["api/needed"]) == ["api/more", "api/needed"]
    assert names(home) == ["api/key", "api/needed"]


def test_what_is_proven_is_forgotten(home):
    kept = KeptSecrets(home)
    kept.keep("api/key", OLD)
    replace(home, "api/key", "new")
    assert kept.forget() == ["api/key"]
    assert names(home) == ["api/key"]
    assert (home / "api/key").read_text() == "new"
    assert kept.forget() == []


def test_a_kill_while_it_is_forgotten_leaves_all_of_it_or_nothing(home, monkeypatch):
    kept = KeptSecrets(home)
    kept.keep("api/key", OLD)
    kept.keep("api/more", OLD)
    with monkeypatch.context() as patch:
        patch.setattr(
            "ansible.module_utils.kept_secrets.rmtree", lambda _path: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            kept.forget()
    assert kept.names() == []
    assert kept.forget() == []
    assert names(home) == ["api/key"], "the next one takes away what was left"


def test_what_another_release_was_proven_with_is_not_kept_on(home):
    """A run that was killed after its last step: the release that serves now was proven with what stands now."""
    kept = KeptSecrets(home)
    kept.keep("api/key", OLD)
    kept.keep("api/gone", OLD)
    replace(home, "api/key", "good")
    kept.keep("api/key", NEW)
    replace(home, "api/key", "bad")
    assert (kept.release(), kept.names()) == (NEW, ["api/key"])
    kept.put_back()
    assert (home / "api/key").read_text() == "good"


def test_a_directory_that_names_no_release_holds_nothing_that_counts(home):
    (home / ".before").mkdir(mode=0o755)
    kept = KeptSecrets(home)
    assert kept.release() == ""
    kept.keep("api/key", OLD)
    assert (kept.release(), kept.names()) == (OLD, ["api/key"])
    assert stat.S_IMODE((home / ".before").stat().st_mode) == 0o700


def test_one_alone_comes_back(home):
    kept = KeptSecrets(home)
    kept.keep("api/key", OLD)
    kept.keep("api/more", OLD)
    replace(home, "api/key", "bad")
    kept.put_back_one("api/key")
    assert (home / "api/key").read_text() == "old"
    assert kept.names() == ["api/more"]
    kept.put_back_one("api/more")
    assert not (home / ".before").exists()


def test_two_releases_change_places(home):
    """A host goes back with the others: what it leaves must be there if that fails."""
    kept = KeptSecrets(home)
    kept.keep("api/key", OLD)
    kept.keep("api/more", OLD)
    replace(home, "api/key", "new")
    replace(home, "api/more", "more")
    assert kept.swap(NEW) == ["api/key", "api/more"]
    assert (home / "api/key").read_text() == "old"
    assert not (home / "api/more").exists()
    assert kept.release() == NEW
    assert kept.put_back() == ["api/key", "api/more"]
    assert (home / "api/key").read_text() == "new"
    assert (home / "api/more").read_text() == "more"


def test_what_is_kept_can_belong_to_the_next_release(home):
    kept = KeptSecrets(home)
    kept.belong_to(NEW)
    assert not (home / ".before").exists()
    kept.keep("api/key", OLD)
    kept.belong_to(NEW)
    assert (kept.release(), kept.names()) == (NEW, ["api/key"])


def test_a_link_in_the_place_of_a_directory_is_not_followed(home, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "precious").touch()
    (home / ".before").symlink_to(elsewhere)
    kept = KeptSecrets(home)
    assert kept.names() == []
    kept.keep("api/key", OLD)
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]
    assert stat.S_ISDIR((home / ".before").lstat().st_mode)
