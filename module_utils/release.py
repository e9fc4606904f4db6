"""Releases as directories: content-addressed, written whole or not at all, and switched by a link.

Layout under the site's directory::

    releases/<id>/…         the files of one release, and release.json, which describes it
    edge/<hash>/…           a shared tree: files that releases refer to, and that outlive one of them
    staged, current, previous   links to releases/<id>: what comes next, what serves, what served before

`plan_release` is pure: from wanted files and images to an id and final bytes. `ReleaseStore` does the rest.
"""

from __future__ import annotations

import fcntl
import grp
import hashlib
import json
import os
import pwd
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

TOKEN = "@release@"  # noqa: S105 - a placeholder, not a secret
IMAGE_TOKEN = re.compile(r"@image:([a-z0-9][a-z0-9._/-]*)@")
RELEASE_ID = re.compile(r"^r-[0-9a-f]{12}$")
DESCRIPTION = "release.json"
LINKS = ("current", "staged", "previous")
TEMPORARY = ".tmp-"


class ReleaseError(Exception):
    """A release cannot be made, read or switched to.

    `reason`: bad_path, bad_file, no_images, unknown_image, unknown_owner, no_release, damaged, io.
    """

    def __init__(self, reason: str, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}. {remedy}".strip() if remedy else message)
        self.reason = reason


@dataclass(frozen=True)
class WantedFile:
    """One file as it is asked for: path as the caller names it, text with its placeholders, octal mode."""

    path: str
    content: str
    mode: int = 0o644
    owner: str | None = None
    group: str | None = None
    show: bool = True


@dataclass(frozen=True)
class FinalFile:
    """One file as it will stand: its directory (relative to the site), its name there, its bytes."""

    wanted: WantedFile
    tree: str
    name: str
    data: bytes

    @property
    def location(self) -> str:
        """Path relative to the site's directory."""
        return f"{self.tree}/{self.name}"

    @property
    def label(self) -> str:
        """What stays the same from release to release: the path without the id or hash in it."""
        parts = self.location.split("/")
        return "/".join([*parts[:1], *parts[2:]])

    @property
    def sha256(self) -> str:
        """Digest of the bytes."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Plan:
    """A release that is wholly known, and not yet written."""

    id: str
    images: Mapping[str, str]
    files: tuple[FinalFile, ...]

    @property
    def tree(self) -> str:
        """The release's own directory, relative to the site."""
        return f"releases/{self.id}"

    @property
    def trees(self) -> list[str]:
        """All directories that its files stand in, the shared ones first: the release refers to them."""
        return [*sorted({file.tree for file in self.files} - {self.tree}), self.tree]


def split_path(path: str) -> tuple[str, str]:
    """(tree, name) of a wanted path; tree is the placeholder, or two parts such as ``edge/<hash>``."""
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or any(part.startswith(TEMPORARY) for part in parts):
        raise ReleaseError(
            "bad_path", f"{path!r} leaves the site's directory", "Give a path relative to it, without '..'"
        )
    if len(parts) >= 2 and parts[0] == TOKEN:
        if parts[1:] == (DESCRIPTION,):
            raise ReleaseError("bad_path", f"{DESCRIPTION} is written by the module itself", "Use metadata")
        return TOKEN, "/".join(parts[1:])
    if len(parts) >= 3 and parts[0] not in ("releases", "secrets", *LINKS):
        return "/".join(parts[:2]), "/".join(parts[2:])
    raise ReleaseError(
        "bad_path",
        f"{path!r} is neither inside the release nor in a shared tree",
        f"Write {TOKEN}/NAME, or DIRECTORY/HASH/NAME for what releases share",
    )


def plan_release(files: list[WantedFile], images: Mapping[str, str]) -> Plan:
    """Resolve the images' placeholders, take the digest, and only then put the id into the contents."""
    resolved = [(file, *split_path(file.path), _with_images(file, images)) for file in files]
    seen = {(tree, name) for _, tree, name, _ in resolved}
    if len(seen) != len(resolved):
        raise ReleaseError("bad_file", "one path is given twice", "Give each file once")
    for file, tree, _, content in resolved:
        if tree != TOKEN and TOKEN in content:
            raise ReleaseError(
                "bad_file",
                f"{file.path} is shared by releases, but has the id of one in it ({TOKEN})",
                "Move it into the release, or take the placeholder out",
            )
    identity = _release_id(
        [(f"{tree}/{name}", content, file.mode) for file, tree, name, content in resolved], images
    )
    own = f"releases/{identity}"
    return Plan(
        identity,
        dict(images),
        tuple(
            FinalFile(file, own if tree == TOKEN else tree, name, content.replace(TOKEN, identity).encode())
            for file, tree, name, content in resolved
        ),
    )


def _with_images(file: WantedFile, images: Mapping[str, str]) -> str:
    def reference(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in images:
            known = ", ".join(sorted(images)) or "none"
            raise ReleaseError(
                "unknown_image", f"{file.path} asks for image {name}; known: {known}", "Name it in 'images'"
            )
        return images[name]

    return IMAGE_TOKEN.sub(reference, file.content)


def _release_id(files: list[tuple[str, str, int]], images: Mapping[str, str]) -> str:
    content = {
        "files": sorted(
            [path, hashlib.sha256(text.encode()).hexdigest(), mode] for path, text, mode in files
        ),
        "images": dict(images),
    }
    return "r-" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@dataclass
class Outcome:
    """What was done (in check mode: what would be done)."""

    written: list[str] = field(default_factory=list)
    links: dict[str, tuple[str | None, str]] = field(default_factory=dict)
    pruned: list[str] = field(default_factory=list)
    diff: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Whether anything is another way than before."""
        return bool(self.written or self.links or self.pruned)


class ReleaseStore:
    """The releases under one site's directory. With `check`, it only says what it would do."""

    def __init__(
        self, path: str, *, check: bool = False, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self.root = Path(path)
        self._check = check
        self._now = now

    # Reading

    def linked(self, link: str) -> str | None:
        """The id that `current`, `staged` or `previous` names; None when it names no release."""
        try:
            identity = PurePosixPath(os.readlink(self.root / link)).name
        except OSError:
            return None
        return identity if (self.root / "releases" / identity).is_dir() else None

    def describe(self, identity: str) -> dict[str, Any] | None:
        """The description of a release with its path and whether all its files are whole; None if there is none."""
        directory = self.root / "releases" / identity
        if not RELEASE_ID.match(identity) or not directory.is_dir():
            return None
        try:
            found = json.loads((directory / DESCRIPTION).read_text())
            if not isinstance(found, dict) or not isinstance(found["files"], dict):
                raise ValueError
        except (OSError, ValueError, KeyError):
            created = datetime.fromtimestamp(directory.stat().st_mtime, UTC)
            found = {
                "created": created.isoformat(timespec="seconds"),
                "images": {},
                "files": {},
                "metadata": {},
            }
            return found | {"id": identity, "path": str(directory), "whole": False}
        whole = all(self._digest(name) == entry["sha256"] for name, entry in found["files"].items())
        return found | {"id": identity, "path": str(directory), "whole": whole}

    def releases(self) -> list[dict[str, Any]]:
        """All releases, the newest first, with the links that point to each."""
        links = {link: self.linked(link) for link in LINKS}
        try:
            names = os.listdir(self.root / "releases")
        except OSError:
            names = []
        releases = []
        for description in filter(None, (self.describe(name) for name in names)):
            releases.append(description | {link: links[link] == description["id"] for link in LINKS})
        return sorted(releases, key=lambda release: (str(release["created"]), release["id"]), reverse=True)

    def known_images(self) -> dict[str, str]:
        """The images of the staged release, or of the current one."""
        for link in ("staged", "current"):
            identity = self.linked(link)
            description = self.describe(identity) if identity else None
            if description and description["images"]:
                return dict(description["images"])
        raise ReleaseError(
            "no_images",
            "no images were given, and no release is there to take them from",
            "Build and push them in the same run (ansible-playbook site.yml, or --tags build,push,stack)",
        )

    # Writing

    def write(
        self,
        plan: Plan,
        metadata: Mapping[str, Any],
        keep: int,
        *,
        activate: bool,
        directories: Mapping[str, int] | None = None,
    ) -> Outcome:
        """Make the release and the directories beside it stand as planned, stage it (and make it current), and prune."""
        outcome = Outcome()
        with _io_errors(), self._locked():
            outcome.diff = self._diff(plan)
            for name, mode in (directories or {}).items():
                self._directory(name, mode, outcome)
            for tree in plan.trees:
                files = {file.name: file for file in plan.files if file.tree == tree}
                if tree == plan.tree:
                    self._write_release(plan, files, metadata, outcome)
                else:
                    self._write_tree(tree, files, outcome)
            self._link("staged", plan.id, outcome)
            if activate:
                self._make_current(plan.id, outcome)
            self._prune(plan, keep, outcome)
        if not outcome.changed:  # staged before, and not yet current: nothing that this run does
            outcome.diff = []
        return outcome

    def activate(self, identity: str | None) -> tuple[str, Outcome]:
        """Make a release (without an id: the staged one) the current one. Returns its id and what was done."""
        outcome = Outcome()
        chosen = self._switchable(identity or self.linked("staged"), identity)
        with _io_errors(), self._locked():
            self._link("staged", chosen, outcome)
            self._make_current(chosen, outcome)
        return chosen, outcome

    def _switchable(self, chosen: str | None, asked: str | None) -> str:
        description = self.describe(chosen) if chosen else None
        if not chosen or description is None:
            known = ", ".join(release["id"] for release in self.releases()) or "none"
            wanted = f"release {asked}" if asked else "staged release"
            raise ReleaseError("no_release", f"there is no {wanted} (there are: {known})", "Render it first")
        if not description["whole"]:
            raise ReleaseError(
                "damaged",
                f"files of release {chosen} are missing or were changed by hand",
                "Render it again (ansible-playbook site.yml --tags stack)",
            )
        return chosen

    def _make_current(self, identity: str, outcome: Outcome) -> None:
        before = self.linked("current")
        if before and before != identity:
            self._link("previous", before, outcome)
        self._link("current", identity, outcome)

    def _write_release(
        self, plan: Plan, files: dict[str, FinalFile], metadata: Mapping[str, Any], outcome: Outcome
    ) -> None:
        # Another run may have made this very release earlier: when, and from what, it says itself.
        known = self.describe(plan.id) or {}
        wanted: dict[str, dict[str, str]] = {
            file.location: {"sha256": file.sha256, "mode": f"{file.wanted.mode:04o}"} for file in plan.files
        }
        description = {
            "id": plan.id,
            "created": known.get("created") or self._now().isoformat(timespec="microseconds"),
            "images": dict(plan.images),
            "files": wanted,
            # What an older version of this project did not note yet is added.
            "metadata": {**metadata, **(known.get("metadata") or {})},
        }
        text = json.dumps(description, indent=2, sort_keys=True) + "\n"
        about = FinalFile(WantedFile(DESCRIPTION, text), plan.tree, DESCRIPTION, text.encode())
        self._write_tree(plan.tree, files | {DESCRIPTION: about}, outcome)

    def _write_tree(self, tree: str, files: dict[str, FinalFile], outcome: Outcome) -> None:
        """Make a directory whole: a new one appears complete by one rename, an old one is repaired file by file."""
        target = self.root / tree
        wrong = [name for name, file in files.items() if not _as_wanted(target / name, file)]
        outcome.written += [f"{tree}/{name}" for name in wrong]
        if self._check or not wrong:
            return
        if target.is_dir():
            for name in wrong:
                _write_file(target / name, files[name])
            return
        _make_directory(target.parent)
        temporary = target.parent / f"{TEMPORARY}{target.name}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        _make_directory(temporary)
        try:
            for name, file in files.items():
                _write_file(temporary / name, file)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(target.parent)

    def _directory(self, name: str, mode: int, outcome: Outcome) -> None:
        """A directory that is no part of a release, with its mode; what is in it is left alone."""
        if PurePosixPath(name).name != name or name in ("..", "releases", "secrets", *LINKS):
            raise ReleaseError(
                "bad_path", f"{name!r} cannot be a directory beside the releases", "Give a plain name"
            )
        path = self.root / name
        if path.is_dir() and stat.S_IMODE(path.stat().st_mode) == mode:
            return
        outcome.written.append(f"{name}/")
        before = f"{stat.S_IMODE(path.stat().st_mode):04o}\n" if path.is_dir() else ""
        outcome.diff.append(
            {
                "before_header": f"{name}/",
                "after_header": f"{name}/",
                "before": before,
                "after": f"{mode:04o}\n",
            }
        )
        if not self._check:
            _make_directory(path)
            path.chmod(mode)

    def _link(self, link: str, identity: str, outcome: Outcome) -> None:
        target, path = f"releases/{identity}", self.root / link
        before = os.readlink(path) if path.is_symlink() else None
        if before == target:
            return
        if path.exists() and not path.is_symlink():
            raise ReleaseError("io", f"{path} is not a link", "Move it away: the releases are switched by it")
        outcome.links[link] = (PurePosixPath(before).name if before else None, identity)
        if self._check:
            return
        temporary = self.root / f"{TEMPORARY}{link}-{os.getpid()}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, path)
        _sync(self.root)

    def _prune(self, plan: Plan, keep: int, outcome: Outcome) -> None:
        """Remove the oldest releases. What fails here is only a warning: the release itself stands."""
        # What the links name when all is done: in check mode they still point to where they did.
        after = (outcome.links.get(link, (None, self.linked(link)))[1] for link in LINKS)
        safe = {plan.id, *filter(None, after)}
        releases = [release for release in self.releases() if release["id"] != plan.id]
        old = [release for release in releases[max(keep - 1, 0) :] if release["id"] not in safe]
        kept = [release for release in releases if release not in old]
        used = {_tree_of(name) for release in kept for name in release["files"]} | set(plan.trees)
        for release in reversed(old):
            trees = {_tree_of(name) for name in release["files"]} - used
            # The release last: until then its description names the trees, and the next run can go on.
            for tree in [*sorted(trees - {f"releases/{release['id']}"}), f"releases/{release['id']}"]:
                self._remove(tree, outcome)
        if not self._check:
            for parent in {(self.root / tree).parent for tree in plan.trees}:
                for leftover in parent.glob(f"{TEMPORARY}*"):  # of a run that was killed
                    shutil.rmtree(leftover, ignore_errors=True)

    def _remove(self, tree: str, outcome: Outcome) -> None:
        path = self.root / tree
        if not path.is_dir():
            return
        if not self._check:
            try:
                shutil.rmtree(path)
            except OSError as error:
                outcome.warnings.append(f"the old {tree} could not be removed: {error}")
                return
        outcome.pruned.append(tree)

    # Differences

    def _diff(self, plan: Plan) -> list[dict[str, str]]:
        """Before and after of each file: against the release that serves, or itself when that is the same."""
        reference = self.linked("current") or self.linked("staged")
        description = (self.describe(reference) if reference else None) or {"files": {}}
        before = {_label(name): name for name in description["files"]}
        pairs = []
        for file in plan.files:
            name = before.pop(file.label, file.location)
            if reference in (None, plan.id):
                name = file.location
            old = self._read(name)
            if old != file.data:
                pairs.append(_difference(name, file.location, old, file.data, show=file.wanted.show))
        # Of what only the old release has, nobody says any more whether it may be shown.
        pairs += [_difference(name, "", self._read(name), None, show=False) for name in before.values()]
        staged = self.linked("staged")
        if staged != plan.id:
            pairs.append(
                {
                    "before_header": "staged",
                    "after_header": "staged",
                    "before": f"{staged}\n" if staged else "",
                    "after": f"{plan.id}\n",
                }
            )
        return pairs

    def _read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except OSError:
            return None

    def _digest(self, name: str) -> str:
        content = self._read(name)
        return "" if content is None else hashlib.sha256(content).hexdigest()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Two runs at once write one after the other. The lock goes away with the process."""
        if self._check:
            yield
            return
        _make_directory(self.root / "releases")
        descriptor = os.open(self.root / "releases", os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _tree_of(location: str) -> str:
    return "/".join(location.split("/")[:2])


def _label(location: str) -> str:
    parts = location.split("/")
    return "/".join([*parts[:1], *parts[2:]])


def _difference(
    old_name: str, new_name: str, old: bytes | None, new: bytes | None, *, show: bool
) -> dict[str, str]:
    def text(data: bytes | None) -> str:
        if data is None:
            return ""
        if not show:
            return f"(content not shown) sha256 {hashlib.sha256(data).hexdigest()}\n"
        return data.decode("utf-8", "replace")

    return {
        "before_header": old_name or new_name,
        "after_header": new_name or old_name,
        "before": text(old),
        "after": text(new),
    }


def _ids(file: WantedFile) -> tuple[int, int]:
    """Numeric owner and group; -1 leaves one as it is."""
    try:
        owner = -1 if file.owner is None else int(file.owner) if file.owner.isdigit() else _uid(file.owner)
        group = -1 if file.group is None else int(file.group) if file.group.isdigit() else _gid(file.group)
    except KeyError as error:
        raise ReleaseError(
            "unknown_owner", f"{file.path}: {error.args[0]}", "Give a number, or create it first"
        ) from error
    return owner, group


def _uid(name: str) -> int:
    return pwd.getpwnam(name).pw_uid


def _gid(name: str) -> int:
    return grp.getgrnam(name).gr_gid


def _as_wanted(path: Path, file: FinalFile) -> bool:
    owner, group = _ids(file.wanted)
    try:
        found = path.lstat()
        return (
            stat.S_ISREG(found.st_mode)
            and stat.S_IMODE(found.st_mode) == file.wanted.mode
            and owner in (-1, found.st_uid)
            and group in (-1, found.st_gid)
            and path.read_bytes() == file.data
        )
    except OSError:
        return False


def _write_file(path: Path, file: FinalFile) -> None:
    """Write beside, then rename over: nobody ever reads half a file."""
    _make_directory(path.parent)
    if path.is_dir() and not path.is_symlink():
        raise ReleaseError("io", f"{path} is a directory where a file belongs", "Move it away")
    temporary = path.parent / f"{TEMPORARY}{path.name}-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(file.data)
            os.fchown(handle.fileno(), *_ids(file.wanted))
            os.fchmod(handle.fileno(), file.wanted.mode)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _make_directory(path: Path) -> None:
    """A directory, and those above it, that containers may enter whatever the umask is."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        directory.chmod(0o755)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _io_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ReleaseError(
            "io",
            f"cannot write the release: {error.strerror or error}{where}",
            "Check free space and rights; nothing that serves was changed",
        ) from error
