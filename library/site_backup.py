#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Write, prove and read back the parts of a site's backup."""

from __future__ import annotations

DOCUMENTATION = r"""
module: site_backup
short_description: Write, prove and read back the parts of a site's backup
description:
  - A backup is a directory that root alone may enter, with one file a part, a manifest and checksums. It is made
    under another name and gets its own when it is whole.
  - Parts are streamed. Nothing is held in memory, and nothing is on the disk twice.
options:
  root:
    description: Directory of the backups on the host.
    type: path
    required: true
  site:
    description: Name of the site.
    type: str
    required: true
  state:
    description:
      - V(begun) makes the directory of a new backup, when there is room for O(need) bytes.
      - V(part) writes one part from O(command), O(paths), O(images) or O(content).
      - V(finished) writes manifest and checksums, and keeps the newest O(keep) backups.
      - V(abandoned) removes what a failed run has written.
      - V(read) finds a backup and returns its manifest; with O(verify) it reads all of it first.
      - V(collected) returns a tar of O(paths) to be encrypted. The task must have C(no_log).
      - V(sent) streams a part into O(command).
      - V(extracted) writes the files of a part, or of O(content), below O(base).
      - V(measured) says how many bytes O(images) take.
    type: str
    choices: [begun, part, finished, abandoned, read, collected, sent, extracted, measured]
    required: true
  backup:
    description: Name of the backup. With O(state=read) also a path, or V(latest).
    type: str
    default: latest
  need:
    description: Bytes that the backup may take at most.
    type: int
    default: 0
  name:
    description: Name of the part.
    type: str
  file:
    description: File of the part.
    type: str
  command:
    description: Command whose output is the part, or which reads the part.
    type: list
    elements: str
  base:
    description: Directory that O(paths) lie in.
    type: path
  paths:
    description: Files and directories below O(base); one that is not there is left out.
    type: list
    elements: str
  content:
    description: The part itself, as text; with O(state=extracted) a tar in base64.
    type: str
  images:
    description: Images by digest, copied from their registry.
    type: list
    elements: str
  required_images:
    description: Those of them without which the part fails. Others that the registry lacks are reported.
    type: list
    elements: str
    default: []
  registry:
    description: Registry that O(images) are in, as they name it.
    type: str
    default: ''
  username:
    description: Login at the registry.
    type: str
    default: ''
  password:
    description: Password of that login.
    type: str
    default: ''
  ca:
    description: Private CA of the registry, a path on the host.
    type: str
    default: ''
  plain_http:
    description: Whether the registry is spoken to in plain http.
    type: bool
    default: false
  expected:
    description: About how many bytes the part has; for the progress file.
    type: int
    default: 0
  progress:
    description: File that says how far the part is, once a second.
    type: path
  metadata:
    description: What the manifest says beside the parts.
    type: dict
    default: {}
  keep:
    description: Backups to keep.
    type: int
    default: 7
  verify:
    description: Whether every checksum is proven.
    type: bool
    default: false
  timeout:
    description: Seconds that O(command) may take.
    type: int
    default: 7200
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details: Reads in check mode too; writes and runs nothing.
  diff_mode:
    support: none
    description: Will return details on what has changed (or possibly needs changing in check mode).
  idempotent:
    support: none
    description:
      - When run twice in a row outside check mode, with the same arguments, the second invocation indicates no change.
    details: Every backup is a new one.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: The database is in the backup
  site_backup:
    root: /var/backups/aisha-webhook
    site: aisha-webhook
    state: part
    backup: aisha-webhook-20261123T040000Z
    name: database
    file: database.dump
    command: [docker, exec, aisha-webhook-postgres, pg_dump, --format=custom, aisha]
"""

RETURN = r"""
path:
  description: Directory of the backup.
  returned: with O(state=begun), O(state=finished) and O(state=read)
  type: str
part:
  description: What was written - C(name), C(file), C(bytes), C(sha256), C(seconds), C(detail).
  returned: with O(state=part)
  type: dict
manifest:
  description: What the backup holds.
  returned: with O(state=finished) and O(state=read)
  type: dict
removed:
  description: Old backups that were removed.
  returned: with O(state=finished)
  type: list
  elements: str
content:
  description: A tar in base64.
  returned: with O(state=collected)
  type: str
said:
  description: The end of what the command said.
  returned: with O(state=part) and O(state=sent)
  type: str
bytes:
  description: Size of the images.
  returned: with O(state=measured)
  type: int
reason:
  description: Why the module failed, for programs.
  returned: on failure
  type: str
  sample: damaged
"""

import base64
import binascii
import io
import tarfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.image_store import BlobRegistry, ImageStoreError, Pinned, Saver, image_bytes
from ansible.module_utils.registry_api import RegistryError
from ansible.module_utils.site_backup import (
    Backups,
    Meter,
    SiteBackupError,
    collect,
    read_manifest,
    run_from,
    run_into,
    tar_files,
    untar_files,
    verify,
)

TEXT = {"type": "str", "default": ""}
ARGUMENTS = {
    "root": {"type": "path", "required": True},
    "site": {"type": "str", "required": True},
    "state": {
        "type": "str",
        "required": True,
        "choices": [
            "begun",
            "part",
            "finished",
            "abandoned",
            "read",
            "collected",
            "sent",
            "extracted",
            "measured",
        ],
    },
    "backup": {"type": "str", "default": "latest"},
    "need": {"type": "int", "default": 0},
    "name": {"type": "str"},
    "file": {"type": "str"},
    "command": {"type": "list", "elements": "str"},
    "base": {"type": "path"},
    "paths": {"type": "list", "elements": "str"},
    "content": {"type": "str", "no_log": True},
    "images": {"type": "list", "elements": "str"},
    "required_images": {"type": "list", "elements": "str", "default": []},
    "registry": TEXT,
    "username": TEXT,
    "password": {"type": "str", "default": "", "no_log": True},
    "ca": TEXT,
    "plain_http": {"type": "bool", "default": False},
    "expected": {"type": "int", "default": 0},
    "progress": {"type": "path"},
    "metadata": {"type": "dict", "default": {}},
    "keep": {"type": "int", "default": 7, "no_log": False},
    "verify": {"type": "bool", "default": False},
    "timeout": {"type": "int", "default": 7200},
}


def registry_from(params: dict[str, Any]) -> BlobRegistry:
    """The registry that the images are in."""
    scheme = "http" if params["plain_http"] else "https"
    login = (params["username"], params["password"]) if params["username"] else None
    return BlobRegistry(
        f"{scheme}://{params['registry']}", login, params["ca"] or None, plain_http=params["plain_http"]
    )


def standing_images(params: dict[str, Any], registry: BlobRegistry) -> tuple[list[Pinned], list[str]]:
    """The images that the registry has, and those that are left out. A required one that is not there is a fault."""
    found, left_out = [], []
    for reference in sorted(set(params["images"] or [])):
        image = Pinned.parse(reference)
        there = image.registry == params["registry"] and registry.find_digest(image.repository, image.digest)
        if there:
            found.append(image)
        elif reference in params["required_images"]:
            raise SiteBackupError(
                "missing_image",
                f"The registry does not have {reference}, which a release runs",
                "Push it again (make up), or leave images out (-e backup_images=false) and keep its bundle",
            )
        else:
            left_out.append(reference)
    return found, left_out


def produce(params: dict[str, Any], meter: Meter) -> Any:
    """Write the part from what was given."""
    if params["command"]:
        return run_into(params["command"], meter, params["timeout"])
    if params["images"] is not None:
        registry = registry_from(params)
        images, left_out = standing_images(params, registry)
        with tarfile.open(mode="w|", fileobj=meter, format=tarfile.PAX_FORMAT) as tar:  # type: ignore[arg-type]
            saver = Saver(tar)
            saver.save(registry, images)
            saver.finish()
        return {"images": [str(image) for image in images], "left_out": left_out}
    if params["paths"] is not None:
        return {"files": tar_files(Path(params["base"]), params["paths"], meter)}
    meter.write((params["content"] or "").encode())
    return {}


def begun(backups: Backups, params: dict[str, Any]) -> dict[str, Any]:
    """Make the directory."""
    return {"changed": True, **backups.begin(params["backup"], params["need"])}


def part(backups: Backups, params: dict[str, Any]) -> dict[str, Any]:
    """Write one part."""
    progress = Path(params["progress"]) if params["progress"] else None
    written = backups.write(
        params["backup"],
        params["name"],
        params["file"],
        lambda meter: produce(params, meter),
        progress,
        params["expected"],
    )
    if progress:
        progress.unlink(missing_ok=True)
    return {"changed": True, "part": written.document(), "said": written.said}


def finished(backups: Backups, params: dict[str, Any]) -> dict[str, Any]:
    """Give the backup its name."""
    return {"changed": True, **backups.finish(params["backup"], params["metadata"], params["keep"])}


def abandoned(backups: Backups, params: dict[str, Any]) -> dict[str, Any]:
    """Remove what was written."""
    backups.abandon(params["backup"])
    return {"changed": True}


def read(backups: Backups, params: dict[str, Any]) -> dict[str, Any]:
    """Find a backup and prove it."""
    path = backups.find(params["backup"])
    return {"path": str(path), "manifest": verify(path) if params["verify"] else read_manifest(path)}


def collected(_backups: Backups, params: dict[str, Any]) -> dict[str, Any]:
    """A tar of what is to be encrypted."""
    return {"content": base64.b64encode(collect(Path(params["base"]), params["paths"])).decode()}


def sent(backups: Backups, params: dict[str, Any]) -> dict[str, Any]:
    """Stream a part into a command."""
    path = backups.find(params["backup"]) / params["file"]
    with path.open("rb") as stream:
        return {"changed": True, "said": run_from(params["command"], stream, params["timeout"])}


def extracted(backups: Backups, params: dict[str, Any]) -> dict[str, Any]:
    """Write files below a directory."""
    base = Path(params["base"])
    base.mkdir(mode=0o755, parents=True, exist_ok=True)
    if params["content"]:
        try:
            stream: Any = io.BytesIO(base64.b64decode(params["content"], validate=True))
        except binascii.Error as error:
            raise SiteBackupError("damaged", "what was encrypted in the backup is no tar") from error
        return {"changed": True, "files": untar_files(stream, base, params["paths"])}
    with (backups.find(params["backup"]) / params["file"]).open("rb") as stream:
        return {"changed": True, "files": untar_files(stream, base, params["paths"])}


def measured(_backups: Backups, params: dict[str, Any]) -> dict[str, Any]:
    """How many bytes the images take."""
    registry = registry_from(params)
    images, left_out = standing_images(params, registry)
    return {"bytes": image_bytes(registry, images), "left_out": left_out}


READING = {"read": read, "collected": collected, "measured": measured}
WRITING = {
    "begun": begun,
    "part": part,
    "finished": finished,
    "abandoned": abandoned,
    "sent": sent,
    "extracted": extracted,
}


def main() -> None:
    """Wire parameters and backups."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True)
    params = module.params
    state = params["state"]
    if state == "collected" and not module.no_log:
        module.fail_json(msg="This returns secrets: give its task no_log: true", reason="no_log_missing")
    if state == "collected":
        # With no_log the task shows nothing at all. The value would only come out masked for the next task.
        module.no_log_values.clear()
    backups = Backups(Path(params["root"]), params["site"])
    try:
        if state in WRITING and module.check_mode:
            module.exit_json(changed=True)
        result = (READING | WRITING)[state](backups, params)
    except (SiteBackupError, ImageStoreError, RegistryError) as error:
        module.fail_json(msg=str(error), reason=error.reason)
    except OSError as error:
        module.fail_json(msg=f"{error.strerror or error} ({error.filename})", reason="io")
    module.exit_json(**{"changed": False, **result})


if __name__ == "__main__":
    main()
