"""The releases that a host has kept, and which of them it can be brought back to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible.module_utils.deploy_lock import DeployLock, LockError
from ansible.module_utils.deploy_record import DeployRecords
from ansible.module_utils.release import ReleaseStore
from ansible.module_utils.rollout.model import RolloutError, parse_release

PREVIOUS = "previous"
#: A secret's file, as role stack writes it into the Compose file.
_SECRET_FILE = re.compile(r"^ +file: (/\S+/secrets/\S+)$", re.MULTILINE)


class KeptError(Exception):
    """That release cannot be gone back to.

    `reason`: no_release (unknown, or there is no previous one), current, damaged, bad_release, secret_missing.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Kept:
    """One kept release."""

    id: str
    created: str
    current: bool
    previous: bool
    images: Mapping[str, str]
    webhook_release: str = ""
    #: When it last became the current one, as the records say; empty when they don't.
    deployed: str = ""
    missing_images: tuple[str, ...] = ()
    missing_secrets: tuple[str, ...] = ()
    #: Why it cannot be gone back to, for people; empty when it can.
    obstacle: str = ""
    reason: str = ""

    def shown(self) -> dict[str, Any]:
        """As the module returns it."""
        names = ("id", "created", "current", "previous", "webhook_release", "deployed", "obstacle")
        lists = {"missing_images": list(self.missing_images), "missing_secrets": list(self.missing_secrets)}
        possible = {"possible": not self.obstacle, "images_here": not self.missing_images}
        return (
            {name: getattr(self, name) for name in names} | lists | possible | {"images": dict(self.images)}
        )

    def line(self) -> str:
        """One line for people."""
        marks = [mark for mark, is_so in (("current", self.current), (PREVIOUS, self.previous)) if is_so]
        marks += [f"served from {self.deployed}"] if self.deployed else []
        marks += ["images are pulled first" if self.missing_images else "images are here"]
        marks += [f"NOT POSSIBLE: {self.obstacle}"] if self.obstacle and not self.current else []
        digests = ", ".join(f"{name} {_short(image)}" for name, image in sorted(self.images.items()))
        return f"{self.id} of {self.created[:19]}, {self.webhook_release or 'unknown'} ({digests}): {'; '.join(marks)}"


@dataclass
class KeptReleases:
    """Those of the site whose directory is `site_dir`. `is_here(image)`: whether the engine has an image."""

    site_dir: Path
    is_here: Callable[[str], bool]
    found: list[Kept] = field(default_factory=list)

    def read(self) -> list[Kept]:
        """All of them, the newest first."""
        deployed = {
            str(record["to"]): str(record.get("ended") or "")
            for record in DeployRecords(self.site_dir).read()
            if record.get("result") == "done"
        }
        store = ReleaseStore(str(self.site_dir))
        self.found = [self._kept(entry, deployed.get(entry["id"], "")) for entry in store.releases()]
        return self.found

    def choose(self, wanted: str) -> Kept:
        """The release to go back to: an id, or `previous`. KeptError says which there are."""
        if wanted == PREVIOUS:
            chosen = next((kept for kept in self.found if kept.previous and not kept.current), None)
            if chosen is None:
                raise self._error("no_release", "no release served before the current one")
        else:
            chosen = next((kept for kept in self.found if kept.id == wanted), None)
            if chosen is None:
                raise self._error("no_release", f"there is no release {wanted} on this host")
        if chosen.obstacle:
            raise self._error(chosen.reason, f"{chosen.id} cannot be gone back to: {chosen.obstacle}")
        return chosen

    def _kept(self, entry: Mapping[str, Any], deployed: str) -> Kept:
        images = dict(entry["images"])
        compose = Path(entry["path"]) / "docker-compose.webhook.prod.yml"
        secrets = tuple(name for name in secret_files(compose) if not Path(name).exists())
        reason, obstacle = self._obstacle(entry, secrets)
        return Kept(
            id=entry["id"],
            created=str(entry["created"]),
            current=entry["current"],
            previous=entry["previous"],
            images=images,
            webhook_release=str(entry["metadata"].get("webhook_release") or ""),
            deployed=deployed,
            missing_images=tuple(image for image in images.values() if not self.is_here(image)),
            missing_secrets=secrets,
            obstacle=obstacle,
            reason=reason,
        )

    def _obstacle(self, entry: Mapping[str, Any], secrets: Sequence[str]) -> tuple[str, str]:
        if entry["current"]:
            return "current", "it is the current one"
        if not entry["whole"]:
            return "damaged", "files of it are missing or were changed by hand"
        try:
            parse_release(entry["id"], Path(entry["path"]), entry["metadata"].get("rollout") or {})
        except RolloutError as error:
            return "bad_release", error.message
        if secrets:
            return (
                "secret_missing",
                f"it needs {', '.join(secrets)}, which is gone: put it back (--tags secrets)",
            )
        return "", ""

    def _error(self, reason: str, message: str) -> KeptError:
        lines = [f"  {kept.line()}" for kept in self.found] or ["  none"]
        return KeptError(reason, "\n".join([f"{message}. Kept on this host:", *lines, *self._at_work()]))

    def _at_work(self) -> list[str]:
        """A run that changes the site now: what may be gone back to is another one when it has ended."""
        lock = DeployLock(self.site_dir)
        try:
            holder = lock.read()
        except LockError:
            return []
        if holder is None or lock.is_dead(holder):
            return []
        return [f"A run is at work: {holder.described()}. See what it leaves (make status), and ask again."]


def secret_files(compose: Path) -> list[str]:
    """The secret files that a release's Compose file names."""
    try:
        return _SECRET_FILE.findall(compose.read_text(encoding="utf-8"))
    except OSError:
        return []


def _short(image: str) -> str:
    name, _, digest = image.rpartition("@")
    return digest[: len("sha256:") + 12] if name else image
