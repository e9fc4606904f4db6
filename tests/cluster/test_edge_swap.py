"""Another configuration, another certificate: nginx is replaced while every sort of client delivers, and nothing fails.

What the kernel setting and the order of the steps are worth is shown in a network of its own: docs/decisions/0510.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import pytest

from tests.support.edgeload import Load
from tests.support.sites import Site

NUMBER = 11
POSTGRES = 21132
PORTS = {"backends_postgres_port": POSTGRES, "backends_redis_port": 21179, "backends_s3_port": 21190}
DELIVERIES = 20_000
LAB = "wht-edge-lab"


def docker(*arguments: str) -> str:
    run = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"docker {' '.join(arguments)}: {run.stderr}"
    return run.stdout.strip()


def wait_for(what: str, probe: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return answer


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site whose nginx lets idle clients go soon: a swap takes as long as that."""
    # The rollout's own probe would wait behind all that the worker still has to do.
    variables = {**PORTS, "edge_keepalive_seconds": 5, "rollout_probe": False}
    made = Site("wht-edge", tmp_path_factory.mktemp("wht-edge"), NUMBER, variables)
    try:
        made.site().must_pass()
        yield made
    finally:
        made.teardown()


def control(container: str, path: str) -> str:
    """What an nginx answers on its own socket; empty when it does not."""
    command = [
        "docker",
        "exec",
        container,
        "curl",
        "-s",
        "--unix-socket",
        "/tmp/edge.sock",
        f"http://edge{path}",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def nginx(site: Site) -> dict[str, Any]:
    """The one nginx of the site, inspected."""
    service = [f"label=com.docker.compose.{key}" for key in (f"project={site.name}", "service=nginx")]
    found = docker(
        "ps", "--all", "--quiet", *(word for label in service for word in ("--filter", label))
    ).split()
    assert len(found) == 1, found
    (seen,) = json.loads(docker("inspect", found[0]))
    assert isinstance(seen, dict)
    return seen


def load(site: Site) -> Load:
    ports = site.settings["site_http_port"], site.settings["site_https_port"]
    return Load("127.0.0.1", ports, site.secret("api/fal_webhook_secret"), nginx(site)["Config"]["Image"])


def recorded(site: Site, run: str) -> dict[str, int]:
    """Rows of the inbox by request id."""
    address = f"postgresql://postgres:{site.secret('postgres_password')}@127.0.0.1:{POSTGRES}/aisha"
    with psycopg.connect(address) as connection:
        rows = connection.execute(
            "SELECT request_id, count(*) FROM webhook.deliveries WHERE request_id LIKE %s GROUP BY 1",
            (f"swap-{run}-%",),
        )
        return dict(rows.fetchall())


def certificate(site: Site) -> str:
    return ssl.get_server_certificate(("127.0.0.1", site.settings["site_https_port"]))


def other_configuration(site: Site, turn: int) -> None:
    site.site("--tags", "edge", "-e", f"edge_hsts_seconds={1000 + turn}").must_pass()


def other_certificate(site: Site, turn: int) -> None:
    before = certificate(site)
    names = json.dumps({"edge_self_signed_names": ["localhost", f"turn-{turn}.example"]})
    site.site("--tags", "edge", "-e", names, "-e", f"edge_hsts_seconds={1000 + turn - 1}").must_pass()
    assert certificate(site) != before


@pytest.mark.timeout(3600)
def test_no_delivery_fails_while_nginx_is_replaced_again_and_again(site: Site) -> None:
    """Every 200 is one row, whoever the client is and however it keeps its connections."""
    changes = [other_configuration, other_certificate]
    turn = 0
    with load(site) as running:
        while running.sent < DELIVERIES or turn < 2 * len(changes):
            before = nginx(site)
            changes[turn % len(changes)](site, turn)
            turn += 1
            after = nginx(site)
            assert after["Id"] != before["Id"], "it was replaced"
            assert after["Name"] == f"/{site.name}-nginx"
            assert control(after["Id"], "/edge_alive") == after["Config"]["Labels"]["org.aisha.edge"]
            assert list((site.home / "state").iterdir()) == [], "no switch is left behind"
    account = running.account
    print(f"nginx was replaced {turn} times\n{account}")
    assert account.failures == 0, str(account)
    assert all(account.sent.values())
    assert len(account.accepted) > DELIVERIES / 2, str(account)

    def kept() -> dict[str, int]:  # what went into the spool follows
        rows = recorded(site, running.run)
        return rows if account.accepted <= set(rows) else {}

    rows = wait_for("what was answered with 200 is in the database", kept)
    assert set(rows.values()) == {1}


def test_compose_typed_by_hand_changes_nothing_and_what_it_made_gets_its_name_back(site: Site) -> None:
    compose = ["compose", "-f", str(site.home / "current" / "docker-compose.webhook.prod.yml")]

    def containers() -> list[str]:
        return sorted(
            docker(
                "ps", "--no-trunc", "--format", "{{.ID}} {{.Names}}", "--filter", f"name={site.name}"
            ).split("\n")
        )

    site.site("--tags", "edge").must_pass()
    before = containers()
    docker(*compose, "up", "--detach")
    assert containers() == before
    # Once down, Compose gives nginx a name of its own choosing until the next rollout.
    docker(*compose, "down")
    docker(*compose, "up", "--detach")
    assert nginx(site)["Name"] == f"/{site.name}-nginx-1"
    named = nginx(site)["Id"]
    wait_for("it is healthy", lambda: nginx(site)["State"]["Health"]["Status"] == "healthy")
    site.site("--tags", "rollout").must_pass()
    assert (nginx(site)["Name"], nginx(site)["Id"]) == (f"/{site.name}-nginx", named)


# -- what the kernel and the drain are worth ------------------------------------------------------------------------


@contextmanager
def lab(site: Site, migrate: int) -> Iterator[tuple[str, Callable[[str], str]]]:
    """A network of its own with that kernel setting: its address, and a way to start an nginx of the site in it."""
    found = nginx(site)
    image = found["Config"]["Image"]
    mounts = {mount["Destination"]: mount["Source"] for mount in found["Mounts"]}

    def start(name: str) -> str:
        made = docker(
            "run", "--detach", "--name", f"{LAB}-{name}", "--network", f"container:{LAB}", "--read-only",
            "--tmpfs", "/tmp:mode=1777", "--tmpfs", "/var/cache/nginx-body:uid=10002,gid=10002",
            "--volume", f"{mounts['/etc/nginx/site']}:/etc/nginx/site:ro",
            "--volume", f"{mounts['/etc/nginx/ssl']}:/etc/nginx/ssl:ro", image,
        )  # fmt: skip
        wait_for(f"nginx {name}", lambda: control(made, "/edge_alive"))
        return made

    try:
        docker(
            "run", "--detach", "--name", LAB, "--network", site.settings["site_network"],
            "--sysctl", f"net.ipv4.tcp_migrate_req={migrate}", image, "sleep", "infinity",
        )  # fmt: skip
        yield (
            docker("inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", LAB),
            start,
        )
    finally:
        subprocess.run(
            ["docker", "rm", "--force", LAB, f"{LAB}-old", f"{LAB}-new"], capture_output=True, check=False
        )


@pytest.mark.skipif(
    not os.path.exists("/proc/sys/net/ipv4/tcp_migrate_req"), reason="this kernel has no tcp_migrate_req"
)
@pytest.mark.parametrize("migrate", [1, 0])
def test_what_waits_in_the_old_ones_queue_is_answered_by_the_new_one(site: Site, migrate: int) -> None:
    """And is lost where the kernel does not migrate it: the risk that a rollout warns of."""
    request = b"GET /edge_alive HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    with lab(site, migrate) as (address, start), ExitStack() as stack:
        start("old")
        start("new")
        docker("pause", f"{LAB}-old")
        clients = []
        for _ in range(64):
            client = stack.enter_context(
                socket.create_connection((address, site.settings["site_http_port"]), timeout=30)
            )
            client.sendall(request)
            clients.append(client)

        def answered() -> list[socket.socket]:
            return select.select(clients, [], [], 0)[0]

        wait_for("the new one answers", lambda: len(answered()) >= 8)
        time.sleep(1)
        waiting = [client for client in clients if client not in answered()]
        assert waiting, "some wait in the queue of the one that stands still"
        # All its processes at once, while they stand still: none may take a connection and die with it.
        for pid in docker("top", f"{LAB}-old", "-eo", "pid").split()[1:]:
            os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["docker", "unpause", f"{LAB}-old"], capture_output=True, check=False)
        assert [outcome(client) for client in waiting] == ["HTTP/1.1 204" if migrate else "reset"] * len(
            waiting
        )


def outcome(client: socket.socket) -> str:
    try:
        return client.recv(12).decode()
    except ConnectionResetError:
        return "reset"
