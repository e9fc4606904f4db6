#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Have a Debian base image in the engine, pulled or bootstrapped."""

from __future__ import annotations

DOCUMENTATION = r"""
module: base_image
short_description: Have a Debian base image in the engine, pulled or bootstrapped
description:
  - Makes the image that all others are built on. V(pull) takes it from a public registry and adds O(packages).
    V(bootstrap) makes it with C(mmdebstrap) from the mirrors that the host's own apt uses, with the suite's updates and
    security updates.
  - The image's name ends in a digest of its content, which also is its label C(org.aisha.base.digest). It depends on the
    suite, on O(packages) and on the installed packages with their versions. So a refresh that brings nothing new keeps
    the name, and images that were built on it stand.
  - An image that stands is taken as it is unless suite, packages, method or age say otherwise. The public registry is
    asked only when an image has to be made.
options:
  name:
    description: Repository of the image in the engine. The tag is C(SUITE-DIGEST).
    type: str
    default: aisha-base
  state:
    description:
      - V(resolved) says what would have to be done, and changes nothing.
      - V(present) does it.
    type: str
    choices: [resolved, present]
    default: present
  method:
    description:
      - V(auto) pulls, and bootstraps where no public registry answers or pulling fails. An image that stands is accepted
        whichever way it was made.
    type: str
    choices: [auto, pull, bootstrap]
    default: auto
  suite:
    description: Debian's suite, by its code name.
    type: str
    default: trixie
  packages:
    description: Packages that the image has beside the essential ones.
    type: list
    elements: str
    default: [ca-certificates]
  refresh_days:
    description: Age in days from which the image is made again, for security updates. 0 means never.
    type: int
    default: 7
  pull_image:
    description: The public image to pull; by default C(debian:SUITE-slim).
    type: str
  mirror:
    description: Debian mirror to bootstrap from, in place of the host's own. Needed on hosts that are not Debian.
    type: str
  security_mirror:
    description: Mirror of Debian's security updates, in place of the host's own.
    type: str
  probe_timeout:
    description: Seconds that the public registry has for an answer.
    type: float
    default: 5
  timeout:
    description: Seconds that pulling or bootstrapping may take.
    type: float
    default: 900
requirements:
  - docker with the buildx plugin
  - mmdebstrap, where the image is bootstrapped
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details:
      - A new image's digest cannot be known before it is made; RV(name) is that of the standing image then, or a stand-in.
  diff_mode:
    support: full
    description: Will return details on what has changed (or possibly needs changing in check mode).
    details: Name, digest and age of the image before and after.
  idempotent:
    support: partial
    description:
      - When run twice in a row outside check mode, with the same arguments, the second invocation indicates no change.
    details: Once the image is O(refresh_days) old it is made again.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: The base image stands
  base_image:
    suite: trixie
    packages: [ca-certificates, tzdata]
  register: base

- name: What would have to be done is known
  base_image:
    method: bootstrap
    state: resolved
  register: plan
"""

RETURN = r"""
name:
  description: Name and tag of the image; C(NAME:SUITE-unknown) while none stands and none was made.
  returned: success
  type: str
  sample: aisha-base:trixie-0123456789ab
digest:
  description: Digest of its content; empty while none stands.
  returned: success
  type: str
image_id:
  description: Its id in the engine; empty while none stands.
  returned: success
  type: str
size:
  description: Its size in bytes.
  returned: success
  type: int
method:
  description: How the image was made.
  returned: success
  type: str
  sample: bootstrap
refreshed:
  description: When it was made or last found to be up to date (UTC).
  returned: success
  type: str
  sample: "2026-01-02T03:04:05Z"
needs:
  description: What had to be done - V(none), V(pull) or V(bootstrap).
  returned: success
  type: str
why:
  description: Why.
  returned: success
  type: str
missing_tools:
  description: Programs that the action needs and the host lacks.
  returned: success
  type: list
  elements: str
reason:
  description: Why the module failed, for programs.
  returned: on failure
  type: str
  sample: no_mirror
"""

from datetime import UTC, datetime

from ansible.module_utils.base_image import (
    TIME_FORMAT,
    BaseImage,
    BaseImageError,
    BaseImages,
    BaseSpec,
    public_registry_answers,
)
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.docker_cli import Docker, DockerError

ARGUMENTS = {
    "name": {"type": "str", "default": "aisha-base"},
    "state": {"type": "str", "choices": ["resolved", "present"], "default": "present"},
    "method": {"type": "str", "choices": ["auto", "pull", "bootstrap"], "default": "auto"},
    "suite": {"type": "str", "default": "trixie"},
    "packages": {"type": "list", "elements": "str", "default": ["ca-certificates"]},
    "refresh_days": {"type": "int", "default": 7},
    "pull_image": {"type": "str"},
    "mirror": {"type": "str"},
    "security_mirror": {"type": "str"},
    "probe_timeout": {"type": "float", "default": 5.0},
    "timeout": {"type": "float", "default": 900.0},
}


def spec_from(params: dict) -> BaseSpec:
    """The image that the module's parameters ask for."""
    return BaseSpec(
        name=params["name"],
        method=params["method"],
        suite=params["suite"],
        packages=tuple(params["packages"]),
        refresh_days=params["refresh_days"],
        pull_image=params["pull_image"] or "",
        mirror=params["mirror"] or "",
        security_mirror=params["security_mirror"] or "",
    )


def describe(image: BaseImage | None, spec: BaseSpec) -> dict:
    """What is returned of an image, or of none."""
    if image is None:
        stand_in = f"{spec.name}:{spec.suite}-unknown"
        return {"name": stand_in, "digest": "", "image_id": "", "size": 0, "method": "", "refreshed": ""}
    return {
        "name": image.name,
        "digest": image.digest,
        "image_id": image.image_id,
        "size": image.size,
        "method": image.method,
        "refreshed": image.refreshed.strftime(TIME_FORMAT),
    }


def main() -> None:
    """Wire parameters, engine and image."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True)
    docker, spec = Docker(), spec_from(module.params)
    try:
        images = BaseImages(
            spec,
            docker,
            datetime.now(UTC),
            reachable=lambda host: public_registry_answers(docker, host, module.params["probe_timeout"]),
            timeout=module.params["timeout"],
            log=module.log,
        )
        plan = images.plan(lenient=module.check_mode)
        wanted = module.params["state"] == "present" and plan.action != "none"
        image = images.make_by(plan.action) if wanted and not module.check_mode else plan.image
    except (BaseImageError, DockerError) as error:
        module.fail_json(msg=str(error), reason=error.reason)
    for warning in images.warnings:
        module.warn(warning)
    before, after = describe(plan.image, spec), describe(image, spec)
    if wanted and module.check_mode:
        after = {**after, "refreshed": f"would be made anew ({plan.action}: {plan.why})"}
    diff = {"before": before, "after": after} if wanted else {}
    result = {"needs": plan.action, "why": plan.why, "missing_tools": list(plan.missing_tools)}
    module.exit_json(changed=wanted, diff=diff, **describe(image, spec), **result)


if __name__ == "__main__":
    main()
