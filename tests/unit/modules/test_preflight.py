"""Preflight: each rule finds its fault, names it with a remedy, and all come at once."""

from __future__ import annotations

import ipaddress
import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from ansible.module_utils import host_observation
from ansible.module_utils.docker_cli import Result
from ansible.module_utils.host_observation import Host, distribution_urls, knock_at_registry
from ansible.module_utils.preflight import (
    DockerNetwork,
    Engine,
    Holder,
    Listener,
    PortWish,
    Wishes,
    disk_faults,
    engine_faults,
    examine,
    file_faults,
    memory_faults,
    mirror_faults,
    needs_packages,
    parse_meminfo,
    parse_os_release,
    parse_proc_net_route,
    parse_proc_net_tcp,
    parse_published,
    port_faults,
    privilege_faults,
    setting_faults,
    subnet_faults,
    system_faults,
    version_numbers,
)

RECORDED_TCP = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F41 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0000 100 0 0 10 0
   1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4712 1 0000 100 0 0 10 0
   2: 0100007F:0050 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 4713 1 0000 20 0 0 10 -1
"""
RECORDED_TCP6 = """  sl  local_address remote_address st tx_queue rx_queue tr
   0: 00000000000000000000000000000000:01BB 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 4714 1
   1: 00000000000000000000000001000000:0CEA 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 4715 1
"""
RECORDED_ROUTE = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
br-0123456789ab\t00F01FAC\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
vpn0\t00F01FAC\t00000000\t0001\t0\t0\t0\t00F0FFFF\t0\t0\t0
"""
OS_RELEASE = (
    'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nNAME="Debian GNU/Linux"\nVERSION_ID="13"\nID=debian\n'
)
SYSTEMS = {"debian": ["12", "13"], "ubuntu": ["24.04"]}


# -- reading


def test_listening_sockets_are_read_and_connections_are_not() -> None:
    assert parse_proc_net_tcp(RECORDED_TCP, ipv6=False) == [
        Listener("127.0.0.1", 8001, 4711),
        Listener("0.0.0.0", 80, 4712),
    ]
    assert parse_proc_net_tcp(RECORDED_TCP6, ipv6=True) == [
        Listener("::", 443, 4714),
        Listener("::1", 3306, 4715),
    ]


def test_routes_are_read_without_the_default() -> None:
    routes = parse_proc_net_route(RECORDED_ROUTE)
    assert ("eth0", ipaddress.ip_network("10.0.0.0/16")) not in routes
    assert routes[1] == ("br-0123456789ab", ipaddress.ip_network("172.31.240.0/24"))
    assert len(routes) == 3


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        ("", []),
        ("8000/tcp", []),
        ("127.0.0.1:8001->8000/tcp", [("127.0.0.1", 8001)]),
        ("0.0.0.0:80->80/tcp, [::]:80->80/tcp", [("0.0.0.0", 80), ("::", 80)]),
        ("0.0.0.0:7000-7002->7000-7002/tcp", [("0.0.0.0", 7000), ("0.0.0.0", 7001), ("0.0.0.0", 7002)]),
        ("0.0.0.0:53->53/udp", []),
        (":::443->443/tcp", [("::", 443)]),
    ],
)
def test_published_ports_are_read(ports: str, expected: list[tuple[str, int]]) -> None:
    assert parse_published(ports) == expected


def test_small_files_are_read() -> None:
    assert parse_meminfo("MemTotal:       2033868 kB\nMemFree: 1 kB\n") == 1986
    assert parse_meminfo("") == 0
    assert parse_os_release(OS_RELEASE) == ("debian", "13")
    assert parse_os_release("") == ("", "")


@pytest.mark.parametrize(
    ("older", "newer"),
    [("20.10.24+dfsg1", "25.0"), ("2.9.0", "2.20"), ("v2.19.1", "2.20.0"), ("24.0.9", "26.1.5")],
)
def test_versions_are_compared_by_number(older: str, newer: str) -> None:
    assert version_numbers(older) < version_numbers(newer)


# -- ports

WEB = PortWish(443, "", "https", ("aisha-nginx-webhook*",))


def holder(address: str = "0.0.0.0", port: int = 443, **who: Any) -> Holder:
    return Holder(Listener(address, port, 1), **who)


@pytest.mark.parametrize("name", ["aisha-nginx-webhook", "aisha-nginx-webhook-next"])
def test_a_port_that_the_stack_itself_holds_is_fine(name: str) -> None:
    findings = port_faults([WEB], [holder(pid=7, process="nginx", container=name)], sees_all=True)
    assert (findings.faults, findings.warnings) == ([], [])


@pytest.mark.parametrize(
    ("who", "named"),
    [
        ({"pid": 7, "process": "apache2"}, "process apache2 (pid 7)"),
        ({"pid": 7, "process": "docker-proxy", "container": "other"}, "container other"),
        (
            {"pid": 7, "process": "nginx", "container": "not-aisha-nginx-webhook"},
            "container not-aisha-nginx-webhook",
        ),
    ],
)
def test_a_port_that_somebody_else_holds_is_named_with_its_holder(who: dict, named: str) -> None:
    (fault,) = port_faults([WEB], [holder(**who)], sees_all=True).faults
    assert f"Port 443 (https) is taken by {named}: stop it" in fault


def test_one_holder_on_two_addresses_is_one_fault() -> None:
    held = [holder(pid=7, process="apache2"), holder("::", pid=7, process="apache2")]
    assert len(port_faults([WEB], held, sees_all=True).faults) == 1


@pytest.mark.parametrize(
    ("wanted", "held", "taken"),
    [
        ("127.0.0.1", "192.168.0.10", False),
        ("127.0.0.1", "0.0.0.0", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("", "127.0.0.1", True),
        ("127.0.0.1", "::", True),
    ],
)
def test_only_addresses_that_meet_are_in_each_others_way(wanted: str, held: str, taken: bool) -> None:
    findings = port_faults([PortWish(443, wanted)], [holder(held, pid=7, process="x")], sees_all=True)
    assert bool(findings.faults) is taken


def test_a_holder_that_cannot_be_seen_is_a_warning_for_a_user_and_a_fault_for_root() -> None:
    assert port_faults([WEB], [holder()], sees_all=False).faults == []
    assert "may not see by whom" in port_faults([WEB], [holder()], sees_all=False).warnings[0]
    assert "another namespace" in port_faults([WEB], [holder()], sees_all=True).faults[0]


# -- other rules


def test_too_little_disk_and_memory() -> None:
    assert disk_faults({"/a": 100, "/b": 100}, {"/a": 99, "/b": 100}) == [
        "/a has 99 MB free and needs 100: free some, or move it to a larger disk"
    ]
    assert memory_faults(1800, 1799)
    assert not memory_faults(1800, 1800)
    assert not memory_faults(1800, 0), "unknown is not too little"


@pytest.mark.parametrize(
    ("system", "count"),
    [
        (("debian", "12", "x86_64"), 0),
        (("debian", "13", "aarch64"), 0),
        (("ubuntu", "24.04", "x86_64"), 0),
        (("debian", "11", "x86_64"), 1),
        (("fedora", "42", "riscv64"), 2),
        (("", "", "x86_64"), 1),
    ],
)
def test_unsupported_systems(system: tuple[str, str, str], count: int) -> None:
    assert len(system_faults(*system, SYSTEMS, ["x86_64", "aarch64"])) == count


def test_a_user_needs_a_way_to_become_root() -> None:
    assert privilege_faults(root=False, sudo=False, become_password=False)
    for way in ("root", "sudo", "become_password"):
        assert not privilege_faults(
            **({"root": False, "sudo": False, "become_password": False} | {way: True})
        )


@pytest.mark.parametrize(
    ("engine", "count"),
    [
        (Engine(), 0),
        (Engine(version="26.1.5", compose="2.26.1"), 0),
        (Engine(version="20.10.24+dfsg1", compose="2.26.1"), 1),
        (Engine(version="24.0.7", compose="v2.19.1"), 2),
        (Engine(version="25.0.0"), 0),
    ],
)
def test_an_old_engine_is_a_fault_and_an_absent_one_is_not(engine: Engine, count: int) -> None:
    assert len(engine_faults(engine, "25.0", "2.20")) == count


@pytest.mark.parametrize(
    ("engine", "needed"),
    [
        (Engine(), True),
        (Engine(installed=True, compose="2", buildx="1"), False),
        (Engine(installed=True, compose="2"), True),
        (Engine(installed=True, permitted=False), False),
    ],
)
def test_mirrors_matter_only_when_something_has_to_be_installed(engine: Engine, needed: bool) -> None:
    assert needs_packages(engine) is needed


def test_a_container_of_the_old_scripts_is_none_of_ours_whatever_its_name() -> None:
    old = holder(pid=7, process="docker-proxy", container="aisha-nginx-webhook", foreign=True)
    (fault,) = port_faults([WEB], [old], sees_all=True).faults
    assert "container aisha-nginx-webhook, which this project did not make" in fault
    assert "docs/moving.md" in fault


OURS = DockerNetwork("cluster", "0123456789abcdef", ("172.31.240.0/24",))


def test_our_own_network_and_its_bridges_route_are_no_overlap() -> None:
    routes = parse_proc_net_route(RECORDED_ROUTE)[:2]
    assert subnet_faults({"cluster": "172.31.240.0/24"}, [OURS], routes) == []


def test_a_port_that_two_parts_are_to_have_is_named_and_nobody_is_told_to_stop_the_other() -> None:
    one, two = (PortWish(8001, "127.0.0.1", f"API instance {n}", (f"*api-{n}*",)) for n in (1, 2))
    held = Holder(Listener("127.0.0.1", 8001), container="aisha-webhook-api-1")
    (fault,) = port_faults([one, two], [held], sees_all=True).faults
    assert fault.startswith(
        "Port 8001 is named twice in the inventory, for API instance 1 and for API instance 2"
    )
    same = [PortWish(443, "", purpose, ("*nginx*",)) for purpose in ("https", "https for fal")]
    assert port_faults(same, [], sees_all=True).faults == []


def test_with_the_engine_down_its_bridge_with_our_subnet_is_ours() -> None:
    """Containers go on without their engine, and so does their network: the run that is to start it again must not stop."""
    ours, larger = ipaddress.ip_network("172.31.240.0/24"), ipaddress.ip_network("172.31.240.0/20")
    wanted = {"cluster": str(ours)}
    bridge = "br-33d81e28b9c2"
    assert subnet_faults(wanted, [], [(bridge, ours)], engine_down=True) == []
    assert len(subnet_faults(wanted, [], [(bridge, ours)])) == 1
    assert len(subnet_faults(wanted, [], [(bridge, larger)], engine_down=True)) == 1
    assert len(subnet_faults(wanted, [], [("vpn0", ours)], engine_down=True)) == 1


def test_overlaps_are_named() -> None:
    other = DockerNetwork("old", "f" * 64, ("172.31.0.0/16", "fd00::/64"))
    faults = subnet_faults(
        {"cluster": "172.31.240.0/24"}, [OURS, other], parse_proc_net_route(RECORDED_ROUTE)
    )
    assert len(faults) == 2
    assert "172.31.0.0/16 of the engine's network old" in faults[0]
    assert "the host's route to 172.31.240.0/20 (vpn0)" in faults[1]


def test_our_network_with_another_subnet_is_a_fault() -> None:
    (fault,) = subnet_faults({"cluster": "172.31.250.0/24"}, [OURS], [])
    assert "exists with the subnet 172.31.240.0/24" in fault


def test_wanted_subnets_must_be_subnets_and_apart() -> None:
    assert "is not a subnet" in subnet_faults({"a": "172.31.240.1/24"}, [], [])[0]
    assert "overlap" in subnet_faults({"a": "10.9.0.0/16", "b": "10.9.1.0/24"}, [], [])[0]


def test_missing_settings_and_files_say_where() -> None:
    required = [
        {"name": "a", "given": True},
        {"name": "b", "given": False, "where": "set it in the vault"},
        {"name": "c", "given": False, "fault": "c is odd"},
    ]
    assert setting_faults(required) == ["b is not set: set it in the vault", "c is odd"]
    wanted = [{"path": "/x", "purpose": "certificate"}, {"path": "/y", "purpose": "key"}]
    assert file_faults(wanted, ["/y"]) == [
        "/y (key) is not there: put it there, or correct its path in the inventory"
    ]


def test_mirrors_are_named_with_the_reason() -> None:
    assert "mirror http://m does not answer (timed out)" in mirror_faults({"http://m": "timed out"})[0]


def test_only_the_distributions_own_sites_are_asked() -> None:
    output = (
        "http://m.example/debian|trixie|Debian\nhttp://m.example/debian|trixie-updates|Debian\n"
        "http://s.example/debian-security/|trixie-security|Debian\nhttps://third.example/apt|x|Third\n"
        "http://bare.example/ubuntu|noble|$(ORIGIN)\nfile:///srv/debian|trixie|Debian\n"
    )
    assert distribution_urls(output) == {
        "http://m.example/debian": "http://m.example/debian/dists/trixie/InRelease",
        "http://s.example/debian-security/": "http://s.example/debian-security/dists/trixie-security/InRelease",
        "http://bare.example/ubuntu": "http://bare.example/ubuntu/dists/noble/InRelease",
    }


# -- all at once


class Seen:
    """A host on which everything is wrong, or nothing."""

    def __init__(self, *, bad: bool) -> None:
        self.bad = bad
        self.root, self.sudo, self.sees_all = not bad, False, True
        self.mirrors_asked = 0

    def system(self) -> dict[str, Any]:
        return {
            "distribution": "debian",
            "release": "11" if self.bad else "13",
            "architecture": "i686" if self.bad else "x86_64",
            "memory_mb": 100 if self.bad else 4000,
        }

    def free_mb(self, paths: Sequence[str]) -> dict[str, int]:
        return dict.fromkeys(paths, 1 if self.bad else 10_000)

    def missing_files(self, paths: Sequence[str]) -> list[str]:
        return list(paths) if self.bad else []

    def engine(self) -> Engine:
        if self.bad:
            return Engine(installed=True, version="20.10.24", compose="2.9", root_dir="/data/docker")
        return Engine(installed=True, running=True, version="26.1.5", compose="2.26.1", buildx="0.13.1")

    def networks(self) -> list[DockerNetwork]:
        return [DockerNetwork("other", "f" * 64, ("172.31.240.0/20",))] if self.bad else []

    def routes(self) -> list[Any]:
        return []

    def holders(self, ports: Sequence[int]) -> list[Holder]:
        return [holder(pid=1, process="apache2")] if self.bad else []

    def unreachable_mirrors(self, timeout: float) -> dict[str, str]:
        self.mirrors_asked += 1
        return {"http://m.example/debian": "timed out"} if self.bad else {}


WISHES = Wishes(
    ports=[WEB],
    paths_free_mb={"@docker": 3000},
    memory_mb=1800,
    systems=SYSTEMS,
    architectures=["x86_64"],
    engine_min="25.0",
    compose_min="2.20",
    subnets={"cluster": "172.31.240.0/24"},
    required_settings=[{"name": "secrets_given.x", "given": False}],
    files=[{"path": "/etc/ssl/x.pem", "purpose": "certificate"}],
)


def test_all_faults_come_in_one_message() -> None:
    findings, facts = examine(Seen(bad=True), WISHES, lambda: "the registry refuses")
    message = findings.message("host-1")
    for part in (
        "13 faults", "Nothing was touched", "Port 443", "/data/docker has 1 MB", "100 MiB", "debian 11", "i686", "not root",
        "engine 20.10.24 is too old", "Compose 2.9 is too old", "other", "secrets_given.x", "x.pem", "the registry refuses",
    ):  # fmt: skip
        assert part in message, part
    assert facts["engine"]["version"] == "20.10.24"
    assert "m.example" in message


@pytest.mark.parametrize("number", [0, -1, 65536, 99999])
def test_what_is_no_port_is_said(number: int) -> None:
    (fault,) = port_faults([PortWish(number, "127.0.0.1", "console")], [], sees_all=True).faults
    assert fault.startswith(f"{number} (console) is no port")
    assert port_faults([PortWish(65535)], [], sees_all=True).faults == []


def test_a_file_that_may_be_there_or_not_is_a_fact_and_no_fault() -> None:
    wishes = Wishes(look_for=["/opt/site/monitoring.yml"])
    findings, facts = examine(Seen(bad=True), wishes, str)
    assert facts["absent"] == ["/opt/site/monitoring.yml"]
    assert "monitoring.yml" not in findings.message("host-1")
    assert examine(Seen(bad=False), wishes, str)[1]["absent"] == []


def test_a_good_host_has_no_fault_and_its_mirrors_are_left_alone() -> None:
    host = Seen(bad=False)
    wishes = Wishes(**{**WISHES.__dict__, "required_settings": []})
    findings, facts = examine(host, wishes, str)
    assert findings.faults == []
    assert host.mirrors_asked == 0
    assert facts["engine"]["running"] is True
    json.dumps(facts)


def test_a_route_of_a_network_that_could_not_be_seen_is_no_fault() -> None:
    class Hidden(Seen):
        def routes(self) -> list[Any]:
            return [("br-0123456789ab", ipaddress.ip_network("172.31.240.0/24"))]

    wishes = Wishes(**{**WISHES.__dict__, "required_settings": []})
    assert examine(Hidden(bad=False), wishes, str)[0].faults == []


# -- observing, from recorded answers


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Result]:
    answers: dict[str, Result] = {}

    def attempt(command: Sequence[str], timeout: float = 1) -> Result:
        text = " ".join(command)
        return next((a for key, a in answers.items() if key in text), Result(127, "", ""))

    monkeypatch.setattr(host_observation, "attempt", attempt)
    monkeypatch.setattr(host_observation, "find_program", lambda name: f"/usr/bin/{name}")
    return answers


def test_a_stopped_engine_still_tells_its_version(recorded: dict[str, Result]) -> None:
    recorded["dockerd --version"] = Result(0, "Docker version 20.10.24+dfsg1, build 297e128\n", "")
    stopped = {"ServerErrors": ["Cannot connect to the Docker daemon"], "ClientInfo": {"Plugins": []}}
    recorded["docker info"] = Result(1, json.dumps(stopped), "")
    engine = Host().engine()
    assert (engine.installed, engine.running, engine.version) == (True, False, "20.10.24+dfsg1")


def test_what_a_stopped_engine_has_left_running_is_known_by_its_notes(recorded: dict[str, Result]) -> None:
    """With live-restore they go on, and hold their ports: the run that starts the engine again is not to be refused."""
    bound = {
        "8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8001"}],
        "53/udp": [{"HostIp": "", "HostPort": "53"}],
        "9/tcp": None,
    }
    ours = {"Labels": {"org.aisha.content.digest": "1"}}
    notes = [
        {"ID": "a" * 64, "Name": "/wht-api-1", "State": {"Running": True}, "Config": ours,
         "NetworkSettings": {"Ports": bound}},
        {"ID": "b" * 64, "Name": "/old-nginx", "State": {"Running": True}, "Config": {"Labels": None}},
        {"ID": "c" * 64, "Name": "/ended", "State": {"Running": False}},
    ]  # fmt: skip
    recorded["docker ps"] = Result(1, "", "Cannot connect to the Docker daemon")
    recorded["config.v2.json"] = Result(0, "".join(map(json.dumps, notes)) + "{half a no", "")
    found = Host(use_sudo=False)._containers()
    assert [(one.name, one.published, one.foreign) for one in found] == [
        ("wht-api-1", [("127.0.0.1", 8001)], False),
        ("old-nginx", [], True),
    ]
    # An engine that is too busy to answer has left nothing, and one that answers is asked.
    for answer in (Result(124, "", ""), Result(127, "", ""), Result(0, "", "")):
        recorded["docker ps"] = answer
        assert Host(use_sudo=False)._containers() == []


def test_a_user_who_may_not_ask_the_engine_is_no_absent_engine(recorded: dict[str, Result]) -> None:
    denied = {"ServerErrors": ["permission denied while trying to connect to the Docker daemon socket"]}
    recorded["docker info"] = Result(1, json.dumps(denied), "")
    engine = Host().engine()
    assert not engine.permitted
    assert not needs_packages(engine)


def test_an_engine_too_busy_to_answer_is_no_absent_engine(recorded: dict[str, Result]) -> None:
    recorded["docker info"] = Result(124, "", "took longer than 10 s")
    engine = Host().engine()
    assert not engine.permitted
    assert not needs_packages(engine)


def test_a_running_engine_is_described(recorded: dict[str, Result]) -> None:
    plugins = [{"Name": "compose", "Version": "2.26.1-4"}, {"Name": "buildx", "Version": "0.13.1"}]
    info = {
        "ServerVersion": "26.1.5",
        "LiveRestoreEnabled": True,
        "DockerRootDir": "/d",
        "ClientInfo": {"Plugins": plugins},
    }
    recorded["docker info"] = Result(0, json.dumps(info), "")
    assert Host().engine() == Engine(
        installed=True,
        running=True,
        version="26.1.5",
        compose="2.26.1-4",
        buildx="0.13.1",
        live_restore=True,
        root_dir="/d",
    )


def test_a_hanging_or_broken_engine_is_an_engine_that_does_not_run(recorded: dict[str, Result]) -> None:
    recorded["docker info"] = Result(124, "no json", "")
    assert not Host().engine().running
    assert Host().networks() == []


class _Registry(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/v2/" else 500)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.mark.parametrize(
    ("status", "fault"), [(200, ""), (401, ""), (404, "no registry"), (502, "no registry")]
)
def test_a_registry_can_be_asked_without_further_libraries(status: int, fault: str) -> None:
    handler = type("Handler", (_Registry,), {"status": status})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        said = knock_at_registry(url, None, 5)
        server.shutdown()
    assert (fault in said) if fault else said == ""
    assert "No registry answers" in knock_at_registry(url, None, 5)
