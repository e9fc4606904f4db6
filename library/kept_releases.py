#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""List the releases that a host has kept, and choose the one to go back to."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kept_releases
short_description: List the releases that a host has kept, and choose the one to go back to
description:
  - Lists the releases below C(SITE_DIR/releases) with what a rollback needs to know - when each was made and
    last served, its images and whether they are on the host, and what stands against it.
  - With O(release), chooses one, and fails with the list when that one cannot be gone back to - unknown, the
    current one, damaged, or a secret file that it needs is gone.
  - Changes nothing.
options:
  site_dir:
    description: The site's directory.
    type: path
    required: true
  release:
    description: Id of a release, or V(previous). Empty to choose none.
    type: str
    default: ''
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
- name: What can be gone back to is known
  kept_releases:
    site_dir: /opt/aisha-webhook
    release: previous
  register: kept
"""

RETURN = r"""
releases:
  description:
    - The kept releases, the newest first, each with C(id), C(created), C(deployed), C(current), C(previous),
      C(webhook_release), C(images), C(images_here), C(missing_images), C(missing_secrets), C(possible) and
      C(obstacle).
  returned: success
  type: list
  elements: dict
lines:
  description: The same for people, one line each.
  returned: success
  type: list
  elements: str
current:
  description: Id of the current release; null when there is none.
  returned: success
  type: str
chosen:
  description: The release of O(release), as in RV(releases); null without one.
  returned: success
  type: dict
reason:
  description: Why the module failed, for programs. V(no_release), V(current), V(damaged), V(bad_release),
    V(secret_missing), V(io), or the engine's.
  returned: on failure
  type: str
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.docker_engine import DOCKER_IMPORT_ERROR, Engine, EngineError
from ansible.module_utils.kept_releases import KeptError, KeptReleases

ARGUMENTS = {
    "site_dir": {"type": "path", "required": True},
    "release": {"type": "str", "default": ""},
}


def main() -> None:
    """Wire parameters, engine and releases."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True)
    if DOCKER_IMPORT_ERROR:
        module.fail_json(msg=missing_required_lib("docker", reason="(package python3-docker)"))
    try:
        engine = Engine()
        kept = KeptReleases(Path(module.params["site_dir"]), lambda image: bool(engine.image_names(image)))
        found = kept.read()
        current = next((entry.id for entry in found if entry.current), None)
        known = {"releases": [entry.shown() for entry in found], "lines": [entry.line() for entry in found]}
        known["current"] = current
        chosen = kept.choose(module.params["release"]).shown() if module.params["release"] else None
    except (KeptError, EngineError) as error:
        module.fail_json(msg=str(error), reason=error.reason)
    except OSError as error:
        module.fail_json(msg=f"the releases cannot be read: {error}", reason="io")
    module.exit_json(changed=False, chosen=chosen, **known)


if __name__ == "__main__":
    main()
