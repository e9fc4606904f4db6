"""Doctor: each thing that docs/troubleshooting.md names, tried on the host, with the cause and the remedy of its entry.

The guide is the source: an entry `### id` says what a person sees, how the doctor tests it, why, and what to do. Here is
how it is tested. A check yields findings; one that cannot look is a finding as well, never an exception.
"""

from __future__ import annotations

import email.utils
import ipaddress
import json
import os
import re
import socket
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ansible.module_utils.docker_cli import Docker, DockerError
from ansible.module_utils.host_observation import Host, knock_at_registry
from ansible.module_utils.kept_secrets import BEFORE, GONE
from ansible.module_utils.kernel_settings import KernelSettingsError, read_setting
from ansible.module_utils.preflight import Engine

MEGABYTE = 1_000_000
CLOCK_SECONDS = 30.0
ASK_SECONDS = 5.0
_ENTRY = re.compile(r"^### ([a-z][a-z0-9-]*)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r"^\*\*(Symptom|Doctor|Cause|Remedy)\.\*\* (.*?)(?=^\*\*|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Finding:
    """What a check saw. `verdict`: ok, warn, fail, skip."""

    check: str
    verdict: str
    what: str


@dataclass(frozen=True)
class Entry:
    """One entry of the guide."""

    symptom: str = ""
    doctor: str = ""
    cause: str = ""
    remedy: str = ""


def read_guide(text: str) -> dict[str, Entry]:
    """The entries of docs/troubleshooting.md by their ids."""
    entries = {}
    for identity, body in _ENTRY.findall(text):
        fields = {name.lower(): " ".join(said.split()) for name, said in _FIELD.findall(body)}
        entries[identity] = Entry(**fields)
    return entries


@dataclass
class Site:
    """What the doctor has to know of a site."""

    name: str
    directory: Path
    nginx: str
    ports: Sequence[int] = ()
    api_ports: Sequence[int] = ()
    registry_url: str = ""
    registry_name: str = ""
    registry_ca: str = ""
    network: str = ""
    subnet: str = ""
    containers: Sequence[str] = ()
    hosts: Sequence[str] = ()
    engine_min: str = "25.0"
    compose_min: str = "2.20"
    memory_mb: int = 300
    disk_mb: int = 2000
    clock_url: str = ""
    spool_volume: str = ""


Check = Callable[["Doctor"], Iterator[Finding]]
CHECKS: dict[str, Check] = {}
#: What module site_status finds, by its kinds.
STATUS_KINDS = (
    "release", "file", "edge", "container", "image", "health", "secret", "switch", "nginx", "orphan", "lock", "certificate",
    "disk", "instance", "run",
)  # fmt: skip


def check(name: str) -> Callable[[Check], Check]:
    """Register a check under the id of its entry."""

    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register


@dataclass
class Doctor:
    """Looks at one host. Everything that it asks can be given by a test: host, engine, kernel, clock."""

    site: Site
    host: Host = field(default_factory=Host)
    docker: Docker = field(default_factory=Docker)
    proc_sys: Path = Path("/proc/sys")
    now: Callable[[], float] = time.time

    def examine(self, names: Sequence[str] = ()) -> list[Finding]:
        """Run the checks (all, or those named) side by side; findings in the order of the checks."""
        wanted = [name for name in CHECKS if not names or name in names]
        with ThreadPoolExecutor(8) as pool:
            return [finding for found in pool.map(self._run, wanted) for finding in found]

    def _run(self, name: str) -> list[Finding]:
        try:
            return [Finding(name, finding.verdict, finding.what) for finding in CHECKS[name](self)] or [
                Finding(name, "ok", "nothing is wrong")
            ]
        except Exception as error:  # one check that breaks costs its own verdict only
            return [Finding(name, "fail", f"the check itself failed: {type(error).__name__}: {error}")]

    def inspect(self, name: str) -> dict[str, Any] | None:
        """What the engine says of a container; None when there is none, or no engine."""
        found = self.docker.attempt("container", "inspect", name)
        with suppress(ValueError, IndexError):
            document: dict[str, Any] = json.loads(found.out or "[]")[0]
            return document
        return None


def ok(what: str) -> Finding:
    """All is well."""
    return Finding("", "ok", what)


def warn(what: str) -> Finding:
    """It works; somebody should look at it."""
    return Finding("", "warn", what)


def fail(what: str) -> Finding:
    """It does not work."""
    return Finding("", "fail", what)


def skip(what: str) -> Finding:
    """It could not be looked at, or there is nothing to look at."""
    return Finding("", "skip", what)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("-")[0].partition("+")[0])[:3])


# -- engine ------------------------------------------------------------------------------------------------------------


@check("engine-stopped")
def engine_stopped(doctor: Doctor) -> Iterator[Finding]:
    """The engine answers."""
    engine: Engine = doctor.host.engine()
    if not engine.installed and not engine.running:
        yield fail("no engine is installed")
    elif not engine.running:
        yield fail("the engine does not answer")
    else:
        yield ok(f"engine {engine.version}")


@check("engine-old")
def engine_old(doctor: Doctor) -> Iterator[Finding]:
    """Engine and Compose are new enough."""
    engine: Engine = doctor.host.engine()
    if not engine.version:
        yield skip("no engine")
        return
    if _version(engine.version) < _version(doctor.site.engine_min):
        yield fail(f"engine {engine.version} is older than {doctor.site.engine_min}")
    if not engine.compose and not engine.permitted:
        yield skip("the engine did not answer in time, or not to this user: its plugins are not known")
    elif not engine.compose:
        yield fail("the engine's client has no compose plugin")
    elif _version(engine.compose.lstrip("v")) < _version(doctor.site.compose_min):
        yield fail(f"Compose {engine.compose} is older than {doctor.site.compose_min}")


@check("live-restore-off")
def live_restore_off(doctor: Doctor) -> Iterator[Finding]:
    """A restart of the engine leaves the containers running."""
    engine: Engine = doctor.host.engine()
    if not engine.running:
        yield skip("no engine")
    elif not engine.live_restore:
        yield warn("live-restore is off: a restart of the engine stops every container")


# -- host --------------------------------------------------------------------------------------------------------------


@check("memory-low")
def memory_low(doctor: Doctor) -> Iterator[Finding]:
    """There is memory left."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    left = int(found.group(1)) * 1024 // MEGABYTE if found else 0
    say = fail if left < doctor.site.memory_mb // 3 else warn if left < doctor.site.memory_mb else ok
    yield say(f"{left} MB of memory are available")


@check("disk-full")
def disk_full(doctor: Doctor) -> Iterator[Finding]:
    """Site, engine and logs have room: bytes and inodes."""
    root = doctor.host.engine().root_dir or "/var/lib/docker"
    for path in dict.fromkeys([str(doctor.site.directory), root]):
        place = Path(path)
        while not place.exists():
            place = place.parent
        status = os.statvfs(place)
        left = status.f_bavail * status.f_frsize // MEGABYTE
        if left < doctor.site.disk_mb // 4:
            yield fail(f"{path}: {left} MB are free")
        elif left < doctor.site.disk_mb:
            yield warn(f"{path}: {left} MB are free, {doctor.site.disk_mb} MB should be")
        elif status.f_files and status.f_favail < 1000:
            yield fail(f"{path}: {status.f_favail} inodes are free")
        else:
            yield ok(f"{path}: {left} MB are free")


@check("kernel-ports")
def kernel_ports(doctor: Doctor) -> Iterator[Finding]:
    """nginx, which is not root, may listen on its ports."""
    lowest = min(doctor.site.ports, default=65535)
    try:
        value = read_setting(doctor.proc_sys, "net.ipv4.ip_unprivileged_port_start")
    except KernelSettingsError as error:
        yield fail(str(error))
        return
    if value is not None and value > lowest:
        yield fail(f"net.ipv4.ip_unprivileged_port_start is {value}, nginx's lowest port {lowest}")


@check("kernel-migrate")
def kernel_migrate(doctor: Doctor) -> Iterator[Finding]:
    """A connection that waits moves to the new nginx when the old one is stopped."""
    value = read_setting(doctor.proc_sys, "net.ipv4.tcp_migrate_req")
    if value is None:
        yield warn(
            "this kernel has no net.ipv4.tcp_migrate_req: a swap of nginx may cost single new connections"
        )
    elif value != 1:
        yield warn(f"net.ipv4.tcp_migrate_req is {value}: a swap of nginx may cost single new connections")


@check("clock-off")
def clock_off(doctor: Doctor) -> Iterator[Finding]:
    """The host's clock agrees with another one's: signatures are refused from 300 s on."""
    if not doctor.site.clock_url:
        yield skip("nobody to compare with (doctor_clock_url)")
        return
    request = urllib.request.Request(doctor.site.clock_url, method="HEAD")  # noqa: S310
    begun = doctor.now()
    try:
        with urllib.request.urlopen(request, timeout=ASK_SECONDS) as answer:  # noqa: S310
            said = answer.headers.get("Date", "")
    except urllib.error.HTTPError as error:
        said = error.headers.get("Date", "")
    except (OSError, ValueError) as error:
        yield skip(f"{doctor.site.clock_url} was not reached: {getattr(error, 'reason', error)}")
        return
    try:
        there = email.utils.parsedate_to_datetime(said).timestamp()
    except (TypeError, ValueError):
        yield skip(f"{doctor.site.clock_url} says no time")
        return
    apart = (begun + doctor.now()) / 2 - there
    say = fail if abs(apart) > CLOCK_SECONDS else ok
    yield say(
        f"this host is {abs(apart):.0f} s {'ahead of' if apart > 0 else 'behind'} {doctor.site.clock_url}"
    )


@check("name-unknown")
def name_unknown(doctor: Doctor) -> Iterator[Finding]:
    """Names that the site needs are known to this host's DNS."""
    for name in doctor.site.hosts:
        with suppress(ValueError):
            ipaddress.ip_address(name)
            continue
        try:
            socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except OSError as error:
            yield fail(f"{name} is not known: {error.strerror or error}")


# -- ports and networks ------------------------------------------------------------------------------------------------


@check("port-taken")
def port_taken(doctor: Doctor) -> Iterator[Finding]:
    """Only the site's own containers listen on its ports."""
    own = dict.fromkeys(doctor.site.ports, doctor.site.nginx)
    own |= dict.fromkeys(doctor.site.api_ports, f"{doctor.site.name}-api-")
    for holder in doctor.host.holders(list(own)):
        port = holder.listener.port
        if not holder.container.startswith(own[port]) and doctor.site.name not in holder.container:
            yield fail(f"port {port} is held by {holder}")


@check("port-open")
def port_open(doctor: Doctor) -> Iterator[Finding]:
    """The instances are reached through nginx only: their ports are on loopback."""
    for holder in doctor.host.holders(list(doctor.site.api_ports)):
        address = holder.listener.address
        if not ipaddress.ip_address(address).is_loopback:
            yield fail(f"port {holder.listener.port} is open on {address}: anybody gets past nginx")


@check("network-gone")
def network_gone(doctor: Doctor) -> Iterator[Finding]:
    """The instances' network is there, under its subnet."""
    if not doctor.host.engine().running:
        yield skip("no engine")
        return
    found = [network for network in doctor.host.networks() if network.name == doctor.site.network]
    if not found:
        yield fail(f"the network {doctor.site.network} is gone")
    elif doctor.site.subnet not in found[0].subnets:
        yield fail(f"{doctor.site.network} is {', '.join(found[0].subnets)}, not {doctor.site.subnet}")


@check("subnet-shared")
def subnet_shared(doctor: Doctor) -> Iterator[Finding]:
    """No route of the host leads into the site's subnet by another way."""
    if not doctor.site.subnet:
        yield skip("no subnet to look for")
        return
    own = ipaddress.ip_network(doctor.site.subnet)
    bridges = {network.bridge or f"br-{network.network_id[:12]}" for network in doctor.host.networks()}
    for interface, route in doctor.host.routes():
        if route.prefixlen and route.overlaps(own) and interface not in bridges:
            yield fail(f"{route} leads to {interface}, and {own} is the site's")


# -- registry and files ------------------------------------------------------------------------------------------------


@check("registry-away")
def registry_away(doctor: Doctor) -> Iterator[Finding]:
    """The registry answers."""
    if not doctor.site.registry_url:
        yield skip("this release came from a bundle")
        return
    said = knock_at_registry(doctor.site.registry_url, doctor.site.registry_ca or None, ASK_SECONDS)
    if said:
        yield warn(said)


@check("image-gone")
def image_gone(doctor: Doctor) -> Iterator[Finding]:
    """The images of the current and the previous release are in the engine: a restart and a rollback need no registry."""
    for link in ("current", "previous"):
        path = doctor.site.directory / link / "release.json"
        with suppress(OSError, ValueError):
            images = list(json.loads(path.read_text(encoding="utf-8"))["images"].values())
            try:
                found = doctor.docker.images(images)
            except DockerError:
                yield skip("no engine")
                return
            for name in images:
                if name not in found:
                    say = fail if link == "current" else warn
                    yield say(f"{name} of the {link} release is not in the engine")


@check("secret-open")
def secret_open(doctor: Doctor) -> Iterator[Finding]:
    """Secret files are there, are not empty, and only their reader may read them."""
    home = doctor.site.directory / "secrets"
    if not home.is_dir():
        yield fail(f"{home} is gone")
        return
    # What a rotation has replaced: nobody but root gets there, so the modes of its files say nothing.
    kept = [path for path in (home / BEFORE, home / GONE) if path.is_dir()]
    for path in kept:
        if path.stat().st_mode & 0o077:
            yield fail(f"{path} may be entered by others (mode {stat.S_IMODE(path.stat().st_mode):04o})")
    for path in sorted(home.rglob("*")):
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or any(place in path.parents for place in kept):
            continue
        if not status.st_size:
            yield fail(f"{path} is empty")
        elif status.st_mode & 0o077 and path.suffix != ".json":
            yield fail(f"{path} may be read by others (mode {stat.S_IMODE(status.st_mode):04o})")


@check("spool-waiting")
def spool_waiting(doctor: Doctor) -> Iterator[Finding]:
    """No deliveries wait on the disk for the database."""
    found = doctor.docker.attempt(
        "volume", "inspect", "--format", "{{.Mountpoint}}", doctor.site.spool_volume
    )
    place = Path(found.out.strip() or "/nonexistent") / "spool"
    if found.code != 0 or not place.is_dir():
        yield skip("no spool")
        return
    broken = [path.name for path in place.iterdir() if path.name.endswith(".broken")]
    waiting = sum(path.stat().st_size for path in place.glob("*.spool-wal"))
    if broken:
        yield fail(f"{', '.join(broken)}: damaged, and kept aside")
    elif waiting > MEGABYTE:
        yield warn(f"{waiting // MEGABYTE} MB of deliveries wait for the database")


# -- containers --------------------------------------------------------------------------------------------------------


@check("container-down")
def container_down(doctor: Doctor) -> Iterator[Finding]:
    """Every container is there and runs."""
    for name in doctor.site.containers:
        found = doctor.inspect(name)
        state = (found or {}).get("State") or {}
        if found is None:
            yield fail(f"{name} is not there")
        elif not state.get("Running"):
            yield fail(f"{name} does not run: {state.get('Status')}, exit code {state.get('ExitCode')}")


@check("container-settings")
def container_settings(doctor: Doctor) -> Iterator[Finding]:
    """No container ends with 78: a setting or a secret that cannot be used."""
    for name in doctor.site.containers:
        state = (doctor.inspect(name) or {}).get("State") or {}
        if state.get("ExitCode") == 78 and not (state.get("Running") and not state.get("Restarting")):
            yield fail(f"{name} ended with 78: its settings or secrets cannot be used")


@check("container-memory")
def container_memory(doctor: Doctor) -> Iterator[Finding]:
    """No container was killed for want of memory."""
    for name in doctor.site.containers:
        if ((doctor.inspect(name) or {}).get("State") or {}).get("OOMKilled"):
            yield fail(f"{name} was killed: it needed more memory than its limit")


@check("container-restarting")
def container_restarting(doctor: Doctor) -> Iterator[Finding]:
    """No container starts again and again."""
    for name in doctor.site.containers:
        found = doctor.inspect(name) or {}
        state = found.get("State") or {}
        if state.get("Restarting") or int(found.get("RestartCount") or 0) >= 3:
            yield warn(f"{name} was restarted {found.get('RestartCount')} times")


@check("container-unhealthy")
def container_unhealthy(doctor: Doctor) -> Iterator[Finding]:
    """Every container that says how it is says that it is well."""
    for name in doctor.site.containers:
        health = ((doctor.inspect(name) or {}).get("State") or {}).get("Health") or {}
        if health.get("Status") == "unhealthy":
            last = (health.get("Log") or [{}])[-1].get("Output", "")
            yield fail(f"{name} is unhealthy: {' '.join(str(last).split())[:200]}")


# -- what others find --------------------------------------------------------------------------------------------------


def from_status(findings: Sequence[Mapping[str, str]]) -> list[Finding]:
    """What module site_status found, as findings of the entries `site-KIND`."""
    return [
        Finding(f"site-{entry['kind']}", entry["verdict"], f"{entry['name']}: {entry['what']}")
        for entry in findings
        if entry["kind"] in STATUS_KINDS
    ]


def from_service(text: str) -> list[Finding]:
    """What `webhook-api doctor --json` found in a container, as findings of the entries `service-CHECK`."""
    try:
        document = json.loads(text)
    except ValueError:
        return [
            Finding("service-settings", "fail", f"the service's own doctor failed: {text.strip()[-300:]}")
        ]
    return [
        Finding(
            f"service-{entry['check'].replace(' ', '-')}",
            entry["verdict"],
            entry["message"] + (f" -> {entry['remedy']}" if entry.get("remedy") else ""),
        )
        for entry in document["findings"]
    ]


def with_guide(findings: Sequence[Finding], guide: Mapping[str, Entry]) -> list[dict[str, str]]:
    """Findings with the cause and the remedy that the guide has for them."""
    none = Entry(cause="not in the guide", remedy="report it, with this line")
    shown = []
    for finding in findings:
        entry = guide.get(finding.check, none)
        told = {} if finding.verdict in ("ok", "skip") else {"cause": entry.cause, "remedy": entry.remedy}
        shown.append({**asdict(finding), **told})
    return shown


def lines(shown: Sequence[Mapping[str, str]], *, all_of_them: bool) -> Iterator[str]:
    """What is told to a person: what is wrong first, then how many checks were well."""
    for verdict in ("fail", "warn"):
        for finding in shown:
            if finding["verdict"] == verdict:
                yield f"{verdict.upper()}  {finding['check']}: {finding['what']}"
                yield f"      cause:  {finding['cause']}"
                yield f"      remedy: {finding['remedy']}"
    for finding in shown if all_of_them else ():
        if finding["verdict"] in ("ok", "skip"):
            yield f"{finding['verdict']:<4}  {finding['check']}: {finding['what']}"
    count = {
        verdict: sum(f["verdict"] == verdict for f in shown) for verdict in ("ok", "warn", "fail", "skip")
    }
    yield ", ".join(f"{number} {verdict}" for verdict, number in count.items() if number)
