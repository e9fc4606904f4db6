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
from pathlib import Path

import pytest

from tests.support.testhost import testhost
from tests.support.typed_commands import Typist, typed_commands

REPO = Path(__file__).resolve().parents[2]
USER = "aisha"
#: name → suite, user who types, packages beside those that the README asks for
HOSTS = {
    "debian12-root": ("bookworm", "root", ()),
    "debian13-sudo": ("trixie", USER, ("sudo",)),
}
pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module", params=HOSTS)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Typist]:
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
        yield Typist(name, user)
    finally:
        testhost.down(name)


def readme_commands() -> tuple[str, str, str]:
    """The README's clone, and its two commands."""
    clone, up, test = typed_commands("README.md")[:3]
    assert (up, test) == ("make up", "make test")
    return clone.replace("<this repository>", "/source.bundle"), up, test


def test_dry_run_before_anything_stands(host: Typist) -> None:
    clone, _, _ = readme_commands()
    host.type(clone)
    host.folder = "~/aisha-webhook"
    output = host.type("make check")
    assert re.search(r"changed=[1-9]\d*\s+unreachable=0\s+failed=0", output), output[-3000:]
    for path in ("/usr/sbin/dockerd", "/opt/aisha-webhook"):
        seen = testhost.docker("exec", host.name, "test", "-e", path, check=False)
        assert seen.returncode != 0, f"the dry run made {path}"


def test_first_command(host: Typist) -> None:
    _, up, _ = readme_commands()
    begin = time.monotonic()
    output = host.type(up)
    seconds = time.monotonic() - begin
    assert re.search(r"failed=0", output)
    print(f"cold make up: {seconds:.0f} s")


def test_second_run_changes_nothing(host: Typist) -> None:
    output = host.type("make up")
    assert re.search(r"changed=0\s+unreachable=0\s+failed=0", output), output[-3000:]


def test_every_command_of_the_guide(host: Typist) -> None:
    """As root, as the guide says: from the folder, one after the other."""
    root = Typist(host.name, "root", f"~{host.user}/aisha-webhook" if host.user != "root" else host.folder)
    testhost.docker(
        "exec", host.name, "bash", "-c", "apt-get update -q && apt-get install -y -q curl", timeout=300
    )
    for command in typed_commands("docs/WEBHOOK_DEPLOYMENT.md"):
        root.type(command)


@pytest.mark.skipif("FRESH_TEST_COMMAND" not in os.environ, reason="half an hour: make test-fresh runs it")
def test_second_command(host: Typist) -> None:
    _, _, test = readme_commands()
    output = host.type(f"AISHA_TEST_HOST=1 {test}", timeout=3600)
    assert "All passed." in output
