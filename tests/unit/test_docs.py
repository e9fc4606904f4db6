"""Documentation is true: no setting, variable, tag or link that is missing or wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.playbook_tags import site_tags

REPO = Path(__file__).resolve().parents[2]
PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("roles/*/README.md")])


def test_page_of_variables_is_what_the_roles_say() -> None:
    run = subprocess.run(
        [sys.executable, "scripts/docs.py", "--check"], cwd=REPO, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_every_setting_of_the_service_is_documented() -> None:
    package = REPO / "webhook" / "webhook_api"
    source = "\n".join(path.read_text() for path in sorted(package.glob("config*.py")))
    asked = set(
        re.findall(
            r'(?:reader\.\w+|_required|_secret|_hosts|_host_ports)\((?:reader, )?"([A-Z][A-Z_]+)"', source
        )
    )
    assert len(asked) > 25
    documented = set(re.findall(r"`([A-Z][A-Z_]+)`", (REPO / "docs" / "settings.md").read_text()))
    assert asked - documented == set()


def test_the_page_of_tags_has_each_tag_and_no_other() -> None:
    tags = site_tags()
    assert len(tags) > 10
    page = (REPO / "docs" / "tags.md").read_text()
    rows = re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)
    assert sorted(re.findall(r"`([a-z_]+)`", " ".join(rows))) == tags


@pytest.mark.parametrize("role", sorted(path.name for path in (REPO / "roles").iterdir() if path.is_dir()))
def test_every_default_is_specified(role: str) -> None:
    defaults = REPO / "roles" / role / "defaults" / "main.yml"
    given = yaml.safe_load(defaults.read_text()) if defaults.exists() else {}
    specs = yaml.safe_load((REPO / "roles" / role / "meta" / "argument_specs.yml").read_text())
    entries = specs["argument_specs"]
    options = (entries.get("main") or entries["settings"]).get("options") or {}
    assert set(given or {}) - set(options) == set()
    for name, value in (given or {}).items():
        assert options[name].get("default", value) == value, (
            f"{name}: the specification names another default"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+\s+(.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


def test_commands_of_the_makefile_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:`|\$ )make ([a-z-]+)", page.read_text()))
        assert named - targets == set(), page


CONTRACT = REPO / "docs" / "receiver" / "fal-contract.md"
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def test_every_line_of_fals_contract_has_tests_that_exist() -> None:
    text = CONTRACT.read_text()
    _, wrong, faults, _ = re.split(r"^## .*$", text, flags=re.MULTILINE)
    rows = {
        part: [row for row in body.splitlines() if row.startswith("| ")][1:]
        for part, body in (("wrong", wrong), ("faults", faults))
    }
    assert [row.split("|")[1].strip() for row in rows["wrong"]] == [str(number) for number in range(1, 15)]
    assert len(rows["faults"]) == 11
    for row in [*rows["wrong"], *rows["faults"]]:
        assert NAMED_TEST.search(row), f"no test is named: {row[:80]}"
    for path, name in sorted(set(NAMED_TEST.findall(text))):
        file = REPO / path
        assert file.exists(), path
        assert re.search(rf"^\s*def {name}\(", file.read_text(), re.MULTILINE), f"{path} has no {name}"
    for number, row in enumerate(rows["wrong"], start=1):
        assert f"::test_wrong_{number:02}_" in row
