"""What a page says to type, and a host on which somebody types it."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
KINDS = ("console", "sh", "")
BLOCK = re.compile(r"^[ \t]*```(?P<kind>\w*)\n(?P<text>.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)


def typed_blocks(page: str) -> list[list[str]]:
    """The commands of a page, block by block: in a console block the lines that begin with `$`, in others each line."""
    return [lines for _, lines in _blocks(page)]


def typed_commands(page: str) -> list[str]:
    """Every command of a page that stands behind a `$`, in order."""
    return [line for kind, lines in _blocks(page) if kind == "console" for line in lines]


def _blocks(page: str) -> Iterator[tuple[str, list[str]]]:
    for found in BLOCK.finditer((REPO / page).read_text()):
        if found["kind"] not in KINDS:
            continue
        lines = [without_comment(line.strip()) for line in found["text"].splitlines()]
        if found["kind"] == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        yield found["kind"], [line for line in lines if line]


def without_comment(command: str) -> str:
    """A command without the remark behind it."""
    return re.sub(r"\s{2,}# .*$", "", command)


@dataclass
class Typist:
    """Somebody who types on a host that is a container of this machine's engine."""

    name: str
    user: str
    folder: str = ""

    def type(self, command: str, timeout: float = 900) -> str:
        """Output of a command typed by the user in the current folder; AssertionError with its end when it fails."""
        shell = f"cd {self.folder or '~'} && {command}"
        login = ["docker", "exec", self.name, "su", "-", self.user, "-c", shell]
        begin = time.monotonic()
        run = subprocess.run(
            login,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        print(f"[{self.name}] {command}: exit {run.returncode}, {time.monotonic() - begin:.1f} s", flush=True)
        assert run.returncode == 0, f"{command}\n{run.stdout[-6000:]}"
        return run.stdout
