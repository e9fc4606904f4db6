#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""What runs of a site on a host, its health, and what is not as the current release says."""

from __future__ import annotations

DOCUMENTATION = r"""
module: site_status
short_description: What runs of a site on a host, and what is not as its release says
description:
  - Looks at a site in one call - the current release and since when, containers with health, restarts and digest,
    the instances' C(/health) with spool and inbox, certificate, disk, lock, records, leftovers of runs that did
    not end.
  - Compares all of it with what the release says. What differs is a finding, with what and where.
  - Changes nothing, and fails only when it cannot look at all.
options:
  site_dir:
    description: The site's directory.
    type: path
    required: true
  certificate_fail_days:
    description: Days left from which on that finding is of the verdict C(fail).
    type: int
    default: 7
  certificate_days:
    description: Days left from which on the certificate is a finding.
    type: int
    default: 21
  disk_free_mb:
    description: Megabytes (10^6 bytes) below which free space is a finding.
    type: int
    default: 2000
  deployments:
    description: How many records are shown.
    type: int
    default: 5
requirements:
  - docker (Debian and Ubuntu - python3-docker)
  - requests (Debian and Ubuntu - python3-requests)
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
  diff_mode:
    support: none
    description: Will return details on what has changed (or possibly needs changing in check mode).
  idempotent:
    support: full
    description: When run twice in a row outside check mode, with the same arguments, the second invocation
      indicates no change.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: The state of the site is known
  site_status:
    site_dir: /opt/aisha-webhook
  register: seen
"""

RETURN = r"""
status:
  description:
    - All that was seen - C(release), C(releases), C(services), C(instances), C(certificate), C(lock), C(at_work),
      C(deployments), C(left_behind), C(disk), C(findings), C(ok), C(time).
  returned: success
  type: dict
lines:
  description: The same for people, one line each.
  returned: success
  type: list
  elements: str
ok:
  description: Whether there is no finding.
  returned: success
  type: bool
findings:
  description: What is not as it should be, each with C(kind), C(name), C(what) and C(verdict) (C(fail) or C(warn)).
  returned: success
  type: list
  elements: dict
"""

from dataclasses import asdict
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.docker_cli import Docker
from ansible.module_utils.docker_engine import DOCKER_IMPORT_ERROR, Engine, EngineError
from ansible.module_utils.site_status import Bounds, SiteStatus, get_json, served_certificate
from ansible.module_utils.site_status_text import lines

ARGUMENTS = {
    "site_dir": {"type": "path", "required": True},
    "certificate_days": {"type": "int", "default": 21},
    "certificate_fail_days": {"type": "int", "default": 7},
    "disk_free_mb": {"type": "int", "default": 2000},
    "deployments": {"type": "int", "default": 5},
}


def main() -> None:
    """Wire parameters, engine and look."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True)
    if DOCKER_IMPORT_ERROR:
        module.fail_json(msg=missing_required_lib("docker", reason="(package python3-docker)"))
    bounds = Bounds(**{name: module.params[name] for name in asdict(Bounds())})
    try:
        engine = Engine()
    except EngineError as error:
        module.fail_json(msg=str(error), reason=error.reason)
    site = SiteStatus(Path(module.params["site_dir"]), engine, Docker(), bounds, get_json, served_certificate)
    shown = site.look()
    told = list(lines(shown))
    module.exit_json(changed=False, status=shown, lines=told, ok=shown["ok"], findings=shown["findings"])


if __name__ == "__main__":
    main()
