"""The proof that images are in a registry: what is expected against what catalogue, tags and manifests say.

`_catalog` alone proves nothing: it is paginated, and lists repositories without tags. Proof is the whole
catalogue, the tag in `tags/list`, and a HEAD on the manifest whose digest equals what was pushed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ansible.module_utils.registry_api import RegistryError

T = TypeVar("T")

#: Faults that a registry which is just starting shows, and that waiting can mend.
PASSING_REASONS = frozenset({"unreachable", "timeout", "server_error", "rate_limited"})
NAMES_SHOWN = 10


class Registry(Protocol):
    """What the proof needs of a client (`registry_api.RegistryClient`)."""

    base_url: str

    def ping(self) -> None:
        """Raise unless the registry answers."""

    def catalog(self) -> list[str]:
        """All repositories."""

    def tags(self, repository: str) -> list[str]:
        """All tags of a repository; empty when there are none."""

    def find_digest(self, repository: str, reference: str) -> str | None:
        """The digest that a tag or digest names, or None."""


@dataclass(frozen=True)
class Expectation:
    """One image that must be there: by tag, by digest, or as a tag on that very digest."""

    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def from_params(cls, entry: Mapping[str, Any]) -> Expectation:
        """Make one from a module parameter, where what was left out is None."""
        return cls(entry["repository"], entry.get("tag") or None, entry.get("digest") or None)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest and not self.tag else ""
        return f"{self.repository}{tag}{digest}"


@dataclass
class Contents:
    """What the registry says of itself."""

    repositories: list[str] = field(default_factory=list)
    tags: dict[str, list[str]] = field(default_factory=dict)
    digests: dict[str, str | None] = field(default_factory=dict)


def read_contents(
    registry: Registry, expect: Iterable[Expectation], *, catalog: bool, all_tags: bool
) -> Contents:
    """Ask the registry for its catalogue, the tags of what matters, and the digest of each expected image."""
    registry.ping()
    expected = list(expect)
    contents = Contents(repositories=registry.catalog() if catalog else [])
    wanted = dict.fromkeys(item.repository for item in expected)
    if all_tags:
        wanted.update(dict.fromkeys(contents.repositories))
    contents.tags = {repository: registry.tags(repository) for repository in wanted}
    for item in expected:
        reference = item.tag or item.digest
        if reference:
            contents.digests[str(item)] = registry.find_digest(item.repository, reference)
    return contents


def find_faults(expect: Iterable[Expectation], contents: Contents, *, catalog: bool) -> list[str]:
    """In what the registry differs from what is expected, one sentence each; empty is the proof."""
    faults = []
    for item in expect:
        fault = _fault_of(item, contents, catalog=catalog)
        if fault:
            faults.append(fault)
    return faults


def _fault_of(item: Expectation, contents: Contents, *, catalog: bool) -> str | None:
    tags = contents.tags.get(item.repository, [])
    if catalog and item.repository not in contents.repositories:
        return f"{item}: the catalogue has no repository {item.repository} ({_some(contents.repositories)})"
    if item.tag and item.tag not in tags:
        return f"{item}: there is no tag {item.tag} ({_some(tags)})"
    if not item.tag and not item.digest and not tags:
        return f"{item}: the repository is in the catalogue, but has no tag"
    found = contents.digests.get(str(item))
    if (item.tag or item.digest) and found is None:
        return f"{item}: there is no such manifest" + (" behind the tag" if item.tag else "")
    if item.digest and found != item.digest:
        return f"{item}: the manifest is {found}, expected {item.digest}"
    return None


def _some(names: list[str]) -> str:
    if not names:
        return "it lists none"
    rest = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"it lists {', '.join(sorted(names)[:NAMES_SHOWN])}{rest}"


def failure_message(base_url: str, faults: list[str]) -> str:
    """One message with all faults, and what to do."""
    return (
        f"The registry {base_url} lacks {len(faults)} of the expected images: {'; '.join(faults)}. "
        "Build and push again (ansible-playbook site.yml --tags build,push); if a digest differs, "
        "somebody else pushed to the same tag: find out who before deploying"
    )


def patiently(
    work: Callable[[], T],
    wait: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Do `work`; repeat it for up to `wait` seconds while the registry is only not there yet."""
    deadline = clock() + wait
    pause = 0.2
    while True:
        try:
            return work()
        except RegistryError as error:
            if error.reason not in PASSING_REASONS or clock() + pause > deadline:
                raise
        sleep(pause)
        pause = min(pause * 2, 2.0)
