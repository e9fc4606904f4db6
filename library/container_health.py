#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Wait until containers are healthy, or say precisely why they are not."""

from __future__ import annotations

DOCUMENTATION = r"""
module: container_health
short_description: Wait until containers are healthy, or say precisely why they are not
description:
  - Waits until every named container is ready. One with a health check is ready when the check passes, one
    without when it
    has been running for O(settle) seconds.
  - Hears of changes through the engine's events, subscribed before the first look, so that nothing is
    missed and no time is
    lost; when the stream of events breaks, it asks at intervals.
  - Gives up at once on a container that cannot become ready any more. That is one which is missing, has
    ended and is not
    restarted, could not be started, is paused, runs another image or carries other labels than expected, or
    crashes again
    and again. One that only starts slowly is waited for until its timeout.
options:
  containers:
    description: The containers to wait for.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name or id of the container.
        type: str
        required: true
      timeout:
        description: Seconds to wait for this one. Default is O(timeout).
        type: float
      require_healthcheck:
        description: Whether a container without a health check is a failure. Default is
          O(require_healthcheck).
        type: bool
      expect_image:
        description: Reference, digest reference or image id that the container must have been made from.
        type: str
      expect_labels:
        description: Labels that the container must carry.
        type: dict
        default: {}
  timeout:
    description: Seconds to wait for each container, counted from the start of the module.
    type: float
    default: 60
  require_healthcheck:
    description: Whether a container without a health check is a failure.
    type: bool
    default: false
  max_restarts:
    description:
      - At how many restarts a container is in a crash loop. Counted are those seen by this run; and for one
        that is being
        restarted after a life of less than 10 seconds, all there were.
    type: int
    default: 2
  unhealthy_grace:
    description: Seconds for which a container that its check calls unhealthy may still recover.
    type: float
    default: 10
  settle:
    description: Seconds that a container without a health check must have been running.
    type: float
    default: 1
  log_lines:
    description: How many of the last log lines of a container that is not ready are returned.
    type: int
    default: 30
  docker_host:
    description: Address of the engine. Default is the environment's C(DOCKER_HOST), then the usual socket.
    type: str
requirements:
  - docker (Debian and Ubuntu - python3-docker)
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details: Only reads. In check mode it looks once, does not wait, and does not fail; see RV(ready).
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
- name: The stack is healthy
  container_health:
    timeout: 60
    require_healthcheck: true
    containers:
      - name: aisha-webhook-api-1
        expect_image: "{{ images_digests['webhook-api'].ref }}"
      - name: aisha-webhook-worker
        timeout: 90
      - name: aisha-nginx-webhook
        expect_labels:
          com.docker.compose.project: aisha-webhook
"""

RETURN = r"""
ready:
  description: Whether all containers are ready.
  returned: when the engine answered
  type: bool
containers:
  description: Every container, in the order of O(containers).
  returned: when the engine answered
  type: list
  elements: dict
  contains:
    name:
      description: As in O(containers).
      type: str
    ok:
      description: Whether it is ready.
      type: bool
    reason:
      description:
        - V(healthy) or V(running) when ready; else V(missing), V(exited), V(crash_loop), V(start_failed),
          V(unhealthy),
          V(paused), V(no_healthcheck), V(wrong_image), V(wrong_label) or V(timeout). In check mode also
          what it is doing.
      type: str
    detail:
      description: The reason in words, with the meaning of the exit code.
      type: str
    status:
      description: The engine's word for its state, or V(missing).
      type: str
    health:
      description: V(healthy), V(unhealthy), V(starting), or V(none) without a health check.
      type: str
    exit_code:
      description: Code of its last exit.
      type: int
    oom_killed:
      description: Whether it was killed for want of memory.
      type: bool
    error:
      description: What the engine said when it could not start it.
      type: str
    restart_count:
      description: How often the engine has restarted it.
      type: int
    started_at:
      description: When it was last started (UTC).
      type: str
    image:
      description: The reference that it was made from.
      type: str
    image_id:
      description: Id of its image.
      type: str
    id:
      description: Its id.
      type: str
    health_log:
      description: The last runs of its health check, each with C(end), C(exit_code) and C(output).
      type: list
      elements: dict
    log:
      description: Its last log lines.
      returned: when it is not ready
      type: list
      elements: str
waited:
  description: Seconds that this took.
  returned: when the engine answered
  type: float
events:
  description: Whether changes were heard of through the engine's events, rather than by asking at intervals.
  returned: when the engine answered
  type: bool
reason:
  description: V(not_ready), or why the engine could not be asked - V(unreachable), V(forbidden) or
    V(engine_error).
  returned: on failure
  type: str
"""

import time

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.container_health import HealthGate, Wanted, failure_message
from ansible.module_utils.docker_engine import DOCKER_IMPORT_ERROR, Engine, EngineError

ARGUMENTS = {
    "containers": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "name": {"type": "str", "required": True},
            "timeout": {"type": "float"},
            "require_healthcheck": {"type": "bool"},
            "expect_image": {"type": "str"},
            "expect_labels": {"type": "dict", "default": {}},
        },
    },
    "timeout": {"type": "float", "default": 60.0},
    "require_healthcheck": {"type": "bool", "default": False},
    "max_restarts": {"type": "int", "default": 2},
    "unhealthy_grace": {"type": "float", "default": 10.0},
    "settle": {"type": "float", "default": 1.0},
    "log_lines": {"type": "int", "default": 30},
    "docker_host": {"type": "str"},
}


def wanted_from(params: dict) -> list[Wanted]:
    """The containers to wait for; what one leaves out, the module's own parameters say."""
    return [
        Wanted(
            name=entry["name"],
            timeout=params["timeout"] if entry["timeout"] is None else entry["timeout"],
            require_healthcheck=(
                params["require_healthcheck"]
                if entry["require_healthcheck"] is None
                else entry["require_healthcheck"]
            ),
            expect_image=entry["expect_image"] or None,
            expect_labels={name: str(value) for name, value in entry["expect_labels"].items()},
            max_restarts=max(params["max_restarts"], 1),
            unhealthy_grace=params["unhealthy_grace"],
            settle=params["settle"],
        )
        for entry in params["containers"]
    ]


def main() -> None:
    """Wire parameters, engine and gate."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True)
    if DOCKER_IMPORT_ERROR:
        module.fail_json(msg=missing_required_lib("docker", reason="(package python3-docker)"))
    start = time.monotonic()
    try:
        engine = Engine(module.params["docker_host"] or None)
        gate = HealthGate(engine, wanted_from(module.params))
        results = gate.look() if module.check_mode else gate.wait()
        for result in results:
            if not result["ok"]:
                result["log"] = engine.last_lines(result["name"], module.params["log_lines"])
    except EngineError as error:
        module.fail_json(msg=str(error), reason=error.reason)
    answer = {
        "ready": all(result["ok"] for result in results),
        "containers": results,
        "waited": round(time.monotonic() - start, 3),
        "events": gate.events_used,
    }
    if not answer["ready"] and not module.check_mode:
        module.fail_json(msg=failure_message(results), reason="not_ready", **answer)
    module.exit_json(changed=False, **answer)


if __name__ == "__main__":
    main()
