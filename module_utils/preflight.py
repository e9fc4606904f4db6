"""Whether a host can carry the stack: pure rules over what was observed. `host_observation` does the observing.

Each rule takes what is wanted and what was seen, and returns faults: sentences that name what is wrong, where, and
what to do. Rules never raise and never touch the host, so all faults can be told at once.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any, Protocol

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
DOCKER_ROOT = "/var/lib/docker"
_WILDCARDS = ("", "*", "0.0.0.0", "::", "[::]")  # noqa: S104  (compared with, not bound to)
#: The interface of a network of the engine, unless it was given a name.
_BRIDGE = re.compile(r"br-[0-9a-f]{12}")


@dataclass(frozen=True)
class Listener:
    """A listening TCP socket: address, port, and the inode by which its owner is found."""

    address: str
    port: int
    inode: int = 0


@dataclass(frozen=True)
class Holder:
    """Who holds a port. Neither a process nor a container is known where this user may not see the owner."""

    listener: Listener
    pid: int = 0
    process: str = ""
    container: str = ""
    foreign: bool = False
    """Whether it is a container whose image this project did not build."""

    def __str__(self) -> str:
        if self.foreign:
            way = "moving from the old scripts: docs/moving.md"
            return f"container {self.container}, which this project did not make ({way})"
        if self.container:
            return f"container {self.container}"
        if self.pid:
            return f"process {self.process or '?'} (pid {self.pid})"
        return "a process that this user may not see"


@dataclass(frozen=True)
class PortWish:
    """A port that the stack needs, and the containers that may hold it already because they are the stack.

    `containers` are names, or patterns with `*`.
    """

    port: int
    address: str = ""
    purpose: str = ""
    containers: tuple[str, ...] = ()

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> PortWish:
        """From module parameters."""
        return cls(
            int(params["port"]),
            params["address"] or "",
            params["purpose"] or "",
            tuple(params["containers"] or ()),
        )


@dataclass(frozen=True)
class DockerNetwork:
    """A network of the engine."""

    name: str
    network_id: str
    subnets: tuple[str, ...]
    bridge: str = ""


@dataclass(frozen=True)
class Engine:
    """The engine as it is found. Empty versions mean: not there, or not to be asked by this user."""

    installed: bool = False
    running: bool = False
    permitted: bool = True
    version: str = ""
    compose: str = ""
    buildx: str = ""
    live_restore: bool = False
    root_dir: str = ""


@dataclass
class Findings:
    """What the rules say: faults stop the play, warnings do not."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def message(self, host: str) -> str:
        """All faults in one text."""
        count = len(self.faults)
        lines = [f"{host} is not ready: {count} fault{'s' if count != 1 else ''}. Nothing was touched."]
        return "\n".join([*lines, *(f"{number}. {fault}" for number, fault in enumerate(self.faults, 1))])


# -- reading what the kernel and the tools say ------------------------------------------------------------------------


def parse_proc_net_tcp(text: str, *, ipv6: bool) -> list[Listener]:
    """The listening sockets of /proc/net/tcp or tcp6."""
    found = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 10 or fields[3] != "0A":
            continue
        address, port = fields[1].split(":")
        raw = bytes.fromhex(address)
        # Words of 32 bits in the byte order of the machine: little-endian wherever Debian's engine runs.
        words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
        host = ipaddress.IPv6Address(words) if ipv6 else ipaddress.IPv4Address(words)
        found.append(Listener(str(host), int(port, 16), int(fields[9])))
    return found


def parse_proc_net_route(text: str) -> list[tuple[str, Network]]:
    """The IPv4 routes of /proc/net/route as (interface, network); the default route is left out."""
    routes: list[tuple[str, Network]] = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8:
            continue
        address = ipaddress.IPv4Address(bytes.fromhex(fields[1])[::-1])
        mask = ipaddress.IPv4Address(bytes.fromhex(fields[7])[::-1])
        if int(mask):
            routes.append((fields[0], ipaddress.IPv4Network(f"{address}/{mask}", strict=False)))
    return routes


def parse_meminfo(text: str) -> int:
    """MemTotal of /proc/meminfo in MiB."""
    match = re.search(r"^MemTotal:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match.group(1)) // 1024 if match else 0


def parse_os_release(text: str) -> tuple[str, str]:
    """ID and VERSION_ID of /etc/os-release."""
    fields = dict(re.findall(r'^([A-Z_]+)="?([^"\n]*)"?$', text, re.MULTILINE))
    return fields.get("ID", ""), fields.get("VERSION_ID", "")


def parse_published(ports: str) -> list[tuple[str, int]]:
    """The published TCP ports in the column Ports of `docker ps`, as (address, host port); ranges are spread."""
    found = []
    for address, first, last in re.findall(r"(\S+?):(\d+)(?:-(\d+))?->\d+(?:-\d+)?/tcp", ports):
        found += [(address.strip("[]"), port) for port in range(int(first), int(last or first) + 1)]
    return found


def version_numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version for comparison: `v2.26.1-4` is (2, 26, 1)."""
    match = re.search(r"\d+(?:\.\d+)*", version)
    return tuple(int(number) for number in match.group().split(".")) if match else ()


# -- rules ------------------------------------------------------------------------------------------------------------


def _overlaps(wanted: str, held: str) -> bool:
    return wanted in _WILDCARDS or held in _WILDCARDS or wanted == held


def _named_twice(wishes: Sequence[PortWish]) -> dict[int, str]:
    """Ports that two parts of the stack are to have, and what is said of each. nginx may have one for two purposes."""
    return {
        one.port: f"Port {one.port} is named twice in the inventory, for {one.purpose} and for {other.purpose}: "
        "choose another one for either"
        for one, other in combinations(wishes, 2)
        if one.port == other.port
        and one.containers != other.containers
        and _overlaps(one.address, other.address)
    }


def _no_ports(wishes: Sequence[PortWish]) -> list[str]:
    """Numbers that no port has."""
    return [
        f"{wish.port} ({wish.purpose}) is no port: choose a number from 1 to 65535"
        for wish in wishes
        if not 1 <= wish.port <= 65535
    ]


def port_faults(wishes: Sequence[PortWish], holders: Sequence[Holder], *, sees_all: bool) -> Findings:
    """Ports that somebody else holds.

    :param sees_all: whether the owners of all sockets could be found out. Where they could not, a port that is held
        may well be held by the stack itself: a warning, not a fault.
    """
    twice = _named_twice(wishes)
    findings = Findings(faults=[*_no_ports(wishes), *twice.values()])
    for wish in wishes:
        if wish.port in twice:
            continue  # who holds it is the other of the two
        held = [
            h for h in holders if h.listener.port == wish.port and _overlaps(wish.address, h.listener.address)
        ]
        others = [
            h
            for h in held
            if h.foreign or not any(fnmatchcase(h.container, name) for name in wish.containers)
        ]
        purpose = f" ({wish.purpose})" if wish.purpose else ""
        unknown = [h for h in others if not h.pid and not h.container]
        for who in sorted({str(h) for h in others if h not in unknown}):
            findings.faults.append(
                f"Port {wish.port}{purpose} is taken by {who}: stop it, or choose another port in the inventory"
            )
        if unknown and not sees_all:
            findings.warnings.append(
                f"Port {wish.port}{purpose} is in use, and this user may not see by whom; "
                "if it is not this stack, starting will fail"
            )
        elif unknown:
            findings.faults.append(
                f"Port {wish.port}{purpose} is taken by a process in another namespace or in the kernel: "
                f"`ss -ltnp sport = :{wish.port}` may name it; stop it, or choose another port"
            )
    return findings


def disk_faults(needed_mb: Mapping[str, int], free_mb: Mapping[str, int]) -> list[str]:
    """File systems with too little room. Each path is judged for itself."""
    return [
        f"{path} has {free_mb[path]} MB free and needs {needed}: free some, or move it to a larger disk"
        for path, needed in sorted(needed_mb.items())
        if path in free_mb and free_mb[path] < needed
    ]


def memory_faults(needed_mb: int, total_mb: int) -> list[str]:
    """Too little memory."""
    if not total_mb or total_mb >= needed_mb:
        return []
    return [f"The host has {total_mb} MiB of memory and needs {needed_mb}: add some, or lower the limits"]


def system_faults(
    distribution: str,
    release: str,
    architecture: str,
    systems: Mapping[str, Sequence[str]],
    architectures: Sequence[str],
) -> list[str]:
    """An unsupported distribution, release or architecture."""
    faults = []
    if release not in systems.get(distribution, ()):
        known = "; ".join(f"{name} {', '.join(releases)}" for name, releases in systems.items())
        faults.append(f"{distribution or 'This system'} {release} is not supported: use {known}")
    if architecture not in architectures:
        faults.append(f"The architecture {architecture} is not supported: use {' or '.join(architectures)}")
    return faults


def privilege_faults(*, root: bool, sudo: bool, become_password: bool) -> list[str]:
    """Neither root nor a way to become root."""
    if root or sudo or become_password:
        return []
    return [
        "This user is not root and sudo wants a password: give it with --ask-become-pass (-K), "
        "or allow the user sudo without one"
    ]


def engine_faults(engine: Engine, engine_min: str, compose_min: str) -> list[str]:
    """An engine or Compose that is too old. What is absent is no fault: role engine installs it."""
    faults = []
    if engine.version and version_numbers(engine.version) < version_numbers(engine_min):
        faults.append(
            f"The Docker engine {engine.version} is too old: upgrade it to {engine_min} or later "
            "(role engine leaves a running engine as it is), or remove it and role engine installs one"
        )
    if engine.compose and version_numbers(engine.compose) < version_numbers(compose_min):
        faults.append(
            f"Docker Compose {engine.compose} is too old: upgrade the plugin to {compose_min} or later"
        )
    return faults


def subnet_faults(
    wanted: Mapping[str, str],
    networks: Sequence[DockerNetwork],
    routes: Sequence[tuple[str, Network]],
    *,
    engine_down: bool = False,
) -> list[str]:
    """Wanted subnets (network name -> subnet) that overlap other networks of the engine or routes of the host.

    :param engine_down: an engine is installed and does not run. Its networks stay with the containers that it left
        running (live-restore), and nobody tells their names: a bridge with exactly our subnet is taken for ours.
    """
    faults = []
    bridges = {n.bridge or f"br-{n.network_id[:12]}" for n in networks} | {"docker0", "docker_gwbridge"}
    for name, subnet in sorted(wanted.items()):
        try:
            network = ipaddress.ip_network(subnet)
        except ValueError as error:
            faults.append(
                f"{subnet} for network {name} is not a subnet ({error}): write it as 172.31.240.0/24"
            )
            continue
        for other in networks:
            faults += _network_faults(name, network, other)
        for interface, route in routes:
            if engine_down and route == network and _BRIDGE.fullmatch(interface):
                continue
            if interface not in bridges and route.version == network.version and route.overlaps(network):
                faults.append(
                    f"The subnet {subnet} of network {name} overlaps the host's route to {route} ({interface}): "
                    "choose another subnet in the inventory"
                )
    faults += _mutual_overlaps(wanted)
    return faults


def _network_faults(name: str, network: Network, other: DockerNetwork) -> list[str]:
    subnets = [ipaddress.ip_network(subnet) for subnet in other.subnets]
    if other.name == name:
        if not subnets or network in subnets:
            return []
        return [
            f"Network {name} exists with the subnet {', '.join(other.subnets)}, not {network}: "
            f"set the subnet in the inventory to that, or remove the network (docker network rm {name})"
        ]
    return [
        f"The subnet {network} of network {name} overlaps {subnet} of the engine's network {other.name}: "
        "choose another subnet in the inventory, or remove that network"
        for subnet in subnets
        if subnet.version == network.version and subnet.overlaps(network)
    ]


def _mutual_overlaps(wanted: Mapping[str, str]) -> list[str]:
    parsed: list[tuple[str, Network]] = []
    faults = []
    for name, subnet in sorted(wanted.items()):
        try:
            network = ipaddress.ip_network(subnet)
        except ValueError:
            continue
        for other_name, other in parsed:
            if other.version == network.version and other.overlaps(network):
                faults.append(
                    f"The subnets of {other_name} ({other}) and {name} ({network}) overlap: choose others"
                )
        parsed.append((name, network))
    return faults


def setting_faults(required: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings that are not given: each entry has name, given, and where to set it, or the whole sentence."""
    return [
        entry.get("fault") or f"{entry['name']} is not set: {entry.get('where') or 'set it in the inventory'}"
        for entry in required
        if not entry["given"]
    ]


def file_faults(wanted: Sequence[Mapping[str, str]], missing: Sequence[str]) -> list[str]:
    """Files that have to be on the host and are not."""
    return [
        f"{entry['path']} ({entry['purpose']}) is not there: put it there, or correct its path in the inventory"
        for entry in wanted
        if entry["path"] in missing
    ]


def needs_packages(engine: Engine) -> bool:
    """Whether role engine will have to install something."""
    if not engine.permitted:
        return False  # what can't be seen is not known to be missing
    return not (engine.installed and engine.compose and engine.buildx)


# -- all of them ------------------------------------------------------------------------------------------------------


class Observed(Protocol):
    """What the rules need to see of a host; `host_observation.Host` shows it."""

    root: bool
    sudo: bool
    sees_all: bool

    def system(self) -> dict[str, Any]: ...  # noqa: D102

    def free_mb(self, paths: Sequence[str]) -> dict[str, int]: ...  # noqa: D102

    def missing_files(self, paths: Sequence[str]) -> list[str]: ...  # noqa: D102

    def engine(self) -> Engine: ...  # noqa: D102

    def networks(self) -> list[DockerNetwork]: ...  # noqa: D102

    def routes(self) -> list[tuple[str, Network]]: ...  # noqa: D102

    def holders(self, ports: Sequence[int]) -> list[Holder]: ...  # noqa: D102

    def unreachable_mirrors(self, timeout: float) -> dict[str, str]: ...  # noqa: D102


@dataclass(frozen=True)
class Wishes:
    """What a host has to offer."""

    ports: Sequence[PortWish] = ()
    paths_free_mb: Mapping[str, int] = field(default_factory=dict)
    memory_mb: int = 0
    systems: Mapping[str, Sequence[str]] = field(default_factory=dict)
    architectures: Sequence[str] = ()
    engine_min: str = ""
    compose_min: str = ""
    subnets: Mapping[str, str] = field(default_factory=dict)
    required_settings: Sequence[Mapping[str, Any]] = ()
    files: Sequence[Mapping[str, str]] = ()
    look_for: Sequence[str] = ()
    mirrors: str = "auto"
    become_password: bool = False
    timeout: float = 5.0


def examine(
    host: Observed, wishes: Wishes, registry_fault: Callable[[], str]
) -> tuple[Findings, dict[str, Any]]:
    """Apply every rule to a host; return the findings and the facts that later roles go by.

    :param registry_fault: says what is wrong with the registry, or nothing.
    """
    system, engine, networks = host.system(), host.engine(), host.networks()
    findings = port_faults(
        wishes.ports,
        host.holders([wish.port for wish in wishes.ports]),
        sees_all=host.sees_all and engine.permitted,
    )
    faults = findings.faults
    faults += privilege_faults(root=host.root, sudo=host.sudo, become_password=wishes.become_password)
    faults += system_faults(
        system["distribution"],
        system["release"],
        system["architecture"],
        wishes.systems,
        wishes.architectures,
    )
    room = {
        engine.root_dir or DOCKER_ROOT if p == "@docker" else p: mb for p, mb in wishes.paths_free_mb.items()
    }
    faults += disk_faults(room, host.free_mb(list(room)))
    faults += memory_faults(wishes.memory_mb, system["memory_mb"])
    faults += engine_faults(engine, wishes.engine_min, wishes.compose_min)
    # A running engine always has networks. Where they could not be seen, a route may well be that of our own network.
    seen = engine.permitted and (bool(networks) or not engine.running)
    down = engine.installed and not engine.running
    faults += subnet_faults(wishes.subnets, networks, host.routes() if seen else [], engine_down=down)
    faults += setting_faults(wishes.required_settings)
    faults += file_faults(wishes.files, host.missing_files([entry["path"] for entry in wishes.files]))
    if wishes.mirrors == "always" or (wishes.mirrors == "auto" and needs_packages(engine)):
        faults += mirror_faults(host.unreachable_mirrors(wishes.timeout))
    if fault := registry_fault():
        faults.append(fault)
    facts = {"root": host.root, "sudo": host.sudo, "engine": asdict(engine)}
    return findings, {**system, **facts, "absent": host.missing_files(wishes.look_for)}


def mirror_faults(unreachable: Mapping[str, str]) -> list[str]:
    """Package mirrors that don't answer (site -> reason)."""
    return [
        f"Packages have to be installed, but {reason if not site else f'the mirror {site} does not answer ({reason})'}: "
        "check the network and /etc/apt (`apt-get update` must work)"
        for site, reason in sorted(unreachable.items())
    ]
