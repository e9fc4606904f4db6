"""Settings and life of the Docker engine: merging daemon.json, reload or restart, start without systemd, what to install."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible.module_utils.docker_cli import DockerError, Result, find_program, last_lines
from ansible.module_utils.docker_cli import run as run_command

Settings = dict[str, Any]

#: Settings that `SIGHUP` makes effective (moby, daemon/reload.go and cmd/dockerd, the same in 20.10 to 28).
RELOADABLE = frozenset(
    {
        "allow-nondistributable-artifacts",
        "authorization-plugins",
        "debug",
        "default-runtime",
        "features",
        "insecure-registries",
        "labels",
        "live-restore",
        "max-concurrent-downloads",
        "max-concurrent-uploads",
        "max-download-attempts",
        "network-diagnostic-port",
        "registry-mirrors",
        "runtimes",
        "shutdown-timeout",
    }
)
#: Settings whose option on the command line has another name than in the file.
_SINGULAR = {
    "insecure-registries": "insecure-registry",
    "registry-mirrors": "registry-mirror",
    "labels": "label",
    "hosts": "host",
    "log-opts": "log-opt",
    "storage-opts": "storage-opt",
    "exec-opts": "exec-opt",
    "default-address-pools": "default-address-pool",
}
DAEMON_JSON = "daemon.json"
#: The pid files that an engine leaves behind when it is killed, and whose process each must name.
PID_FILES = {
    "docker.pid": "dockerd",
    "docker/containerd/containerd.pid": "containerd",
    "docker-ssd.pid": "dockerd",
}


class EngineConfigError(Exception):
    """The engine cannot be brought to what is wanted.

    `reason`: bad_json, flag_conflict, invalid, no_ca, not_started, not_reloaded, no_process, unsupported.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def parse(text: str, path: str) -> Settings:
    """The settings in daemon.json; an empty file holds none, as for the engine itself."""
    if not text.strip():
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise EngineConfigError(
            "bad_json",
            f"{path} is not JSON ({error}). Nothing was written: mend it or move it away, then run again",
        ) from error
    if not isinstance(found, dict):
        raise EngineConfigError(
            "bad_json", f"{path} holds no JSON object. Nothing was written: mend it, then run again"
        )
    return found


def merge(existing: Mapping[str, Any], wanted: Mapping[str, Any]) -> Settings:
    """`existing` with what is wanted: objects merge, lists get what they lack, anything else is replaced."""
    merged = dict(existing)
    for key, value in wanted.items():
        have = merged.get(key)
        if isinstance(have, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(have, value)
        elif isinstance(have, list) and isinstance(value, list):
            merged[key] = have + [entry for entry in value if entry not in have]
        else:
            merged[key] = value
    return merged


@dataclass(frozen=True)
class Trust:
    """What was added to an engine so that it takes images from a site's registry; noted in the site's directory."""

    insecure: tuple[str, ...] = ()
    certificates: Mapping[str, str] = field(default_factory=dict)
    """Path of each, and the SHA-256 of what was put there."""

    @classmethod
    def read(cls, path: Path) -> Trust:
        """As it was noted; nothing where there is no note, or none that can be read."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(tuple(found["insecure-registries"]), dict(found["certificates"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def and_also(self, other: Trust) -> Trust:
        """Both together."""
        insecure = tuple(dict.fromkeys((*self.insecure, *other.insecure)))
        return Trust(insecure, {**self.certificates, **other.certificates})

    def text(self) -> str:
        """For the file."""
        found = {"insecure-registries": list(self.insecure), "certificates": dict(self.certificates)}
        return json.dumps(found, indent=2) + "\n"


def without(existing: Mapping[str, Any], trust: Trust) -> Settings:
    """The settings without what was added; a list that is empty then goes."""
    kept = dict(existing)
    have = kept.get("insecure-registries")
    if isinstance(have, list) and set(have) & set(trust.insecure):
        kept["insecure-registries"] = [entry for entry in have if entry not in trust.insecure]
        if not kept["insecure-registries"]:
            del kept["insecure-registries"]
    return kept


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """Top-level settings that differ."""
    return {key for key in {*before, *after} if before.get(key) != after.get(key)}


def action_for(keys: set[str]) -> str:
    """What makes these settings effective: none, reload or restart."""
    if not keys:
        return "none"
    return "reload" if keys <= RELOADABLE else "restart"


def without_flags(wanted: Mapping[str, Any], command_line: Sequence[str]) -> Settings:
    """What is wanted and not already an option of the running engine.

    The engine does not start when a setting is both in its file and on its command line, so one that is on the command line
    with what is wanted stays out of the file, and with anything else is a fault.
    """
    kept: Settings = {}
    for key, value in wanted.items():
        option = "--" + _SINGULAR.get(key, key)
        given = _option_values(command_line, option)
        if not given:
            kept[key] = value
            continue
        have = {entry for values in given for entry in values.split(",")}
        needed = {str(entry).lower() for entry in (value if isinstance(value, list) else [value])}
        if not needed <= {entry.lower() for entry in have}:
            raise EngineConfigError(
                "flag_conflict",
                f"The engine is started with {option} ({', '.join(sorted(have))}), and needs {key} = {json.dumps(value)}. "
                f"It would not start with the setting in both places: move the option from its service or start script "
                f"into {DAEMON_JSON}",
            )
    return kept


def _option_values(command_line: Sequence[str], option: str) -> list[str]:
    values = []
    for index, argument in enumerate(command_line):
        if argument.startswith(option + "="):
            values.append(argument.partition("=")[2])
        elif argument == option:
            following = command_line[index + 1] if index + 1 < len(command_line) else "--"
            values.append("true" if following.startswith("-") else following)
    return values


def not_in_effect(info: Mapping[str, Any], wanted: Mapping[str, Any]) -> set[str]:
    """Those of the settings that can be seen from outside and that the running engine does not have (yet)."""
    missing = set()
    if "live-restore" in wanted and info.get("LiveRestoreEnabled") != wanted["live-restore"]:
        missing.add("live-restore")
    registries = info.get("RegistryConfig") or {}
    insecure = {
        name
        for name, entry in (registries.get("IndexConfigs") or {}).items()
        if not entry.get("Secure", True)
    }
    insecure |= set(registries.get("InsecureRegistryCIDRs") or [])
    if set(wanted.get("insecure-registries", [])) - insecure:
        missing.add("insecure-registries")
    return missing


@dataclass(frozen=True)
class Engine:
    """What one question to the engine's command line told."""

    installed: bool = False
    client: bool = False
    running: bool = False
    version: str = ""
    compose: str = ""
    buildx: str = ""
    error: str = ""
    info: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_answer(cls, answer: Result, *, daemon: bool, client: bool) -> Engine:
        """Read `docker info --format '{{json .}}'`, which also answers (with exit code 1) when no engine does."""
        line = next((text for text in answer.out.splitlines() if text.startswith("{")), "{}")
        info: dict[str, Any] = json.loads(line)
        plugins = {entry.get("Name"): entry for entry in (info.get("ClientInfo") or {}).get("Plugins") or []}
        version = str(info.get("ServerVersion") or "")
        faults = info.get("ServerErrors") or ([] if version else [last_lines(answer.err, 3)])
        return cls(
            installed=daemon or bool(version),
            client=client,
            running=bool(version),
            version=version,
            compose=_plugin_version(plugins.get("compose")),
            buildx=_plugin_version(plugins.get("buildx")),
            error="; ".join(str(fault) for fault in faults),
            info=info,
        )

    def facts(self) -> dict[str, Any]:
        """For the module's answer."""
        names = ("installed", "client", "running", "version", "compose", "buildx")
        return {name: getattr(self, name) for name in names}


def _plugin_version(plugin: Mapping[str, Any] | None) -> str:
    """A plugin that the client found and cannot run has an error in place of a version."""
    return (
        ""
        if plugin is None or plugin.get("Err")
        else str(plugin.get("Version") or "unknown").removeprefix("v")
    )


def observe(docker: str | None = None) -> Engine:
    """Ask the engine of this host."""
    client, daemon = docker or find_program("docker"), find_program("dockerd") is not None
    if client is None:
        return Engine(installed=daemon)
    try:
        answer = run_command([client, "info", "--format", "{{json .}}"])
    except DockerError as error:
        return Engine(installed=daemon, client=True, error=str(error))
    return Engine.from_answer(answer, daemon=daemon, client=True)


@dataclass(frozen=True)
class Plan:
    """Packages that are missing. `suite`: a newer suite of Debian that `pinned` come from; empty for the host's own."""

    packages: tuple[str, ...] = ()
    suite: str = ""
    pinned: tuple[str, ...] = ()


Packages = Mapping[str, tuple[str, ...]]
_DEBIAN: Packages = {
    "engine": ("docker.io", "iptables"),
    "client": ("docker-cli",),
    "compose": ("docker-compose",),
    "buildx": ("docker-buildx",),
}
_UBUNTU: Packages = {**_DEBIAN, "client": ("docker.io",), "compose": ("docker-compose-v2",)}
_DOCKER: Packages = {
    "engine": (),
    "client": ("docker-ce-cli",),
    "compose": ("docker-compose-plugin",),
    "buildx": ("docker-buildx-plugin",),
}
#: Packages of Debian 13 that also install on Debian 12. Not runc: since 1.1.15+ds1-2+b4 it needs a newer libc6.
_FROM_TRIXIE = ("docker.io", "docker-cli", "docker-compose", "docker-buildx", "containerd")


def packages_for(engine: Engine, distribution: str, release: str, owner: str = "") -> Plan:
    """What to install so that engine, client, Compose and buildx are there.

    :param owner: the package that the installed engine comes from; empty when it is no package's.
    """
    present = {
        "engine": engine.installed,
        "client": engine.client,
        "compose": engine.compose,
        "buildx": engine.buildx,
    }
    missing = [part for part, there in present.items() if not there]
    if not missing:
        return Plan()
    major = release.split(".")[0]
    if owner.startswith("docker-ce"):
        return Plan(tuple(name for part in missing for name in _DOCKER[part]))
    if distribution == "ubuntu" and major.isdigit() and int(major) >= 24:
        return Plan(tuple(dict.fromkeys(name for part in missing for name in _UBUNTU[part])))
    if distribution != "debian" or not major.isdigit() or int(major) < 12:
        raise EngineConfigError(
            "unsupported",
            f"{' and '.join(missing)} missing, and this role installs only on Debian 12 and Ubuntu 24.04 or newer, "
            f"not on {distribution} {release}. Install Docker engine 24 or newer with Compose v2 and buildx, then run again",
        )
    packages = tuple(name for part in missing for name in _DEBIAN[part])
    if major != "12":
        return Plan(packages)
    if "engine" in missing:
        packages += ("containerd", "runc")
    return Plan(packages, "trixie", tuple(name for name in _FROM_TRIXIE if name in packages))


def start_command(daemon: str, run_dir: Path, log: Path, options: Sequence[str] = ()) -> list[str]:
    """How the engine is started where there is no systemd.

    Not by its init script: that raises `ulimit -n`, which needs a capability that containers and small hosts lack.
    """
    pid_file = str(run_dir / "docker-ssd.pid")
    command = ["start-stop-daemon", "--start", "--background", "--pidfile", pid_file, "--make-pidfile"]
    command += ["--output", str(log), "--exec", daemon]
    return [*command, "--", *options] if options else command


def stop_command(run_dir: Path) -> list[str]:
    """How it is stopped; with `live-restore` its containers go on."""
    pid_file = str(run_dir / "docker.pid")
    return [
        "start-stop-daemon",
        "--stop",
        "--pidfile",
        pid_file,
        "--retry",
        "TERM/60/KILL/10",
        "--name",
        "dockerd",
    ]


def process_name(pid: int, proc: Path = Path("/proc")) -> str:
    """The name of a process; empty when there is none."""
    try:
        return (proc / str(pid) / "comm").read_text().strip()
    except OSError:
        return ""


def read_pid(path: Path) -> int:
    """The number in a pid file; 0 when there is none."""
    try:
        return int(path.read_text().strip())
    except (OSError, ValueError):
        return 0


def engine_pid(run_dir: Path, proc: Path = Path("/proc")) -> int:
    """The running engine's process; 0 when it is not here (a remote engine) or not found."""
    pid = read_pid(run_dir / "docker.pid")
    return pid if pid and process_name(pid, proc) == "dockerd" else 0


def command_line(pid: int, proc: Path = Path("/proc")) -> list[str]:
    """A process's arguments."""
    try:
        return (proc / str(pid) / "cmdline").read_text().rstrip("\0").split("\0")
    except OSError:
        return []


def remove_stale_pid_files(run_dir: Path, proc: Path = Path("/proc")) -> list[str]:
    """Remove pid files that name nobody or somebody else: the engine would take that process for itself, and not start."""
    removed = []
    for name, program in PID_FILES.items():
        path = run_dir / name
        if path.exists() and process_name(read_pid(path), proc) != program:
            path.unlink()
            removed.append(str(path))
    return removed


def wait_for(ready: Callable[[], Any], deadline: float, clock: Callable[[], float] = time.monotonic) -> Any:
    """Call `ready` until it returns something true; the last answer when `deadline` (on `clock`) has passed."""
    while not (answer := ready()) and clock() < deadline:
        time.sleep(0.2)
    return answer


class EngineHost:
    """The engine's files and processes on this host."""

    def __init__(
        self, path: Path, run_dir: Path, log: Path, timeout: float, proc: Path = Path("/proc")
    ) -> None:
        self.path, self.run_dir, self.log, self.timeout, self.proc = path, run_dir, log, timeout, proc

    def text(self) -> str:
        """daemon.json as it stands."""
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def running_options(self) -> list[str]:
        """Options that the running engine was started with."""
        pid = engine_pid(self.run_dir, self.proc)
        return command_line(pid, self.proc) if pid else []

    def validate(self, candidate: Path) -> None:
        """Let the engine itself read the file; engines before 23 cannot and are trusted to."""
        daemon = find_program("dockerd")
        if daemon is None:
            return
        result = run_command([daemon, "--validate", "--config-file", str(candidate)])
        if result.code != 0 and "unknown flag" not in result.err:
            raise EngineConfigError(
                "invalid",
                f"The engine would not accept {self.path}: {last_lines(result.err or result.out, 3)}. Nothing was written",
            )

    def start(self) -> Engine:
        """Start the engine without systemd and wait until it answers."""
        daemon = find_program("dockerd")
        if daemon is None:
            raise EngineConfigError("not_started", "There is no dockerd on this host")
        remove_stale_pid_files(self.run_dir, self.proc)
        result = run_command(start_command(daemon, self.run_dir, self.log))
        if result.code != 0:
            raise EngineConfigError(
                "not_started", f"start-stop-daemon failed: {last_lines(result.err or result.out, 3)}"
            )
        engine: Engine = wait_for(self._answer, time.monotonic() + self.timeout) or observe()
        if not engine.running:
            raise EngineConfigError(
                "not_started",
                f"The engine does not answer {self.timeout:.0f} s after its start ({engine.error}). "
                f"The end of {self.log}:\n{last_lines(self._log_text(), 12)}",
            )
        return engine

    def restart(self) -> Engine:
        """Stop and start the engine without systemd."""
        result = run_command(stop_command(self.run_dir), timeout=90)
        if result.code != 0:
            raise EngineConfigError(
                "not_started",
                f"`{shlex.join(stop_command(self.run_dir))}` did not stop the engine: {result.err}",
            )
        return self.start()

    def reload(self, wanted: Mapping[str, Any]) -> Engine:
        """Have the running engine read its file again, and wait until that is seen."""
        pid = engine_pid(self.run_dir, self.proc)
        if not pid:
            raise EngineConfigError(
                "no_process",
                f"{self.run_dir}/docker.pid names no dockerd to reload, so {self.path} is not in effect: restart the engine",
            )
        os.kill(pid, signal.SIGHUP)

        def effective() -> Engine | None:
            engine = observe()
            return engine if engine.running and not not_in_effect(engine.info, wanted) else None

        engine: Engine | None = wait_for(effective, time.monotonic() + self.timeout)
        if engine is None:
            late = ", ".join(sorted(not_in_effect(observe().info, wanted)))
            raise EngineConfigError(
                "not_reloaded", f"The engine was reloaded and does not have {late}: look at its log"
            )
        return engine

    def _answer(self) -> Engine | None:
        engine = observe()
        return engine if engine.running else None

    def _log_text(self) -> str:
        try:
            return self.log.read_text(errors="replace")
        except OSError:
            return ""
