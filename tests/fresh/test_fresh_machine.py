"""A fresh machine: the README's two commands and the guide's commands, typed as they stand there, on bare Debian hosts.

Each host is a container made from Debian's packages with what the README asks for and nothing else, and has an engine of
its own: what a developer's machine has by accident is not there.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.testhost import testhost

REPO = Path(__file__).resolve().parents[2]
USER = "aisha"
#: name → suite, user who types, packages beside those that the README asks for
HOSTS = {
    "debian12-root": ("bookworm", "root", ()),
    "debian13-sudo": ("trixie", USER, ("sudo",)),
}
pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]


def typed_commands(page: str) -> list[str]:
    """Every command of a page: lines that begin with `$` in its console blocks, in order."""
    blocks = re.findall(r"^```console\n(.*?)^```", (REPO / page).read_text(), re.MULTILINE | re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def without_comment(command: str) -> str:
    """A command without the remark behind it."""
    return re.sub(r"\s{2,}# .*$", "", command)


@dataclass
class Host:
    """A bare host, and somebody who types on it."""

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


@pytest.fixture(scope="module", params=HOSTS)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A bare host with the project's history within reach of `git clone`."""
    suite, user, extra = HOSTS[request.param]
    bundle = tmp_path_factory.mktemp("source") / "source.bundle"
    subprocess.run(
        ["git", "bundle", "create", str(bundle), "HEAD"], cwd=REPO, check=True, capture_output=True
    )
    bundle.parent.chmod(0o755)
    name = f"wht-fresh-{request.param}"
    image = testhost.build(suite, (*testhost.PACKAGES, *extra), tag="-".join([suite, *extra]))
    try:
        testhost.up(name, suite, (f"{bundle}:/source.bundle:ro",), image)
        if user != "root":
            make_user = f"useradd --create-home --shell /bin/bash {user}"
            sudoers = f"echo '{user} ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/{user}"
            testhost.docker("exec", name, "bash", "-c", f"{make_user} && {sudoers}")
        yield Host(name, user)
    finally:
        testhost.down(name)


def readme_commands() -> tuple[str, str, str]:
    """The README's clone, and its two commands."""
    clone, up, test = typed_commands("README.md")[:3]
    assert (up, test) == ("make up", "make test")
    return clone.replace("<this repository>", "/source.bundle"), up, test


def test_dry_run_before_anything_stands(host: Host) -> None:
    clone, _, _ = readme_commands()
    host.type(clone)
    host.folder = "~/aisha-webhook"
    output = host.type("make check")
    assert re.search(r"changed=[1-9]\d*\s+unreachable=0\s+failed=0", output), output[-3000:]
    for path in ("/usr/sbin/dockerd", "/opt/aisha-webhook"):
        seen = testhost.docker("exec", host.name, "test", "-e", path, check=False)
        assert seen.returncode != 0, f"the dry run made {path}"


def test_first_command(host: Host) -> None:
    _, up, _ = readme_commands()
    begin = time.monotonic()
    output = host.type(up)
    seconds = time.monotonic() - begin
    assert re.search(r"failed=0", output)
    print(f"cold make up: {seconds:.0f} s")


def test_second_run_changes_nothing(host: Host) -> None:
    output = host.type("make up")
    assert re.search(r"changed=0\s+unreachable=0\s+failed=0", output), output[-3000:]


def test_every_command_of_the_guide(host: Host) -> None:
    """As root, as the guide says: from the folder, one after the other."""
    root = Host(host.name, "root", f"~{host.user}/aisha-webhook" if host.user != "root" else host.folder)
    testhost.docker(
        "exec", host.name, "bash", "-c", "apt-get update -q && apt-get install -y -q curl", timeout=300
    )
    for command in typed_commands("docs/WEBHOOK_DEPLOYMENT.md"):
        root.type(without_comment(command))


@pytest.mark.skipif("FRESH_TEST_COMMAND" not in os.environ, reason="half an hour: make test-fresh runs it")
def test_second_command(host: Host) -> None:
    _, _, test = readme_commands()
    output = host.type(f"AISHA_TEST_HOST=1 {test}", timeout=3600)
    assert "All passed." in output
