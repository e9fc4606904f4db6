"""host_preflight on this machine: it sees who really holds a port, and needs no root to look."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from module_support import host_port, wait_for

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def busy_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_all_faults_at_once_and_nothing_is_changed(
    run_module, busy_port, containers, base_image, project
) -> None:
    container = containers(base_image, ["sleep", "600"], name=project, ports={"80/tcp": ("127.0.0.1", None)})
    published = host_port(container, 80)
    result = run_module(
        "host_preflight",
        ports=[{"port": busy_port, "purpose": "https"}, {"port": published, "containers": ["another"]}],
        paths_free_mb={"/no/such/place": 999_999_999},
        memory_mb=999_999_999,
        engine_min="999",
        compose_min="999",
        subnets={"test-net": "172.17.0.0/30"} if Path("/proc/net/route").exists() else {},
        required_settings=[{"name": "a_setting", "given": False, "where": "set it in the vault"}],
        files=[{"path": "/no/such/certificate.pem", "purpose": "certificate"}],
        registry={"url": "http://127.0.0.1:9", "plain_http": True},
    )
    assert result["failed"]
    for part in (
        f"Port {busy_port} (https) is taken by process",
        f"(pid {os.getpid()})",
        f"Port {published} is taken by container {project}",
        "/no/such/place has",
        "MiB of memory",
        "engine 2",
        "Docker Compose",
        "a_setting is not set: set it in the vault",
        "/no/such/certificate.pem (certificate) is not there",
        "no registry answers at http://127.0.0.1:9",
        "Nothing was touched",
    ):
        assert part in result["msg"], part
    assert "Traceback" not in result["output"]


#: What every image of this project has.
OURS = {"org.aisha.content.digest": "0" * 64}


@pytest.mark.parametrize("labels", [OURS, {}], ids=["ours", "of the old scripts"])
def test_a_container_of_the_stack_may_hold_its_port(
    run_module, containers, base_image, project, labels
) -> None:
    container = containers(
        base_image, ["sleep", "600"], name=project, ports={"80/tcp": ("127.0.0.1", None)}, labels=labels
    )
    result = run_module(
        "host_preflight",
        ports=[{"port": host_port(container, 80), "address": "127.0.0.1", "containers": [f"{project}*"]}],
    )
    assert not result["changed"]
    if labels:
        assert not result.get("failed"), result.get("msg")
        assert result["host"]["engine"]["running"]
    else:
        assert f"container {project}, which this project did not make" in result["msg"]


def test_a_container_on_the_hosts_network_is_named(
    run_module, containers, engine, base_image, project
) -> None:
    """nginx runs like this: no published port says whose socket it is."""
    shell = ["bash", "-c", "perl -MIO::Socket::INET -e '$s=IO::Socket::INET->new(Listen=>1,LocalAddr=>\"127.0.0.1:0\");"
             "$|=1;print $s->sockport,\"\\n\";sleep 600'"]  # fmt: skip
    container = containers(base_image, shell, name=project, network_mode="host", labels=OURS)
    port = int(wait_for(lambda: container.logs().decode().strip(), what="the listener"))
    taken = run_module("host_preflight", ports=[{"port": port}])
    assert f"Port {port} is taken by container {project}" in taken["msg"]
    assert not run_module("host_preflight", ports=[{"port": port, "containers": [project]}]).get("failed")


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root to become somebody else"
)
def test_an_ordinary_user_can_look(busy_port) -> None:
    """Without root, sudo or the docker group: what can't be seen is a warning, and what is missing is named."""
    script = """
import json, sys
import ansible.module_utils
ansible.module_utils.__path__.insert(0, sys.argv[1])
from ansible.module_utils.host_observation import Host
from ansible.module_utils.preflight import PortWish, Wishes, examine
findings, facts = examine(Host(), Wishes(ports=[PortWish(int(sys.argv[2]))], mirrors="never"), str)
print(json.dumps({"faults": findings.faults, "warnings": findings.warnings, "facts": facts}))
"""
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", script]
    done = subprocess.run(
        [*command, str(ROOT / "module_utils"), str(busy_port)],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert "This user is not root" in seen["faults"][0]
    assert f"Port {busy_port} is in use" in seen["warnings"][0]
    assert seen["facts"]["engine"]["permitted"] is False
    assert seen["facts"]["root"] is False
