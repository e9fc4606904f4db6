#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Take, renew, give back, read and break the deployment lock of a site."""

from __future__ import annotations

DOCUMENTATION = r"""
module: deploy_lock
short_description: The deployment lock of a site
description:
  - One deployment at a time changes a site on a host. The lock is C(PATH/run/deployment.lock); it says who
    has it, since when, from which version and what for.
  - It is taken atomically, also by twenty runs at once, and waited for with a limit.
  - A run on this very machine (local connection) loses it when its ansible-playbook process ends, however it
    ends. Over SSH, where no such process is to be seen, it ends with its lease.
options:
  path:
    description: The site's directory.
    type: path
    required: true
  state:
    description:
      - V(held) takes the lock, or renews it when O(run) has it already.
      - V(renewed) gives the lease of O(run) its whole length again, and fails when the lock is somebody else's.
      - V(released) gives back the lock of O(run). A lock of another run is left alone.
      - V(read) only says who has it.
      - V(broken) takes it away from whoever has it; with O(run), only from that run.
    type: str
    choices: [held, renewed, released, read, broken]
    default: held
  run:
    description: Id of the run, C(d-20261123T040000-1a2b3c). With O(state=held) a new one by default.
    type: str
    default: ''
  owner:
    description: Who deploys, and from where; C(user@controller).
    type: str
    default: unknown
  purpose:
    description: What for; C(deploy), C(rollback).
    type: str
    default: deploy
  version:
    description: What is deployed; a commit, for example.
    type: str
    default: ''
  lease:
    description: Seconds after which the lock is free, where the run cannot be seen and does not renew it.
    type: int
    default: 600
  wait:
    description: Seconds to wait for a lock that somebody has.
    type: int
    default: 0
  controller:
    description:
      - The run's process on its controller, where that is another machine, as C(module_utils/run_process.py) prints
        it. RV(holder) gives it back, so that another run from there can see whether it is over.
    type: dict
    default: {}
  must:
    description: Whether O(state=held) fails when somebody else has the lock. Otherwise RV(held) says so.
    type: bool
    default: true
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details: Takes no lock, and does not fail because somebody has it.
  diff_mode:
    support: none
    description: Will return details on what has changed (or possibly needs changing in check mode).
  idempotent:
    support: full
    description: When run twice in a row outside check mode, with the same arguments, the second invocation
      indicates no change.
    details: With the same O(run). Renewing a lease is no change.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: This run has the lock
  deploy_lock:
    path: /opt/aisha-webhook
    owner: aida@laptop
    version: 4f2c1aa
    wait: 300
  register: lock

- name: The lock is given back
  deploy_lock:
    path: /opt/aisha-webhook
    state: released
    run: "{{ lock.run }}"
"""

RETURN = r"""
held:
  description: Whether O(run) has the lock now. In check mode, whether it would get it at once.
  returned: always
  type: bool
run:
  description: Id of the run.
  returned: with O(state=held), O(state=renewed) and O(state=released)
  type: str
holder:
  description: Who has the lock after this. V(null) when nobody does.
  returned: always
  type: dict
  contains:
    run: {description: Id of its run., type: str}
    owner: {description: Who started it., type: str}
    purpose: {description: What for., type: str}
    version: {description: What it deploys., type: str}
    since: {description: When it was taken; ISO 8601 in UTC., type: str}
    until: {description: End of its lease., type: str}
    pid: {description: The ansible-playbook process that has it; V(null) when it is not on this machine., type: int}
    controller: {description: Its process on its controller; V(null) when that was not said., type: dict}
    dead: {description: Whether that run has ended without giving it back. Then the lock is free., type: bool}
    readable: {description: Whether the lock file can be read., type: bool}
described:
  description: The same in one phrase; empty when nobody has it.
  returned: always
  type: str
before:
  description: The dead run whose lock was taken, or the one whose lock was broken.
  returned: with O(state=held) and O(state=broken)
  type: dict
reason:
  description: Why the module failed, for programs. V(locked), V(lost), V(invalid) or V(io).
  returned: on failure
  type: str
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.deploy_lock import DeployLock, Holder, LockError, new_run_id
from ansible.module_utils.run_process import RunProcess

ARGUMENTS = {
    "path": {"type": "path", "required": True},
    "state": {
        "type": "str",
        "choices": ["held", "renewed", "released", "read", "broken"],
        "default": "held",
    },
    "run": {"type": "str", "default": ""},
    "owner": {"type": "str", "default": "unknown"},
    "purpose": {"type": "str", "default": "deploy"},
    "version": {"type": "str", "default": ""},
    "lease": {"type": "int", "default": 600},
    "wait": {"type": "int", "default": 0},
    "controller": {"type": "dict", "default": {}},
    "must": {"type": "bool", "default": True},
}


def held(module: AnsibleModule, lock: DeployLock) -> dict[str, Any]:
    """Take the lock."""
    params = module.params
    run = params["run"] or new_run_id()
    if module.check_mode:
        holder = lock.read()
        free = holder is None or holder.run == run or lock.is_dead(holder)
        return {"changed": holder is None or holder.run != run, "run": run, "held": free, "before": None}
    names = ("owner", "purpose", "version", "lease", "wait")
    try:
        controller = RunProcess.from_record(params["controller"])
        taken = lock.acquire(run, controller=controller, **{name: params[name] for name in names})
    except LockError as error:
        if params["must"] or error.reason != "locked":
            raise
        return {"changed": False, "run": run, "held": False, "before": None}
    return {"changed": taken.changed, "run": run, "held": True, "before": lock.facts(taken.dead)}


def renewed(module: AnsibleModule, lock: DeployLock) -> dict[str, Any]:
    """Renew the lease."""
    run = module.params["run"]
    if module.check_mode:
        lock.check(run)
    else:
        lock.renew(run, module.params["lease"])
    return {"changed": False, "run": run, "held": True}


def released(module: AnsibleModule, lock: DeployLock) -> dict[str, Any]:
    """Give the lock back."""
    run, holder = module.params["run"], lock.read()
    ours = holder is not None and holder.run == run
    changed = ours if module.check_mode else lock.release(run)
    return {"changed": changed, "run": run, "held": False}


def broken(module: AnsibleModule, lock: DeployLock) -> dict[str, Any]:
    """Take the lock away."""
    before = lock.read() if module.check_mode else lock.break_(module.params["run"])
    return {"changed": before is not None, "held": False, "before": lock.facts(before)}


def read(module: AnsibleModule, lock: DeployLock) -> dict[str, Any]:
    """Say who has it."""
    holder = lock.read()
    return {"changed": False, "held": bool(holder and holder.run == module.params["run"])}


def after(lock: DeployLock, holder: Holder | None) -> dict[str, Any]:
    """Who has the lock when all is done."""
    return {"holder": lock.facts(holder), "described": holder.described() if holder else ""}


def main() -> None:
    """Wire parameters and lock."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True)
    lock = DeployLock(module.params["path"])
    states = {"held": held, "renewed": renewed, "released": released, "read": read, "broken": broken}
    try:
        result = states[module.params["state"]](module, lock)
        result |= after(lock, lock.read())
    except LockError as error:
        holder = lock.facts(error.holder)
        module.fail_json(msg=str(error), reason=error.reason, holder=holder, held=False)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
