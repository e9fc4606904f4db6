"""Each check of the host's doctor is provoked once: by what really is wrong, on this machine's engine, ports and disks."""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.host_doctor import CHECKS, Doctor, Finding, Site
from ansible.module_utils.host_observation import Host

pytestmark = pytest.mark.engine
PROVOKED: set[str] = set()


def site(directory: Path, **changes: Any) -> Site:
    return Site(**{"name": "wht-ill", "directory": directory, "nginx": "wht-ill-nginx", **changes})


def examined(name: str, doctor: Doctor) -> list[Finding]:
    """What one check says; it must be the only one that spoke."""
    found = doctor.examine([name])
    assert {finding.check for finding in found} == {name}
    return found


def provoked(name: str, doctor: Doctor, *words: str, verdict: str = "fail") -> None:
    """The check finds it, and says what."""
    found = examined(name, doctor)
    said = [finding.what for finding in found if finding.verdict == verdict]
    assert said, found
    for word in words:
        assert word in " | ".join(said), found
    PROVOKED.add(name)


def well(name: str, doctor: Doctor) -> None:
    """The check finds nothing."""
    found = examined(name, doctor)
    assert not [finding for finding in found if finding.verdict in ("fail", "warn")], found


def test_the_engine_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    well("engine-stopped", Doctor(site(tmp_path)))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    provoked("engine-stopped", Doctor(site(tmp_path)), "does not answer")
    # What needs an engine says so, or looks all the same; none of it fails by itself.
    for name in CHECKS:
        assert all("check itself failed" not in f.what for f in Doctor(site(tmp_path)).examine([name])), name


def test_the_engine_is_old(tmp_path: Path) -> None:
    well("engine-old", Doctor(site(tmp_path)))
    provoked("engine-old", Doctor(site(tmp_path, engine_min="99.0")), "older than 99.0")
    provoked("engine-old", Doctor(site(tmp_path, compose_min="99.0")), "Compose")


def test_live_restore_is_off(tmp_path: Path) -> None:
    class Other(Host):
        def engine(self) -> Any:
            return replace(super().engine(), live_restore=False)

    provoked("live-restore-off", Doctor(site(tmp_path), host=Other()), "live-restore", verdict="warn")


def test_memory_and_disk_are_short(tmp_path: Path) -> None:
    provoked("memory-low", Doctor(site(tmp_path, memory_mb=10**9)), "MB of memory")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=True)
    try:
        provoked("disk-full", Doctor(site(small, disk_mb=100)), f"{small}: 1 MB are free")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_kernel_is_set_otherwise(tmp_path: Path) -> None:
    provoked("kernel-ports", Doctor(site(tmp_path, ports=[0])), "ip_unprivileged_port_start")
    setting = tmp_path / "net" / "ipv4"
    setting.mkdir(parents=True)
    provoked("kernel-migrate", Doctor(site(tmp_path), proc_sys=tmp_path), "has no", verdict="warn")
    (setting / "tcp_migrate_req").write_text("0\n")
    provoked("kernel-migrate", Doctor(site(tmp_path), proc_sys=tmp_path), "is 0", verdict="warn")


@contextmanager
def clock(shift: float) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() + shift)

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


def test_the_clock_is_wrong(tmp_path: Path) -> None:
    with clock(0) as url:
        well("clock-off", Doctor(site(tmp_path, clock_url=url)))
    with clock(400) as url:
        provoked("clock-off", Doctor(site(tmp_path, clock_url=url)), "behind")


def test_a_name_is_unknown(tmp_path: Path) -> None:
    well("name-unknown", Doctor(site(tmp_path, hosts=["localhost", "127.0.0.1"])))
    provoked("name-unknown", Doctor(site(tmp_path, hosts=["nowhere.invalid"])), "nowhere.invalid")


def bound(port: int) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("0.0.0.0", port))
    return made


def test_ports_are_taken_and_open(tmp_path: Path) -> None:
    # The port stays bound when its holder is gone, so that nobody else listens there.
    with bound(0) as keeper:
        port = keeper.getsockname()[1]
        with bound(port) as holder:
            holder.listen()
            provoked("port-taken", Doctor(site(tmp_path, ports=[port])), f"port {port} is held by process")
            provoked("port-open", Doctor(site(tmp_path, api_ports=[port])), f"port {port} is open on 0.0.0.0")
        well("port-taken", Doctor(site(tmp_path, ports=[port])))
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        well("port-open", Doctor(site(tmp_path, api_ports=[holder.getsockname()[1]])))


def test_networks(tmp_path: Path) -> None:
    provoked("network-gone", Doctor(site(tmp_path, network="wht-none", subnet="172.31.99.0/24")), "is gone")
    provoked(
        "network-gone", Doctor(site(tmp_path, network="bridge", subnet="10.99.0.0/24")), "not 10.99.0.0/24"
    )
    name = f"wht{uuid.uuid4().hex[:8]}"
    try:
        subprocess.run(["ip", "link", "add", name, "type", "dummy"], check=True, capture_output=True)
        subprocess.run(["ip", "address", "add", "10.98.7.1/24", "dev", name], check=True)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        subnet = "10.98.7.0/25"
    except (
        subprocess.CalledProcessError,
        FileNotFoundError,
    ):  # a machine that may not: any route of its own will do
        bridges = {n.bridge or f"br-{n.network_id[:12]}" for n in Host().networks()}
        subnet = next(str(r) for i, r in Host().routes() if r.prefixlen and i not in bridges)
    try:
        provoked("subnet-shared", Doctor(site(tmp_path, subnet=subnet)), "leads to")
        well("subnet-shared", Doctor(site(tmp_path, subnet=str(ipaddress.ip_network("10.97.6.0/24")))))
    finally:
        subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)


def test_registry_images_and_secrets(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        provoked("registry-away", Doctor(site(tmp_path, registry_url=url)), url, verdict="warn")
    release = tmp_path / "current"
    release.mkdir()
    gone = f"127.0.0.1:9/nothing@sha256:{'0' * 64}"
    (release / "release.json").write_text(json.dumps({"images": {"webhook-api": gone}}))
    provoked("image-gone", Doctor(site(tmp_path)), gone)
    provoked("secret-open", Doctor(site(tmp_path)), "is gone")
    secrets = tmp_path / "secrets" / "api"
    secrets.mkdir(parents=True)
    for name, text, mode in (
        ("empty", "", 0o400),
        ("open", "x", 0o644),
        ("right", "x", 0o400),
        ("keys.json", "{}", 0o444),
    ):
        (secrets / name).write_text(text)
        (secrets / name).chmod(mode)
    found = [finding.what for finding in examined("secret-open", Doctor(site(tmp_path)))]
    assert len(found) == 2, found
    provoked(
        "secret-open", Doctor(site(tmp_path)), "empty is empty", "open may be read by others (mode 0644)"
    )


def test_the_spool_holds_something(tmp_path: Path) -> None:
    volume = f"wht-ill-{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["docker", "volume", "create", volume], check=True, capture_output=True, text=True)
    try:
        where = ["docker", "volume", "inspect", "--format", "{{.Mountpoint}}", made.stdout.strip()]
        mountpoint = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
        spool = Path(mountpoint, "spool")
        spool.mkdir()
        well("spool-waiting", Doctor(site(tmp_path, spool_volume=volume)))
        (spool / "a.spool-wal").write_bytes(b"x" * 2_000_000)
        provoked("spool-waiting", Doctor(site(tmp_path, spool_volume=volume)), "2 MB", verdict="warn")
        (spool / "a.spool.broken").write_bytes(b"x")
        provoked("spool-waiting", Doctor(site(tmp_path, spool_volume=volume)), "a.spool.broken")
    finally:
        subprocess.run(["docker", "volume", "rm", volume], check=True, capture_output=True)


def until(doctor: Doctor, name: str, wanted: Callable[[list[Finding]], bool]) -> None:
    deadline = time.monotonic() + 60
    while not wanted(examined(name, doctor)):
        assert time.monotonic() < deadline, examined(name, doctor)
        time.sleep(0.2)


def test_containers_that_are_not_well(tmp_path: Path, containers: Any, base_image: str) -> None:
    def start(script: str, **options: Any) -> Any:
        return containers(base_image, ["sh", "-c", script], **options)

    sick = {
        "test": ["CMD-SHELL", "echo no backend; false"],
        "interval": 10**9,
        "timeout": 5 * 10**9,
        "retries": 1,
    }
    settings = start("exit 78")
    loop = start("exit 1", restart_policy={"Name": "always"})
    unhealthy = start("exec sleep 600", healthcheck=sick)
    greedy = start("x=xxxxxxxxxxxxxxxx; while :; do x=$x$x; done", mem_limit="8m", memswap_limit="8m")
    plain = start("exec sleep 600")

    def bad(found: list[Finding]) -> bool:
        return any(finding.verdict in ("fail", "warn") for finding in found)

    for name, container, words, verdict in (
        ("container-settings", settings, "ended with 78", "fail"),
        ("container-down", settings, "exit code 78", "fail"),
        ("container-restarting", loop, "was restarted", "warn"),
        ("container-unhealthy", unhealthy, "no backend", "fail"),
        ("container-memory", greedy, "was killed", "fail"),
    ):
        doctor = Doctor(site(tmp_path, containers=[container.name]))
        until(doctor, name, bad)
        provoked(name, doctor, container.name, words, verdict=verdict)
        well(name, Doctor(site(tmp_path, containers=[plain.name])))
    provoked("container-down", Doctor(site(tmp_path, containers=["wht-ill-nobody"])), "is not there")


def test_every_check_was_provoked() -> None:
    """The last one here: a check that nobody has provoked is not known to work."""
    text = Path(__file__).read_text(encoding="utf-8")
    named = set(re.findall(r'provoked\("([a-z-]+)"', text)) | set(
        re.findall(r'\("(container-[a-z]+)", ', text)
    )
    assert named == set(CHECKS)
    # Together with the tests above; alone, nothing was.
    assert not PROVOKED or set(CHECKS) == PROVOKED
