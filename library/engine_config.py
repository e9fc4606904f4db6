#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Bring the Docker engine's settings to what is wanted, and the engine up."""

from __future__ import annotations

DOCUMENTATION = r"""
module: engine_config
short_description: Bring the Docker engine's settings to what is wanted, and the engine up
description:
  - Merges settings into the engine's C(daemon.json) and leaves everything else in it as it is. Objects are merged,
    lists get what they lack. The engine itself validates the file before it takes the old one's place; a dated copy of
    that one stays.
  - Reloads the running engine (SIGHUP) where that makes the settings effective, also when an earlier run was interrupted
    between writing and reloading. Says RV(action=restart) where only a restart does.
  - Where there is no systemd, starts an engine that does not run, and restarts one that must be.
  - Says which packages are missing, and which of the Python libraries that other modules need.
options:
  state:
    description:
      - V(present) brings the engine to what is wanted. V(absent) takes back what O(note) says of the registry - its entry
        in C(insecure-registries) and the certificate of its authority, where nobody has changed them since - and leaves all
        else as it is.
    type: str
    choices: [present, absent]
    default: present
  note:
    description: File that keeps what this module has added for the registry; empty for none.
    type: path
  path:
    description: The engine's configuration file.
    type: path
    default: /etc/docker/daemon.json
  settings:
    description: Settings that must be there.
    type: dict
    default: {}
  registry:
    description: Host and port of a registry whose certificate O(registry_ca) signed.
    type: str
    default: ""
  registry_ca:
    description: Path, on the host, of a PEM file with that authority. It is copied to where the engine looks for it.
    type: str
    default: ""
  timeout:
    description: Seconds until an engine that was started or reloaded must answer.
    type: float
    default: 60
  run_dir:
    description: Directory of the engine's pid files.
    type: path
    default: /run
  log:
    description: Where an engine that this module starts writes its log.
    type: path
    default: /var/log/docker.log
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details: A file that would be written is not validated by the engine.
  diff_mode:
    support: full
    description: Will return details on what has changed (or possibly needs changing in check mode).
  idempotent:
    support: full
    description:
      - When run twice in a row outside check mode, with the same arguments, the second invocation indicates no change.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: The engine keeps containers alive while it restarts, and trusts the registry
  engine_config:
    settings:
      live-restore: true
      insecure-registries: ["192.168.0.4:5000"]
"""

RETURN = r"""
engine:
  description:
    - The engine with C(installed), C(client) (whether there is a command line), C(running), C(version), C(compose)
      and C(buildx) (versions, empty when absent).
  returned: success
  type: dict
init:
  description: V(systemd) or V(none).
  returned: success
  type: str
missing:
  description: What to install. C(packages), and C(pinned) of them from C(suite) where the host's own are too old.
  returned: success
  type: dict
python_missing:
  description: Python libraries that other modules need and this interpreter lacks.
  returned: success
  type: list
  elements: str
interpreter:
  description: Path of that interpreter.
  returned: success
  type: str
action:
  description:
    - What was (in check mode, would be) done to the engine - V(none), V(start), V(reload), V(restart).
    - With systemd V(start) and V(restart) are left to the caller.
  returned: success
  type: str
backup:
  description: Copy of the file as it was.
  returned: when an existing file was replaced
  type: str
reason:
  description: Why the module failed, for programs.
  returned: on failure
  type: str
  sample: bad_json
"""

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.docker_cli import DockerError, find_program
from ansible.module_utils.engine_config import (
    EngineConfigError,
    EngineHost,
    Plan,
    Trust,
    action_for,
    changed_keys,
    merge,
    not_in_effect,
    observe,
    packages_for,
    parse,
    without,
    without_flags,
)
from ansible.module_utils.preflight import parse_os_release

ARGUMENTS = {
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "note": {"type": "path"},
    "path": {"type": "path", "default": "/etc/docker/daemon.json"},
    "settings": {"type": "dict", "default": {}},
    "registry": {"type": "str", "default": ""},
    "registry_ca": {"type": "str", "default": ""},
    "timeout": {"type": "float", "default": 60},
    "run_dir": {"type": "path", "default": "/run"},
    "log": {"type": "path", "default": "/var/log/docker.log"},
}
PYTHON_LIBRARIES = ("docker", "requests")


class Run:
    """One run of the module: observe, decide, write, make effective."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        params = module.params
        self.host = EngineHost(
            Path(params["path"]), Path(params["run_dir"]), Path(params["log"]), params["timeout"]
        )
        self.engine = observe()
        self.systemd = Path("/run/systemd/system").is_dir()
        self.changed = False
        self.action = "none"
        self.diffs: list = []
        self.backup = ""

    def settings(self) -> None:
        """Write what is missing in daemon.json, and decide how it becomes effective."""
        wanted = dict(self.module.params["settings"])
        if (self.engine.info.get("Swarm") or {}).get("LocalNodeState") == "active" and wanted.pop(
            "live-restore", None
        ):
            self.module.warn("This host is in a swarm, where the engine refuses live-restore: it is left out")
        self.wanted = without_flags(wanted, self.host.running_options())
        text = self.host.text()
        before = parse(text, str(self.host.path))
        after = merge(before, self.wanted)
        keys = changed_keys(before, after)
        if keys and self.engine.installed:
            have = before.get("insecure-registries") or []
            new = [entry for entry in after.get("insecure-registries") or [] if entry not in have]
            self._remember(Trust(tuple(new)))
            self._write(text, json.dumps(after, indent=2, ensure_ascii=False) + "\n")
        if self.engine.running:
            self.action = action_for(keys | not_in_effect(self.engine.info, self.wanted))
        elif self.engine.installed and self.engine.client:
            self.action = "start"

    def certificate(self) -> None:
        """Have the registry's authority where the engine looks for it; it reads it at every pull."""
        registry, source = self.module.params["registry"], self.module.params["registry_ca"]
        if not source:
            return
        try:
            content = Path(source).read_text()
        except OSError as error:
            message = f"The registry's CA {source} cannot be read on this host: {error.strerror}"
            raise EngineConfigError("no_ca", message) from error
        target = self.host.path.parent / "certs.d" / registry / "ca.crt"
        have = target.read_text() if target.exists() else ""
        if have == content:
            return
        if not have or str(target) in self._noted().certificates:
            self._remember(Trust(certificates={str(target): _digest(content)}))
        self._note(have, content, target)
        if not self.module.check_mode:
            target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._replace(content, target)

    def forget(self) -> None:
        """Take back what was added for the registry."""
        trust, text = self._noted(), self.host.text()
        self.wanted = {}
        before = parse(text, str(self.host.path))
        after = without(before, trust)
        if before != after:
            self._write(text, json.dumps(after, indent=2, ensure_ascii=False) + "\n")
            self.action = "reload" if self.engine.running else "none"
        for name, digest in trust.certificates.items():
            path = Path(name)
            if path.is_file() and _digest(path.read_text()) == digest:
                self._note(path.read_text(), "", path)
                if not self.module.check_mode:
                    path.unlink()
                    if not any(path.parent.iterdir()):
                        path.parent.rmdir()
        if not self.module.check_mode and self.module.params["note"]:
            Path(self.module.params["note"]).unlink(missing_ok=True)

    def _noted(self) -> Trust:
        note = self.module.params["note"]
        return Trust.read(Path(note)) if note else Trust()

    def _remember(self, trust: Trust) -> None:
        """Before it is done: what is noted and was not done is no harm."""
        note = self.module.params["note"]
        after = self._noted().and_also(trust)
        if not note or self.module.check_mode or after == self._noted():
            return
        Path(note).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._replace(after.text(), Path(note))

    def effect(self) -> None:
        """Reload, restart or start, as far as that is this module's to do."""
        self.changed = self.changed or self.action != "none"
        if self.module.check_mode or self.action == "none":
            return
        if self.action in ("reload", "restart"):
            self.engine = self.host.reload(
                self.wanted
            )  # before a restart: live-restore must be in effect then
        if self.action == "restart" and not self.systemd:
            self.engine = self.host.restart()
        if self.action == "start" and not self.systemd:
            self.engine = self.host.start()

    def missing(self) -> dict:
        """What has to be installed."""
        complete = self.engine.installed and self.engine.client and self.engine.compose and self.engine.buildx
        if complete:
            return asdict(Plan())
        distribution, release = parse_os_release(Path("/etc/os-release").read_text())
        return asdict(packages_for(self.engine, distribution, release, self._owner()))

    def _owner(self) -> str:
        daemon, query = find_program("dockerd"), find_program("dpkg-query")
        if not daemon or not query:
            return ""
        code, out, _err = self.module.run_command([query, "--search", os.path.realpath(daemon)])
        return out.split(":")[0] if code == 0 else ""

    def _write(self, old: str, new: str) -> None:
        self._note(old, new, self.host.path)
        if self.module.check_mode:
            return
        self.host.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if self.host.path.exists():
            self.backup = self.module.backup_local(str(self.host.path))
        self._replace(new, self.host.path, validate=True)

    def _replace(self, content: str, target: Path, *, validate: bool = False) -> None:
        handle, name = tempfile.mkstemp(dir=self.module.tmpdir)
        with os.fdopen(handle, "w") as stream:
            stream.write(content)
        if validate:
            self.host.validate(Path(name))
        if not target.exists():
            os.chmod(name, 0o644)
        self.module.atomic_move(name, str(target))

    def _note(self, before: str, after: str, path: Path) -> None:
        self.changed = True
        self.diffs.append(
            {"before": before, "after": after, "before_header": str(path), "after_header": str(path)}
        )


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def main() -> None:
    """Wire the parts."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True, required_by={"registry_ca": ["registry"]})
    run = Run(module)
    try:
        if module.params["state"] == "absent":
            run.forget()
            missing = asdict(Plan())
        else:
            run.settings()
            run.certificate()
            missing = run.missing()
        run.effect()
    except (EngineConfigError, DockerError) as error:
        module.fail_json(msg=str(error), reason=error.reason)
    except OSError as error:
        module.fail_json(
            msg=f"{error.filename}: {error.strerror}. Run the task with become: true", reason="os_error"
        )
    module.exit_json(
        changed=run.changed,
        engine=run.engine.facts(),
        init="systemd" if run.systemd else "none",
        missing=missing,
        python_missing=[name for name in PYTHON_LIBRARIES if importlib.util.find_spec(name) is None],
        interpreter=sys.executable,
        action=run.action,
        diff=run.diffs,
        **({"backup": run.backup} if run.backup else {}),
    )


if __name__ == "__main__":
    main()
