"""What a host looks like to an ordinary user, with `sudo -n` where that user may see more. Changes nothing."""

from __future__ import annotations

import getpass
import glob
import json
import os
import platform
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ansible.module_utils.docker_cli import DockerError, Result, find_program, run
from ansible.module_utils.preflight import (
    DockerNetwork,
    Engine,
    Holder,
    Listener,
    Network,
    parse_meminfo,
    parse_os_release,
    parse_proc_net_route,
    parse_proc_net_tcp,
    parse_published,
)

SHORT = 10.0
DAEMON_JSON, DATA_ROOT = "/etc/docker/daemon.json", "/var/lib/docker"
_CONTAINER_ID = re.compile(r"(?:docker[-/]|/)([0-9a-f]{64})(?:\.scope)?$", re.MULTILINE)
#: The last is on every image that this project builds.
_SEEN_FORMAT = '{{.ID}}\t{{.Names}}\t{{.Ports}}\t{{.Label "org.aisha.content.digest"}}'
_PROCESS_SCRIPT = """
for f in /proc/[0-9]*/fd/*; do
  l=$(readlink "$f" 2>/dev/null) || continue
  case $l in socket:*) echo "$f $l";; esac
done
"""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def attempt(command: Sequence[str], timeout: float = SHORT) -> Result:
    """Run a command; a program that is missing or hangs is an answer too (code 127, 124)."""
    try:
        result: Result = run(command, timeout=timeout)
        return result
    except DockerError as error:
        return Result(127 if error.reason == "no_client" else 124, "", str(error))


class SeenContainer(NamedTuple):
    """A container that runs, and the ports (address, number) that it publishes."""

    identity: str
    name: str
    published: list[tuple[str, int]]
    foreign: bool


class Host:
    """One host, seen by this process's user.

    :param use_sudo: whether `sudo -n` may be used to see what only root sees.
    """

    def __init__(self, *, use_sudo: bool = True) -> None:
        self.root = os.geteuid() == 0
        self.user = _user_name()
        self.sudo = not self.root and use_sudo and attempt(["sudo", "-n", "true"]).code == 0
        self.sees_all = self.root or self.sudo
        self._docker = find_program("docker")

    def _privileged(self, command: Sequence[str], timeout: float = SHORT) -> Result:
        return attempt(["sudo", "-n", *command] if self.sudo else command, timeout)

    def _ask_docker(self, *arguments: str) -> Result:
        if not self._docker:
            return Result(127, "", "")
        return self._privileged([self._docker, *arguments])

    # -- system

    def system(self) -> dict[str, Any]:
        """Distribution, release, architecture, kernel, init and memory."""
        distribution, release = parse_os_release(_read("/etc/os-release"))
        return {
            "distribution": distribution,
            "release": release,
            "architecture": platform.machine(),
            "kernel": platform.release(),
            "init": "systemd" if os.path.isdir("/run/systemd/system") else "none",
            "memory_mb": parse_meminfo(_read("/proc/meminfo")),
            "cpus": os.cpu_count() or 1,
        }

    def free_mb(self, paths: Sequence[str]) -> dict[str, int]:
        """Free MB for an ordinary user at each path, or at the nearest directory above that exists."""
        free = {}
        for path in paths:
            place = Path(path)
            while not place.exists() and place != place.parent:
                place = place.parent
            status = os.statvfs(place)
            free[path] = status.f_bavail * status.f_frsize // 1_000_000
        return free

    def missing_files(self, paths: Sequence[str]) -> list[str]:
        """The files that are not there; one that this user may not look for counts as there."""
        missing = []
        for path in paths:
            if self._privileged(["test", "-e", path]).code == 1 and (self.sees_all or _may_look(path)):
                missing.append(path)
        return missing

    # -- engine

    def engine(self) -> Engine:
        """The engine, Compose and buildx."""
        daemon = find_program("dockerd")
        installed = daemon is not None
        resting = attempt([daemon, "--version"]).out if daemon else ""
        if not self._docker:
            return Engine(installed=installed, version=_version(resting))
        info = self._ask_docker("info", "--format", "{{json .}}")
        data = _json_object(info.out)
        version = str(data.get("ServerVersion") or "")
        plugins = {
            p.get("Name"): p.get("Version", "") for p in (data.get("ClientInfo") or {}).get("Plugins") or []
        }
        refused = "permission denied" in info.err + " ".join(data.get("ServerErrors") or [])
        return Engine(
            installed=installed or bool(version),
            running=bool(version),
            # An engine too busy to answer in time was not asked either.
            permitted=not refused and info.code != 124,
            version=version or _version(resting),
            compose=str(plugins.get("compose") or ""),
            buildx=str(plugins.get("buildx") or ""),
            live_restore=bool(data.get("LiveRestoreEnabled")),
            root_dir=str(data.get("DockerRootDir") or ""),
        )

    def networks(self) -> list[DockerNetwork]:
        """The engine's networks; none where there is no engine or this user may not ask it."""
        ids = self._ask_docker("network", "ls", "--quiet", "--no-trunc").out.split()
        if not ids:
            return []
        try:
            # One that went away meanwhile fails the command; the others are printed all the same.
            documents = json.loads(self._ask_docker("network", "inspect", *ids).out or "[]")
        except ValueError:
            return []
        return [_network(document) for document in documents]

    def routes(self) -> list[tuple[str, Network]]:
        """The host's IPv4 routes."""
        routes: list[tuple[str, Network]] = parse_proc_net_route(_read("/proc/net/route"))
        return routes

    # -- ports

    def holders(self, ports: Sequence[int]) -> list[Holder]:
        """Who listens on these TCP ports."""
        listeners = [
            *parse_proc_net_tcp(_read("/proc/net/tcp"), ipv6=False),
            *parse_proc_net_tcp(_read("/proc/net/tcp6"), ipv6=True),
        ]
        wanted = [listener for listener in listeners if listener.port in set(ports)]
        containers = self._containers()
        owners = self._owners({listener.inode for listener in wanted}) if wanted else {}
        holders = [self._holder(listener, owners, containers) for listener in wanted]
        # Without docker-proxy a published port has no listener: the kernel's packet filter passes it on.
        seen = {(holder.listener.port, holder.container) for holder in holders}
        return holders + [
            Holder(Listener(address, port), container=one.name, foreign=one.foreign)
            for one in containers
            for address, port in one.published
            if port in ports and (port, one.name) not in seen
        ]

    def _containers(self) -> list[SeenContainer]:
        listed = self._ask_docker("ps", "--no-trunc", "--format", _SEEN_FORMAT)
        if listed.code not in (0, 124, 127):
            return self._left_running()
        lines = listed.out.splitlines()
        rows = [line.split("\t") for line in lines if line.count("\t") == 3]
        return [SeenContainer(row[0], row[1], parse_published(row[2]), not row[3]) for row in rows]

    def _left_running(self) -> list[SeenContainer]:
        """What an engine that is down has left running (live-restore), by its own notes, which only root may read."""
        root = str(_json_object(_read(DAEMON_JSON)).get("data-root") or DATA_ROOT)
        notes = self._privileged(["sh", "-c", 'cat -- "$0"/containers/*/config.v2.json', root]).out
        return [_left(note) for note in _json_objects(notes) if (note.get("State") or {}).get("Running")]

    def _owners(self, inodes: set[int]) -> dict[int, int]:
        """Inode -> pid, as far as this user may see."""
        if self.sudo:
            lines = self._privileged(["sh", "-c", _PROCESS_SCRIPT], 30).out.splitlines()
            links = [tuple(line.split(" ", 1)) for line in lines if " " in line]
        else:
            links = [(path, link) for path in glob.glob("/proc/[0-9]*/fd/*") if (link := _link(path))]
        owners: dict[int, int] = {}
        for path, link in links:
            match = re.fullmatch(r"socket:\[(\d+)\]", link)
            if match and int(match.group(1)) in inodes:
                owners.setdefault(int(match.group(1)), int(path.split("/")[2]))
        return owners

    def _holder(
        self,
        listener: Listener,
        owners: Mapping[int, int],
        containers: Sequence[SeenContainer],
    ) -> Holder:
        pid = owners.get(listener.inode, 0)
        process = _read(f"/proc/{pid}/comm").strip() if pid else ""
        if not pid or process == "docker-proxy":
            for container in containers:
                if any(port == listener.port for _address, port in container.published):
                    return Holder(listener, pid, process, container.name, container.foreign)
        match = _CONTAINER_ID.search(_read(f"/proc/{pid}/cgroup")) if pid else None
        found = next((one for one in containers if match and one.identity == match.group(1)), None)
        return Holder(listener, pid, process, found.name if found else "", bool(found and found.foreign))

    # -- mirrors

    def unreachable_mirrors(self, timeout: float) -> dict[str, str]:
        """The distribution's own sites in apt's configuration that don't answer, with the reason."""
        question = [
            "apt-get",
            "indextargets",
            "--format",
            "$(SITE)|$(RELEASE)|$(ORIGIN)",
            "Created-By: Packages",
        ]
        # A machine that never ran `apt-get update` has no release files yet, and apt names its sources only this way.
        urls = distribution_urls(attempt(question, 30).out) or distribution_urls(
            attempt([*question, "--no-release-info"], 30).out
        )
        if not urls:
            return {"": "apt has no http(s) source of the distribution itself"}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler(_proxies()))
        with ThreadPoolExecutor(len(urls)) as pool:
            answers = pool.map(lambda url: _head(opener, url, timeout), urls.values())
        return {site: answer for site, answer in zip(urls, answers, strict=True) if answer}


def distribution_urls(output: str) -> dict[str, str]:
    """Site -> address of a release file, for the distribution's own http(s) sites in `apt-get indextargets`.

    Sites of third parties are left out: apt goes on without them.
    """
    urls: dict[str, str] = {}
    for line in output.splitlines():
        site, release, origin = [*line.split("|"), "", ""][:3]
        own = origin in ("Debian", "Ubuntu") or (
            (not origin or origin.startswith("$(")) and re.search(r"/(debian|ubuntu)", site)
        )
        if own and site.startswith(("http://", "https://")):
            urls.setdefault(site, f"{site.rstrip('/')}/dists/{release}/InRelease")
    return urls


def knock_at_registry(url: str, ca: str | None, timeout: float) -> str:
    """What is wrong with a registry, as far as the standard library can tell: whether `/v2/` answers like one.

    For a host where Python's requests is not installed yet. A login is not tried: 401 is an answer.
    """
    address = f"{url.rstrip('/')}/v2/"
    try:
        context = ssl.create_default_context(cafile=ca) if address.startswith("https://") else None
        with urllib.request.urlopen(address, timeout=timeout, context=context):  # noqa: S310
            return ""
    except urllib.error.HTTPError as error:
        if error.code == 401:
            return ""
        return (
            f"What answers at {url} is no registry (HTTP {error.code} to /v2/): check address, port and proxy"
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return f"No registry answers at {url} ({reason}): check that it runs, its address, and site_registry_scheme"


def _proxies() -> dict[str, str]:
    """The environment's proxies, and those of apt's configuration, which are stronger."""
    config = attempt(["apt-config", "dump"]).out
    found = dict(re.findall(r'^Acquire::(http|https)::Proxy "([^"]+)";$', config, re.MULTILINE))
    proxies = {**urllib.request.getproxies(), **found}
    return {scheme: address for scheme, address in proxies.items() if address != "DIRECT"}


def _head(opener: urllib.request.OpenerDirector, url: str, timeout: float) -> str:
    """Why an address can't be had; empty when it can."""
    try:
        with opener.open(urllib.request.Request(url, method="HEAD"), timeout=timeout):  # noqa: S310
            return ""
    except urllib.error.HTTPError as error:
        return "" if error.code == 405 else f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def _version(text: str) -> str:
    """The version in `Docker version 26.1.5+dfsg1, build 411e817`."""
    match = re.search(r"version (\S+?),", text)
    return match.group(1) if match else ""


def _network(document: Mapping[str, Any]) -> DockerNetwork:
    configurations = (document.get("IPAM") or {}).get("Config") or []
    return DockerNetwork(
        name=str(document.get("Name", "")),
        network_id=str(document.get("Id", "")),
        subnets=tuple(c["Subnet"] for c in configurations if c.get("Subnet")),
        bridge=str((document.get("Options") or {}).get("com.docker.network.bridge.name", "")),
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text or "{}")
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _json_objects(text: str) -> list[dict[str, Any]]:
    """The objects of a text of several, as far as it can be read."""
    found, decoder, rest = [], json.JSONDecoder(), text.lstrip()
    while rest:
        try:
            document, end = decoder.raw_decode(rest)
        except ValueError:
            break
        found.append(document)
        rest = rest[end:].lstrip()
    return [document for document in found if isinstance(document, dict)]


def _left(note: Mapping[str, Any]) -> SeenContainer:
    """A container as the engine notes it down."""
    labels = (note.get("Config") or {}).get("Labels") or {}
    bindings = ((note.get("NetworkSettings") or {}).get("Ports") or {}).items()
    published = [
        (str(binding.get("HostIp") or "0.0.0.0"), int(binding.get("HostPort") or 0))  # noqa: S104  (what the engine means)
        for port, bound in bindings
        for binding in bound or []
        if port.endswith("/tcp")
    ]
    name = str(note.get("Name") or "").lstrip("/")
    return SeenContainer(str(note.get("ID")), name, published, "org.aisha.content.digest" not in labels)


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _may_look(path: str) -> bool:
    parent = Path(path).parent
    try:
        return parent.exists() is False or os.access(parent, os.X_OK)
    except PermissionError:
        return False


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.geteuid())
