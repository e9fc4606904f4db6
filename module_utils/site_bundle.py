"""Bundles: one tar with all that a site without internet and without a registry is deployed from.

    project/      the project itself
    wheels/       what the controller's environment is made of
    images/       an OCI layout: the release's images, byte for byte as the registry has them
    engine.tar    images that are known by a tag (base image, embedded backends), as `docker save` writes them
    bundle.json   what it is
    SHA256SUMS    of everything but the blobs, which are named by their digests

The checksums come last: a bundle that was cut off has none.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from ansible.module_utils.image_store import REPOSITORY, TAG, BlobRegistry, Pinned, Saver
from ansible.module_utils.site_backup import run_into

FORMAT = 1
MANIFEST = "bundle.json"
SUMS = "SHA256SUMS"
ENGINE = "engine.tar"
IMAGES = "images/"
PROJECT = "project/"
WHEELS = "wheels/"
SAVE_SECONDS = 1800.0
_BLOCK = 1024 * 1024
#: By-products of a directory that is no git checkout.
_LEFT_OUT = frozenset(
    {".git", ".venv", ".cache", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
)
#: What lies in a project and is none of it: other bundles, keys and certificates, a site's vault. As .gitignore says.
_NOT_SHARED = ("*-bundle.tar", ".*.making", ".engine-*", "*.pem", "*.key", "vault.yml")


class BundleError(Exception):
    """A bundle cannot be written or used. `reason`: damaged, newer, missing. `str()` gives fault and remedy."""

    def __init__(self, reason: str, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}. {remedy}" if remedy else message)
        self.reason = reason


@dataclass(frozen=True)
class Contents:
    """What is to be in a bundle."""

    project: Path
    wheels: Path | None = None
    images: Sequence[Pinned] = ()
    registries: Mapping[str, BlobRegistry] = field(default_factory=dict)
    archives: Sequence[str] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


class _Digesting:
    """A stream whose digest is known once it was read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._digest.update(data)
        return data

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class _Bundle:
    """A tar on its way, and the checksums of what is in it."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.sums: dict[str, str] = {}

    def file(self, name: str, path: Path) -> None:
        member = tarfile.TarInfo(name)
        status = path.lstat()
        member.mode, member.mtime = status.st_mode & 0o777, int(status.st_mtime)
        if path.is_symlink():
            member.type, member.linkname = tarfile.SYMTYPE, os.readlink(path)
            self._tar.addfile(member)
            return
        with path.open("rb") as stream:
            member.size = os.fstat(stream.fileno()).st_size
            source = _Digesting(stream)
            self._tar.addfile(member, source)
        self.sums[name] = source.sha256

    def text(self, name: str, text: str) -> None:
        data = text.encode()
        member = tarfile.TarInfo(name)
        member.size, member.mode, member.mtime = len(data), 0o644, int(datetime.now(UTC).timestamp())
        self._tar.addfile(member, io.BytesIO(data))
        self.sums[name] = hashlib.sha256(data).hexdigest()


def write(path: Path, contents: Contents) -> dict[str, Any]:
    """Make a bundle; its manifest. Until it is whole it has another name, and a failed one is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".{path.name}.making")
    try:
        with tarfile.open(making, "w:", format=tarfile.PAX_FORMAT) as tar:
            manifest = _write(tar, path.parent, contents, (path, making))
        os.replace(making, path)
    finally:
        making.unlink(missing_ok=True)
    return manifest


def _write(tar: tarfile.TarFile, place: Path, contents: Contents, own: Collection[Path]) -> dict[str, Any]:
    bundle = _Bundle(tar)
    for name in project_files(contents.project, own):
        bundle.file(f"{PROJECT}{name}", contents.project / name)
    wheels = sorted(contents.wheels.glob("*.whl")) if contents.wheels else []
    for wheel in wheels:
        bundle.file(f"{WHEELS}{wheel.name}", wheel)
    saver = Saver(tar, IMAGES)
    for registry, client in contents.registries.items():
        saver.save(client, [image for image in contents.images if image.registry == registry])
    entries = saver.finish()
    if contents.archives:
        _save(bundle, place, contents.archives)
    manifest = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": {
            entry["annotations"][REPOSITORY]: {
                "digest": entry["digest"],
                "tag": entry["annotations"][TAG],
            }
            for entry in entries
        },
        "archives": list(contents.archives),
        "wheels": [wheel.name for wheel in wheels],
        **contents.metadata,
    }
    bundle.text(MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    bundle.text(SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(bundle.sums.items())))
    return manifest


def _save(bundle: _Bundle, place: Path, tags: Sequence[str]) -> None:
    """`docker save` beside the bundle first: a tar wants to know a member's size before its content."""
    with tempfile.NamedTemporaryFile(dir=place, prefix=".engine-") as saved:
        run_into(["docker", "save", *tags], saved, SAVE_SECONDS)
        saved.flush()
        bundle.file(ENGINE, Path(saved.name))


def project_files(project: Path, without: Collection[Path] = ()) -> list[str]:
    """The files of the project, relative to it; none that the project does not share, and none of `without`."""
    own = {path.resolve() for path in without}
    names = [name for name in _names(project) if (project / name).resolve() not in own]
    return sorted(name for name in names if os.path.lexists(project / name))


def _names(project: Path) -> list[str]:
    known = _git_files(project, "--cached")
    if known is None:
        return [name for name in _all_files(project) if _shared(name)]
    others = _git_files(project, "--others", "--exclude-standard") or []
    return [name for name in known if Path(name).parts[0] not in _LEFT_OUT] + [
        name for name in others if _shared(name)
    ]


def _shared(name: str) -> bool:
    path = Path(name)
    return path.parts[0] not in _LEFT_OUT and not any(fnmatch(path.name, pattern) for pattern in _NOT_SHARED)


def _git_files(project: Path, *which: str) -> list[str] | None:
    """What git says of a checkout; None where there is none."""
    asked = subprocess.run(
        ["git", "-C", str(project), "ls-files", "-z", *which], capture_output=True, check=False
    )
    return [os.fsdecode(n) for n in asked.stdout.split(b"\0") if n] if asked.returncode == 0 else None


def _all_files(project: Path) -> Iterator[str]:
    for directory, folders, files in os.walk(project):
        folders[:] = [folder for folder in folders if folder not in _LEFT_OUT]
        for name in files:
            yield str(Path(directory, name).relative_to(project))


def read(path: Path) -> dict[str, Any]:
    """Prove a bundle from end to end; its manifest."""
    again = "Copy it again from where it was made"
    found: dict[str, str] = {}
    texts: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stream = tar.extractfile(member) if member.isreg() else None
                if stream is None:
                    continue
                content = stream.read() if member.name in (MANIFEST, SUMS) else b""
                if content:
                    texts[member.name] = content
                found[member.name] = hashlib.sha256(content).hexdigest() if content else _digest(stream)
    except FileNotFoundError as error:
        raise BundleError("missing", f"There is no bundle {path}", "Make one: make bundle") from error
    except (OSError, tarfile.TarError) as error:
        raise BundleError("damaged", f"{path} cannot be read: {error}", again) from error
    if SUMS not in texts or MANIFEST not in texts:
        raise BundleError("damaged", f"{path} was cut off: its checksums are missing", again)
    wrong = _differences(found, texts[SUMS].decode())
    if wrong:
        raise BundleError("damaged", f"{path} is damaged: {', '.join(wrong[:5])}", again)
    manifest: dict[str, Any] = json.loads(texts[MANIFEST])
    if int(manifest.get("format", 0)) > FORMAT:
        raise BundleError("newer", f"{path} has format {manifest['format']}", "Use the project that is in it")
    return manifest


def _digest(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := stream.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _differences(found: Mapping[str, str], sums: str) -> list[str]:
    wanted = {
        name: digest for digest, _, name in (line.partition("  ") for line in sums.splitlines()) if name
    }
    blobs = f"{IMAGES}blobs/sha256/"
    wanted |= {name: name.removeprefix(blobs) for name in found if name.startswith(blobs)}
    # What another file proves, or is proven by nothing but itself.
    known = set(wanted) | {SUMS, f"{IMAGES}index.json", f"{IMAGES}oci-layout"}
    wrong = [f"{name} is missing" for name in sorted(set(wanted) - set(found))]
    wrong += [
        f"{name} differs" for name, digest in sorted(wanted.items()) if found.get(name, digest) != digest
    ]
    return wrong + [f"{name} is not in {SUMS}" for name in sorted(set(found) - known)]
