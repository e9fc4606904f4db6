#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Try each thing that the troubleshooting guide names, and tell cause and remedy of what is wrong."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_doctor
short_description: Try each thing that the troubleshooting guide names
description:
  - Looks at engine, host, ports, networks, registry, files and containers of a site; adds what the site's state
    (as M(site_status) sees it) and the service's own C(webhook-api doctor) say.
  - Cause and remedy of a finding are those of its entry in O(guide), so guide and doctor cannot come apart.
  - Changes nothing, and fails only when it cannot look at all.
options:
  site:
    description: What has to be known of the site; see C(Site) in C(module_utils/host_doctor.py).
    type: dict
    required: true
  guide:
    description: Text of docs/troubleshooting.md.
    type: str
    required: true
  checks:
    description: Names of the host's checks to run; all by default.
    type: list
    elements: str
    default: []
  service:
    description: Container that C(webhook-api doctor) is run in; empty for none.
    type: str
    default: ''
  verbose:
    description: Whether what is well is told as well.
    type: bool
    default: false
requirements:
  - docker (Debian and Ubuntu - python3-docker)
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details: Only looks. The service's doctor writes one object into the bucket and removes it again.
  diff_mode:
    support: none
    description: Will return details on what has changed (or possibly needs changing in check mode).
  idempotent:
    support: full
    description:
      - When run twice in a row outside check mode, with the same arguments, the second invocation indicates no change.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: The host is looked at
  host_doctor:
    guide: "{{ lookup('ansible.builtin.file', 'docs/troubleshooting.md') }}"
    service: aisha-webhook-api-1
    site:
      name: aisha-webhook
      directory: /opt/aisha-webhook
      nginx: aisha-nginx-webhook
      ports: [80, 443, 8443]
      api_ports: [8001, 8002]
"""

RETURN = r"""
findings:
  description: Each with C(check), C(verdict), C(what), and where something is wrong C(cause) and C(remedy).
  returned: success
  type: list
  elements: dict
lines:
  description: The same for people.
  returned: success
  type: list
  elements: str
well:
  description: Whether nothing failed.
  returned: success
  type: bool
"""

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.docker_cli import Docker, DockerError
from ansible.module_utils.docker_engine import DOCKER_IMPORT_ERROR, Engine, EngineError
from ansible.module_utils.host_doctor import (
    Doctor,
    Finding,
    Site,
    from_service,
    from_status,
    lines,
    read_guide,
    with_guide,
)
from ansible.module_utils.site_status import Bounds, SiteStatus, get_json, served_certificate

ARGUMENTS = {
    "site": {"type": "dict", "required": True},
    "guide": {"type": "str", "required": True},
    "checks": {"type": "list", "elements": "str", "default": []},
    "service": {"type": "str", "default": ""},
    "verbose": {"type": "bool", "default": False},
}
SERVICE_SECONDS = 40.0


def site_from(given: dict[str, Any]) -> Site:
    """The site as the module was told of it."""
    numbers = {name: [int(port) for port in given.get(name) or []] for name in ("ports", "api_ports")}
    whole = {name: int(given[name]) for name in ("memory_mb", "disk_mb") if name in given}
    return Site(**{**given, **numbers, **whole, "directory": Path(given["directory"])})


def of_the_site(site: Site, docker: Docker) -> list[Finding]:
    """What module site_status finds."""
    if DOCKER_IMPORT_ERROR:
        return [
            Finding("site-release", "skip", "python3-docker is missing: the site's state was not looked at")
        ]
    try:
        engine = Engine()
    except EngineError:
        return [Finding("site-release", "skip", "no engine: the site's state was not looked at")]
    look = SiteStatus(
        site.directory, engine, docker, Bounds(disk_free_mb=site.disk_mb), get_json, served_certificate
    )
    return from_status(look.look()["findings"])


def of_the_service(container: str, docker: Docker) -> list[Finding]:
    """What the service's own doctor finds."""
    try:
        said = docker.attempt("exec", container, "webhook-api", "doctor", "--json", timeout=SERVICE_SECONDS)
    except DockerError as error:
        return [Finding("service-settings", "skip", str(error))]
    if not said.out.strip() and ("No such container" in said.err or "is not running" in said.err):
        return [Finding("service-settings", "skip", f"{container} does not run: the service was not asked")]
    return from_service(said.out or said.err)


def main() -> None:
    """Wire parameters and looks."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True)
    try:
        site = site_from(module.params["site"])
    except (TypeError, ValueError, KeyError) as error:
        module.fail_json(msg=f"site is not described as it has to be: {error}", reason="invalid")
    docker = Docker()
    findings = Doctor(site, docker=docker).examine(module.params["checks"])
    if not module.params["checks"]:
        findings += of_the_site(site, docker)
    if module.params["service"]:
        findings += of_the_service(module.params["service"], docker)
    shown = with_guide(findings, read_guide(module.params["guide"]))
    told = list(lines(shown, all_of_them=module.params["verbose"]))
    well = not any(finding["verdict"] == "fail" for finding in shown)
    module.exit_json(changed=False, findings=shown, lines=told, well=well)


if __name__ == "__main__":
    main()
