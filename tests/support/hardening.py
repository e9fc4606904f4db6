"""What a container may do: its settings as the engine has them, and its processes as the kernel has them.

`faults` names everything that is softer than it has to be, one sentence each. So a test can also show that it would
find something: a container that was started without care has many.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

#: Where mounts of a host's files may be written to: the ACME client's certificate and challenges, and nothing else.
WRITABLE_BINDS = ("/acme/certificate", "/acme/challenges", "/acme/state")
#: Never in a container: whoever writes to it is root on the host.
SOCKETS = ("docker.sock", "containerd.sock", "/run/docker", "/var/lib/docker")
TMPFS_OPTIONS = {"noexec", "nosuid", "nodev"}
SECRET_WORDS = ("PASSWORD", "SECRET", "ACCESS_KEY", "TOKEN", "API_KEY")
_READ_PROCESSES = (
    "for status in /proc/[0-9]*/status; do sed -n -E 's/^(Name|Uid|CapEff|CapBnd|NoNewPrivs|Seccomp):[[:space:]]*/\\1=/p' "
    "$status 2>/dev/null | tr '\\n\\t' '; '; echo; done"
)


def inspect(name: str) -> dict[str, Any]:
    """What the engine says of a container."""
    run = subprocess.run(["docker", "inspect", name], capture_output=True, text=True, check=True)
    (seen,) = json.loads(run.stdout)
    return dict(seen)


def faults(name: str, *, host_network: bool = False) -> list[str]:
    """All that is too soft about a running container; `host_network` where it belongs on the host's network."""
    seen = inspect(name)
    found = [*_settings(seen, host_network), *_mounts(seen), *_upkeep(seen), *_processes(name)]
    return [f"{name}: {fault}" for fault in found]


def _settings(seen: dict[str, Any], host_network: bool) -> Iterator[str]:
    host, config = seen["HostConfig"], seen["Config"]
    if config["User"].split(":")[0] in ("", "0", "root"):
        yield "runs as root"
    if ":" not in config["User"] or config["User"].split(":")[1] in ("0", "root"):
        yield "its group is root's"
    if not host["ReadonlyRootfs"]:
        yield "its root file system can be written to"
    if host["CapDrop"] != ["ALL"] or host["CapAdd"]:
        yield f"capabilities: dropped {host['CapDrop']}, added {host['CapAdd']}"
    if host["Privileged"] or host["Devices"] or host["DeviceCgroupRules"]:
        yield "has devices, or is privileged"
    options = host["SecurityOpt"] or []
    if not any(option in ("no-new-privileges", "no-new-privileges:true") for option in options):
        yield "may gain privileges"
    if any("unconfined" in option for option in options):
        yield f"is let off: {options}"
    if host["Memory"] <= 0 or not 0 < (host["PidsLimit"] or 0) <= 1024:
        yield f"has no limits: memory {host['Memory']}, processes {host['PidsLimit']}"
    spaces = {kind: host[f"{kind}Mode"] for kind in ("Pid", "Ipc", "UTS", "Userns")}
    if "host" in spaces.values():
        yield f"shares name spaces with the host: {spaces}"
    if (host["NetworkMode"] == "host") != host_network:
        yield f"is on network {host['NetworkMode']}"
    for variable in config["Env"]:
        key, _, value = variable.partition("=")
        if value and not key.endswith("_FILE") and any(word in key for word in SECRET_WORDS):
            yield f"has a secret in its environment: {key}"
    yield from _ports(seen)


def _ports(seen: dict[str, Any]) -> Iterator[str]:
    for port, bindings in (seen["HostConfig"]["PortBindings"] or {}).items():
        for binding in bindings:
            if binding["HostIp"] not in ("127.0.0.1", "::1"):
                yield f"port {port} listens on {binding['HostIp'] or 'every address'}"
    if seen["HostConfig"]["PublishAllPorts"]:
        yield "publishes every port of its image"


def _mounts(seen: dict[str, Any]) -> Iterator[str]:
    for mount in seen["Mounts"]:
        source, target = mount.get("Source", ""), mount["Destination"]
        bind = mount["Type"] == "bind"
        if bind and any(word in source or word in target for word in SOCKETS):
            yield f"has the engine's own {source}"
        writable = bind and mount["RW"]
        if writable and target not in WRITABLE_BINDS:
            yield f"may write to the host's {source}"
        if target in ("/", "/etc", "/proc", "/sys", "/dev") or source in ("/", "/etc", "/root", "/home"):
            yield f"has {source} mounted at {target}"
    for target, options in (seen["HostConfig"].get("Tmpfs") or {}).items():
        words = set(options.split(","))
        if not words >= TMPFS_OPTIONS or not any(word.startswith("size=") for word in words):
            yield f"its tmpfs {target} has only {options}"


def _upkeep(seen: dict[str, Any]) -> Iterator[str]:
    host, health = seen["HostConfig"], seen["Config"].get("Healthcheck") or {}
    if not health.get("Test") or health["Test"] == ["NONE"] or not health.get("StartInterval"):
        yield "has no health check that looks soon"
    log = host["LogConfig"]
    if not log["Config"].get("max-size") or int(log["Config"].get("max-file", "1")) < 2:
        yield f"its logs grow without end: {log}"
    if host["RestartPolicy"]["Name"] != "unless-stopped":
        yield f"does not come back: {host['RestartPolicy']}"
    if "@sha256:" not in seen["Config"]["Image"] and not seen["Config"]["Image"].rpartition(":")[
        2
    ].startswith("c-"):
        yield f"its image is named by a tag that moves: {seen['Config']['Image']}"


def _processes(name: str) -> Iterator[str]:
    """Every process, as the kernel sees it: settings are promises, this is what they came to."""
    run = subprocess.run(
        ["docker", "exec", name, "/bin/sh", "-c", _READ_PROCESSES], capture_output=True, text=True, check=True
    )
    lines = [line for line in run.stdout.splitlines() if "Uid=" in line]
    if not lines:
        yield "shows no processes"
    for line in lines:
        fields = dict(part.split("=", 1) for part in line.strip(";").split(";") if "=" in part)
        if "0" in fields["Uid"].split():
            yield f"process {fields['Name']} is root"
        if int(fields["CapEff"], 16) or int(fields["CapBnd"], 16):
            yield f"process {fields['Name']} has capabilities {fields['CapEff']}, bound {fields['CapBnd']}"
        if fields["NoNewPrivs"] != "1":
            yield f"process {fields['Name']} may gain privileges"
