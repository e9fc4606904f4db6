"""Rooms of the rollout with a real engine and real sockets: services one by one, two of one, leftovers, connections."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest
import yaml
from ansible.module_utils.docker_cli import Docker
from ansible.module_utils.docker_engine import Engine
from ansible.module_utils.rollout.compose import Project, is_running
from ansible.module_utils.rollout.evidence import collect, tell
from ansible.module_utils.rollout.model import RolloutError, parse_release
from ansible.module_utils.rollout.sockets import connections

pytestmark = pytest.mark.engine


def service(image, name, kind, command="exec sleep 600", **more):
    return {
        "image": image,
        "init": True,
        "entrypoint": ["sh", "-c", command],
        "stop_grace_period": "1s",
        "labels": {f"org.aisha.{'edge' if kind == 'edge' else 'release'}": "one"},
        **({} if kind == "edge" else {"container_name": name}),
        **more,
    }


@pytest.fixture
def site(tmp_path, base_image, project):
    """A site of small containers: (project, release, write the Compose file)."""
    kinds = {"api-1": "api", "worker": "worker", "nginx": "edge"}
    rollout = {
        "webhook_release": "one",
        "project": project,
        "services": [
            {"name": name, "kind": kind, "container": f"{project}-{name}", "image": base_image}
            for name, kind in kinds.items()
        ],
        "edge": "one",
        "edge_path": str(tmp_path),
        "certificate_directory": str(tmp_path),
        "ports": {"http": 1, "https": [2]},
    }
    release = parse_release("r-000000000001", tmp_path, rollout)

    def write(**commands):
        services = {
            name: service(
                base_image, f"{project}-{name}", kind, commands.get(name.replace("-", "_"), "exec sleep 600")
            )
            for name, kind in kinds.items()
        }
        services["migrate"] = {"image": base_image, "profiles": ["migrate"], "entrypoint": ["sleep", "600"]}
        document = {"name": project, "services": services}
        release.compose_file.write_text(yaml.safe_dump(document))

    write()
    yield Project(project, Docker(), Engine()), release, write
    down = [
        "docker",
        "compose",
        "-p",
        project,
        "--profile",
        "migrate",
        "-f",
        str(release.compose_file),
        "down",
    ]
    subprocess.run([*down, "--timeout", "0", "--remove-orphans"], check=True, capture_output=True)


def actions(project, release):
    planned, orphans = project.plan(release)
    assert orphans == []
    return {entry.name: entry.action for entry in planned if entry.name != "migrate"}


def test_services_are_brought_up_one_by_one_and_the_plan_follows(site):
    project, release, write = site
    assert set(actions(project, release).values()) == {"create"}
    project.up(release, ["api-1", "worker"])
    assert actions(project, release) == {"api-1": "none", "worker": "none", "nginx": "create"}

    write(api_1="exec sleep 601")
    assert actions(project, release)["api-1"] == "replace"
    project.clear("api-1")
    assert actions(project, release)["api-1"] == "create"
    (worker,) = project.containers("worker")
    project.up(release, ["api-1"])
    assert actions(project, release) == {"api-1": "none", "worker": "none", "nginx": "create"}
    assert project.containers("worker")[0]["Id"] == worker["Id"]


def test_two_stand_side_by_side_and_the_one_that_stays_gets_the_name(site):
    project, release, write = site
    project.up(release, ["nginx"])
    (old,) = project.containers("nginx")
    project.rename(old, release.nginx.container)
    write(nginx="exec sleep 601")
    project.up(release, ["nginx"], {"nginx": 2})
    found = {container["Id"]: container for container in project.containers("nginx")}
    assert len(found) == 2
    assert all(is_running(container) for container in found.values())
    (new,) = (container for identity, container in found.items() if identity != old["Id"])
    project.stop(found[old["Id"]])
    project.remove(found[old["Id"]])
    project.remove(found[old["Id"]])  # what is gone already is no fault
    project.rename(new, release.nginx.container)
    (left,) = project.containers("nginx")
    assert left["Name"] == f"/{release.nginx.container}"
    assert actions(project, release)["nginx"] == "none"


def test_a_migration_that_nobody_waits_for_is_found_and_is_no_service(site):
    project, release, _ = site
    command = [
        "docker",
        "compose",
        "-p",
        project.name,
        "-f",
        str(release.compose_file),
        "--profile",
        "migrate",
    ]
    subprocess.run([*command, "run", "--detach", "--no-deps", "migrate"], check=True, capture_output=True)
    assert actions(project, release)["api-1"] == "create"
    (left,) = project.one_offs()
    project.remove(left)
    assert project.one_offs() == []


def test_what_compose_says_is_told(site):
    project, release, write = site
    write()
    text = release.compose_file.read_text().replace("entrypoint", "entrypiont", 1)
    release.compose_file.write_text(text)
    with pytest.raises(RolloutError, match="entrypiont") as caught:
        project.plan(release)
    assert caught.value.reason == "bad_release"
    write()
    release.compose_file.write_text(
        release.compose_file.read_text().replace("init: true", "init: true\n    pull_policy: never")
    )
    document = yaml.safe_load(release.compose_file.read_text())
    document["services"]["api-1"]["image"] = "no-such-image:ever"
    release.compose_file.write_text(yaml.safe_dump(document))
    with pytest.raises(RolloutError, match="api-1") as caught:
        project.up(release, ["api-1"])
    assert caught.value.reason == "start_failed"


def test_the_last_words_of_a_crash_loop_are_kept(containers, base_image):
    loop = containers(
        base_image, ["sh", "-c", "echo last words >&2; exit 3"], restart_policy={"Name": "always"}
    )
    deadline = time.monotonic() + 60
    engine = Engine()
    while engine.inspect(loop.name)["RestartCount"] < 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    found = collect(engine, loop.name, 5)
    assert found["exit_code"] == 3
    assert found["log"][-1] == "last words"
    assert "exit code 3" in tell(found)[0]


SERVER = """
import os, socket, sys
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
if os.fork():
    sys.stdin.read()
    sys.exit()
held = [listening.accept() for _ in range(2)]
held[0][0].recv(1)
held[0][0].close()
held[1][0].recv(1)
"""


def test_connections_are_seen_while_they_last():
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    port = int(server.stdout.readline())
    first, second = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))

    def until(count):
        deadline = time.monotonic() + 30
        while len(found := connections(server.pid, {port})) != count:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        return found

    both = until(2)
    assert connections(server.pid, {port + 1}) == set()
    first.sendall(b"x")
    assert until(1) < both
    second.close()
    first.close()
    server.communicate()
    assert server.returncode == 0
