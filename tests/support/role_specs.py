"""What the roles say of their variables: meta/argument_specs.yml of each, and role site's settings.yml."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[2]


def role_options(role: str) -> dict[str, dict[str, Any]]:
    """The variables of a role, each with its specification."""
    found: dict[str, dict[str, Any]] = {}
    for path in (REPO / "roles" / role / "meta").glob("*.yml"):
        for entry in (yaml.safe_load(path.read_text()).get("argument_specs") or {}).values():
            found |= entry.get("options") or {}
    return found


@cache
def role_variables() -> frozenset[str]:
    """The names of all roles' variables."""
    return frozenset(name for role in (REPO / "roles").iterdir() for name in role_options(role.name))
