#!/usr/bin/env python3
"""Writes docs/configuration.md from the roles' argument_specs.yml, and docs/decisions/README.md from the decisions' titles.

`scripts/docs.py` writes both, `scripts/docs.py --check` fails when one is not what it would write.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "configuration.md"
DECISIONS = REPO / "docs" / "decisions" / "README.md"
ORDER = [
    "site",
    "preflight",
    "lock",
    "hooks",
    "engine",
    "base_image",
    "registry",
    "secrets",
    "backends",
    "images",
    "edge",
    "stack",
    "rollout",
    "records",
    "verify",
    "monitoring",
    "rollback",
    "prune",
    "backup",
    "restore",
    "bundle",
    "doctor",
    "teardown",
    "status",
]

HEAD = """# Variables of the roles

Written by `scripts/docs.py` from the roles' `argument_specs.yml`; a test keeps it true. Set variables in the inventory
(`inventory/<site>/group_vars/all.yml`), or for one run with `-e name=value`. The service's own settings (the environment in
`prod.env`) are in [settings.md](settings.md).
"""


DECISIONS_HEAD = """# Decisions

What was decided and why, one file each. Written by `scripts/docs.py` from their titles; a test keeps it true.
Reasons for each direct dependency: [dependencies](dependencies.md).

"""


def text(value: Any) -> str:
    """A description or a default as one line of a Markdown table."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value) and value and " " in value[0]:
        value = " ".join(value)
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|").strip()


def default(option: dict[str, Any]) -> str:
    """How a default is shown: code, or what its absence means."""
    if "default" not in option:
        return "**required**" if option.get("required") else ""
    value = option["default"]
    return "empty" if value in ("", [], {}) else f"`{text(value)}`"


def rows(options: dict[str, Any], prefix: str = "") -> list[str]:
    """Table rows of a role's options, nested ones behind their parent."""
    lines = []
    for name, option in options.items():
        kind = option.get("type", "str")
        choices = f" One of {', '.join(map(str, option['choices']))}." if "choices" in option else ""
        lines.append(
            f"| `{prefix}{name}` | {kind} | {default(option)} | {text(option.get('description', ''))}{choices} |"
        )
        lines += rows(option.get("options", {}), f"{prefix}{name}.")
    return lines


def role_section(role: str) -> str:
    """One role's section: what it is for, and its variables."""
    name = "settings" if role == "site" else "argument_specs"
    specs = yaml.safe_load((REPO / "roles" / role / "meta" / f"{name}.yml").read_text())["argument_specs"]
    main = specs.get("main") or specs["settings"]
    head = f"\n## {role}\n{text(main.get('short_description', ''))}.\n".replace("..", ".")
    options = main.get("options") or {}
    if not options:
        return head + "\nNo variables.\n"
    return "\n".join(
        [head, "| variable | type | default | meaning |", "|---|---|---|---|", *rows(options), ""]
    )


def page() -> str:
    """The whole page."""
    roles = sorted(path.parent.parent.name for path in REPO.glob("roles/*/meta/argument_specs.yml"))
    ranked = sorted(roles, key=lambda role: (ORDER.index(role) if role in ORDER else len(ORDER), role))
    return HEAD + "".join(role_section(role) for role in ranked)


def decisions() -> str:
    """The list of decisions: number and title of each."""
    lines = []
    for path in sorted(DECISIONS.parent.glob("[0-9]*.md")):
        found = re.match(r"# (\d{4}):? (.+)", path.read_text())
        if found is None:
            raise SystemExit(f"{path.relative_to(REPO)} does not begin with `# NUMBER: title`")
        number, title = found.groups()
        lines.append(f"- [{number}]({path.name}) {title}\n")
    return DECISIONS_HEAD + "".join(lines)


def main() -> int:
    """Write the pages, or compare them."""
    for path, wanted, source in (
        (PAGE, page(), "what the roles say"),
        (DECISIONS, decisions(), "the list of the decisions"),
    ):
        if "--check" not in sys.argv[1:]:
            path.write_text(wanted)
        elif not path.exists() or path.read_text() != wanted:
            print(f"{path.relative_to(REPO)} is not {source}: run scripts/docs.py", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
