#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Look whether a certificate and its key stand so that a server can use them."""

from __future__ import annotations

DOCUMENTATION = r"""
module: certificate_pair
short_description: Look whether a certificate and its key stand so that a server can use them
description:
  - Reads a certificate, and looks at its key - whether it is there, who may read it, and whether it is that certificate's
    (by C(openssl), where the host has it). Shows nothing of the key.
options:
  certificate:
    description: Path of the certificate, with its chain.
    type: path
    required: true
  key:
    description: Path of its private key.
    type: path
    required: true
  owner:
    description: Number of the user that reads the key.
    type: int
    required: true
  ours:
    description: Whether nobody but that user may read it. Else it is enough that this one can.
    type: bool
    default: true
  must:
    description: Whether the module fails where something is wrong. Otherwise RV(faults) says so.
    type: bool
    default: false
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details: Never changes anything.
  diff_mode:
    support: none
    description: Will return details on what has changed (or possibly needs changing in check mode).
  idempotent:
    support: full
    description: When run twice in a row outside check mode, with the same arguments, the second invocation indicates
      no change.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: The certificate on the host is looked at
  certificate_pair:
    certificate: /opt/aisha-webhook/ssl/fullchain.pem
    key: /opt/aisha-webhook/ssl/privkey.pem
    owner: 10002
  register: pair
"""

RETURN = r"""
certificate:
  description: Its text; empty where there is none.
  returned: success
  type: str
faults:
  description: What is wrong, one sentence each.
  returned: always
  type: list
  elements: str
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.certificate_pair import look

ARGUMENTS = {
    "certificate": {"type": "path", "required": True},
    # A path: nothing to hide.
    "key": {"type": "path", "required": True, "no_log": False},
    "owner": {"type": "int", "required": True},
    "ours": {"type": "bool", "default": True},
    "must": {"type": "bool", "default": False},
}


def main() -> None:
    """Wire parameters and look."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True)
    params = module.params
    pair = look(Path(params["certificate"]), Path(params["key"]), params["owner"], ours=params["ours"])
    if params["must"] and pair.faults:
        remedy = "Put a certificate with its key there, readable by that user, or correct the edge_certificate_ variables"
        module.fail_json(msg=f"{'; '.join(pair.faults)}. {remedy}", faults=pair.faults)
    module.exit_json(changed=False, certificate=pair.certificate, faults=pair.faults)


if __name__ == "__main__":
    main()
