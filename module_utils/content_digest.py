"""What an image is made of, as one digest: the files of its build context and everything else that decides its content.

Two machines with the same source get the same digest; a file that `.dockerignore` keeps out of the build has no part
in it. The files that were digested are copied to a stage, checked while they are copied, and the image is built from
the stage. So a tag can't stand for anything but what it was computed from, even when a file changes meanwhile.

Contract for `.dockerignore`: https://docs.docker.com/build/concepts/context/#dockerignore-files and moby/patternmatcher.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: By-products of tools. They never belong to an image, whatever `.dockerignore` says.
ALWAYS_IGNORED = (
    ".git",
    "**/__pycache__",
    "**/*.py[co]",
    "**/.pytest_cache",
    "**/.mypy_cache",
    "**/.ruff_cache",
    "**/*.swp",
    "**/.DS_Store",
)
#: Enters every digest: raise it when the way of building changes what comes out of the same source.
SCHEME = "aisha-content/1"
TAG_LENGTH = 16
#: Modification time of all staged files: 1980-01-01, the earliest that zip archives (wheels) can hold.
STAGED_MTIME = 315532800


class ContentError(Exception):
    """A build context can't be digested.

    `reason`: no_context, no_dockerfile, unreadable, outside_context, changed. `str()` gives fault and remedy.
    """

    def __init__(self, reason: str, message: str, remedy: str) -> None:
        super().__init__(f"{message}. {remedy}")
        self.reason = reason
        self.message = message
        self.remedy = remedy


@dataclass(frozen=True)
class IgnoreRule:
    """One line of an ignore file: paths that match are left out, or (`negated`) taken in again."""

    expression: re.Pattern[str]
    negated: bool


@dataclass(frozen=True, order=True)
class Entry:
    """One file or symbolic link of a context. `sha256` is that of the content, or of the link's target."""

    path: str
    kind: str
    executable: bool
    sha256: str


def _expression(pattern: str) -> re.Pattern[str]:
    """The regular expression for a Docker pattern: `*` and `?` stop at `/`, `**` does not, `[…]` is a class."""
    parts: list[str] = []
    rest = pattern
    while rest:
        if rest.startswith("**"):
            rest = rest[2:].removeprefix("/")
            parts.append("(?:.*/)?" if rest else ".*")
            continue
        character, rest = rest[0], rest[1:]
        if character == "*":
            parts.append("[^/]*")
        elif character == "?":
            parts.append("[^/]")
        elif character == "\\" and rest:
            parts.append(re.escape(rest[0]))
            rest = rest[1:]
        elif character == "[" and "]" in rest[1:]:
            end = rest.index("]", 1)
            parts.append("[" + rest[:end].replace("\\", "\\\\") + "]")
            rest = rest[end + 1 :]
        else:
            parts.append(re.escape(character))
    return re.compile("".join(parts), re.DOTALL)


def ignore_rules(text: str) -> list[IgnoreRule]:
    """The rules of an ignore file, in order. Comments, empty lines and `.` say nothing."""
    rules = []
    for line in text.removeprefix("\ufeff").splitlines():
        if line.startswith("#"):
            continue
        pattern = line.strip()
        negated = pattern.startswith("!")
        pattern = pattern.removeprefix("!").strip()
        if not pattern:
            continue
        pattern = posixpath.normpath(pattern).lstrip("/")
        if pattern and pattern != ".":
            rules.append(IgnoreRule(_expression(pattern), negated))
    return rules


def is_ignored(path: str, rules: Sequence[IgnoreRule]) -> bool:
    """Whether a path (relative, with `/`) is left out: the last rule that matches it or a directory above decides."""
    parts = path.split("/")
    names = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    ignored = False
    for rule in rules:
        if rule.negated == ignored and any(rule.expression.fullmatch(name) for name in names):
            ignored = not rule.negated
    return ignored


def load_rules(context: Path, dockerfile: Path) -> list[IgnoreRule]:
    """The rules for a build: of `DOCKERFILE.dockerignore` where it exists, otherwise of the context's `.dockerignore`."""
    for candidate in (dockerfile.with_name(dockerfile.name + ".dockerignore"), context / ".dockerignore"):
        if candidate.is_file():
            return ignore_rules(candidate.read_text(encoding="utf-8"))
    return []


def _walk(context: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All files and links below a directory with their relative paths; directories that are links are not entered."""
    pending = [""]
    while pending:
        directory = pending.pop()
        with os.scandir(context / directory) as entries:
            for entry in entries:
                path = f"{directory}/{entry.name}" if directory else entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path)
                elif entry.is_symlink() or entry.is_file(follow_symlinks=False):
                    yield path, entry


def _file_sha256(path: Path | str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _entry(path: str, found: os.DirEntry[str]) -> Entry:
    if found.is_symlink():
        target = os.readlink(found.path)
        return Entry(path, "link", False, hashlib.sha256(os.fsencode(target)).hexdigest())
    executable = bool(found.stat(follow_symlinks=False).st_mode & 0o111)
    return Entry(path, "file", executable, _file_sha256(found.path))


def read_context(context: Path, dockerfile: Path) -> list[Entry]:
    """The files of a build context that the build may see, sorted by path.

    Only what an image gets from them counts: path, content, and whether the file may be executed. Owner, time and
    the other mode bits differ from one checkout to the next, and so do empty directories.
    """
    if not context.is_dir():
        raise ContentError(
            "no_context", f"There is no directory {context} to build from", "Give the context's path"
        )
    if not dockerfile.is_file():
        raise ContentError(
            "no_dockerfile", f"There is no Dockerfile {dockerfile}", "Give its path as dockerfile"
        )
    try:
        ignored = load_rules(context, dockerfile)
        always = ignore_rules("\n".join(ALWAYS_IGNORED))
        entries = [
            _entry(path, found)
            for path, found in _walk(context)
            if not is_ignored(path, ignored) and not is_ignored(path, always)
        ]
    except (OSError, UnicodeDecodeError, re.error) as error:
        raise ContentError(
            "unreadable", f"The build context {context} can't be read: {error}", "Make it readable"
        ) from error
    return sorted(entries)


def content_digest(
    entries: Sequence[Entry],
    *,
    dockerfile: str,
    base: str,
    target: str = "",
    args: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
) -> str:
    """The SHA-256 (64 hexadecimal digits) of everything that decides an image's content.

    :param dockerfile: the Dockerfile's text.
    :param base: the identity of the base image's content, not its name.
    :param args: build arguments before `@tag@` is replaced.
    :param labels: labels that are the same in every build of the same source; not times or commits.
    """
    document = {
        "scheme": SCHEME,
        "files": [[e.path, e.kind, e.executable, e.sha256] for e in sorted(entries)],
        "dockerfile": dockerfile,
        "base": base,
        "target": target,
        "args": sorted((args or {}).items()),
        "labels": sorted((labels or {}).items()),
    }
    # surrogateescape: a file name need not be UTF-8
    return hashlib.sha256(json.dumps(document).encode("utf-8", "surrogateescape")).hexdigest()


def content_tag(digest: str) -> str:
    """The image tag for a content digest, e.g. ``c-0123456789abcdef``."""
    return f"c-{digest[:TAG_LENGTH]}"


def stage(context: Path, entries: Sequence[Entry], destination: Path) -> None:
    """Copy exactly the digested files to `destination`, with modes and times that don't depend on the checkout.

    Raises `ContentError` (changed) when a file is no longer what was digested.
    """
    for entry in entries:
        source, target = context / entry.path, destination / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if entry.kind == "link":
                os.symlink(os.readlink(source), target)
                sha256 = hashlib.sha256(os.fsencode(os.readlink(target))).hexdigest()
            else:
                shutil.copyfile(source, target, follow_symlinks=False)
                sha256 = _file_sha256(target)
        except OSError as error:
            raise _changed(context, entry) from error
        if sha256 != entry.sha256:
            raise _changed(context, entry)
        if entry.kind == "file":
            target.chmod(0o755 if entry.executable else 0o644)
            os.utime(target, (STAGED_MTIME, STAGED_MTIME))
    for directory, _names, _files in os.walk(destination, topdown=False):
        os.chmod(directory, 0o755)  # noqa: S103  (a build context, readable by the builder)
        os.utime(directory, (STAGED_MTIME, STAGED_MTIME))


def _changed(context: Path, entry: Entry) -> ContentError:
    return ContentError(
        "changed",
        f"{context / entry.path} changed between the digest and the build",
        "Run again when nothing writes to the build context",
    )
