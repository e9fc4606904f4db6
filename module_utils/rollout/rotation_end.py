"""What becomes of kept secrets at the end of a run, beside a rollout: module kept_secrets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ansible.module_utils.deploy_record import DeployRecords
from ansible.module_utils.docker_engine import Engine
from ansible.module_utils.release import ReleaseStore
from ansible.module_utils.rollout.journal import only_one
from ansible.module_utils.rollout.model import Release, RolloutError, parse_release
from ansible.module_utils.rollout.secrets import PROC, Rotation


@dataclass(frozen=True)
class Ended:
    """What was done: none (nothing was kept), removed, restored, left (it is not decided yet). To which secrets."""

    action: str
    names: list[str] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Whether anything is another way than before."""
        return self.action in ("removed", "restored")


class RotationEnd:
    """Ends the rotations of one site on one host, where no rollout does."""

    def __init__(
        self, site_dir: Path, engine: Engine, warn: Callable[[str], None], proc: Path = PROC
    ) -> None:
        self._site_dir = site_dir
        self._rotation = Rotation(site_dir, engine, warn, proc)

    def end(self, state: str, *, check: bool = False) -> Ended:
        """`settled`: all hosts serve. `restored`: the run has failed, and what no container uses yet is as before."""
        names = self._rotation.names()
        if not names:
            return Ended("none")
        release = self._current()
        if check:
            return Ended(self._decide(state, release), names)
        try:
            with only_one(self._site_dir, 0):
                return self._do(state, release, names)
        except RolloutError as error:
            if error.reason != "locked":
                raise
            return Ended("left", names)  # a rollout is at work, whose controller is gone: it decides

    def _do(self, state: str, release: Release | None, names: list[str]) -> Ended:
        action = self._decide(state, release)
        if action == "restored" and release:
            self._rotation.put_back(release)
        elif action == "removed":
            self._rotation.forget()
        elif state == "settled" and release:
            self._rotation.settle(release)  # says which containers are not as the files are
        return Ended(action, names)

    def _decide(self, state: str, release: Release | None) -> str:
        if release is None:
            return "removed"
        if state == "settled":
            return "removed" if self._rotation.settles(release) else "left"
        if DeployRecords(self._site_dir).in_hand():
            return "left"
        if not self._rotation.is_kept_for(release):
            return "removed"
        return "left" if self._rotation.in_use(release) else "restored"

    def _current(self) -> Release | None:
        store = ReleaseStore(str(self._site_dir))
        described = store.describe(store.linked("current") or "")
        if described is None:
            return None
        rollout = described["metadata"].get("rollout") or {}
        release: Release = parse_release(described["id"], Path(described["path"]), rollout)
        return release
