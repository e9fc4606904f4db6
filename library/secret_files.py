#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Keep secrets as files, each readable by one user only."""

from __future__ import annotations

DOCUMENTATION = r"""
module: secret_files
short_description: Keep secrets as files, each readable by one user only
description:
  - Writes given secrets, generates those that are neither given nor there, and derives public counterparts.
  - A secret that was generated stays as it is until its file is removed. A given value replaces what stands.
  - Files are replaced as a whole, belong to the user that reads them, and are never shown. Directories may be passed
    through and not listed.
  - While a release of O(site_dir) serves, what is replaced can be kept for it, for root alone, until module M(rollout) has
    proven the new one or puts the old one back.
  - Returns the values for later tasks, so the module refuses to run in a task without C(no_log).
options:
  path:
    description: Directory of the secrets. It is made if it is missing.
    type: path
    required: true
  directory_mode:
    description: Mode of the directories.
    type: str
    default: "0711"
  site_dir:
    description:
      - The site's directory, whose C(current) names the release that serves. With it, files with O(files[].keep) are kept
        in C(.before) of O(path) when they are replaced. Where no release serves yet, nothing is kept.
    type: path
  files:
    description: The secrets.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the file below O(path). Parts may be separated by C(/).
        type: str
        required: true
      value:
        description: The secret. An empty string counts as none.
        type: str
      generate:
        description: How to generate it when there is neither a value nor a file. Without it such a secret is a fault.
        type: dict
        suboptions:
          kind:
            description:
              - A V(password) of letters and digits, V(hex) digits, the seed of an V(ed25519) private key in hex, or a
                private key on the curve P-256 in PEM form (V(p256), made by openssl).
            type: str
            choices: [password, hex, ed25519, p256]
            required: true
          length:
            description: Number of characters; by default 32 for a password and 64 for hex. At least 16.
            type: int
      derive:
        description: What to compute it from.
        type: dict
        suboptions:
          kind:
            description:
              - V(copy) is the same secret for another reader.
              - V(jwks) is the JSON Web Key Set with the public key of an Ed25519 seed. Everyone may read it.
            type: str
            choices: [copy, jwks]
            required: true
          from:
            description: Name of the secret in the same list.
            type: str
            required: true
      owner:
        description: Number of the user that reads it.
        type: int
        default: 0
      group:
        description: Number of the file's group; by default that of O(files[].owner).
        type: int
      mode:
        description: Mode of the file; V(0400) by default and V(0444) for a public one. Others may never read a secret.
        type: str
      keep:
        description: Whether the file that is replaced is kept until a release has proven the new one. See O(site_dir).
        type: bool
        default: false
      retire:
        description:
          - Whether a secret without a value is no longer wanted. Where its file stands, random characters that nobody knows
            take the place of what is in it - releases that mount the file still start, and it lets nobody in.
        type: bool
        default: false
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details: A secret that would be generated has a stand-in value of the right form; RV(placeholders) names it.
  diff_mode:
    support: full
    description: Will return details on what has changed (or possibly needs changing in check mode).
    details: Says which files are created or replaced, never what is in them. A task with C(no_log) shows no diff at all.
  idempotent:
    support: full
    description:
      - When run twice in a row outside check mode, with the same arguments, the second invocation indicates no change.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: The service's secrets stand
  secret_files:
    path: /opt/aisha-webhook/secrets
    files:
      - name: postgres_password
        generate: {kind: password}
        owner: 10011
      - name: api/fal_webhook_secret
        value: "{{ vault_fal_webhook_secret }}"
        owner: 10001
      - name: fal_dev_key
        generate: {kind: ed25519}
      - name: api/fal_dev_jwks.json
        derive: {kind: jwks, from: fal_dev_key}
  no_log: true
  register: secrets
"""

RETURN = r"""
values:
  description: The secrets by name, without retired ones.
  returned: success
  type: dict
version:
  description: 12 hexadecimal digits that change when any of the secrets changes, and say nothing about them.
  returned: success
  type: str
  sample: 0f1e2d3c4b5a
versions:
  description: The same for each secret by itself.
  returned: success
  type: dict
actions:
  description: What was (in check mode, would be) done, by name - V(generate), V(create), V(replace), V(retire), V(owner),
    V(mode).
  returned: success
  type: dict
kept:
  description: Names of the secrets whose file of before is (in check mode, would be) kept for the release that serves.
  returned: success
  type: list
  elements: str
placeholders:
  description: Names of the secrets whose value is a stand-in, because check mode generates nothing.
  returned: success
  type: list
  elements: str
reason:
  description: Why the module failed, for programs.
  returned: on failure
  type: str
  sample: missing
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.release import ReleaseStore
from ansible.module_utils.secret_files import SecretError, SecretFiles, SecretSpec

GENERATE = {
    "kind": {"type": "str", "choices": ["password", "hex", "ed25519", "p256"], "required": True},
    "length": {"type": "int"},
}
DERIVE = {
    "kind": {"type": "str", "choices": ["copy", "jwks"], "required": True},
    "from": {"type": "str", "required": True},
}
ARGUMENTS = {
    "path": {"type": "path", "required": True},
    "directory_mode": {"type": "str", "default": "0711"},
    "site_dir": {"type": "path"},
    "files": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "name": {"type": "str", "required": True},
            "value": {"type": "str", "no_log": True},
            "generate": {"type": "dict", "options": GENERATE},
            "derive": {"type": "dict", "options": DERIVE},
            "owner": {"type": "int", "default": 0},
            "group": {"type": "int"},
            "mode": {"type": "str"},
            "keep": {"type": "bool", "default": False},
            "retire": {"type": "bool", "default": False},
        },
    },
}


def main() -> None:
    """Wire parameters and files."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True)
    if not module.no_log:
        module.fail_json(
            msg="This module returns secrets: give its task no_log: true", reason="no_log_missing"
        )
    # With no_log the task shows nothing at all. The values would only come out masked for later tasks.
    module.no_log_values.clear()
    params = module.params
    try:
        specs = [SecretSpec.from_params(entry) for entry in params["files"]]
        serves = ReleaseStore(params["site_dir"]).linked("current") if params["site_dir"] else None
        files = SecretFiles(Path(params["path"]), specs, int(params["directory_mode"], 8), serves or "")
        changed = files.plan()
        if changed and not module.check_mode:
            files.apply()
    except ValueError:
        module.fail_json(msg="A mode is an octal number in quotes, such as '0400'", reason="invalid")
    except SecretError as error:
        module.fail_json(msg=str(error), reason=error.reason)
    module.exit_json(
        changed=changed,
        diff=files.diff(),
        values=files.values(),
        version=files.version(),
        versions=files.versions(),
        actions=files.actions(),
        kept=files.kept(),
        placeholders=files.placeholders(),
    )


if __name__ == "__main__":
    main()
