#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Remove images that no kept release needs, from a registry or from a host's engine."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_prune
short_description: Remove images that no kept release needs
description:
  - Works on the repositories of O(repositories) and on nothing else, and there on images that M(content_images) made
    - known by a content tag (C(c-) and 16 hexadecimal digits) and by a label. An image that bears any other tag, such as
    C(latest) or one that a person has set, stays.
  - With O(scope=engine) on a host. The images of every release that stands on this host stay, of the site in O(path) and
    of the sites beside it, and those of every container. The rest goes, but for the O(keep) newest of each repository.
    Nothing is forced. When a release does not say what it needs, nothing is removed.
  - With O(scope=registry). The digests in O(needed) stay, and the O(keep) newest of each repository. Signatures and bills
    of materials that stand under tags C(sha256-DIGEST…) go together with their image. The registry's disk is freed by
    its own garbage collection.
  - What cannot be removed is a warning. With O(strict) the module fails then.
options:
  scope:
    description: Where to remove.
    type: str
    choices: [engine, registry]
    required: true
  repositories:
    description: Repositories, without the registry's host.
    type: list
    elements: str
    required: true
  registry:
    description: Host and port of the registry, as in image names.
    type: str
    required: true
  keep:
    description: How many of the newest images of each repository stay, whoever needs them.
    type: int
    default: 10
  retired:
    description:
      - With O(scope=engine), those of O(repositories) that this site uses no more. Of those none stays for being new, only
        what is needed here. In a registry other sites may go on using them.
    type: list
    elements: str
    default: []
  path:
    description: With O(scope=engine), the site's directory; its releases are read.
    type: path
  needed:
    description: With O(scope=registry), references or digests that stay; gathered from RV(needed) of every host.
    type: list
    elements: str
  username:
    description: Name for basic authentication at the registry. An empty string means none.
    type: str
  password:
    description: Password for basic authentication.
    type: str
  ca:
    description: Path of a PEM file with the authorities to trust for the registry; empty for the system's.
    type: path
  plain_http:
    description: Whether the registry is spoken to in plain http.
    type: bool
    default: false
  strict:
    description: Whether to fail when something could not be removed.
    type: bool
    default: false
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
  diff_mode:
    support: full
    description: Will return details on what has changed (or possibly needs changing in check mode).
    details: The names that go.
  idempotent:
    support: full
    description:
      - When run twice in a row outside check mode, with the same arguments, the second invocation indicates no change.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: Images that no release needs are gone from the host
  image_prune:
    scope: engine
    path: /opt/aisha-webhook
    registry: registry.example:5000
    repositories: [webhook-api, nginx-webhook]
    keep: 3
  register: host

- name: Tags that no release needs are gone from the registry
  image_prune:
    scope: registry
    registry: registry.example:5000
    repositories: [webhook-api, nginx-webhook]
    needed: "{{ host.needed }}"
    keep: 10
"""

RETURN = r"""
removed:
  description: Names that were (in check mode, would be) removed.
  returned: success
  type: list
  elements: str
kept:
  description: How many images that this module may remove stay.
  returned: success
  type: int
needed:
  description: With O(scope=engine), the references that the releases of this host name.
  returned: success
  type: list
  elements: str
faults:
  description: What could not be removed, one sentence each.
  returned: always
  type: list
  elements: str
reason:
  description: Why the module failed, for programs.
  returned: on failure
  type: str
  sample: not_all_removed
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.docker_cli import Docker
from ansible.module_utils.image_prune import (
    EnginePrune,
    Outcome,
    PruneError,
    RegistryPrune,
    needed_references,
)
from ansible.module_utils.registry_api import REQUESTS_IMPORT_ERROR, RegistryClient, RegistryError

ARGUMENTS = {
    "scope": {"type": "str", "choices": ["engine", "registry"], "required": True},
    "repositories": {"type": "list", "elements": "str", "required": True},
    "registry": {"type": "str", "required": True},
    "keep": {"type": "int", "default": 10},
    "retired": {"type": "list", "elements": "str", "default": []},
    "path": {"type": "path"},
    "needed": {"type": "list", "elements": "str"},
    "username": {"type": "str"},
    "password": {"type": "str", "no_log": True},
    "ca": {"type": "path"},
    "plain_http": {"type": "bool", "default": False},
    "strict": {"type": "bool", "default": False},
}


def prune_engine(params: dict, *, check: bool) -> tuple[Outcome, list[str]]:
    """Prune this host's engine; the outcome, and what its releases need."""
    needed = needed_references(Path(params["path"]))
    repositories, retired = (
        [f"{params['registry']}/{name}" for name in params[names]] for names in ("repositories", "retired")
    )
    prune = EnginePrune(Docker(), needed, params["keep"], check=check, retired=retired)
    return prune.run(repositories), needed


def prune_registry(params: dict, *, check: bool) -> Outcome:
    """Prune the registry."""
    scheme = "http" if params["plain_http"] else "https"
    login = (params["username"], params["password"] or "") if params["username"] else None
    url = f"{scheme}://{params['registry']}"
    client = RegistryClient(url, login, params["ca"] or None, plain_http=params["plain_http"])
    return RegistryPrune(client, params["needed"], params["keep"], check=check).run(params["repositories"])


def main() -> None:
    """Wire parameters, engine or registry, and what was done."""
    module = AnsibleModule(
        ARGUMENTS,
        supports_check_mode=True,
        required_if=[("scope", "engine", ["path"]), ("scope", "registry", ["needed"])],
    )
    params = module.params
    if params["keep"] < 1:
        module.fail_json(msg="keep is at least 1", reason="invalid", faults=[])
    if REQUESTS_IMPORT_ERROR and params["scope"] == "registry":
        module.fail_json(
            msg=missing_required_lib("requests", reason="(package python3-requests)"),
            exception=REQUESTS_IMPORT_ERROR,
        )
    needed: list[str] = []
    outcome = Outcome()
    try:
        if params["scope"] == "engine":
            outcome, needed = prune_engine(params, check=module.check_mode)
        else:
            outcome = prune_registry(params, check=module.check_mode)
    except (PruneError, RegistryError) as error:
        outcome.faults.append(str(error))
    report = {"removed": outcome.removed, "kept": outcome.kept, "faults": outcome.faults}
    if outcome.faults and params["strict"]:
        message = "Not everything could be removed: " + "; ".join(outcome.faults)
        module.fail_json(msg=message, reason="not_all_removed", changed=bool(outcome.removed), **report)
    for fault in outcome.faults:
        module.warn(f"Not removed: {fault}")
    before = "".join(f"{name}\n" for name in outcome.removed)
    diff = {"before": before, "after": "", "before_header": "images", "after_header": "images"}
    # A host whose releases could not be read says nothing of what they need.
    known = {} if outcome.faults and not needed else {"needed": needed}
    module.exit_json(changed=bool(outcome.removed), diff=diff, **report, **known)


if __name__ == "__main__":
    main()
