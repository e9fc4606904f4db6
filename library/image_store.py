#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Bring images that lie in an OCI layout into an engine or a registry, under their digests."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_store
short_description: Bring images from an OCI layout into an engine or a registry, under their digests
description:
  - The layout is a tar as M(site_backup) writes it, or part of a bundle. Nothing is unpacked to the disk.
  - An engine gets the images by pulling them from a registry on loopback that stands for that moment, so that it knows them
    by the digest that a release is pinned to. C(docker load) would lose it.
options:
  path:
    description: The tar on the host.
    type: path
    required: true
  prefix:
    description: Directory inside the tar that the layout lies in, with its slash.
    type: str
    default: ''
  state:
    description:
      - V(listed) says what is in it.
      - V(checked) says which of O(references) and O(tags) the engine lacks; O(path) need not be there.
      - V(loaded) brings the images into the engine under O(address).
      - V(sent) puts them into O(registry).
    type: str
    choices: [listed, checked, loaded, sent]
    required: true
  address:
    description: Address on loopback, host and port, that the images are named by in the engine.
    type: str
    default: ''
  archives:
    description: Members of the tar that C(docker load) takes, for images that are known by a tag; with O(state=loaded).
    type: list
    elements: str
    default: []
  tags:
    description: Tags that the archives bring. When the engine has them all, nothing is loaded.
    type: list
    elements: str
    default: []
  references:
    description: Images by digest; with O(state=checked).
    type: list
    elements: str
    default: []
  registry:
    description: Registry to put the images into.
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
  timeout:
    description: Seconds that one image may take.
    type: int
    default: 600
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
  diff_mode:
    support: none
    description: Will return details on what has changed (or possibly needs changing in check mode).
  idempotent:
    support: full
    description:
      - When run twice in a row outside check mode, with the same arguments, the second invocation indicates no change.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: The images are in the engine under their digests
  image_store:
    path: /root/bundle.tar
    prefix: images/
    state: loaded
    address: 127.0.0.1:5009
"""

RETURN = r"""
images:
  description: Repository -> reference, digest and tag of each image of the layout.
  returned: but with O(state=checked)
  type: dict
missing:
  description: What the engine lacks.
  returned: with O(state=checked)
  type: list
  elements: str
new:
  description: What was not there before.
  returned: success
  type: list
  elements: str
reason:
  description: Why the module failed, for programs.
  returned: on failure
  type: str
  sample: port_taken
"""

import subprocess
import tarfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.docker_cli import Docker, DockerError
from ansible.module_utils.image_store import (
    TAG,
    BlobRegistry,
    ImageStoreError,
    Layout,
    load,
    missing_images,
    send,
)
from ansible.module_utils.registry_api import RegistryError
from ansible.module_utils.site_backup import SiteBackupError, run_from

TEXT = {"type": "str", "default": ""}
ARGUMENTS = {
    "path": {"type": "path", "required": True},
    "prefix": TEXT,
    "state": {"type": "str", "required": True, "choices": ["listed", "checked", "loaded", "sent"]},
    "address": TEXT,
    "archives": {"type": "list", "elements": "str", "default": []},
    "tags": {"type": "list", "elements": "str", "default": []},
    "references": {"type": "list", "elements": "str", "default": []},
    "registry": TEXT,
    "username": TEXT,
    "password": {"type": "str", "default": "", "no_log": True},
    "ca": TEXT,
    "plain_http": {"type": "bool", "default": False},
    "timeout": {"type": "int", "default": 600},
}


def described(layout: Layout, address: str) -> dict[str, Any]:
    """What the layout holds, the newest of each repository."""
    found = {}
    for name, entries in layout.repositories().items():
        entry = entries[-1]
        tag = entry["annotations"].get(TAG, "")
        found[name] = {
            "name": name,
            "ref": f"{address}/{name}@{entry['digest']}" if address else f"{name}@{entry['digest']}",
            "digest": entry["digest"],
            "tag": tag,
        }
    return found


def load_archives(module: AnsibleModule, docker: Docker) -> list[str]:
    """Load the archives that `docker load` takes, unless the engine has all their tags."""
    params = module.params
    missing = missing_images(docker, params["tags"])
    if not missing or module.check_mode:
        return missing
    with tarfile.open(params["path"], "r:") as tar:
        for name in params["archives"]:
            member = tar.extractfile(name)
            if member is None:
                raise ImageStoreError("damaged", f"{params['path']} lacks {name}", "Take another one")
            run_from(["docker", "load", "--quiet"], member, params["timeout"])
    still = missing_images(docker, params["tags"])
    if still:
        raise ImageStoreError("not_loaded", f"{params['path']} did not bring {', '.join(still)}")
    return missing


def loaded(module: AnsibleModule, layout: Layout) -> list[str]:
    """Bring everything into the engine."""
    docker = Docker()
    references = [
        f"{module.params['address']}/{entry['annotations']['org.aisha.repository']}@{entry['digest']}"
        for entry in layout.entries
    ]
    new = load_archives(module, docker)
    if module.check_mode:
        return new + missing_images(docker, references)
    return new + load(docker, layout, references, module.params["timeout"])


def sent(module: AnsibleModule, layout: Layout) -> list[str]:
    """Put everything into a registry."""
    params = module.params
    if module.check_mode:
        return []
    scheme = "http" if params["plain_http"] else "https"
    login = (params["username"], params["password"]) if params["username"] else None
    url = f"{scheme}://{params['registry']}"
    return send(layout, BlobRegistry(url, login, params["ca"] or None, plain_http=params["plain_http"]))


def main() -> None:
    """Wire parameters, tar, engine and registry."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True)
    new: list[str] = []
    try:
        if module.params["state"] == "checked":
            wanted = [*module.params["references"], *module.params["tags"]]
            module.exit_json(changed=False, missing=missing_images(Docker(), wanted))
        layout = Layout(Path(module.params["path"]), module.params["prefix"])
        if module.params["state"] == "loaded":
            new = loaded(module, layout)
        elif module.params["state"] == "sent":
            new = sent(module, layout)
        images = described(layout, module.params["address"])
    except (ImageStoreError, RegistryError, DockerError, SiteBackupError) as error:
        module.fail_json(msg=str(error), reason=error.reason)
    except (OSError, tarfile.TarError, KeyError, subprocess.SubprocessError) as error:
        module.fail_json(msg=f"{module.params['path']} cannot be used: {error}", reason="damaged")
    module.exit_json(changed=bool(new), new=new, images=images)


if __name__ == "__main__":
    main()
