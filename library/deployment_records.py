#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Bring a host's deployment records into the database."""

from __future__ import annotations

DOCUMENTATION = r"""
module: deployment_records
short_description: Bring a host's deployment records into the database
description:
  - Hands the records of C(PATH/deployments.jsonl) to C(webhook-api deployments import) in a container of the
    service. What the database has already stays as it is.
  - The file is what counts. A database or container that is away is a warning; the next call brings all.
options:
  path:
    description: The site's directory.
    type: path
    required: true
  container:
    description: A container of the service. Empty where nothing is to be imported.
    type: str
    default: ''
  stopped:
    description:
      - A run that ended before anything was rolled out on this host, which is put on record first, unless the run has a
        record here already. Names C(id), C(host), C(kind), C(started), C(who), C(controller), C(version), C(reason) and
        C(failed_at).
    type: dict
  unchanged:
    description:
      - The record of a run that had nothing to do on this host (M(rollout), C(expect_unchanged)),
        which is put on record, unless the run has a record here already.
    type: dict
  timeout:
    description: Seconds that the import may take.
    type: float
    default: 15
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details: Says nothing of what the database lacks.
  diff_mode:
    support: none
    description: Will return details on what has changed (or possibly needs changing in check mode).
  idempotent:
    support: full
    description: When run twice in a row outside check mode, with the same arguments, the second invocation
      indicates no change.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: The deployment records are in the database
  deployment_records:
    path: /opt/aisha-webhook
    container: aisha-webhook-api-1
"""

RETURN = r"""
recorded:
  description: Whether the run of O(stopped) or O(unchanged) was put on record.
  returned: always
  type: bool
imported:
  description: How many records the database had not.
  returned: always
  type: int
problem:
  description: Why they could not be imported; empty when they were.
  returned: always
  type: str
"""

from datetime import UTC, datetime

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.deploy_record import (
    DeployRecords,
    RecordError,
    bring_into_database,
    stopped_record,
)
from ansible.module_utils.docker_cli import DockerError
from ansible.module_utils.release import ReleaseStore

ARGUMENTS = {
    "path": {"type": "path", "required": True},
    "container": {"type": "str", "default": ""},
    "stopped": {"type": "dict"},
    "unchanged": {"type": "dict"},
    "timeout": {"type": "float", "default": 15.0},
}


def main() -> None:
    """Wire records and container."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True)
    params, imported, recorded, problem = module.params, 0, False, ""
    records = DeployRecords(params["path"])
    try:
        if params["stopped"] and not module.check_mode:
            current = ReleaseStore(params["path"]).linked("current")
            recorded = records.append_once(stopped_record(params["stopped"], current, datetime.now(UTC)))
        if params["unchanged"] and not module.check_mode:
            recorded = records.append_once(params["unchanged"])
    except (RecordError, KeyError) as error:
        module.warn(f"This run could not be recorded: {error}")
    try:
        if params["container"] and not module.check_mode:
            imported = bring_into_database(records, params["container"], params["timeout"])
    except (RecordError, DockerError) as error:
        problem = str(error)
        module.warn(
            f"The deployment records are not in the database yet; the next run brings them. {problem}"
        )
    module.exit_json(changed=recorded or imported > 0, recorded=recorded, imported=imported, problem=problem)


if __name__ == "__main__":
    main()
