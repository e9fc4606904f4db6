"""A host without any network is deployed from a bundle: its controller, its images, its proof."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sites import Site
from tests.support.testhost import testhost
from tests.support.typed_commands import typed_commands

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]
NAME = "wht-bundle"
HOST = "wht-bundle-host"
#: What docs/air-gapped.md presupposes of a host.
ENGINE = ("docker.io", "docker-cli", "docker-compose", "docker-buildx", "containerd", "runc", "iptables")
PYTHON = ("python3-docker", "python3-requests")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("bundle")
    site = Site(NAME, home / "inventory", 36)
    path = home / "bundle.tar"
    answers = {"bundle_output": str(path), "bundle_pythons": ["3.13"]}
    try:
        result = site.playbook("playbooks/bundle.yml", "-e", json.dumps(answers), timeout=1800).must_pass()
        print(result.output[-800:])
        yield path
    finally:
        site.teardown()


def run(command: str, *, fails: bool = False, timeout: float = 1800) -> str:
    """Type a command on the host, in the project's folder once it is there."""
    shell = f"cd /root/project 2>/dev/null || cd /root; {command}"
    done = subprocess.run(
        ["docker", "exec", HOST, "bash", "-lc", shell],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert (done.returncode != 0) == fails, f"{command}\n{done.stdout[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def host(bundle: Path) -> Iterator[str]:
    image = testhost.build("trixie", (*testhost.PACKAGES, *ENGINE, *PYTHON), tag="trixie-engine")
    try:
        testhost.up(HOST, "trixie", (f"{bundle}:/bundle.tar:ro",), image, ("--network=none",))
        run("tar -xf /bundle.tar project")
        yield HOST
    finally:
        testhost.down(HOST)


def manifest(bundle: Path) -> dict[str, dict[str, dict[str, str]]]:
    text = subprocess.run(["tar", "-xOf", str(bundle), "bundle.json"], capture_output=True, check=True).stdout
    found: dict[str, dict[str, dict[str, str]]] = json.loads(text)
    return found


def test_there_is_no_network(host: str) -> None:
    assert run("cat /proc/net/route").strip().count("\n") == 0


def test_a_bundle_that_was_cut_off_is_refused(host: str, bundle: Path) -> None:
    run("make up BUNDLE=/nowhere.tar", fails=True)
    size = bundle.stat().st_size
    run(f"head -c {size - 20_000} /bundle.tar > /root/cut.tar")
    said = run("make up BUNDLE=/root/cut.tar", fails=True)
    assert "cut off" in " ".join(said.split())
    run("test ! -e /opt/aisha-webhook/current && rm /root/cut.tar")


def test_a_whole_site_stands_from_it(host: str, bundle: Path) -> None:
    said = run("make up BUNDLE=/bundle.tar")
    assert re.search(r"failed=0", said)
    wanted = manifest(bundle)["images"]
    assert set(wanted) == {"webhook-api", "nginx-webhook"}
    # `docker ps` leaves the digest out.
    running = run("docker ps --quiet | xargs docker inspect --format '{{.Name}} {{.Config.Image}}'")
    for name, image in wanted.items():
        pin = f"127.0.0.1:5009/{name}@{image['digest']}"
        assert pin in running
        assert pin in run("cat /opt/aisha-webhook/current/docker-compose.webhook.prod.yml")
        assert image["digest"] in run(f"docker image inspect --format '{{{{.RepoDigests}}}}' {pin}")
    assert "registry" not in running
    # Only what listens (0A): connections that are over are listed for a minute.
    listens = run("awk '$4 == \"0A\" { print $2 }' /proc/net/tcp /proc/net/tcp6").split()
    assert any(address.endswith(":0050") for address in listens), listens
    assert not [address for address in listens if address.endswith(":1391")], "5009 is still listened to"
    health = "import urllib.request as u; print(u.urlopen('http://127.0.0.1/health').status)"
    assert run(f'python3 -c "{health}"').strip() == "200"


def test_the_second_run_changes_nothing_and_the_proof_needs_no_registry(host: str) -> None:
    said = run("make up BUNDLE=/bundle.tar")
    assert re.search(r"changed=0\s+unreachable=0\s+failed=0", said), said[-3000:]
    run("make verify")


def test_an_inventory_with_builders_and_a_registry_elsewhere_asks_neither(host: str) -> None:
    """As inventory/production has them: from a host without internet neither is to be reached."""
    away = {"hosts": {"away": {"ansible_host": "192.0.2.1", "ansible_connection": "ssh"}}}
    here = {"hosts": {"localhost": None}}
    children = {"builders": away, "registry": away, "backends": here, "webhook": here}
    own = {"ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}"}
    hosts = json.dumps({"all": {"hosts": {"localhost": own}, "children": children}})
    run("mkdir -p /root/away && cp -r inventory/local/group_vars /root/away/")
    run(f"cat > /root/away/hosts.yml <<'EOF'\n{hosts}\nEOF")
    said = run("make up BUNDLE=/bundle.tar ARGS='-i /root/away'")
    assert re.search(r"^localhost .*unreachable=0\s+failed=0", said, re.MULTILINE), said[-3000:]
    assert not re.search(r"^away ", said, re.MULTILINE), said[-3000:]


def test_every_command_of_the_operators_page(host: str) -> None:
    """As it stands there; BUNDLE stands in for the internet that this host has not got."""
    assert run("cat /proc/sys/net/ipv4/tcp_migrate_req").strip() == "1"
    commands = typed_commands("docs/operations.md")
    assert any("restore" in command for command in commands)
    for command in commands:
        print(command, flush=True)
        run(f"export BUNDLE=/bundle.tar; {command}")
    run("make down ARGS='-e teardown_confirmed=true'")
    left = set(run("ls -A /opt/aisha-webhook").split())
    assert left == {"secrets", "ssl", "deployments.jsonl"}
    assert run("docker ps --all --quiet").strip() == ""
    run("make down ARGS='-e teardown_confirmed=true -e teardown_data=true -e teardown_images=true'")
    run(
        'test ! -e /opt/aisha-webhook && test ! -e /etc/sysctl.d/60-aisha-webhook.conf && test -z "$(docker volume ls -q)"'
    )
    assert run("docker image ls --quiet").strip() == ""
    assert run("cat /proc/sys/net/ipv4/tcp_migrate_req").strip() == "0"
