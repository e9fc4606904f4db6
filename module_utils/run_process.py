"""Which ansible-playbook a module was started by on this machine, and whether that process is still there.

A process is named by the boot of its machine, its namespace of process ids, its id, and when it started (in clock ticks
since boot, proc(5)): another process that is given the same id later is another one.

On a controller it also is a program (role lock): without an argument it prints the run that it belongs to, with a record
whether that run is over: true, false, or null when that cannot be told from here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: How far up the tree is looked: become adds some processes, and there is no end without one in a broken /proc.
HIGHEST = 40
#: Places in an argument list where the name of an Ansible command may stand: after an interpreter and its options.
PROGRAM_PLACES = 4


@dataclass(frozen=True)
class RunProcess:
    """One process of one machine."""

    boot: str
    namespace: str
    pid: int
    start: int
    command: str = ""

    @classmethod
    def from_record(cls, record: object) -> RunProcess | None:
        """From what `as_record` gave; None when it is none."""
        if not isinstance(record, Mapping):
            return None
        fields = {"boot": str, "namespace": str, "pid": int, "start": int, "command": str}
        if any(not isinstance(record.get(name), kind) for name, kind in fields.items()):
            return None
        return cls(**{name: record[name] for name in fields})

    def as_record(self) -> dict[str, Any]:
        """A form for JSON."""
        return asdict(self)


class ProcessTable:
    """The processes of this machine, as /proc shows them."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc

    def boot(self) -> str:
        """Id of the machine's boot; empty where the kernel does not say."""
        return self._text("sys/kernel/random/boot_id").strip()

    def namespace(self) -> str:
        """Our namespace of process ids: the ids of another one mean nothing here."""
        try:
            return os.readlink(self._proc / "self/ns/pid")
        except OSError:
            return ""

    def ansible_run(self, pid: int | None = None) -> RunProcess | None:
        """The main process of the Ansible command that `pid` (default: us) belongs to on this machine; None over SSH.

        A worker that Ansible forks has the argument list of its main process. A run inside another run has one of its own.
        """
        found: tuple[int, str] | None = None
        for ancestor in self._line_of(os.getpid() if pid is None else pid):
            command = self._command(ancestor)
            if found is None and command and is_ansible(command):
                found = (ancestor, "\0".join(command))
            elif found is not None:
                if "\0".join(command) != found[1]:
                    break
                found = (ancestor, found[1])
        if found is None or (start := self.start_of(found[0])) is None:
            return None
        words = found[1].split("\0")
        return RunProcess(
            self.boot(), self.namespace(), found[0], start, os.path.basename(words[program(words)])
        )

    def is_over(self, process: RunProcess) -> bool | None:
        """Whether it has ended; None when that cannot be told from here."""
        if process.boot != self.boot():
            return True  # started again since: nothing of before is left
        if process.namespace != self.namespace():
            return None
        return self.start_of(process.pid) != process.start

    def start_of(self, pid: int) -> int | None:
        """When a process started, in clock ticks since boot; None when it is gone, or has ended and is not yet buried."""
        fields = self._status(pid)
        return int(fields[19]) if fields and fields[0] not in ("Z", "X", "x") else None

    def _line_of(self, pid: int) -> Iterator[int]:
        for _ in range(HIGHEST):
            if pid <= 1:
                return
            yield pid
            fields = self._status(pid)
            pid = int(fields[1]) if fields else 0

    def _status(self, pid: int) -> list[str]:
        # The name, in parentheses, may hold anything: the fields begin after the last one. State first, then the parent.
        return self._text(f"{pid}/stat").rpartition(")")[2].split()

    def _command(self, pid: int) -> list[str]:
        return self._text(f"{pid}/cmdline").rstrip("\0").split("\0")

    def _text(self, name: str) -> str:
        try:
            return (self._proc / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""


def program(command: list[str]) -> int:
    """Place of the program's name in an argument list: after an interpreter and its options."""
    for place, word in enumerate(command[:PROGRAM_PLACES]):
        if os.path.basename(word).startswith("ansible"):
            return place
    return 0


def is_ansible(command: list[str]) -> bool:
    """Whether an argument list is that of an Ansible command (ansible-playbook, ansible, ansible-pull, …)."""
    name = os.path.basename(command[program(command)])
    return name == "ansible" or (name.startswith("ansible-") and not name.endswith(".py"))


def main(arguments: list[str]) -> str:
    """What is printed: our run, or whether the run of the record given is over."""
    table = ProcessTable()
    if not arguments:
        found = table.ansible_run()
        return json.dumps(found.as_record() if found else None)
    process = RunProcess.from_record(json.loads(arguments[0]))
    return json.dumps(table.is_over(process) if process else None)


if __name__ == "__main__":
    print(main(sys.argv[1:]))
