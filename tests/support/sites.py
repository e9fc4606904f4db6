"""Sites of the tests' own: another name, other ports, networks and volumes than the stack of `make up`.

A site is what `site.yml` makes of an inventory. Tests make one, use it, and take it down; nothing stays.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[2]
HOST = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}


@dataclass
class PlaybookResult:
    """What a run of ansible-playbook came to: its exit code, output, and the recap of the one host."""

    code: int
    output: str

    @property
    def recap(self) -> dict[str, int]:
        """Counters of the recap (ok, changed, failed …); empty when the run ended before it."""
        line = re.search(r"^localhost\s+:\s+(.*)$", self.output, re.MULTILINE)
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line.group(1))} if line else {}

    def must_pass(self) -> PlaybookResult:
        """Raise AssertionError with the output's end when the run failed."""
        assert self.code == 0, f"ansible-playbook failed ({self.code}):\n{self.output[-8000:]}"
        return self


@dataclass
class Site:
    """An inventory of its own under a temporary directory, and the playbooks run against it.

    `number` (1 to 9) picks ports and subnets, so that several sites can stand side by side.
    """

    name: str
    directory: Path
    number: int
    variables: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Write the inventory."""
        groups = ("builders", "registry", "backends", "webhook")
        hosts = {
            "all": {
                "hosts": {"localhost": HOST},
                "children": {g: {"hosts": {"localhost": None}} for g in groups},
            }
        }
        (self.directory / "group_vars").mkdir(parents=True, exist_ok=True)
        (self.directory / "hosts.yml").write_text(yaml.safe_dump(hosts))
        self.write_variables()

    @property
    def settings(self) -> dict[str, Any]:
        """Variables of the inventory: what makes the site different from the default one."""
        base = 20000 + self.number * 100
        return {
            "site_name": self.name,
            "site_environment": "development",
            "site_registry_scheme": "http",
            "site_registry": f"127.0.0.1:{base}",
            "site_http_port": base + 80,
            "site_https_port": base + 43,
            "site_https_alt_port": base + 44,
            "site_api_ports": [base + 1, base + 2],
            "site_network": f"{self.name}_cluster",
            "site_subnet": f"172.31.{100 + 2 * self.number}.0/24",
            "site_backends_network": f"{self.name}_backends",
            "site_backends_subnet": f"172.31.{101 + 2 * self.number}.0/24",
            **self.variables,
        }

    @property
    def home(self) -> Path:
        """The site's directory on the host."""
        return Path("/opt") / self.name

    def write_variables(self) -> None:
        """Write the inventory's variables again, after a change of `variables`."""
        (self.directory / "group_vars" / "all.yml").write_text(yaml.safe_dump(self.settings))

    def secret(self, name: str) -> str:
        """A generated secret, read from the host's file."""
        return (self.home / "secrets" / name).read_text().strip()

    def playbook(self, playbook: str, *arguments: str, timeout: float = 900) -> PlaybookResult:
        """Run a playbook against the site; its output is shown as it comes when VERBOSE is set."""
        command = ["ansible-playbook", "-i", str(self.directory), playbook, *arguments]
        environment = {**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}
        run = subprocess.run(
            command,
            cwd=REPO,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        if os.environ.get("VERBOSE"):
            print(run.stdout)
        return PlaybookResult(run.returncode, run.stdout)

    def site(self, *arguments: str, timeout: float = 900) -> PlaybookResult:
        """Run `site.yml`."""
        return self.playbook("site.yml", *arguments, timeout=timeout)

    def teardown(self) -> None:
        """Remove the site with all that it holds."""
        answers = {"teardown_confirmed": True, "teardown_data": True, "teardown_images": True}
        # Other tests are at work on this machine, also while they have no container yet.
        answers["teardown_shared"] = False
        self.playbook("playbooks/teardown.yml", "-e", json.dumps(answers)).must_pass()
        assert self.left_behind() == []

    def left_behind(self) -> list[str]:
        """What of the site is still on this machine: containers, volumes, networks, files."""
        left = []
        for kind in (["ps", "--all"], ["volume", "ls"], ["network", "ls"]):
            shown = "{{.Names}}" if kind[0] == "ps" else "{{.Name}}"
            command = ["docker", *kind, "--format", shown, "--filter", f"name={self.name}"]
            left += subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        files = [self.home, Path(f"/etc/sysctl.d/60-{self.name}.conf")]
        return left + [str(path) for path in files if path.exists()]
