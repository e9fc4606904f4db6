#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Prove the webhook service from outside to its last backend."""

from __future__ import annotations

DOCUMENTATION = r"""
module: webhook_probe
short_description: Prove the webhook service from outside to its last backend
description:
  - Asks every health address. Then it sends one delivery, signed as fal.ai signs or with the shared secret,
    follows it with
    C(webhook-api trace) to its row, its effects, its stream entry and its archived object, and removes it
    again. One command does both (C(--wait --remove)); where it cannot, they are done one after the other.
  - The request id of the delivery starts with C(probe-). The service keeps such deliveries away from
    avatars and from the
    stream that the bot reads.
  - When an address is not healthy, nothing is sent.
options:
  urls:
    description: Health addresses.
    type: list
    elements: dict
    default: []
    suboptions:
      url:
        description: Address that answers a GET with status 200 and a JSON object with C(status).
        type: str
        required: true
      validate_certs:
        description: Whether its certificate must be valid. Default is O(validate_certs).
        type: bool
      version:
        description: The C(version) that the answer must name.
        type: str
      release:
        description: The C(release) that the answer must name. Default is O(release).
        type: str
  accept:
    description: Values of C(status) that count as healthy.
    type: list
    elements: str
    default: [healthy]
  release:
    description: The C(release) that every answer must name.
    type: str
  delivery_url:
    description: Address for the delivery. Without it only O(urls) are asked.
    type: str
  validate_certs:
    description: Whether certificates must be valid.
    type: bool
    default: true
  ca:
    description: PEM file with the authorities to trust in place of the system's. An empty string means none.
    type: path
  key_file:
    description:
      - File with the Ed25519 seed (64 hexadecimal digits) to sign with, as fal does. Wins over
        O(secret_file).
      - An empty string means none.
    type: path
  account_id:
    description: The fal user id in a signed delivery. The service must allow it.
    type: str
    default: probe
  secret_file:
    description: File with the secret to send as C(X-Webhook-Secret). An empty string means none.
    type: path
  container:
    description: Container in which C(webhook-api trace) is run. Required with O(delivery_url).
    type: str
  trace_command:
    description: The command to trace with, as a list of arguments.
    type: list
    elements: str
    default: [webhook-api, trace]
  timeout:
    description: Seconds from the delivery until all its effects must be there.
    type: float
    default: 30
  health_wait:
    description: Seconds in all for which addresses that are not healthy yet are asked again.
    type: float
    default: 10
  request_timeout:
    description: Seconds to wait for the answer to one request. fal waits 15.
    type: float
    default: 15
  remove:
    description: Whether to remove the probe's traces, also when a check failed.
    type: bool
    default: true
  log_containers:
    description: Containers whose last log lines are shown when a check fails.
    type: list
    elements: str
    default: []
  log_lines:
    description: How many lines of each.
    type: int
    default: 20
  docker_host:
    description: Address of the engine. Default is the environment's C(DOCKER_HOST), then the usual socket.
    type: str
requirements:
  - requests (Debian and Ubuntu - python3-requests)
  - docker (Debian and Ubuntu - python3-docker)
  - PyNaCl or cryptography, with O(key_file)
attributes:
  check_mode:
    support: partial
    description: Can run in check mode and return changed status prediction without modifying the target.
    details: In check mode it only asks the health addresses, once, and does not fail; see RV(ok). Nothing
      is sent.
  diff_mode:
    support: N/A
    description: Will return details on what has changed (or possibly needs changing in check mode).
    details: Leaves nothing behind that could be shown.
  idempotent:
    support: full
    description: When run twice in a row outside check mode, with the same arguments, the second invocation
      indicates no change.
    details: What it sends it removes again, and never says changed.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: A signed delivery reaches every backend
  webhook_probe:
    urls:
      - url: http://127.0.0.1/health
      - url: https://127.0.0.1:8443/health
        validate_certs: false
      - url: http://127.0.0.1:8001/health
    release: "{{ stack_release.id }}"
    delivery_url: https://127.0.0.1:8443/api/v1/avatar/status_update
    validate_certs: false
    key_file: /opt/aisha-webhook/secrets/probe/fal_dev_key
    account_id: dev-account
    container: aisha-webhook-api-1
    log_containers: [aisha-webhook-worker, aisha-webhook-api-1]
"""

RETURN = r"""
ok:
  description: Whether every check passed.
  returned: always, unless the probe could not be made at all
  type: bool
checks:
  description:
    - Every check in the order made, each with C(check) (V(health), V(delivery), V(row), V(effects),
      V(stream), V(object) or
      V(removed)), C(name), C(ok), C(latency_ms) and C(detail). The latency of row to removed counts from the
      answer to the
      delivery until the command that saw them had ended; one command for all of them is the rule.
  returned: always, unless the probe could not be made at all
  type: list
  elements: dict
request_id:
  description: Id of the delivery.
  returned: when one was sent
  type: str
logs:
  description: Last log lines of O(log_containers).
  returned: when a check failed
  type: dict
reason:
  description: V(check_failed), or why the probe could not be made.
  returned: on failure
  type: str
"""

import time

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
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

ARGUMENTS = {**PROBE_ARGUMENTS, "docker_host": {"type": "str"}}


def main() -> None:
    """Wire parameters and prober."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True, required_by={"delivery_url": "container"})
    for library, missing in (("requests", REQUESTS_IMPORT_ERROR), ("docker", DOCKER_IMPORT_ERROR)):
        if missing:
            module.fail_json(msg=missing_required_lib(library, reason=f"(package python3-{library})"))
    params, answer = module.params, {}
    sending = params["delivery_url"] and not module.check_mode
    try:
        engine = None if module.check_mode else Engine(params["docker_host"] or None)
        prober = Prober(quiet_session(), engine, request_timeout=params["request_timeout"])
        checks = prober.health(addresses(params), 0 if module.check_mode else params["health_wait"])
        if sending and all(check.ok for check in checks):
            answer["request_id"] = new_request_id()
            checks += send_and_follow(params, prober, answer["request_id"], time.time())
    except (ProbeError, EngineError) as error:
        module.fail_json(msg=str(error), reason=error.reason)
    answer |= {"ok": all(check.ok for check in checks), "checks": [check.as_result() for check in checks]}
    if engine and not answer["ok"]:
        logs = {name: engine.last_lines(name, params["log_lines"]) for name in params["log_containers"]}
        module.fail_json(msg=failure_message(checks, logs), reason="check_failed", logs=logs, **answer)
    module.exit_json(changed=False, **answer)


if __name__ == "__main__":
    main()
