"""The docker command line: what its answers and faults mean."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from ansible.module_utils.docker_cli import Docker, DockerError, Result, explain, last_lines, run

RECORDED_MISSING = "Error response from daemon: No such image: nothing:here\n"
RECORDED_STOPPED = (
    "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?\n"
)
RECORDED_DENIED = (
    "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock: "
    'Get "http://%2Fvar%2Frun%2Fdocker.sock/v1.45/info": dial unix /var/run/docker.sock: connect: permission denied\n'
)
IMAGE = {
    "Id": "sha256:1",
    "RepoTags": ["r.example:5000/a:c-1", "r.example:5000/a:latest"],
    "RepoDigests": ["a@sha256:9"],
}


class Recorded:
    """Answers as they were recorded, and the commands that asked."""

    def __init__(self, *results: Result) -> None:
        self.results = list(results)
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **options: object) -> Result:
        self.commands.append(command)
        return self.results.pop(0)


def test_images_that_the_engine_lacks_are_left_out() -> None:
    runner = Recorded(Result(1, json.dumps([IMAGE]), RECORDED_MISSING))
    found = Docker(runner, "docker").images(
        ["r.example:5000/a:c-1", "nothing:here", "r.example:5000/a", "a@sha256:9"]
    )
    assert sorted(found) == ["a@sha256:9", "r.example:5000/a", "r.example:5000/a:c-1"]
    assert runner.commands == [
        [
            "docker",
            "image",
            "inspect",
            "r.example:5000/a:c-1",
            "nothing:here",
            "r.example:5000/a",
            "a@sha256:9",
        ]
    ]


def test_a_prefix_of_a_name_is_another_image() -> None:
    runner = Recorded(Result(1, json.dumps([IMAGE]), RECORDED_MISSING))
    assert Docker(runner, "docker").images(["r.example:5000/a:c-11"]) == {}


def test_no_question_is_asked_for_no_image() -> None:
    assert Docker(Recorded(), "docker").images([]) == {}


@pytest.mark.parametrize(
    ("error", "reason", "remedy"),
    [
        (RECORDED_STOPPED, "unreachable", "role engine"),
        (RECORDED_DENIED, "no_permission", "become"),
        ("no space left on device\n", "failed", "no space left"),
    ],
)
def test_a_fault_says_what_to_do(error: str, reason: str, remedy: str) -> None:
    with pytest.raises(DockerError, match=remedy) as caught:
        Docker(Recorded(Result(1, "", error)), "docker").images(["a:b"])
    assert caught.value.reason == reason


def test_a_failure_without_a_word_is_told_as_such() -> None:
    assert "no output" in str(explain("", "look"))


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(DockerError, match="no program no-such-program-here") as caught:
        run(["no-such-program-here"])
    assert caught.value.reason == "no_client"


def begun(marker: Path) -> str:
    """Let a command that never ends run into its timeout; return its child's process id."""
    for timeout in (0.5, 2, 8, 32):  # a busy machine may need more than the first to begin
        started = time.monotonic()
        with pytest.raises(DockerError) as caught:
            run(["sh", "-c", f"sleep 600 & echo $! > {marker}; wait"], timeout=timeout)
        assert caught.value.reason == "timeout"
        assert time.monotonic() - started < timeout + 30
        if marker.exists() and (found := marker.read_text().strip()):
            return found
    pytest.fail("the command never began")


def gone(process: str) -> bool:
    """Whether a process has ended, buried or not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    child = begun(tmp_path / "pid")
    deadline = time.monotonic() + 30
    while not gone(child):
        assert time.monotonic() < deadline, "the child is killed as well"
        time.sleep(0.05)


def test_output_goes_to_a_log_as_it_comes(tmp_path: Path) -> None:
    result = run(["sh", "-c", "echo out; echo err >&2; exit 3"], log=tmp_path / "log")
    assert (result.code, result.out) == (3, "out\nerr\n")
    assert (tmp_path / "log").read_text() == "out\nerr\n"


def test_the_last_lines_are_those_that_say_something() -> None:
    assert last_lines("a\n\nb\n \nc\n\n", 2) == "b\nc"
