"""What a run that was killed has left: stale switches, a second nginx, containers that were made for one command."""

from __future__ import annotations

from ansible.module_utils.docker_cli import Docker
from ansible.module_utils.rollout.compose import Project
from ansible.module_utils.rollout.edge import Edge
from ansible.module_utils.rollout.model import Release
from ansible.module_utils.rollout.prepare import TEST_LABEL
from ansible.module_utils.rollout.rehearsal import Rehearsal
from ansible.module_utils.rollout.switch import Switches


class Leftovers:
    """Clears up, and says what it did. Touches nothing where nothing is left."""

    def __init__(
        self, project: Project, docker: Docker, edge: Edge, switches: Switches, rehearsal: Rehearsal
    ) -> None:
        self._project, self._docker = project, docker
        self._edge, self._switches, self._rehearsal = edge, switches, rehearsal

    def clear(self, target: Release, current: Release | None, *, throwaways: bool) -> list[str]:
        """One nginx, no stale switch, no half-run migration. With `throwaways`, what was only tried too (a look more)."""
        told: list[str] = self._one_offs() + self._edge.resolve(target, current)
        if throwaways:
            self._throwaways(target)
            self._rehearsal.clear(target)
        return [*told, *self._switched_off(target)]

    def are_there(self, target: Release) -> bool:
        """Whether `clear` would have something to do. A look, and nothing else."""
        return bool(self._switches.out() or self._edge.is_unresolved(target) or self._project.one_offs())

    def _switched_off(self, target: Release) -> list[str]:
        """Switches of what is no more. An instance that is there stays out until a gate has proven it."""
        told = []
        for name in self._switches.out():
            if target.service(name) is None and not self._project.containers(name):
                self._switches.take_in(name)
                told.append(f"the switch of {name}, which is not there, was removed")
        return told

    def _one_offs(self) -> list[str]:
        """A migration whose run was killed: PostgreSQL undoes what it had not committed."""
        told = []
        for found in self._project.one_offs():
            self._project.stop(found)
            self._project.remove(found)
            told.append(f"{found['Name'].lstrip('/')} was ended")
        return told

    def _throwaways(self, release: Release) -> None:
        listed = self._docker.call(
            "ps",
            "--all",
            "--quiet",
            "--filter",
            f"label={TEST_LABEL}={release.project}",
            action="list containers",
        )
        for identity in listed.split():
            self._docker.attempt("rm", "--force", "--volumes", identity)
