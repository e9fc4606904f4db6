"""The secrets of before: what a rotation has replaced, until a release has proven what replaced it.

All releases of a site mount the same files, so a release that fails because of a new secret can only be gone back from
with the old one. Layout, in the directory of the secrets::

    .before/            for root alone
    .before/.release    id of the release that was proven with what is kept
    .before/<name>      the file that was replaced; an empty one: none stood there

A kept file is the replaced file itself (a link to it), with its owner: a container that runs goes on reading it, and has
the file that stands when it is put back.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

from ansible.module_utils.whole_files import read_file, remove_file, sync_directory, write_file

BEFORE = ".before"
RELEASE = ".release"
#: What is being removed is called so: from then on nothing of it is kept.
GONE = ".before-gone"
_SWAP = ".swap-"


class KeptSecrets:
    """What is kept below the directory of the secrets. Everything may be killed anywhere and done again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._place = directory / BEFORE

    # Looking

    def release(self) -> str:
        """The release that was proven with what is kept; empty where nothing is kept."""
        found = read_file(self._place / RELEASE) if self._stands() else None
        return found[0].strip() if found else ""

    def names(self) -> list[str]:
        """Names of the secrets of which something is kept."""
        if not self.release():
            return []
        files = (path.relative_to(self._place) for path in self._place.rglob("*") if not path.is_dir())
        return sorted(str(path) for path in files if not path.name.startswith("."))

    def kept(self, name: str) -> Path:
        """Where a kept file lies, whether there is one or not."""
        return self._place / name

    # Keeping

    def keep(self, name: str, release: str) -> None:
        """Keep what stands under a name before it is replaced, unless something is kept already for this release.

        What another release was proven with is of no use any more, and goes.
        """
        if self.release() != release:
            self.forget()
            self._private(self._place)
            write_file(self._place / RELEASE, f"{release}\n", mode=0o400)
        place = self.kept(name)
        for directory in reversed(place.relative_to(self._place).parents[:-1]):
            self._private(self._place / directory)
        with suppress(FileExistsError):
            _link_or_mark(self.directory / name, place)
        sync_directory(place.parent)

    def belong_to(self, release: str) -> None:
        """From now on what is kept is what that release was proven with."""
        if self.release() not in ("", release):
            write_file(self._place / RELEASE, f"{release}\n", mode=0o400)

    # The ends

    def put_back(self, needed: Collection[str] = ()) -> list[str]:
        """Let every kept file stand again, each by one rename. Their names.

        What did not stand before goes, unless it is `needed`: a container could not be started without it.
        """
        names = self.names()
        for name in names:
            self._put_back(name, needed)
        self.forget()
        return names

    def put_back_one(self, name: str) -> None:
        """Let one of the kept files stand again; the others stay kept."""
        self._put_back(name, ())
        if not self.names():
            self.forget()

    def swap(self, release: str, needed: Collection[str] = ()) -> list[str]:
        """Put back as `put_back` does, and keep in its place what stood until now, which `release` was proven with."""
        names = self.names()
        for name in names:
            place = self.kept(name)
            beside = place.with_name(f"{_SWAP}{place.name}")
            remove_file(beside)
            _link_or_mark(self.directory / name, beside)
            self._put_back(name, needed)
            os.rename(beside, place)
            sync_directory(place.parent)
        self.belong_to(release)
        return names

    def forget(self) -> list[str]:
        """Remove all that is kept, by one rename. The names of what it was."""
        names, gone = self.names(), self.directory / GONE
        _remove(gone)
        if os.path.lexists(self._place):
            os.rename(self._place, gone)
            sync_directory(self.directory)
            _remove(gone)
        return names

    # Inside

    def _put_back(self, name: str, needed: Collection[str]) -> None:
        place, target = self.kept(name), self.directory / name
        if place.lstat().st_size:
            os.rename(place, target)
            sync_directory(target.parent)
        elif name not in needed:
            remove_file(target)
        # Two names of one file are left as they are by a rename.
        remove_file(place)

    def _stands(self) -> bool:
        try:
            return stat.S_ISDIR(self._place.lstat().st_mode)
        except OSError:
            return False

    @staticmethod
    def _private(directory: Path) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        directory.chmod(0o700)


def _link_or_mark(source: Path, place: Path) -> None:
    """The same file under another name; an empty one where there is none. FileExistsError where something is."""
    try:
        os.link(source, place, follow_symlinks=False)
    except FileNotFoundError:
        os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400))


def _remove(path: Path) -> None:
    """A directory with all that is in it, or whatever else has its name."""
    if path.is_dir() and not path.is_symlink():
        rmtree(path)
    else:
        remove_file(path)
