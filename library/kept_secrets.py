#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""End the rotation of secrets on one host: forget the values of before, or put them back."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kept_secrets
short_description: End the rotation of secrets on one host
description:
  - M(secret_files) keeps the secrets that it replaces while a release serves, and M(rollout) forgets them or puts them back.
    This module does it where no rollout does - when all hosts of a run serve, and when a run has failed elsewhere.
  - Never reads a secret. A container has the file that stood when it was started; that is told by its inode.
options:
  site_dir:
    description: The site's directory.
    type: path
    required: true
  state:
    description:
      - V(settled) removes what was kept, if the containers of the current release have what stands now.
      - V(restored) puts back what the current release was proven with. It is left to the next rollout where a container has
        been started with what stands now, or where a rollout is at work or was killed. What was kept for another release
        than the current one is removed.
    type: str
    choices: [settled, restored]
    required: true
requirements:
  - docker (Debian and Ubuntu - python3-docker)
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
  diff_mode:
    support: full
    description: Will return details on what has changed (or possibly needs changing in check mode).
    details: Names the secrets, never what is in them.
  idempotent:
    support: full
    description:
      - When run twice in a row outside check mode, with the same arguments, the second invocation indicates no change.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: Secrets that no container uses yet are those of before again
  kept_secrets:
    site_dir: /opt/aisha-webhook
    state: restored
"""

RETURN = r"""
result:
  description: What was (in check mode, would be) done. V(none), nothing was kept; V(removed); V(restored); V(left), it is
    for the next rollout to decide.
  returned: success
  type: str
names:
  description: Names of the secrets of which something was kept.
  returned: success
  type: list
  elements: str
reason:
  description: Why the module failed, for programs. V(bad_release), V(io), or the engine's.
  returned: on failure
  type: str
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.deploy_record import RecordError
from ansible.module_utils.docker_engine import DOCKER_IMPORT_ERROR, Engine, EngineError
from ansible.module_utils.rollout.model import RolloutError
from ansible.module_utils.rollout.rotation_end import RotationEnd

ARGUMENTS = {
    "site_dir": {"type": "path", "required": True},
    "state": {"type": "str", "choices": ["settled", "restored"], "required": True},
}


def main() -> None:
    """Wire parameters, engine and files."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True)
    if DOCKER_IMPORT_ERROR:
        module.fail_json(msg=missing_required_lib("docker", reason="(package python3-docker)"))
    try:
        ending = RotationEnd(Path(module.params["site_dir"]), Engine(), module.warn)
        ended = ending.end(module.params["state"], check=module.check_mode)
    except (RolloutError, EngineError, RecordError) as error:
        module.fail_json(msg=str(error), reason=error.reason)
    except OSError as error:
        module.fail_json(msg=f"The kept secrets can't be used: {error}. Run with become: true", reason="io")
    before = "".join(f"{name}: kept\n" for name in ended.names)
    after = "".join(f"{name}: {ended.action}\n" for name in ended.names) if ended.changed else before
    module.exit_json(
        changed=ended.changed, result=ended.action, names=ended.names, diff={"before": before, "after": after}
    )


if __name__ == "__main__":
    main()
