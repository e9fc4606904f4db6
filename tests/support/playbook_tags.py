"""The tags of a playbook, as the file has them: for tests that run each, or compare them with the documentation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

SITE = Path(__file__).resolve().parents[2] / "playbooks" / "site.yml"
#: Of Ansible itself.
SPECIAL = frozenset({"always", "never", "all", "tagged", "untagged"})


def tags_in(part: object) -> Iterator[str]:
    """Every tag of a part of a playbook, at whatever depth."""
    if isinstance(part, list):
        for item in part:
            yield from tags_in(item)
    elif isinstance(part, dict):
        yield from part.get("tags", [])
        for value in part.values():
            yield from tags_in(value)


def site_tags() -> list[str]:
    """The tags of `site.yml` that a person can name, sorted."""
    return sorted(set(tags_in(yaml.safe_load(SITE.read_text(encoding="utf-8")))) - SPECIAL)
