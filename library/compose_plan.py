#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Say which services of a Compose project would be created, replaced or started, and why."""

from __future__ import annotations

DOCUMENTATION = r"""
module: compose_plan
short_description: Say which services of a Compose project would be created, replaced or started, and why
description:
  - Compares a Compose file with the containers of its project - by Compose's own hash of each service's
    configuration
    (with env files resolved), by image, and by state. Changes nothing.
  - The networks, volumes and containers need not exist yet.
options:
  project:
    description: Name of the Compose project.
    type: str
    required: true
  file:
    description: Path of the Compose file.
    type: path
    required: true
  contents:
    description:
      - In check mode, where O(file) does not exist because a release was only planned, the texts of its
        directory by file
        name (C(rendered) of M(release_directory) has them). They stand in for the directory while the plan
        is made.
      - Paths that they refer to must be absolute, or be among them.
    type: dict
    default: {}
  env_files:
    description: Files for the interpolation of the Compose file (C(--env-file)).
    type: list
    elements: path
    aliases: [env_file]
    default: []
  profiles:
    description: Profiles whose services count as well.
    type: list
    elements: str
    default: []
  order:
    description: Services in the order in which they are to be returned; the others follow.
    type: list
    elements: str
    default: []
  replace_unhealthy:
    description: Whether an unhealthy or always restarting container with the right configuration is to be
      replaced.
    type: bool
    default: true
  docker_host:
    description: Address of the engine. Default is the environment's C(DOCKER_HOST), then the usual socket.
    type: str
requirements:
  - Docker Compose 2.17 or newer
  - docker (Debian and Ubuntu - python3-docker)
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details:
      - Only reads. Where the Compose file or the engine is not there yet in check mode, RV(known) is
        V(false) instead of a
        failure.
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
- name: What differs is known
  compose_plan:
    project: aisha-webhook
    file: /opt/aisha-webhook/staged/docker-compose.webhook.prod.yml
    order: [worker, api-1, api-2, nginx]
    contents: "{{ stack_rendered.rendered | default({}) }}"
  register: plan

- name: What differs is replaced, one service at a time
  community.docker.docker_compose_v2:
    project_name: aisha-webhook
    project_src: /opt/aisha-webhook/staged
    files: [docker-compose.webhook.prod.yml]
    services: ["{{ item }}"]
    dependencies: false
    wait: true
  loop: "{{ plan.pending }}"
"""

RETURN = r"""
services:
  description: Every service, in the order of O(order).
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name of the service.
      type: str
    action:
      description: V(none), V(create), V(replace) or V(start).
      type: str
    reason:
      description: Why, in words. Names of variables and labels that differ, never their values.
      type: str
      sample: "image changed 127.0.0.1:5000/webhook-api@sha256:1111 -> 127.0.0.1:5000/webhook-api@sha256:2222"
    image:
      description: The image that the Compose file asks for.
      type: str
    running_image:
      description: The image that the service's container was made from; empty without one.
      type: str
    containers:
      description: Names of its containers.
      type: list
      elements: str
pending:
  description: Names of the services with something to do, in the same order.
  returned: success
  type: list
  elements: str
orphans:
  description: Containers of the project that belong to no service of the file, each with C(name),
    C(service), C(status).
  returned: success
  type: list
  elements: dict
known:
  description: Whether the plan could be made. Only V(false) in check mode, where nothing stands yet.
  returned: success
  type: bool
reason:
  description: Why the module failed, for programs.
  returned: on failure
  type: str
  sample: bad_file
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.compose_plan import (
    PlanError,
    hash_command,
    in_order,
    make_plan,
    model_command,
    parse_hashes,
    parse_model,
)
from ansible.module_utils.docker_cli import Docker, DockerError
from ansible.module_utils.docker_engine import DOCKER_IMPORT_ERROR, Engine, EngineError

ARGUMENTS = {
    "project": {"type": "str", "required": True},
    "file": {"type": "path", "required": True},
    "contents": {"type": "dict", "default": {}},
    "env_files": {"type": "list", "elements": "path", "default": [], "aliases": ["env_file"]},
    "profiles": {"type": "list", "elements": "str", "default": []},
    "order": {"type": "list", "elements": "str", "default": []},
    "replace_unhealthy": {"type": "bool", "default": True},
    "docker_host": {"type": "str"},
}
#: Faults that only mean, in check mode, that nothing stands yet.
NOTHING_YET = {"no_file", "no_client", "unreachable"}


@contextmanager
def compose_file(params: dict, check: bool) -> Iterator[str]:
    """Path of the Compose file; in check mode, if need be, in a directory that only stands for the planned one."""
    path = params["file"]
    if os.path.isfile(path) or not check or os.path.basename(path) not in params["contents"]:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="compose-plan-") as directory:
        for name, text in params["contents"].items():
            place = os.path.join(directory, os.path.normpath(f"/{name}").lstrip("/"))
            os.makedirs(os.path.dirname(place), exist_ok=True)
            with open(place, "w", encoding="utf-8") as handle:
                handle.write(str(text))
        yield os.path.join(directory, os.path.basename(path))


def plan(params: dict) -> dict:
    """Ask Compose and the engine, and compare."""
    for path in (params["file"], *params["env_files"]):
        if not os.path.isfile(path):
            raise PlanError("no_file", f"there is no file {path}", "Render the release first (--tags stack)")
    options = {"env": {"DOCKER_HOST": params["docker_host"]}} if params["docker_host"] else {}
    docker, profiles = Docker(), params["profiles"]
    command = model_command(params["project"], params["file"], params["env_files"], profiles)
    try:
        model = docker.call(*command, action=f"read {params['file']}", **options)
        hash_text = docker.call(
            *hash_command(params["project"], profiles),
            action=f"take the hashes of {params['file']}",
            stdin=model,
            **options,
        )
    except DockerError as error:
        if error.reason == "failed":
            raise PlanError("bad_file", str(error), "Mend what Compose names") from error
        raise
    services = parse_model(model)
    order = in_order(services, params["order"], params["file"])
    engine = Engine(params["docker_host"] or None)
    planned, orphans = make_plan(
        services,
        parse_hashes(hash_text),
        engine.project_containers(params["project"]),
        engine,
        order,
        replace_unhealthy=params["replace_unhealthy"],
    )
    return {
        "services": [service.as_result() for service in planned],
        "pending": [service.name for service in planned if service.action != "none"],
        "orphans": orphans,
        "known": True,
    }


def main() -> None:
    """Wire parameters and plan."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True)
    if DOCKER_IMPORT_ERROR and not module.check_mode:
        module.fail_json(msg=missing_required_lib("docker", reason="(package python3-docker)"))
    try:
        if DOCKER_IMPORT_ERROR:
            raise EngineError("unreachable", "Python's docker library is not installed yet")
        with compose_file(module.params, module.check_mode) as path:
            result = plan(module.params | {"file": path})
    except (PlanError, EngineError, DockerError) as error:
        if not (module.check_mode and error.reason in NOTHING_YET):
            module.fail_json(msg=str(error), reason=error.reason)
        module.warn(f"What would be replaced cannot be known yet: {error}")
        result = {"services": [], "pending": [], "orphans": [], "known": False}
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
