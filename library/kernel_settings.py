#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Set kernel settings now and for the next boot, in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kernel_settings
short_description: Set kernel settings now and for the next boot
description:
  - Compares settings with what the running kernel has (C(/proc/sys)), sets those that differ, and keeps them over a
    reboot by a file of C(sysctl.d).
  - Needs no C(sysctl) command, which a minimal system does not have, and handles any number of settings in one call.
  - A setting that the system already has right is left alone and not written to O(file), unless an earlier run put it there.
options:
  file:
    description: The file of C(sysctl.d) that keeps the settings. It belongs to this module alone.
    type: path
    required: true
  state:
    description:
      - V(present) sets what differs. V(absent) gives back the values that the settings of O(file) had before this module
        changed them, where nobody has changed them since, and removes the file.
    type: str
    choices: [present, absent]
    default: present
  settings:
    description: The wanted settings. All are whole numbers.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Its name, with dots.
        type: str
        required: true
      value:
        description: Its value.
        type: int
        required: true
      at_most:
        description: Whether a lower value is right as well.
        type: bool
        default: false
      optional:
        description: Whether a kernel that has no such setting is accepted.
        type: bool
        default: false
  read:
    description: Names of further settings to return, without changing them.
    type: list
    elements: str
    default: []
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
  diff_mode:
    support: full
    description: Will return details on what has changed (or possibly needs changing in check mode).
  idempotent:
    support: full
    description: When run twice in a row outside check mode, with the same arguments, the second invocation indicates
      no change.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: A process without privileges may listen on port 80
  kernel_settings:
    file: /etc/sysctl.d/60-edge.conf
    settings:
      - name: net.ipv4.ip_unprivileged_port_start
        value: 80
        at_most: true
      - name: net.ipv4.tcp_migrate_req
        value: 1
        optional: true
    read: [net.ipv6.conf.all.disable_ipv6]
  register: kernel
"""

RETURN = r"""
values:
  description: The settings as they are now (in check mode, as they would be), also those of O(read); null where the kernel
    has none.
  returned: success
  type: dict
  sample: {"net.ipv4.ip_unprivileged_port_start": 80, "net.ipv6.conf.all.disable_ipv6": 0}
reason:
  description: Why the module failed, for programs.
  returned: on failure
  type: str
  sample: unwritable
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kernel_settings import (
    KernelSettingsError,
    Setting,
    differences,
    file_text,
    kept_settings,
    other_files,
    read_setting,
    undone,
    write_file,
    write_setting,
)

ARGUMENTS = {
    "file": {"type": "path", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "settings": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "name": {"type": "str", "required": True},
            "value": {"type": "int", "required": True},
            "at_most": {"type": "bool", "default": False},
            "optional": {"type": "bool", "default": False},
        },
    },
    "read": {"type": "list", "elements": "str", "default": []},
}


def ensure(wanted, read, file, check, root=Path("/proc/sys")):
    """Bring the kernel and the file to what is wanted (not in check mode); the module's result."""
    values = {name: read_setting(root, name) for name in [*(setting.name for setting in wanted), *read]}
    changes = differences(wanted, values)
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    after = file_text(before, wanted, changes, values, other_files(file))
    return apply(changes, values, file, before, after, check, root)


def forget(file, check, root=Path("/proc/sys")):
    """Give the kernel back what it had, and remove the file (not in check mode); the module's result."""
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    values = {name: read_setting(root, name) for name in kept_settings(before)}
    return apply(undone(before, values), values, file, before, "", check, root)


def apply(changes, values, file, before, after, check, root):
    """Write what differs (not in check mode); the module's result."""
    if not check:
        for change in changes:
            write_setting(root, change.name, change.after)
        if after != before:
            write_file(file, after)
    after_values = {**values, **{change.name: change.after for change in changes}}
    return {
        "changed": bool(changes) or before != after,
        "values": after_values,
        "diff": [
            {
                "before_header": "running kernel",
                "after_header": "running kernel",
                "before": "".join(f"{change.name} = {change.before}\n" for change in changes),
                "after": "".join(f"{change.name} = {change.after}\n" for change in changes),
            },
            {"before_header": str(file), "after_header": str(file), "before": before, "after": after},
        ],
    }


def main():
    """Read the arguments, do the work, and answer."""
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    file = Path(module.params["file"])
    wanted = [Setting(**entry) for entry in module.params["settings"]]
    try:
        if module.params["state"] == "absent":
            result = forget(file, module.check_mode)
        else:
            result = ensure(wanted, module.params["read"], file, module.check_mode)
    except KernelSettingsError as error:
        module.fail_json(msg=str(error), reason=error.reason)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
