"""The Docker command line: commands as argument lists, answers as data, faults as one exception.

Also works where Python's Docker SDK is not installed, and is the only way to BuildKit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

#: Seconds for a command that only asks.
QUERY_TIMEOUT = 30.0
#: Directories that an ordinary user's PATH may lack.
SYSTEM_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")


class DockerError(Exception):
    """The engine or its command line did not do what was asked.

    `reason`: no_client, unreachable, no_permission, timeout, failed. `str()` gives fault and remedy.
    """

    def __init__(self, reason: str, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}. {remedy}" if remedy else message)
        self.reason = reason
        self.message = message
        self.remedy = remedy


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


Runner = Callable[..., Result]


def find_program(name: str) -> str | None:
    """The path of a program, also in the system's directories; None where there is none."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_PATH]))


def run(
    command: Sequence[str],
    *,
    timeout: float = QUERY_TIMEOUT,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    log: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> Result:
    """Run a command to its end, without a shell.

    :param timeout: seconds, after which the command and its children are killed and `DockerError` (timeout) is raised.
    :param env: variables to add to this process's environment.
    :param pass_fds: descriptors that the command has open as well.
    :param log: a file that gets both outputs as they come; then `out` holds its text and `err` nothing.
    """
    environment = {**os.environ, "LC_ALL": "C.UTF-8", **(env or {})}
    environment["PATH"] = os.pathsep.join([environment.get("PATH", ""), *SYSTEM_PATH]).lstrip(os.pathsep)
    sink = log.open("wb") if log else None
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=sink or subprocess.PIPE,
            stderr=subprocess.STDOUT if sink else subprocess.PIPE,
            env=environment,
            start_new_session=True,
            pass_fds=pass_fds,
        )
        out, err = _wait(process, command, timeout, stdin)
    # A directory of PATH that this user may not enter makes it a PermissionError.
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise DockerError(
            "no_client", f"There is no program {command[0]}", "Install it: role engine does so for docker"
        ) from error
    finally:
        if sink:
            sink.close()
    text = log.read_bytes() if log else out or b""
    return Result(
        process.returncode, text.decode("utf-8", "replace"), (err or b"").decode("utf-8", "replace")
    )


def _wait(
    process: subprocess.Popen[bytes], command: Sequence[str], timeout: float, stdin: str | None
) -> tuple[bytes | None, bytes | None]:
    try:
        return process.communicate(stdin.encode() if stdin is not None else None, timeout=timeout)
    except BaseException as error:  # also when the play is interrupted: no build goes on without us
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()
        if isinstance(error, subprocess.TimeoutExpired):
            raise DockerError(
                "timeout",
                f"`{' '.join(command[:3])} …` took longer than {timeout:.0f} s",
                "Look at the engine's load and log; raise the timeout if the machine is merely slow",
            ) from error
        raise


def explain(error_output: str, action: str) -> DockerError:
    """The `DockerError` for what the docker command wrote when it failed."""
    text = error_output.strip()
    if "permission denied" in text and "docker" in text and ".sock" in text:
        return DockerError(
            "no_permission",
            f"Cannot {action}: this user may not talk to the engine",
            "Run with become: true, or add the user to group docker",
        )
    if "Cannot connect to the Docker daemon" in text or "error during connect" in text:
        return DockerError(
            "unreachable",
            f"Cannot {action}: no engine answers",
            "Start it: role engine does so (--tags engine)",
        )
    return DockerError("failed", f"Cannot {action}: {last_lines(text, 5) or 'no output'}")


def last_lines(text: str, count: int) -> str:
    """The last lines that say something."""
    return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-count:])


class Docker:
    """Questions to one engine, through its command line.

    :param runner: what runs a command; `run` unless a test gives another.
    """

    def __init__(self, runner: Runner = run, program: str | None = None) -> None:
        self._run = runner
        self._program = program or find_program("docker") or "docker"

    def holding(self, descriptor: int) -> Docker:
        """The same, whose commands have a descriptor open: a lock on it lasts as long as any of them does."""
        return Docker(partial(self._run, pass_fds=(descriptor,)), self._program)

    def call(self, *arguments: str, action: str, **options: Any) -> str:
        """Run `docker ARGUMENTS` and return its output; `DockerError` when it fails."""
        result = self._run([self._program, *arguments], **options)
        if result.code != 0:
            raise explain(result.err or result.out, action)
        return result.out

    def attempt(self, *arguments: str, **options: Any) -> Result:
        """Run `docker ARGUMENTS` and return how it went, success or not."""
        return self._run([self._program, *arguments], **options)

    def images(self, references: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What the engine says of these images (names with tag, or ids); those that it lacks are left out."""
        if not references:
            return {}
        wanted = list(dict.fromkeys(references))
        result = self.attempt("image", "inspect", *wanted)
        # One missing image fails the command as a whole; what it found is printed all the same.
        if result.code != 0 and "No such image" not in result.err:
            raise explain(result.err, "ask the engine for images")
        found = json.loads(result.out or "[]")
        return {ref: image for ref in wanted for image in found if _names(image, ref)}


def _names(image: Mapping[str, Any], reference: str) -> bool:
    names = [*(image.get("RepoTags") or []), *(image.get("RepoDigests") or []), image.get("Id", "")]
    last = reference.rpartition("/")[2]
    return (reference if ":" in last or "@" in last else f"{reference}:latest") in names


def labels_of(image: Mapping[str, Any]) -> dict[str, str]:
    """The labels of an image that `docker image inspect` described."""
    return dict((image.get("Config") or {}).get("Labels") or {})
