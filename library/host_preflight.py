#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Say at once all that keeps a host from carrying the stack."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_preflight
short_description: Say at once all that keeps a host from carrying the stack
description:
  - Looks at ports, disk, memory, system, privileges, engine, networks, files, package mirrors and the registry, and
    fails with one message that names every fault and what to do about it.
  - Only looks. It needs no root; where C(sudo -n) works it is used to see the owners of ports and to ask the engine.
  - An engine that is not there is no fault, because role C(engine) installs it. One that is too old is.
options:
  ports:
    description: TCP ports that have to be free, or held by containers of the stack itself.
    type: list
    elements: dict
    default: []
    suboptions:
      port:
        description: The port.
        type: int
        required: true
      address:
        description: The address it is bound to; empty for all.
        type: str
        default: ""
      purpose:
        description: What it is for, for the message.
        type: str
        default: ""
      containers:
        description: Names of the containers that may hold it; C(*) stands for any characters.
        type: list
        elements: str
        default: []
  paths_free_mb:
    description:
      - Paths and the MB (10^6 bytes) that have to be free there. A path need not exist yet.
      - V(@docker) is where the engine keeps its data.
    type: dict
    default: {}
  memory_mb:
    description: MiB of memory that the host has to have, as C(MemTotal) in /proc/meminfo tells it. 0 for any.
    type: int
    default: 0
  systems:
    description: Supported distributions (C(ID) in /etc/os-release) and their releases (C(VERSION_ID)).
    type: dict
    default: {debian: ["12", "13"], ubuntu: ["24.04"]}
  architectures:
    description: Supported architectures.
    type: list
    elements: str
    default: [x86_64, aarch64]
  engine_min:
    description: The oldest engine that will do.
    type: str
    default: "25.0"
  compose_min:
    description: The oldest Compose plugin that will do.
    type: str
    default: "2.20"
  subnets:
    description: Names of networks and the subnets they are to have.
    type: dict
    default: {}
  required_settings:
    description: Settings that must be given.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the variable.
        type: str
        required: true
      given:
        description: Whether it is given. Never the value itself.
        type: bool
        required: true
      where:
        description: Where to set it.
        type: str
        default: ""
      fault:
        description: The whole sentence to report, in place of one made of name and place.
        type: str
  files:
    description: Files that have to be on the host.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Path of the file.
        type: path
        required: true
      purpose:
        description: What it is, for the message.
        type: str
        required: true
  look_for:
    description: Files that may be on the host or not. Those that are certainly not there are in RV(host.absent).
    type: list
    elements: path
    default: []
  mirrors:
    description: When apt's own sites have to answer; V(auto) means when something of the engine has to be installed.
    type: str
    choices: [auto, always, never]
    default: auto
  registry:
    description: A registry that has to answer and let the login in. Leave it out where the stack brings its own.
    type: dict
    suboptions:
      url:
        description: Scheme, host and port.
        type: str
        required: true
      username:
        description: Name for basic authentication; empty for none.
        type: str
      password:
        description: Password for basic authentication.
        type: str
      ca:
        description: Path of a PEM file with the authorities to trust; empty for the system's.
        type: str
      plain_http:
        description: Whether plain http is allowed.
        type: bool
        default: false
  become_password_given:
    description: Whether the play has a password for sudo.
    type: bool
    default: false
  report_only:
    description: Whether to return the faults rather than to fail.
    type: bool
    default: false
  timeout:
    description: Seconds that a mirror or the registry has for an answer.
    type: float
    default: 5
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details: Only looks. Does the same, and may fail in the same way, in check mode.
  diff_mode:
    support: N/A
    description: Will return details on what has changed (or possibly needs changing in check mode).
    details: Changes nothing.
  idempotent:
    support: full
    description:
      - When run twice in a row outside check mode, with the same arguments, the second invocation indicates no change.
    details: Changes nothing.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: The host can carry the stack
  host_preflight:
    ports:
      - {port: 443, purpose: https, containers: [aisha-nginx-webhook]}
    paths_free_mb:
      /var/lib/docker: 6000
    memory_mb: 1800
    subnets:
      aisha_webhook_cluster: 172.31.240.0/24
    required_settings:
      - name: secrets_given.fal_webhook_secret
        given: "{{ secrets_given.fal_webhook_secret | default('') | length > 0 }}"
        where: set it in the vault of the inventory
  become: false
  register: host
"""

RETURN = r"""
host:
  description: What the host is and has.
  returned: always
  type: dict
  contains:
    distribution:
      description: C(ID) of /etc/os-release.
      type: str
      sample: debian
    release:
      description: C(VERSION_ID) of /etc/os-release.
      type: str
      sample: "13"
    architecture:
      description: The machine's architecture.
      type: str
      sample: x86_64
    kernel:
      description: The kernel's release.
      type: str
    init:
      description: V(systemd) or V(none).
      type: str
    memory_mb:
      description: MiB of memory.
      type: int
    cpus:
      description: Number of processors.
      type: int
    root:
      description: Whether the module ran as root.
      type: bool
    sudo:
      description: Whether C(sudo) works without a password. False for root, who needs none.
      type: bool
    absent:
      description: Of O(look_for), what is not there. What this user may not look for is not among it.
      type: list
      elements: str
    engine:
      description:
        - The engine with C(installed), C(running), C(permitted) (whether this user could ask it), C(version),
          C(compose), C(buildx) (versions, empty when absent), C(live_restore) and C(root_dir).
      type: dict
faults:
  description: What is wrong, one sentence each.
  returned: always
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.host_observation import Host, knock_at_registry
from ansible.module_utils.preflight import PortWish, Wishes, examine
from ansible.module_utils.registry_api import REQUESTS_IMPORT_ERROR, RegistryClient, RegistryError

ARGUMENTS = {
    "ports": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "port": {"type": "int", "required": True},
            "address": {"type": "str", "default": ""},
            "purpose": {"type": "str", "default": ""},
            "containers": {"type": "list", "elements": "str", "default": []},
        },
    },
    "paths_free_mb": {"type": "dict", "default": {}},
    "memory_mb": {"type": "int", "default": 0},
    "systems": {"type": "dict", "default": {"debian": ["12", "13"], "ubuntu": ["24.04"]}},
    "architectures": {"type": "list", "elements": "str", "default": ["x86_64", "aarch64"]},
    "engine_min": {"type": "str", "default": "25.0"},
    "compose_min": {"type": "str", "default": "2.20"},
    "subnets": {"type": "dict", "default": {}},
    "required_settings": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "name": {"type": "str", "required": True},
            "given": {"type": "bool", "required": True},
            "where": {"type": "str", "default": ""},
            "fault": {"type": "str"},
        },
    },
    "files": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {"path": {"type": "path", "required": True}, "purpose": {"type": "str", "required": True}},
    },
    "look_for": {"type": "list", "elements": "path", "default": []},
    "mirrors": {"type": "str", "choices": ["auto", "always", "never"], "default": "auto"},
    "registry": {
        "type": "dict",
        "options": {
            "url": {"type": "str", "required": True},
            "username": {"type": "str"},
            "password": {"type": "str", "no_log": True},
            "ca": {"type": "str"},
            "plain_http": {"type": "bool", "default": False},
        },
    },
    # Says whether, not what: nothing to hide.
    "become_password_given": {"type": "bool", "default": False, "no_log": False},
    "report_only": {"type": "bool", "default": False},
    "timeout": {"type": "float", "default": 5.0},
}


def wishes_from(params: dict) -> Wishes:
    """What the host has to offer, from the module's parameters."""
    return Wishes(
        ports=[PortWish.from_params(entry) for entry in params["ports"]],
        paths_free_mb={path: int(megabytes) for path, megabytes in params["paths_free_mb"].items()},
        memory_mb=params["memory_mb"],
        systems={
            name: [str(release) for release in releases] for name, releases in params["systems"].items()
        },
        architectures=params["architectures"],
        engine_min=params["engine_min"],
        compose_min=params["compose_min"],
        subnets=params["subnets"],
        required_settings=params["required_settings"],
        files=params["files"],
        look_for=params["look_for"],
        mirrors=params["mirrors"],
        become_password=params["become_password_given"],
        timeout=params["timeout"],
    )


def registry_fault(registry: dict | None, timeout: float) -> str:
    """What is wrong with the registry; nothing where none is to be asked."""
    if not registry:
        return ""
    if REQUESTS_IMPORT_ERROR:
        # A host that role `engine` has not prepared yet.
        return knock_at_registry(registry["url"], registry["ca"] or None, timeout)
    login = (registry["username"], registry["password"] or "") if registry["username"] else None
    try:
        RegistryClient(
            registry["url"],
            login,
            registry["ca"] or None,
            connect_timeout=timeout,
            read_timeout=timeout,
            plain_http=registry["plain_http"],
        ).ping()
    except RegistryError as error:
        return str(error)
    return ""


def main() -> None:
    """Wire parameters, host and rules."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True)
    params = module.params
    try:
        wishes = wishes_from(params)
    except (TypeError, ValueError) as error:
        module.fail_json(
            msg=f"paths_free_mb takes numbers and systems takes lists: {error}", faults=[], host={}
        )
    findings, facts = examine(Host(), wishes, lambda: registry_fault(params["registry"], params["timeout"]))
    for warning in findings.warnings:
        module.warn(warning)
    if findings.faults and not params["report_only"]:
        module.fail_json(msg=findings.message("This host"), faults=findings.faults, host=facts)
    module.exit_json(changed=False, faults=findings.faults, host=facts)


if __name__ == "__main__":
    main()
