"""Which images nobody needs any more, in a registry and in an engine, and how they go away.

An image is needed when a release that is kept names it, on any host. Beyond those the newest ones stay. Everything else
that this project made goes: in the registry by digest, in the engine by its names and never by force. What cannot be
removed is reported, and is never a reason to call a deployment bad.

`registry_plan` and `engine_plan` are pure. `RegistryPrune` and `EnginePrune` ask, and do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ansible.module_utils.docker_cli import Docker, DockerError, Result, last_lines
from ansible.module_utils.registry_api import RegistryError

CONTENT_LABEL = "org.aisha.content.digest"
CREATED_LABEL = "org.opencontainers.image.created"
DESCRIPTION = "release.json"
_CONTENT_TAG = re.compile(r"^c-[0-9a-f]{16}$")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
#: Tags under which signatures and bills of materials of an image stand (cosign, OCI referrers).
_ATTACHED = re.compile(r"^sha256-([0-9a-f]{64})(?:\.[a-z]+)?$")


class PruneError(Exception):
    """Nothing can be pruned safely. `reason`: damaged_release. `str()` gives fault and remedy."""

    def __init__(self, reason: str, message: str, remedy: str) -> None:
        super().__init__(f"{message}. {remedy}")
        self.reason = reason


@dataclass
class Outcome:
    """What was (in check mode, would be) removed, how many stay, and what could not be removed."""

    removed: list[str] = field(default_factory=list)
    kept: int = 0
    faults: list[str] = field(default_factory=list)


# -- the registry -----------------------------------------------------------------------------------------------------


class Registry(Protocol):
    """What is needed of a registry; `registry_api.RegistryClient` has it."""

    def tags(self, repository: str) -> list[str]: ...  # noqa: D102

    def find_digest(self, repository: str, reference: str) -> str | None: ...  # noqa: D102

    def labels(self, repository: str, reference: str) -> dict[str, str]: ...  # noqa: D102

    def manifest(self, repository: str, reference: str) -> dict[str, Any]: ...  # noqa: D102

    def delete_manifest(self, repository: str, digest: str) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class RegistryImage:
    """One manifest of a repository: its digest, all tags on it, and when it was made (ISO 8601)."""

    digest: str
    tags: tuple[str, ...]
    created: str


def digests_in(references: Iterable[str]) -> set[str]:
    """The digests that references (``registry/name@sha256:…``) name; a reference without one adds nothing."""
    return {digest for reference in references for digest in _DIGEST.findall(reference)}


def by_digest(tags: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Tags by the digest that they name.

    :param tags: tag and digest.
    """
    found: dict[str, list[str]] = {}
    for tag, digest in tags.items():
        found.setdefault(digest, []).append(tag)
    return {digest: tuple(sorted(names)) for digest, names in found.items()}


def removable(tags: Collection[str]) -> bool:
    """Whether an image under these tags may go at all: under none that a person (or `latest`) has set."""
    return bool(tags) and all(_CONTENT_TAG.match(tag) for tag in tags)


def registry_plan(images: Sequence[RegistryImage], needed: Collection[str], keep: int) -> list[RegistryImage]:
    """Which manifests go, the oldest first: those that no release needs, beyond the `keep` newest of the repository."""
    newest = sorted(images, key=lambda image: (image.created, image.digest), reverse=True)
    old = [image for image in newest[keep:] if image.digest not in needed and removable(image.tags)]
    return old[::-1]


def attached_to(tags: Iterable[str], digest: str) -> list[str]:
    """Tags that hold a signature or a bill of materials of a manifest."""
    bare = digest.partition(":")[2]
    return sorted(tag for tag in tags if (match := _ATTACHED.match(tag)) and match.group(1) == bare)


class RegistryPrune:
    """Removes images of given repositories from a registry.

    :param needed: references or digests that some host's kept releases name.
    :param keep: how many of the newest images of each repository stay in any case.
    """

    def __init__(self, registry: Registry, needed: Iterable[str], keep: int, *, check: bool) -> None:
        self._registry = registry
        self._needed = digests_in(needed)
        self._keep = keep
        self._check = check

    def run(self, repositories: Iterable[str]) -> Outcome:
        """Prune one repository after the other; what the registry refuses is a fault of the outcome."""
        outcome = Outcome()
        for repository in repositories:
            try:
                self._repository(repository, outcome)
            except RegistryError as error:
                outcome.faults.append(f"{repository}: {error}")
        return outcome

    def _repository(self, repository: str, outcome: Outcome) -> None:
        tags = {tag: self._registry.find_digest(repository, tag) for tag in self._registry.tags(repository)}
        named = {tag: digest for tag, digest in tags.items() if digest}
        images = self._ours(repository, by_digest(named))
        doomed = registry_plan(images, self._needed, self._keep)
        outcome.kept += len(images) - len(doomed)
        for image in doomed:
            attached = attached_to(named, image.digest)
            if not self._check:
                for tag in attached:
                    self._delete_attached(repository, named[tag])
                # The image last: until then what is attached to it can be found again.
                self._registry.delete_manifest(repository, image.digest)
            outcome.removed += [f"{repository}:{tag}" for tag in (*attached, *image.tags)]

    def _delete_attached(self, repository: str, digest: str) -> None:
        """Remove what is attached to an image: a manifest, or an index together with the manifests that it lists."""
        listed = self._registry.manifest(repository, digest).get("manifests") or []
        for entry in listed:
            self._registry.delete_manifest(repository, str(entry["digest"]))
        self._registry.delete_manifest(repository, digest)

    def _ours(self, repository: str, digests: Mapping[str, tuple[str, ...]]) -> list[RegistryImage]:
        """Images that this project built: a content tag, and the label that only its builds set."""
        found = []
        for digest, tags in digests.items():
            if any(_CONTENT_TAG.match(tag) for tag in tags):
                labels = self._registry.labels(repository, digest)
                if CONTENT_LABEL in labels:
                    found.append(RegistryImage(digest, tags, labels.get(CREATED_LABEL, "")))
        return found


# -- an engine --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineImage:
    """One image of an engine: its id, its names in the repositories asked for, and when it was made (ISO 8601)."""

    id: str
    names: tuple[str, ...]
    created: str


def engine_plan(images: Sequence[EngineImage], needed: Collection[str], keep: int) -> list[EngineImage]:
    """Which images go, the oldest first: those that neither a release nor a container needs, beyond the `keep` newest.

    The images are those of one repository.

    :param needed: ids of images.
    """
    spare = sorted(
        (image for image in images if image.id not in needed),
        key=lambda image: (image.created, image.id),
        reverse=True,
    )
    return spare[keep:][::-1]


def names_in(image: Mapping[str, Any], repository: str) -> tuple[str, ...]:
    """The names of an image (`docker image inspect`) that lie in a repository: tags first, then digests."""
    names = [*(image.get("RepoTags") or []), *(image.get("RepoDigests") or [])]
    return tuple(name for name in names if re.split(r"@|:(?=[^/]*$)", name)[0] == repository)


def needed_references(site: Path) -> list[str]:
    """The images of all releases that stand on this host: the site's, and those of the sites beside it.

    :raises PruneError: damaged_release, when a release does not say what it needs.
    """
    found: set[str] = set()
    for directory in sorted(site.parent.glob("*/releases/r-*")):
        if not directory.is_dir():
            continue
        try:
            images = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))["images"]
            found.update(images.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PruneError(
                "damaged_release",
                f"{directory} does not say which images it needs, so no image was removed",
                f"Render that release again, or remove {directory}",
            ) from error
    return sorted(found)


class EnginePrune:
    """Removes images of given repositories from this host's engine.

    :param needed: references (name with digest or tag) that this host's kept releases name.
    :param keep: how many of the newest other images of each repository stay.
    :param retired: repositories that nothing is built for any more: of those none stays for being new.
    """

    def __init__(
        self,
        docker: Docker,
        needed: Sequence[str],
        keep: int,
        *,
        check: bool,
        retired: Collection[str] = (),
    ) -> None:
        self._docker = docker
        self._needed = list(needed)
        self._keep = keep
        self._retired = frozenset(retired)
        self._check = check

    def run(self, repositories: Iterable[str]) -> Outcome:
        """Prune one repository after the other, named with the registry in front."""
        outcome = Outcome()
        try:
            needed = self._ids_in_use()
            for repository in repositories:
                images = self._images(repository)
                doomed = engine_plan(images, needed, 0 if repository in self._retired else self._keep)
                outcome.kept += len(images) - len(doomed)
                for image in doomed:
                    self._remove(image, outcome)
        except DockerError as error:
            outcome.faults.append(str(error))
        return outcome

    def _ids_in_use(self) -> set[str]:
        """Ids of the images that kept releases and containers, also stopped ones, need."""
        named = self._docker.images(self._needed)
        listed = self._docker.call("ps", "--all", "--quiet", "--no-trunc", action="list the containers")
        containers = listed.split()
        # One that vanished since is an error of the command; the others are printed all the same.
        seen = (
            self._docker.attempt("inspect", "--type", "container", "--format", "{{.Image}}", *containers)
            if containers
            else Result(0, "", "")
        )
        return {str(image["Id"]) for image in named.values()} | set(seen.out.split())

    def _images(self, repository: str) -> list[EngineImage]:
        action = f"list the images of {repository}"
        arguments = ("image", "ls", "--quiet", "--no-trunc", "--filter", f"reference={repository}")
        ids = list(dict.fromkeys(self._docker.call(*arguments, action=action).split()))
        found = self._docker.images(ids)
        needed = set(self._needed)
        images = []
        for identity, image in found.items():
            names = names_in(image, repository)
            tags = [name.rpartition(":")[2] for name in names if "@" not in name]
            # A tag that a person (or `latest`) has set holds it; so does a release, by this very name.
            if names and all(map(_CONTENT_TAG.match, tags)) and not needed & set(names):
                images.append(EngineImage(identity, names, str(image.get("Created", ""))))
        return images

    def _remove(self, image: EngineImage, outcome: Outcome) -> None:
        """Take an image's names away; with the last one it goes. The engine refuses what a container uses."""
        if self._check:
            outcome.removed += image.names
            return
        result = self._docker.attempt("image", "rm", *image.names, timeout=120.0)
        # With the last tag of a repository the engine takes its digests away as well.
        trouble = [line for line in result.err.splitlines() if line.strip() and "No such image" not in line]
        if result.code != 0 and trouble:
            outcome.faults.append(f"{image.names[0]}: {last_lines(chr(10).join(trouble), 2)}")
        else:
            outcome.removed += image.names
