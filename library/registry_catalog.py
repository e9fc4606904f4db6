#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Prove what a container registry holds."""

from __future__ import annotations

DOCUMENTATION = r"""
module: registry_catalog
short_description: Prove what a container registry holds
description:
  - Reads the catalogue of a registry, following its pagination to the end, the tags of the repositories
    that matter, and the
    digest of each expected manifest (by C(HEAD), accepting OCI and Docker manifests and indexes).
  - With O(expect) it fails unless everything expected is there, and names all that is missing or different
    in one message.
  - Speaks the registry HTTP API version 2. Redirects are not followed, and a login never leaves the host of
    O(url).
options:
  url:
    description: Scheme, host and port of the registry. A path, a query or a login in it is refused.
    type: str
    required: true
  username:
    description: Name for basic authentication. Give O(password) with it. An empty string means none.
    type: str
  password:
    description: Password for basic authentication.
    type: str
  ca:
    description:
      - Path, on the host where the module runs, of a PEM file with the authorities to trust for O(url).
      - Without it the authorities of that host are trusted. An empty string means none.
    type: path
  plain_http:
    description: Whether an C(http://) address is allowed. Without it such an address is refused before
      anything is sent.
    type: bool
    default: false
  expect:
    description: What must be in the registry.
    type: list
    elements: dict
    default: []
    suboptions:
      repository:
        description: Name of the repository, without the registry's host.
        type: str
        required: true
      tag:
        description: A tag that the repository must have.
        type: str
      digest:
        description:
          - The digest (C(sha256:) and 64 hexadecimal digits) that O(expect[].tag) must name; without a tag,
            one that must be there.
        type: str
  catalog:
    description: Whether to read the catalogue. Hosted registries often do not offer one; set it to V(false)
      for these.
    type: bool
    default: true
  all_tags:
    description: Whether to return the tags of every repository of the catalogue, not only of the expected
      ones.
    type: bool
    default: false
  wait:
    description: Seconds to wait for a registry that does not answer yet, or answers with a server error.
    type: float
    default: 0
  timeout:
    description: Seconds without a byte of an answer after which a request is given up.
    type: float
    default: 30
requirements:
  - requests (Debian and Ubuntu - python3-requests)
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details: Only reads. Does the same, and may fail in the same way, in check mode.
  diff_mode:
    support: N/A
    description: Will return details on what has changed (or possibly needs changing in check mode).
    details: Changes nothing.
  idempotent:
    support: full
    description: When run twice in a row outside check mode, with the same arguments, the second invocation
      indicates no change.
    details: Changes nothing.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: The images are in the registry, under these very digests
  registry_catalog:
    url: https://registry.example:5000
    username: deploy
    password: "{{ registry_password }}"
    ca: /etc/ssl/private-ca.pem
    expect:
      - repository: webhook-api
        tag: latest
        digest: "{{ images_digests['webhook-api'].digest }}"
      - repository: aisha/bot

- name: A registry on loopback is listed
  registry_catalog:
    url: http://127.0.0.1:5000
    plain_http: true
    all_tags: true
    wait: 10
  register: catalogue
"""

RETURN = r"""
repositories:
  description: All repositories of the catalogue, of all pages. One without any tag may be among them.
  returned: when the registry answered
  type: list
  elements: str
  sample: [aisha/bot, nginx-webhook, webhook-api]
tags:
  description: The tags of each expected repository (of every repository with O(all_tags)).
  returned: when the registry answered
  type: dict
  sample: {webhook-api: [latest, c0ffee123456]}
digests:
  description: The digest found for each expectation that has a tag or a digest; null where there is none.
  returned: when the registry answered
  type: dict
  sample: {"webhook-api:latest": "sha256:7d865e959b2466918c9863afca942d0fb89d7c9ac0c99bafc3749504ded97730"}
faults:
  description: What is missing or different, one sentence each.
  returned: when something expected is not there
  type: list
  elements: str
reason:
  description:
    - Why the module failed, for programs. V(not_as_expected) when O(expect) is not met; otherwise what went
      wrong with the registry.
  returned: on failure
  type: str
  sample: unauthorized
"""

from dataclasses import asdict

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.registry_api import REQUESTS_IMPORT_ERROR, RegistryClient, RegistryError
from ansible.module_utils.registry_catalog import (
    Expectation,
    failure_message,
    find_faults,
    patiently,
    read_contents,
)

ARGUMENTS = {
    "url": {"type": "str", "required": True},
    "username": {"type": "str"},
    "password": {"type": "str", "no_log": True},
    "ca": {"type": "path"},
    "plain_http": {"type": "bool", "default": False},
    "expect": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "repository": {"type": "str", "required": True},
            "tag": {"type": "str"},
            "digest": {"type": "str"},
        },
    },
    "catalog": {"type": "bool", "default": True},
    "all_tags": {"type": "bool", "default": False},
    "wait": {"type": "float", "default": 0.0},
    "timeout": {"type": "float", "default": 30.0},
}


def client_from(params: dict) -> RegistryClient:
    """The client that the parameters describe; empty strings stand for what is not given."""
    return RegistryClient(
        params["url"],
        (params["username"], params["password"]) if params["username"] else None,
        params["ca"] or None,
        read_timeout=params["timeout"],
        plain_http=params["plain_http"],
    )


def main() -> None:
    """Wire parameters, client and proof."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True, required_together=[("username", "password")])
    if REQUESTS_IMPORT_ERROR:
        module.fail_json(
            msg=missing_required_lib("requests", reason="(package python3-requests)"),
            exception=REQUESTS_IMPORT_ERROR,
        )
    params = module.params
    expect = [Expectation.from_params(entry) for entry in params["expect"]]
    try:
        client = client_from(params)
        contents = patiently(
            lambda: read_contents(client, expect, catalog=params["catalog"], all_tags=params["all_tags"]),
            params["wait"],
        )
    except RegistryError as error:
        module.fail_json(msg=str(error), reason=error.reason)
    faults = find_faults(expect, contents, catalog=params["catalog"])
    if faults:
        module.fail_json(
            msg=failure_message(client.base_url, faults),
            reason="not_as_expected",
            faults=faults,
            **asdict(contents),
        )
    module.exit_json(changed=False, **asdict(contents))


if __name__ == "__main__":
    main()
