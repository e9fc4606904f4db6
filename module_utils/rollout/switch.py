"""The files that nginx looks at on every request: ``<service>.down`` and ``<edge id>.draining``.

A file's presence is a switch that needs no reload (measured: docs/rollout.md). nginx has the directory read-only.
"""

from __future__ import annotations

from pathlib import Path

DOWN, DRAINING = ".down", ".draining"


class Switches:
    """The switch files of one site."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def prepare(self) -> None:
        """Make the directory, readable for nginx whatever the umask is."""
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
        if self.directory.stat().st_mode & 0o777 != 0o755:
            self.directory.chmod(0o755)

    def take_out(self, service: str) -> None:
        """nginx sends nothing new to that instance."""
        self._create(f"{service}{DOWN}")

    def take_in(self, service: str) -> None:
        """nginx uses that instance again."""
        self._remove(f"{service}{DOWN}")

    def drain(self, edge: str) -> None:
        """Every answer of the nginx with that edge id closes its connection."""
        self._create(f"{edge}{DRAINING}")

    def undrain(self, edge: str) -> None:
        """Connections are kept again."""
        self._remove(f"{edge}{DRAINING}")

    def out(self) -> list[str]:
        """Services that are switched off."""
        return self._named(DOWN)

    def draining(self) -> list[str]:
        """Edge ids that close their connections."""
        return self._named(DRAINING)

    def _named(self, suffix: str) -> list[str]:
        return sorted(path.name.removesuffix(suffix) for path in self.directory.glob(f"*{suffix}"))

    def _create(self, name: str) -> None:
        self.prepare()
        path = self.directory / name
        path.touch(mode=0o644)
        path.chmod(0o644)

    def _remove(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)
