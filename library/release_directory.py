#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Write, list and switch releases: content-addressed directories with a link to the one that serves."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release_directory
short_description: Write, list and switch content-addressed release directories
description:
  - Writes the files of a release to C(PATH/releases/ID), where ID is C(r-) and 12 hexadecimal digits of a
    digest over the
    paths, contents and modes of its files and over its images. The same input is always the same release.
  - A release appears whole, by one rename, or not at all. A file of it that was damaged since is repaired.
  - Links in O(path) say which release is C(staged) (written last), C(current) (serving) and C(previous)
    (served before).
  - Removes the oldest releases, but never one that a link points to; and shared trees that no release
    refers to any more.
options:
  path:
    description: The site's directory.
    type: path
    required: true
  state:
    description:
      - V(present) writes the release of O(files) and O(images), and stages it.
      - V(active) makes O(release) the current one, and the one that was current the previous one. Files
        that are missing or
        were changed by hand are refused.
      - V(read) only reads.
    type: str
    choices: [present, active, read]
    default: present
  files:
    description: The files of the release.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description:
          - C(@release@/NAME) is a file inside the release; C(DIRECTORY/HASH/NAME), relative to O(path), one
            in a tree that
            releases share, whose HASH must be a digest of its contents.
        type: str
        required: true
      content:
        description:
          - The text of the file. C(@release@) in it becomes the id of the release; C(@image:NAME@) the
            reference of that
            image.
        type: str
        required: true
      mode:
        description: Permissions, octal.
        type: str
        default: '0644'
      owner:
        description: Name or number of the owner. Default is whoever runs the module.
        type: str
      group:
        description: Name or number of the group.
        type: str
      show:
        description: Whether C(--diff) may show the content. Otherwise it shows digests.
        type: bool
        default: true
  images:
    description:
      - References of the release's images by name; each a string, or a dictionary with C(ref).
      - When empty, those of the staged release, else of the current one, are taken; when there is none
        either, it fails.
    type: dict
    default: {}
  metadata:
    description: Anything else to note in C(release.json). It is no part of the digest. What was
      written first is kept; keys that a release lacks are added.
    type: dict
    default: {}
  keep:
    description: How many releases are kept at least, the newest first.
    type: int
    default: 5
  directories:
    description: Directories below O(path) that are no part of any release, and their octal modes. With
      O(state=present) they are made, and their modes put right; what is in them is left alone.
    type: dict
    default: {}
  activate:
    description: With O(state=present), whether the release also becomes the current one.
    type: bool
    default: false
  release:
    description: With O(state=active), the id of the release. Default is the staged one.
    type: str
attributes:
  check_mode:
    support: full
    description: Can run in check mode and return changed status prediction without modifying the target.
    details:
      - Where no image is known in check mode (nothing was built yet), it goes on with a placeholder and
        warns; the id is
        another one then.
  diff_mode:
    support: full
    description: Will return details on what has changed (or possibly needs changing in check mode).
    details: Shows each file against the current release. O(files[].show) hides contents.
  idempotent:
    support: full
    description: When run twice in a row outside check mode, with the same arguments, the second invocation
      indicates no change.
author: The maintainers of aisha-webhook-deployment
"""

EXAMPLES = r"""
- name: The release is rendered
  release_directory:
    path: /opt/aisha-webhook
    images: "{{ images_digests }}"
    files:
      - path: "@release@/docker-compose.webhook.prod.yml"
        content: "{{ lookup('ansible.builtin.template', 'compose.yml.j2') }}"
      - path: "@release@/prod.env"
        content: "{{ lookup('ansible.builtin.template', 'prod.env.j2') }}"
        mode: "0640"
      - path: "edge/{{ stack_edge_hash }}/nginx.conf"
        content: "{{ stack_edge_conf }}"
  register: stack_rendered

- name: The release that was rolled out is the current one
  release_directory:
    path: /opt/aisha-webhook
    state: active
    release: "{{ stack_rendered.id }}"

- name: What can be gone back to is listed
  release_directory:
    path: /opt/aisha-webhook
    state: read
  register: releases
"""

RETURN = r"""
id:
  description: Id of the release. With O(state=read), of the current one.
  returned: when there is one
  type: str
  sample: r-0123456789ab
path:
  description: Directory of that release.
  returned: when there is one
  type: str
images:
  description: Its images, reference by name.
  returned: when there is one
  type: dict
files:
  description: Where each of O(files) stands, by the path that was asked for.
  returned: when O(state=present)
  type: dict
rendered:
  description:
    - Final texts of the files inside the release, by name, but not of those with O(files[].show=false). For
      M(compose_plan), which cannot read files that were not written.
  returned: in check mode, when O(state=present)
  type: dict
written:
  description: Files that were (in check mode, would be) written, relative to O(path).
  returned: when O(state=present)
  type: list
  elements: str
pruned:
  description: Releases and shared trees that were (would be) removed.
  returned: when O(state=present)
  type: list
  elements: str
current:
  description: Id of the current release after this run; null when there is none.
  returned: always
  type: str
staged:
  description: Id of the staged release after this run; null when there is none.
  returned: always
  type: str
previous:
  description: Id of the previous release after this run; null when there is none.
  returned: always
  type: str
releases:
  description:
    - All releases, the newest first. Each with C(id), C(path), C(created), C(images), C(files),
      C(metadata), whether it is
      C(whole), and whether it is C(current), C(staged), C(previous).
  returned: when O(state=read)
  type: list
  elements: dict
reason:
  description:
    - Why the module failed, for programs. V(bad_path), V(bad_file), V(no_images), V(unknown_image),
      V(unknown_owner),
      V(no_release), V(damaged) or V(io).
  returned: on failure
  type: str
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.release import (
    IMAGE_TOKEN,
    LINKS,
    Outcome,
    ReleaseError,
    ReleaseStore,
    WantedFile,
    plan_release,
)

ARGUMENTS = {
    "path": {"type": "path", "required": True},
    "state": {"type": "str", "choices": ["present", "active", "read"], "default": "present"},
    "files": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "path": {"type": "str", "required": True},
            "content": {"type": "str", "required": True},
            "mode": {"type": "str", "default": "0644"},
            "owner": {"type": "str"},
            "group": {"type": "str"},
            "show": {"type": "bool", "default": True},
        },
    },
    "images": {"type": "dict", "default": {}},
    "metadata": {"type": "dict", "default": {}},
    "keep": {"type": "int", "default": 5},
    "directories": {"type": "dict", "default": {}},
    "activate": {"type": "bool", "default": False},
    "release": {"type": "str"},
}


def octal(path: str, text: object) -> int:
    """A mode as a number."""
    try:
        mode = int(str(text), 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise ReleaseError("bad_file", f"{path}: {text!r} is no octal mode", "Write it as '0644'")
    return mode


def wanted_files(params: dict) -> list[WantedFile]:
    """The files as the module was asked for them."""
    wanted = []
    for entry in params["files"]:
        rest = (entry["owner"] or None, entry["group"] or None, entry["show"])
        wanted.append(WantedFile(entry["path"], entry["content"], octal(entry["path"], entry["mode"]), *rest))
    if not wanted:
        raise ReleaseError("bad_file", "a release without files is none", "Give 'files'")
    return wanted


def images_of(module: AnsibleModule, store: ReleaseStore, files: list[WantedFile]) -> dict[str, str]:
    """The images that were given, or those of the release that is there."""
    given = module.params["images"]
    if given:
        return {
            name: value["ref"] if isinstance(value, dict) else str(value) for name, value in given.items()
        }
    try:
        return store.known_images()
    except ReleaseError:
        if not module.check_mode:
            raise
        module.warn("No image is built yet: the release is shown without digests, its id will be another.")
        return {
            name: f"{name}@(not built yet)" for file in files for name in IMAGE_TOKEN.findall(file.content)
        }


def present(module: AnsibleModule, store: ReleaseStore) -> dict[str, Any]:
    """Write the release."""
    files = wanted_files(module.params)
    plan = plan_release(files, images_of(module, store, files))
    params = module.params
    directories = {name: octal(name, mode) for name, mode in params["directories"].items()}
    outcome = store.write(
        plan, params["metadata"], params["keep"], activate=params["activate"], directories=directories
    )
    for warning in outcome.warnings:
        module.warn(warning)
    inside = [file for file in plan.files if file.tree == plan.tree and file.wanted.show]
    rendered = {"rendered": {file.name: file.data.decode() for file in inside}} if module.check_mode else {}
    return (
        links_after(store, outcome)
        | rendered
        | {
            "changed": outcome.changed,
            "diff": outcome.diff,
            "id": plan.id,
            "path": str(store.root / plan.tree),
            "images": dict(plan.images),
            "files": {file.wanted.path: str(store.root / file.location) for file in plan.files},
            "written": outcome.written,
            "pruned": outcome.pruned,
        }
    )


def active(module: AnsibleModule, store: ReleaseStore) -> dict[str, Any]:
    """Switch to a release."""
    chosen, outcome = store.activate(module.params["release"] or None)
    before, after = (
        "".join(f"{link} -> {pair[i]}\n" for link, pair in outcome.links.items()) for i in (0, 1)
    )
    return (
        links_after(store, outcome)
        | facts(store, chosen)
        | {
            "changed": outcome.changed,
            "diff": {"before": before, "after": after},
        }
    )


def read(_module: AnsibleModule, store: ReleaseStore) -> dict[str, Any]:
    """Say what is there."""
    return (
        links_after(store, Outcome())
        | facts(store, store.linked("current"))
        | {
            "changed": False,
            "releases": store.releases(),
        }
    )


def facts(store: ReleaseStore, identity: str | None) -> dict[str, Any]:
    """Id, path and images of one release; nothing when there is none."""
    description = store.describe(identity) if identity else None
    return {key: description[key] for key in ("id", "path", "images")} if description else {}


def links_after(store: ReleaseStore, outcome: Outcome) -> dict[str, str | None]:
    """Where the links point when all is done; in check mode, where they would."""
    return {link: outcome.links[link][1] if link in outcome.links else store.linked(link) for link in LINKS}


def main() -> None:
    """Wire parameters and store."""
    module = AnsibleModule(ARGUMENTS, supports_check_mode=True)
    store = ReleaseStore(module.params["path"], check=module.check_mode)
    action = {"present": present, "active": active, "read": read}[module.params["state"]]
    try:
        result = action(module, store)
    except ReleaseError as error:
        module.fail_json(msg=str(error), reason=error.reason)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
