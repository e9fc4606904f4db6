#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Read the bill of materials that stands beside an image in the registry."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_sbom
short_description: Read the bill of materials that stands beside an image in the registry
description:
  - Finds the CycloneDX document that M(content_images) put beside an image, by the image's digest, and proves it by its
    digests. With a public key it also proves that the site signed it together with the image.
options:
  image:
    description: The image by its digest (C(registry/repository@sha256:...)).
    type: str
    required: true
  key_file:
    description: The site's public key on the host (PEM). An empty string means that no signature is asked for.
    type: path
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
  - requests (Debian and Ubuntu - python3-requests)
  - openssl, where O(key_file) is given
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
- name: What is in the image is known
  image_sbom:
    image: 127.0.0.1:5000/webhook-api@sha256:7d865e959b2466918c9863afca942d0fb89d7c9ac0c99bafc3749504ded97730
    plain_http: true
  register: sbom
"""

RETURN = r"""
document:
  description: The CycloneDX document, as JSON text.
  returned: success
  type: str
digest:
  description: Digest of the artifact in the registry.
  returned: success
  type: str
signed:
  description: Whether the site's signature covers it; false where no signature was asked for.
  returned: success
  type: bool
lines:
  description: One line a package, with kind, name, version and licence.
  returned: success
  type: list
  elements: str
reason:
  description: Why the module failed, for programs.
  returned: on failure
  type: str
  sample: missing
"""

from pathlib import Path

from ansible.module_utils import image_referrers, sbom
from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.image_signature import Reference, SignatureError, signed_sbom, stored, verify
from ansible.module_utils.registry_api import REQUESTS_IMPORT_ERROR, RegistryClient, RegistryError

ARGUMENTS = {
    "image": {"type": "str", "required": True},
    "key_file": {"type": "path", "no_log": False},
    "plain_http": {"type": "bool", "default": False},
    "username": {"type": "str"},
    "password": {"type": "str", "no_log": True},
    "ca": {"type": "path"},
}


def check_signature(registry: RegistryClient, reference: Reference, artifact: str, key_file: str) -> None:
    """Raise unless the site signed this very bill of materials with the image."""
    signature = verify(reference, stored(registry, reference), Path(key_file).read_text(encoding="utf-8"))
    if signed_sbom(signature) != artifact:
        raise SignatureError(
            "other_image",
            f"The bill of materials beside {reference} is not the one that was signed with it",
            "Remove it from the registry, and run site.yml with --tags images",
        )


def read(params: dict) -> dict:
    """Find, prove and decode the document."""
    reference = Reference.parse(params["image"])
    login = (params["username"], params["password"]) if params["username"] else None
    url = f"{'http' if params['plain_http'] else 'https'}://{reference.registry}"
    registry = RegistryClient(url, login, params["ca"] or None, plain_http=params["plain_http"])
    artifact = image_referrers.find(registry, reference.repository, reference.digest, sbom.MEDIA_TYPE)
    if artifact is None:
        raise sbom.SbomError(
            "missing", f"There is no bill of materials beside {reference}", "Run site.yml with --tags images"
        )
    if params["key_file"]:
        check_signature(registry, reference, artifact, params["key_file"])
    content = image_referrers.read(registry, reference.repository, artifact)
    lines = sbom.summary(sbom.decode(content))
    return {
        "document": content.decode(),
        "digest": artifact,
        "signed": bool(params["key_file"]),
        "lines": lines,
    }


def main() -> None:
    """Wire parameters and registry."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True, required_together=[("username", "password")])
    if REQUESTS_IMPORT_ERROR:
        module.fail_json(
            msg=missing_required_lib("requests", reason="(package python3-requests)"),
            exception=REQUESTS_IMPORT_ERROR,
        )
    try:
        found = read(module.params)
    except (sbom.SbomError, SignatureError, RegistryError, OSError) as error:
        module.fail_json(msg=str(error), reason=getattr(error, "reason", "io"))
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()
