#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Prove that images are signed with the site's key, before a host runs them."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_signatures
short_description: Prove that images are signed with the site's key, before a host runs them
description:
  - Reads the signature of each image from the registry, in cosign's format, and verifies it with openssl and the public
    key - over the image's digest and repository, so that a signature of another image is refused as well.
  - Signatures that were verified are kept on the host, so that a release can be proven again (for a rollback, or from a
    bundle) when the registry is away. They are verified each time.
  - No transparency log and no other outside service is asked.
options:
  images:
    description: The images, each by its digest (C(registry/repository@sha256:...)).
    type: list
    elements: str
    required: true
  public_key:
    description: The site's public key in PEM form. Where it is empty, the one in O(key_file) counts.
    type: str
    default: ""
  key_file:
    description: Where the host keeps the public key.
    type: path
    required: true
  kept:
    description: Directory where the host keeps signatures that were verified.
    type: path
    required: true
  registry:
    description: Whether the registry may be asked. Without it only kept signatures count.
    type: bool
    default: true
  plain_http:
    description: Whether the registry is spoken to in plain http.
    type: bool
    default: false
  username:
    description: Name for basic authentication at the registry. An empty string means none.
    type: str
  password:
    description: Password for basic authentication at the registry.
    type: str
  ca:
    description: Path of a PEM file with the authorities to trust for the registry in place of the system's.
    type: path
requirements:
  - openssl
  - requests (Debian and Ubuntu - python3-requests)
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details:
      - Images without a digest (not built yet) and a key that does not stand yet are no fault then.
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
- name: Only images of this site run here
  image_signatures:
    images: "{{ stack_release.images.values() | list }}"
    public_key: "{{ site_image_public_key }}"
    key_file: /opt/aisha-webhook/image-signing.pub
    kept: /opt/aisha-webhook/signatures
"""

RETURN = r"""
verified:
  description: Each image that was proven, and where its signature was found (V(host) or V(registry)).
  returned: success
  type: dict
key:
  description: Start of the SHA-256 of the public key (DER form). Empty in check mode before there is one.
  returned: success
  type: str
reason:
  description: Why the module failed, for programs.
  returned: on failure
  type: str
  sample: unsigned
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.image_signature import KeptSignatures, Reference, SignatureError, key_id, prove
from ansible.module_utils.registry_api import REQUESTS_IMPORT_ERROR, RegistryClient, RegistryError
from ansible.module_utils.whole_files import read_file, write_file

ARGUMENTS = {
    "images": {"type": "list", "elements": "str", "required": True},
    "public_key": {"type": "str", "default": "", "no_log": False},
    "key_file": {"type": "path", "required": True},
    "kept": {"type": "path", "required": True},
    "registry": {"type": "bool", "default": True},
    "plain_http": {"type": "bool", "default": False},
    "username": {"type": "str"},
    "password": {"type": "str", "no_log": True},
    "ca": {"type": "path"},
}


def public_key_of(params: dict, check_mode: bool) -> tuple[str, bool]:
    """The public key that counts, and whether the host has to learn it. Learns it, unless in check mode."""
    path = Path(params["key_file"])
    found = read_file(path)
    known, given = (found[0].strip() if found else ""), params["public_key"].strip()
    if given:
        key_id(given)
    if given and given != known and not check_mode:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_file(path, f"{given}\n", mode=0o444)
    return given or known, bool(given) and given != known


def client_for(reference: Reference, params: dict) -> RegistryClient | None:
    """A client of the registry that an image is named by; None where none may be asked."""
    if not params["registry"]:
        return None
    login = (params["username"], params["password"]) if params["username"] else None
    scheme = "http" if params["plain_http"] else "https"
    url = f"{scheme}://{reference.registry}"
    return RegistryClient(url, login, params["ca"] or None, plain_http=params["plain_http"])


def prove_all(params: dict, public_key: str, check_mode: bool) -> dict[str, str]:
    """Prove each image; `SignatureError` names the first that can't be."""
    kept = KeptSignatures(Path(params["kept"]), writable=not check_mode)
    verified = {}
    for image in sorted(set(params["images"])):
        if check_mode and "@sha256:" not in image:
            continue
        reference = Reference.parse(image)
        verified[image] = prove(reference, public_key, kept, client_for(reference, params))
    return verified


def main() -> None:
    """Wire parameters, key, registry and images."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True, required_together=[("username", "password")])
    if REQUESTS_IMPORT_ERROR and module.params["registry"]:
        module.fail_json(
            msg=missing_required_lib("requests", reason="(package python3-requests)"),
            exception=REQUESTS_IMPORT_ERROR,
        )
    try:
        public_key, changed = public_key_of(module.params, module.check_mode)
        if not public_key and module.check_mode:
            module.exit_json(changed=True, verified={}, key="")
        if not public_key:
            raise SignatureError(
                "no_key",
                f"No public key to verify images with: none was given, and there is no {module.params['key_file']}",
                "Run site.yml as a whole (its builder names the key), or set signatures_public_key",
            )
        verified = prove_all(module.params, public_key, module.check_mode)
    except (SignatureError, RegistryError, OSError) as error:
        module.fail_json(msg=str(error), reason=getattr(error, "reason", "io"))
    module.exit_json(changed=changed, verified=verified, key=key_id(public_key))


if __name__ == "__main__":
    main()
