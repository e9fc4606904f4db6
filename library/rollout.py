#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Cut one host over to a release: no request fails, and what fails is undone."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rollout
short_description: Cut one host over to a release without a failed request, and undo what fails
description:
  - Brings the containers of a site to a release that stands in C(SITE_DIR/releases/ID). First all that can be
    refused is tried - images are pulled by digest unless they are here, nginx tests its configuration, the
    database is migrated. Then instances are replaced one after the other, each taken out of use by a switch
    file, then the worker, then nginx with two containers side by side. Every step is behind a gate of
    consecutive healthy answers that name the release. A new nginx is rehearsed first, on sockets that no
    client can reach.
  - When a step fails, what was replaced becomes the current release's again by the same path, and the module
    fails with what happened, the container's state, health log and last lines.
  - Secrets that M(secret_files) has replaced and kept are put back before a container of the current release is started,
    and when nothing was replaced; when the release serves, what was kept of them is removed.
  - It goes on when its controller goes away, ends in order when it gets SIGTERM or SIGINT, and completes or undoes
    what a killed run has left.
  - Keeps C(run/deployment.json) up to date and adds one record to C(deployments.jsonl).
options:
  site_dir:
    description: The site's directory.
    type: path
    required: true
  release:
    description: Id of the release.
    type: str
    required: true
  kind:
    description:
      - V(deploy) and V(rollback) cut over; a rollback runs no migration.
      - V(prepare) only tries what can be refused - lock, images, nginx's configuration - and touches no container.
    type: str
    choices: [deploy, rollback, prepare]
    default: deploy
  run:
    description: Id of the deployment's run, which must have the lock (M(deploy_lock)). Empty for none.
    type: str
    default: ''
  host:
    description: Name of this host in the record.
    type: str
    default: ''
  owner:
    description: Who deploys, for the record.
    type: str
    default: ''
  controller:
    description: From which machine, for the record.
    type: str
    default: ''
  reason:
    description: Why, for the record.
    type: str
    default: ''
  version:
    description: Version of the source, for the record.
    type: str
    default: ''
  expect_current:
    description:
      - Id of the release that C(current) has to name when the run has the lock. Another one means that somebody deployed
        while this run waited; then it changes nothing and fails. Empty for any.
    type: str
    default: ''
  gate:
    description: When a gate opens.
    type: dict
    default: {}
    suboptions:
      count:
        description: Consecutive good answers.
        type: int
        default: 3
      interval:
        description: Seconds between two questions.
        type: float
        default: 0.15
      timeout:
        description: Seconds after which a gate that stays shut has failed.
        type: float
        default: 30
  drain:
    description: How an instance is emptied before it is ended.
    type: dict
    default: {}
    suboptions:
      seconds:
        description: Seconds at most until it has no request any more; the rest is up to its own grace period.
        type: float
        default: 10
      settle:
        description: Seconds that it is left alone at least.
        type: float
        default: 0.2
  keepalive:
    description: Seconds at most that an old nginx is left its connections. Default is what the release says.
    type: float
    default: 0
  health_timeout:
    description: Seconds that a container has to become healthy.
    type: float
    default: 90
  migrate_timeout:
    description: Seconds that the migration may take.
    type: float
    default: 1800
  log_lines:
    description: Log lines of a failed container that are kept.
    type: int
    default: 30
  docker_config:
    description: Directory with the registry's login (C(DOCKER_CONFIG)). Empty for the user's own.
    type: str
    default: ''
  wait:
    description: Seconds to wait for another rollout on this host, one whose controller was killed for example.
    type: float
    default: 120
  settle:
    description:
      - Whether what was kept of replaced secrets is removed when the release serves.
      - V(false) where other hosts of the run may still fail, and this one go back with them; M(kept_secrets) does it then.
    type: bool
    default: true
  expect_unchanged:
    description: Touch nothing, and return the record that a run with nothing to do has on this host
      (M(deployment_records) writes it). Where anything differs, where another run has the deployment's lock, or the run
      before did not succeed, the module fails. Outside check mode, with O(kind=deploy).
    type: bool
    default: false
  probe:
    description: A probe before the release becomes the current one; options as those of M(webhook_probe), without
      C(docker_host). C(release) is the release's. Empty for none.
    type: dict
    default: {}
  contents:
    description: In check mode, the texts of a release that is not written, by name (C(rendered) of
      M(release_directory)).
    type: dict
    default: {}
  metadata:
    description: In check mode, C(metadata.rollout) of a release that is not written.
    type: dict
    default: {}
requirements:
  - docker (Debian and Ubuntu - python3-docker)
  - requests (Debian and Ubuntu - python3-requests)
  - Docker Compose 2.17 or newer
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details: Returns the plan. Takes no lock. Where nothing stands yet, RV(known) is V(false).
  diff_mode:
    support: full
    description: Will return details on what has changed (or possibly needs changing in check mode).
    details: Shows the plan's steps and the current release.
  idempotent:
    support: full
    description: When run twice in a row outside check mode, with the same arguments, the second invocation
      indicates no change.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: The release runs
  rollout:
    site_dir: /opt/aisha-webhook
    release: r-0123456789ab
    run: "{{ lock.run }}"
    host: "{{ inventory_hostname }}"

- name: Every host has what the release needs, before one is touched
  rollout:
    site_dir: /opt/aisha-webhook
    release: r-0123456789ab
    kind: prepare
"""

RETURN = r"""
result:
  description: V(done), V(unchanged), V(prepared) or V(planned); on failure V(failed) or V(rolled_back).
  returned: always
  type: str
services:
  description: What differed, in order, each with C(name), C(kind), C(action) and C(reason).
  returned: success
  type: list
  elements: dict
pending:
  description: Names of the same services.
  returned: success
  type: list
  elements: str
orphans:
  description: Containers of the project that belong to no service of the release; they are removed last.
  returned: success
  type: list
  elements: str
plan:
  description: The same in words, one line a step.
  returned: success
  type: list
  elements: str
pulled:
  description: Images that were (would be) pulled.
  returned: with O(kind=prepare) and in check mode
  type: list
  elements: str
from:
  description: The release that was current; null when there was none.
  returned: success
  type: str
to:
  description: The release.
  returned: success
  type: str
kept_secrets:
  description: Names of replaced secrets whose value of before is still kept - the containers don't use the new one yet, or
    O(settle) is V(false).
  returned: when not in check mode, with O(kind=deploy) and O(kind=rollback)
  type: list
  elements: str
known:
  description: Whether the plan could be made. Only V(false) in check mode, where nothing stands yet.
  returned: in check mode
  type: bool
record:
  description: The deployment's record.
  returned: when there is one
  type: dict
after_failure:
  description: Whether the run before on this host did not succeed. The record of this one is then news to the database too.
  returned: where nothing had to be done
  type: bool
rolled_back:
  description: Whether the current release was put back.
  returned: on failure
  type: bool
failed_at:
  description: The service at which it failed.
  returned: on failure
  type: str
container:
  description: State, exit code, health log and last lines of the container that failed, before it was removed.
  returned: on failure
  type: dict
reason:
  description: V(bad_setting), V(no_release), V(damaged), V(bad_release), V(locked), V(image_missing), V(edge_refused),
    V(rehearsal_failed), V(migration_failed), V(start_failed), V(unhealthy), V(wrong_release), V(gate_failed),
    V(no_other_instance), V(probe_failed), V(interrupted), V(differs), V(engine), V(io) or V(defect).
  returned: on failure
  type: str
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.module_utils.docker_cli import Docker, DockerError
from ansible.module_utils.docker_engine import DOCKER_IMPORT_ERROR, Engine, EngineError
from ansible.module_utils.probe import (
    REQUESTS_IMPORT_ERROR,
    ProbeError,
    Prober,
    failure_message,
    new_request_id,
    quiet_session,
)
from ansible.module_utils.probe_request import PROBE_ARGUMENTS, addresses, send_and_follow
from ansible.module_utils.release import ReleaseError
from ansible.module_utils.rollout.model import Release, RolloutError, Settings, parse_release
from ansible.module_utils.rollout.run import Rollout
from ansible.module_utils.rollout.signals import detach

ARGUMENTS: dict[str, dict[str, Any]] = {
    "site_dir": {"type": "path", "required": True},
    "release": {"type": "str", "required": True},
    "kind": {"type": "str", "choices": ["deploy", "rollback", "prepare"], "default": "deploy"},
    "run": {"type": "str", "default": ""},
    "host": {"type": "str", "default": ""},
    "owner": {"type": "str", "default": ""},
    "controller": {"type": "str", "default": ""},
    "reason": {"type": "str", "default": ""},
    "version": {"type": "str", "default": ""},
    "expect_current": {"type": "str", "default": ""},
    "gate": {
        "type": "dict",
        "default": {},
        "apply_defaults": True,
        "options": {
            "count": {"type": "int", "default": 3},
            "interval": {"type": "float", "default": 0.15},
            "timeout": {"type": "float", "default": 30.0},
        },
    },
    "drain": {
        "type": "dict",
        "default": {},
        "apply_defaults": True,
        "options": {
            "seconds": {"type": "float", "default": 10.0},
            "settle": {"type": "float", "default": 0.2},
        },
    },
    "keepalive": {"type": "float", "default": 0.0},
    "health_timeout": {"type": "float", "default": 90.0},
    "migrate_timeout": {"type": "float", "default": 1800.0},
    "log_lines": {"type": "int", "default": 30},
    "docker_config": {"type": "str", "default": ""},
    "wait": {"type": "float", "default": 120.0},
    "settle": {"type": "bool", "default": True},
    "expect_unchanged": {"type": "bool", "default": False},
    "probe": {"type": "dict", "default": {}},
    "contents": {"type": "dict", "default": {}},
    "metadata": {"type": "dict", "default": {}},
}
#: Faults that only mean, in check mode, that nothing stands yet.
NOTHING_YET = {"no_client", "unreachable", "no_release"}
FAULTS = (RolloutError, EngineError, DockerError, ReleaseError)


def settings(params: dict) -> Settings:
    """The parameters as the rollout takes them."""
    same = ("kind", "run", "host", "owner", "controller", "reason", "version", "keepalive", "health_timeout")
    same += ("migrate_timeout", "log_lines", "docker_config", "wait", "settle", "expect_current")
    gate, drain = params["gate"], params["drain"]
    return Settings(
        site_dir=Path(params["site_dir"]),
        gate_count=gate["count"],
        gate_interval=max(gate["interval"], 0.05),
        gate_timeout=gate["timeout"],
        drain_seconds=drain["seconds"],
        drain_settle=drain["settle"],
        **{name: params[name] for name in same},
    )


def prober(params: dict, engine: Engine) -> Callable[[Release], None] | None:
    """What proves a release from outside to its last backend; None when no probe was asked for."""
    if not params["probe"]:
        return None
    checked = ArgumentSpecValidator(PROBE_ARGUMENTS).validate(params["probe"])
    if checked.error_messages:
        raise RolloutError("probe_failed", f"probe: {'; '.join(checked.error_messages)}", "Correct it")
    options = checked.validated_parameters

    def prove(release: Release) -> None:
        wanted = options | {"release": release.webhook_release}
        asking = Prober(quiet_session(), engine, request_timeout=wanted["request_timeout"])
        try:
            checks = asking.health(addresses(wanted), wanted["health_wait"])
            if wanted["delivery_url"] and all(check.ok for check in checks):
                checks += send_and_follow(wanted, asking, new_request_id(), time.time())
        except ProbeError as error:
            raise RolloutError("probe_failed", f"the probe cannot be made: {error}") from error
        if not all(check.ok for check in checks):
            logs = {name: engine.last_lines(name, wanted["log_lines"]) for name in wanted["log_containers"]}
            raise RolloutError("probe_failed", f"the probe failed. {failure_message(checks, logs)}")

    return prove


def foresee(module: AnsibleModule) -> dict:
    """Check mode."""
    params = module.params
    try:
        if DOCKER_IMPORT_ERROR:
            raise EngineError("unreachable", "Python's docker library is not installed yet")
        rollout = Rollout(settings(params), Engine(), Docker(), warn=module.warn)
        path = Path(params["site_dir"]) / "releases" / params["release"]
        if path.is_dir() or not params["metadata"]:
            target = rollout.load(params["release"])
        else:
            target = parse_release(params["release"], path, params["metadata"])
        return rollout.foresee(target, params["contents"]) | {"known": True}
    except FAULTS as error:
        if error.reason not in NOTHING_YET:
            raise
        module.warn(f"What would be replaced cannot be known yet: {error}")
        nothing = {name: [] for name in ("services", "pending", "orphans", "plan", "pulled")}
        told = {"changed": params["kind"] != "prepare", "result": "planned", "known": False}
        return nothing | told | {"from": None, "to": params["release"]}


def bring(module: AnsibleModule) -> dict:
    """Not check mode."""
    params = module.params
    engine = Engine()
    rollout = Rollout(settings(params), engine, Docker(), probe=prober(params, engine), warn=module.warn)
    target = rollout.load(params["release"])
    if params["kind"] == "prepare":
        return rollout.prepare(target)
    if params["expect_unchanged"]:
        return rollout.confirm(target)
    detach()
    return rollout.run(target)


def main() -> None:
    """Wire parameters and rollout."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True)
    for library, missing in (("requests", REQUESTS_IMPORT_ERROR), ("docker", DOCKER_IMPORT_ERROR)):
        if missing and not module.check_mode:
            module.fail_json(msg=missing_required_lib(library, reason=f"(package python3-{library})"))
    try:
        result = foresee(module) if module.check_mode else bring(module)
    except RolloutError as error:
        known = {"result": "failed", "rolled_back": False, "failed_at": error.service or None}
        module.fail_json(msg=str(error), reason=error.reason, **known | error.evidence)
    except FAULTS as error:
        module.fail_json(msg=str(error), reason=error.reason, result="failed", rolled_back=False)
    before = f"current: {result['from']}\n"
    after = "".join(f"{line}\n" for line in result["plan"]) if result["changed"] else before
    module.exit_json(diff={"before": before, "after": after}, **result)


if __name__ == "__main__":
    main()
