"""Documentation is true: no setting, variable, tag or link that is missing or wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.playbook_tags import site_tags
from tests.support.role_specs import role_options

REPO = Path(__file__).resolve().parents[2]
PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("roles/*/README.md")])


def test_page_of_variables_is_what_the_roles_say() -> None:
    run = subprocess.run(
        [sys.executable, "scripts/docs.py", "--check"], cwd=REPO, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


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
    options = role_options(role)
    assert set(given or {}) - set(options) == set()
    for name, value in (given or {}).items():
        assert options[name].get("default", value) == value, (
            f"{name}: the specification names another default"
        )


def without_blocks(text: str) -> str:
    """A page without its blocks of code: a remark in one is no heading, and a bracket in one no link."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The places in a page that a link can name, as GitHub makes them of its headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+\s+(.*?)\s*$", without_blocks(page.read_text()), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        again = 0
        while (name := f"{slug}-{again}" if again else slug) in found:
            again += 1
        found.add(name)
    return found


def dead_links(page: Path) -> list[str]:
    """Links and pictures of a page that lead nowhere in this repository."""
    text = without_blocks(page.read_text())
    targets = re.findall(r"\]\(<?([^)\s>]+)", text)
    targets += re.findall(r"^\[[^\]]+\]:\s+(\S+)", text, re.MULTILINE)
    targets += re.findall(r"<(?:img|a)\s[^>]*(?:src|href)=[\"']([^\"']+)", text)
    dead = []
    for target in targets:
        path, _, anchor = target.partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and (file.suffix != ".md" or anchor not in anchors(file))):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


@pytest.mark.parametrize(
    "link",
    [
        "[x](other.md)",
        "![x](picture.png)",
        "[x](page.md#nowhere)",
        "[x](#nowhere)",
        "[x](page.md#a-remark)",
        '<img src="picture.png">',
        "[x]: other.md",
        "[x](<other.md>)",
    ],
)
def test_a_dead_link_is_found(tmp_path: Path, link: str) -> None:
    text = "# Page\n## Über `code` & more\n## Same\n## Same\n```sh\n# a remark\nx](y.md)\n```\n"
    good = (
        "[a](page.md) [b](#über-code--more) [c](page.md#same-1) [d](https://x.example/y.md) ![e](there.png)\n"
    )
    (tmp_path / "there.png").touch()
    page = tmp_path / "page.md"
    page.write_text(text + good)
    assert dead_links(page) == []
    page.write_text(text + good + link + "\n")
    assert len(dead_links(page)) == 1


#: Where pages are named without a link: messages, comments, remedies.
NAMING = [
    path
    for pattern in ("roles/**/*", "playbooks/**/*", "module_utils/**/*", "library/*", "scripts/*", "inventory/**/*",
                    "webhook/webhook_api/**/*", "docs/**/*.md", "*.md", "Makefile", "examples/*")
    for path in REPO.glob(pattern)
    if path.suffix in (".yml", ".yaml", ".py", ".j2", ".sh", ".md", ".html", ".example", "") and path.is_file()
]  # fmt: skip


def test_pages_that_are_named_without_a_link_exist() -> None:
    named: dict[str, str] = {}
    for path in NAMING:
        for page in re.findall(r"\bdocs/[\w./-]+?\.md\b", path.read_text(errors="replace")):
            named.setdefault(page, str(path.relative_to(REPO)))
    assert len(named) > 15
    assert {page: where for page, where in named.items() if not (REPO / page).exists()} == {}


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
