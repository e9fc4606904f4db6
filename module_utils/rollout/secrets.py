"""Secrets of which a rotation is not proven yet: who has which, how they come back, when they go (decision 0524)."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from ansible.module_utils.docker_engine import Engine
from ansible.module_utils.kept_releases import secret_files
from ansible.module_utils.kept_secrets import KeptSecrets
from ansible.module_utils.mounted_files import bind_mounts, has_what_stands
from ansible.module_utils.rollout.compose import label_of
from ansible.module_utils.rollout.model import Release

SERVICE_LABEL = "com.docker.compose.service"
#: Where the files are found that a process sees.
PROC = Path("/proc")


class Rotation:
    """The kept secrets of one site, and the containers that have what replaced them, or don't."""

    def __init__(
        self,
        site_dir: Path,
        engine: Engine,
        warn: Callable[[str], None] = lambda _text: None,
        proc: Path = PROC,
    ) -> None:
        self._kept = KeptSecrets(site_dir / "secrets")
        self._engine, self._warn, self._proc = engine, warn, proc

    def names(self) -> list[str]:
        """Names of the secrets whose value of before is kept."""
        names: list[str] = self._kept.names()
        return names

    def is_kept_for(self, release: Release) -> bool:
        """Whether what is kept is what that release was proven with."""
        return bool(self._kept.release() == release.id)

    # Who has which

    def behind(self, release: Release, names: Collection[str]) -> list[str]:
        """Services of the release whose container has another file than stands now under one of the names, or none
        because it does not run: on the way back it is not waited for until the engine starts it again."""
        seen = set(self._looks(release, names)) if names else set()
        return [name for name in release.names if (name, False) in seen]

    def in_use(self, release: Release) -> bool:
        """Whether a container has been started with what stands now under the name of a kept one."""
        names = self.names()
        return bool(names) and any(has for _service, has in self._looks(release, names))

    def _looks(self, release: Release, names: Collection[str]) -> Iterator[tuple[str, bool]]:
        """(service, whether it has what stands now) for each container and each mount of one of the names."""
        wanted = {os.path.realpath(self._kept.directory / name) for name in names}
        for found in self._engine.project_containers(release.project):
            for mount in bind_mounts(found):
                if os.path.realpath(mount["Source"]) not in wanted:
                    continue
                try:
                    yield label_of(found, SERVICE_LABEL), has_what_stands(found, mount, self._proc)
                except OSError:  # it has just ended, or the file is gone: then it has nothing that counts
                    continue

    # The ends

    def settles(self, release: Release) -> bool:
        """Whether there is something kept that is of no use any more now that the release serves."""
        names = self.names()
        return bool(names) and not self.behind(release, names)

    def settle(self, release: Release, *, forget: bool = True) -> list[str]:
        """The release serves: forget what was before, if its containers have what stands now. Names that stay kept.

        `forget`: not while other hosts may still make this one go back.
        """
        names = self.names()
        behind = self.behind(release, names)
        if behind:
            self._kept.belong_to(release.id)
            self._warn(
                f"{', '.join(names)}: replaced, but not in use yet by {', '.join(behind)}. The values of before are kept "
                "until a release is rolled out that was rendered with the new ones (--tags secrets,stack,rollout)."
            )
            return names
        if not forget:
            return names
        self.forget()
        return []

    def forget(self) -> None:
        """Nothing is kept any more."""
        self._kept.forget()

    def put_back(self, current: Release) -> list[str]:
        """What the current release was proven with stands again. The names; none where nothing of it is kept."""
        if not self.is_kept_for(current):
            return []
        names: list[str] = self._kept.put_back(self._needed(current))
        return names

    def put_back_unused(self, current: Release) -> list[str]:
        """The same where no container was replaced; but not under one that has been started with what stands."""
        return [] if self.in_use(current) else self.put_back(current)

    def hand_over(self, target: Release, current: str) -> list[str]:
        """Before a host goes back to a release of which something is kept: that stands again, and what the current
        release has is kept in its place. The names."""
        if not self.is_kept_for(target):
            return []
        names: list[str] = self._kept.swap(current, self._needed(target))
        return names

    def _needed(self, release: Release) -> list[str]:
        """Names of the secrets that the release mounts: without their files its containers would not start."""
        home = f"{self._kept.directory}/"
        return [
            path.removeprefix(home) for path in secret_files(release.compose_file) if path.startswith(home)
        ]
