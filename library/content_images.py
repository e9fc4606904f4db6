#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Build container images by content, push them, and prove that the registry has them."""

from __future__ import annotations

DOCUMENTATION = r"""
module: content_images
short_description: Build container images by content, push them, and prove that the registry has them
description:
  - The tag of an image is a digest of everything that decides its content - the files of its build context, its
    Dockerfile, its build arguments and the content of its base image. An image that the registry or the engine
    already has under that tag is neither built nor pushed.
  - Builds with BuildKit (C(docker buildx build), the engine's own builder) from a private copy of exactly the files
    that were digested. C(.dockerignore) is honoured as Docker does it; by-products such as C(__pycache__) never count.
  - The build gets two build secrets. C(ca) is the CA bundle of the build host. C(pip) is a C(pip.conf) with the http(s)
    indexes, trusted hosts and the proxy that pip uses on the build host; it is empty where pip uses its defaults.
    Proxy variables of the module's environment are handed to the build as well. None of it stays in an image.
  - All images are built and pushed side by side. After a push the registry is asked for the digest of the manifest,
    which must be the one that was pushed. For an image that the registry already had, the content digest in the
    image's own labels is compared.
  - With O(sbom) each image in the registry gets a bill of materials (CycloneDX 1.6), an artifact that refers to the
    image's digest; the image and its tag do not change with it. With O(signing_key) both are signed as cosign does, and
    an image that the registry has counts only when it is signed with that key - otherwise it is built and pushed again.
options:
  images:
    description: The images.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Repository of the image, without the registry's host.
        type: str
        required: true
      context:
        description: Directory with the build context, on the host where the module runs.
        type: path
        required: true
      dockerfile:
        description: Path of the Dockerfile, absolute or relative to the context.
        type: str
        default: Dockerfile
      base:
        description:
          - Name of the base image in the engine. Handed to the build as argument C(BASE), unless O(images[].args) sets it.
          - Of its content only its label C(org.aisha.base.digest) (or C(org.aisha.content.digest)) counts, and its id where
            it has no such label. Its name does not count.
        type: str
      target:
        description: Stage of the Dockerfile to build; the last one by default.
        type: str
      args:
        description: Build arguments. C(@tag@) in a value is replaced by the content tag. Never give secrets here.
        type: dict
        default: {}
      labels:
        description: Labels that belong to the image's content. Times and commits do not; see O(revision).
        type: dict
        default: {}
  state:
    description:
      - V(resolved) says what stands where, and changes nothing.
      - V(built) builds what neither the engine nor the registry has.
      - V(pushed) builds, pushes and proves. Without O(registry) it means V(built).
    type: str
    choices: [resolved, built, pushed]
    default: pushed
  registry:
    description: Host and port of the registry, as in image names. Without it images stay in the engine.
    type: str
  plain_http:
    description: Whether the registry is spoken to in plain http. The engine must allow it as well.
    type: bool
    default: false
  username:
    description: Name for basic authentication at the registry. Give O(password) with it. An empty string means none.
    type: str
  password:
    description: Password for basic authentication at the registry. It stands in no argument list, and in no file that stays.
    type: str
  ca:
    description: Path of a PEM file with the authorities to trust for the registry in place of the system's.
    type: path
  latest:
    description: Whether the tag C(latest) follows, in the engine and in the registry.
    type: bool
    default: true
  revision:
    description: Commit of the source, for the label C(org.opencontainers.image.revision). It does not enter the content tag.
    type: str
    default: ""
  ca_bundle:
    description: CA bundle of the build host, handed to builds as the secret C(ca).
    type: path
    default: /etc/ssl/certs/ca-certificates.crt
  log_dir:
    description: Directory on the build host where the output of each build can be followed, in C(build-NAME.log).
    type: path
  sbom:
    description: Whether images in the registry get a bill of materials. Needs O(registry).
    type: bool
    default: false
  signing_key:
    description:
      - Path of a private key on the build host - EC, P-256, in PEM form, without a passphrase. Images and their bills of
        materials are signed with it when they are pushed. An empty string means no signatures. Needs O(registry).
      - In check mode a key that does not stand yet is no fault.
    type: path
  build_timeout:
    description: Seconds that one build may take.
    type: float
    default: 1800
  push_timeout:
    description: Seconds that one push may take.
    type: float
    default: 600
requirements:
  - openssl, where O(signing_key) is given
  - docker with the buildx plugin
  - requests (Debian and Ubuntu - python3-requests), where O(registry) is given
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details:
      - Says what would be built, pushed and tagged. An engine, a base image or a registry that does not stand yet is no
        fault then; without the base image the tag cannot be known, see RV(images.tag_known).
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
- name: The images are in the registry
  content_images:
    registry: registry.example:5000
    username: deploy
    password: "{{ registry_password }}"
    revision: "{{ lookup('ansible.builtin.pipe', 'git rev-parse HEAD') }}"
    images:
      - name: webhook-api
        context: /srv/source/webhook
        base: "{{ base_image_name }}"
        args:
          WEBHOOK_VERSION: "@tag@"
      - name: nginx-webhook
        context: /srv/source/nginx
        base: "{{ base_image_name }}"
  register: images

- name: A backend's image stands in the engine
  content_images:
    state: built
    images:
      - name: aisha-backend-postgres
        context: /srv/source/postgres
        base: "{{ base_image_name }}"
"""

RETURN = r"""
images:
  description: Each image by its name.
  returned: success
  type: dict
  contains:
    name:
      description: Repository, without the registry's host.
      type: str
    tag:
      description: The content tag.
      type: str
      sample: c-0123456789abcdef
    tag_known:
      description: False only in check mode, when the base image does not stand yet; the tag is a stand-in then.
      type: bool
    ref:
      description: What to pin to. Registry, name and digest; name and content tag where no digest is known.
      type: str
      sample: 127.0.0.1:5000/webhook-api@sha256:7d865e959b2466918c9863afca942d0fb89d7c9ac0c99bafc3749504ded97730
    digest:
      description: Digest of the manifest in the registry; without O(registry) the image's id. Empty when there is none yet.
      type: str
    content_digest:
      description: The whole digest of what the image is made of.
      type: str
    image_id:
      description: The image's id in the engine; empty when the engine does not have it.
      type: str
    size:
      description: Bytes in the engine, unpacked, with the base; 0 when the engine does not have it.
      type: int
    size_over_base:
      description: Bytes that the image adds to its base; 0 when the engine does not have it.
      type: int
    in_engine:
      description: Whether the engine has the image under its content tag.
      type: bool
    in_registry:
      description: Whether the registry has the image under its content tag.
      type: bool
    built:
      description: Whether it was (in check mode, would be) built.
      type: bool
    pushed:
      description: Whether it was (in check mode, would be) pushed.
      type: bool
    tagged:
      description: Whether the tag C(latest) was (in check mode, would be) moved to it, other than by a build.
      type: bool
    sbom:
      description: Digest of the artifact with the bill of materials; empty without O(sbom), or where there is none yet.
      type: str
    described:
      description: Whether a bill of materials was (in check mode, would be) made.
      type: bool
    signed:
      description: Whether the image in the registry is signed with O(signing_key).
      type: bool
    seconds:
      description: How long building and pushing took.
      type: float
public_key:
  description: The public key that belongs to O(signing_key), in PEM form; empty without one.
  returned: success
  type: str
reason:
  description: Why the module failed, for programs.
  returned: on failure
  type: str
  sample: build_failed
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.docker_cli import Docker
from ansible.module_utils.image_build import ContentImages, ImageError, ImageSpec, Settings
from ansible.module_utils.image_signature import SignatureError, Signer
from ansible.module_utils.registry_api import REQUESTS_IMPORT_ERROR, RegistryClient, RegistryError

ARGUMENTS = {
    "images": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "name": {"type": "str", "required": True},
            "context": {"type": "path", "required": True},
            "dockerfile": {"type": "str", "default": "Dockerfile"},
            "base": {"type": "str"},
            "target": {"type": "str"},
            "args": {"type": "dict", "default": {}},
            "labels": {"type": "dict", "default": {}},
        },
    },
    "state": {"type": "str", "choices": ["resolved", "built", "pushed"], "default": "pushed"},
    "registry": {"type": "str"},
    "plain_http": {"type": "bool", "default": False},
    "username": {"type": "str"},
    "password": {"type": "str", "no_log": True},
    "ca": {"type": "path"},
    "latest": {"type": "bool", "default": True},
    "revision": {"type": "str", "default": ""},
    "ca_bundle": {"type": "path", "default": "/etc/ssl/certs/ca-certificates.crt"},
    "log_dir": {"type": "path"},
    "sbom": {"type": "bool", "default": False},
    "signing_key": {"type": "path", "no_log": False},
    "build_timeout": {"type": "float", "default": 1800.0},
    "push_timeout": {"type": "float", "default": 600.0},
}


def settings_from(params: dict, signer: Signer | None = None) -> Settings:
    """What holds for all images, from the module's parameters."""
    return Settings(
        state=params["state"],
        registry=params["registry"] or "",
        username=params["username"] or "",
        password=params["password"] or "",
        latest=params["latest"],
        revision=params["revision"],
        ca_bundle=Path(params["ca_bundle"]),
        build_timeout=params["build_timeout"],
        push_timeout=params["push_timeout"],
        log_dir=Path(params["log_dir"]) if params["log_dir"] else None,
        sbom=params["sbom"],
        signer=signer,
    )


def client_from(params: dict) -> RegistryClient | None:
    """A client of the registry; None where there is no registry."""
    if not params["registry"]:
        return None
    scheme = "http" if params["plain_http"] else "https"
    login = (params["username"], params["password"]) if params["username"] else None
    url = f"{scheme}://{params['registry']}"
    return RegistryClient(url, login, params["ca"] or None, plain_http=params["plain_http"])


def signer_from(params: dict, registry: RegistryClient | None, check_mode: bool) -> Signer | None:
    """Who signs; None where nothing is to be signed, and in check mode before there is a key."""
    path = Path(params["signing_key"] or "/")
    if registry is None or not params["signing_key"] or (check_mode and not path.is_file()):
        return None
    return Signer(registry, params["registry"], path)


def main() -> None:
    """Wire parameters, engine, registry and images."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True, required_together=[("username", "password")])
    if REQUESTS_IMPORT_ERROR and module.params["registry"]:
        module.fail_json(
            msg=missing_required_lib("requests", reason="(package python3-requests)"),
            exception=REQUESTS_IMPORT_ERROR,
        )
    try:
        specs = [ImageSpec.from_params(entry) for entry in module.params["images"]]
        registry = client_from(module.params)
        signer = signer_from(module.params, registry, module.check_mode)
        settings = settings_from(module.params, signer)
        work = ContentImages(specs, settings, Docker(), registry, module.log)
        work.resolve(lenient=module.check_mode)
        changed = work.predict() if module.check_mode else work.apply()
    except (ImageError, RegistryError, SignatureError) as error:
        module.fail_json(msg=str(error), reason=error.reason)
    for warning in work.warnings:
        module.warn(warning)
    images = {image.spec.name: image.report() for image in work.images}
    module.exit_json(changed=changed, images=images, public_key=signer.public_key if signer else "")


if __name__ == "__main__":
    main()
