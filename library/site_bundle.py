#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Write or prove a bundle: everything that a site without internet and without a registry is deployed from."""

from __future__ import annotations

DOCUMENTATION = r"""
module: site_bundle
short_description: Write or prove a bundle for sites without internet and without a registry
description:
  - A bundle is one tar with the project, the wheels of its controller, the images by digest as an OCI layout, other
    images as C(docker save) writes them, a manifest and checksums.
  - It is made under another name and gets its own when it is whole.
options:
  path:
    description: The bundle.
    type: path
    required: true
  state:
    description: V(written) makes it; V(read) proves every checksum and returns its manifest.
    type: str
    choices: [written, read]
    required: true
  project:
    description:
      - Directory of the project. In a git checkout, the files that git knows or does not ignore; else all of it.
      - Bundles, keys, certificates and vaults that are no part of the project stay out.
    type: path
  wheels:
    description: Directory with wheels.
    type: path
  images:
    description: Images by digest, copied from their registry.
    type: list
    elements: str
    default: []
  archives:
    description: Images of the engine by tag, saved as they are.
    type: list
    elements: str
    default: []
  metadata:
    description: What the manifest says beside.
    type: dict
    default: {}
  username:
    description: Login at the registry.
    type: str
    default: ''
  password:
    description: Password of that login.
    type: str
    default: ''
  ca:
    description: Private CA of the registry, a path on this host.
    type: str
    default: ''
  plain_http:
    description: Whether the registry is spoken to in plain http.
    type: bool
    default: false
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details: Reads; writes nothing.
  diff_mode:
    support: none
    description: Will return details on what has changed (or possibly needs changing in check mode).
  idempotent:
    support: none
    description:
      - When run twice in a row outside check mode, with the same arguments, the second invocation indicates no change.
    details: Writes a new one each time.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: The bundle is proven
  site_bundle:
    path: /media/stick/aisha-webhook-bundle.tar
    state: read
  register: bundle
"""

RETURN = r"""
manifest:
  description: What the bundle holds.
  returned: success
  type: dict
  contains:
    images:
      description: Repository -> digest and tag.
      type: dict
    archives:
      description: Tags that come as C(docker save) wrote them.
      type: list
      elements: str
bytes:
  description: Size of the bundle.
  returned: success
  type: int
reason:
  description: Why the module failed, for programs.
  returned: on failure
  type: str
  sample: damaged
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.docker_cli import DockerError
from ansible.module_utils.image_store import BlobRegistry, ImageStoreError, Pinned
from ansible.module_utils.registry_api import RegistryError
from ansible.module_utils.site_backup import SiteBackupError
from ansible.module_utils.site_bundle import BundleError, Contents, read, write

TEXT = {"type": "str", "default": ""}
NAMES = {"type": "list", "elements": "str", "default": []}
ARGUMENTS = {
    "path": {"type": "path", "required": True},
    "state": {"type": "str", "required": True, "choices": ["written", "read"]},
    "project": {"type": "path"},
    "wheels": {"type": "path"},
    "images": NAMES,
    "archives": NAMES,
    "metadata": {"type": "dict", "default": {}},
    "username": TEXT,
    "password": {"type": "str", "default": "", "no_log": True},
    "ca": TEXT,
    "plain_http": {"type": "bool", "default": False},
}


def contents_from(params: dict) -> Contents:
    """What is to be in the bundle, from the module's parameters."""
    images = [Pinned.parse(reference) for reference in params["images"]]
    scheme = "http" if params["plain_http"] else "https"
    login = (params["username"], params["password"]) if params["username"] else None
    registries = {
        name: BlobRegistry(f"{scheme}://{name}", login, params["ca"] or None, plain_http=params["plain_http"])
        for name in {image.registry for image in images}
    }
    return Contents(
        project=Path(params["project"]),
        wheels=Path(params["wheels"]) if params["wheels"] else None,
        images=images,
        registries=registries,
        archives=params["archives"],
        metadata=params["metadata"],
    )


def main() -> None:
    """Wire parameters and bundle."""
    module = AnsibleModule(
        ARGUMENTS, supports_check_mode=True, required_if=[("state", "written", ("project",))]
    )
    path = Path(module.params["path"])
    writing = module.params["state"] == "written"
    try:
        if writing and module.check_mode:
            module.exit_json(changed=True, manifest={}, bytes=0)
        manifest = write(path, contents_from(module.params)) if writing else read(path)
    except (BundleError, ImageStoreError, RegistryError, DockerError, SiteBackupError) as error:
        module.fail_json(msg=str(error), reason=error.reason)
    except OSError as error:
        module.fail_json(msg=f"{error.strerror or error} ({error.filename})", reason="io")
    module.exit_json(changed=writing, manifest=manifest, bytes=path.stat().st_size)


if __name__ == "__main__":
    main()
