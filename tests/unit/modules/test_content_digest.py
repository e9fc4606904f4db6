"""The content digest: what it must notice, what it must not, and Docker's rules for what a build sees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ansible.module_utils.content_digest import (
    ContentError,
    content_digest,
    content_tag,
    ignore_rules,
    is_ignored,
    read_context,
    stage,
)

DOCKERFILE = "ARG BASE\nFROM ${BASE}\nCOPY . /srv\n"


@pytest.fixture
def context(tmp_path: Path) -> Path:
    root = tmp_path / "context"
    (root / "package").mkdir(parents=True)
    (root / "Dockerfile").write_text(DOCKERFILE)
    (root / "package/main.py").write_text("print(1)\n")
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    return root


def digest_of(context: Path, **changes: object) -> str:
    parts = {"dockerfile": DOCKERFILE, "base": "sha256:base", "args": {"A": "1"}} | changes
    return content_digest(read_context(context, context / "Dockerfile"), **parts)


def test_the_same_content_elsewhere_has_the_same_digest(context: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a/checkout/somewhere/else"
    copy.mkdir(parents=True)
    for path in (
        "run.sh",
        "package/main.py",
        "Dockerfile",
    ):  # another order of creation, another umask, other times
        (copy / path).parent.mkdir(exist_ok=True)
        (copy / path).write_bytes((context / path).read_bytes())
        (copy / path).chmod(0o700 if path == "run.sh" else 0o600)
        os.utime(copy / path, (0, 0))
    (copy / "an empty directory").mkdir()
    assert digest_of(copy) == digest_of(context)


def test_content_counts(context: Path) -> None:
    before = digest_of(context)
    (context / "package/main.py").write_text("print(2)\n")
    assert digest_of(context) != before


def test_a_name_counts(context: Path) -> None:
    before = digest_of(context)
    (context / "package/main.py").rename(context / "package/app.py")
    assert digest_of(context) != before


def test_the_executable_bit_counts(context: Path) -> None:
    before = digest_of(context)
    (context / "run.sh").chmod(0o644)
    assert digest_of(context) != before


def test_a_link_counts_as_its_target_and_is_not_followed(context: Path) -> None:
    (context / "link").symlink_to("package/main.py")
    before = digest_of(context)
    (context / "link").unlink()
    (context / "link").symlink_to("run.sh")
    after = digest_of(context)
    (context / "link").unlink()
    (context / "link").write_text("run.sh")
    assert len({before, after, digest_of(context)}) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"dockerfile": DOCKERFILE + "USER 1\n"},
        {"base": "sha256:another"},
        {"args": {"A": "2"}},
        {"args": {}},
        {"labels": {"team": "x"}},
        {"target": "builder"},
    ],
)
def test_everything_else_that_decides_the_content_counts(context: Path, change: dict) -> None:
    assert digest_of(context, **change) != digest_of(context)


def test_content_cannot_pass_for_a_name(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for root, files in ((one, {"ab": "c"}), (two, {"a": "bc"})):
        root.mkdir()
        (root / "Dockerfile").write_text(DOCKERFILE)
        for name, text in files.items():
            (root / name).write_text(text)
    assert digest_of(one) != digest_of(two)


@pytest.mark.parametrize(
    "name", ["package/__pycache__/main.cpython-313.pyc", ".git/HEAD", ".mypy_cache/x", ".main.py.swp"]
)
def test_by_products_never_count(context: Path, name: str) -> None:
    before = digest_of(context)
    (context / name).parent.mkdir(exist_ok=True)
    (context / name).write_text("anything")
    assert digest_of(context) == before


def test_what_dockerignore_leaves_out_does_not_count(context: Path) -> None:
    (context / ".dockerignore").write_text("*\n!Dockerfile\n!package\n**/*.md\n")
    before = digest_of(context)
    (context / "notes.txt").write_text("ignored")
    (context / "run.sh").write_text("ignored as well")
    (context / "package/README.md").write_text("ignored too")
    assert digest_of(context) == before
    (context / "package/new.py").write_text("not ignored")
    assert digest_of(context) != before


def test_a_dockerfile_may_have_an_ignore_file_of_its_own(context: Path) -> None:
    (context / ".dockerignore").write_text("package\n")
    (context / "Dockerfile.dockerignore").write_text("run.sh\n")
    paths = [entry.path for entry in read_context(context, context / "Dockerfile")]
    assert "package/main.py" in paths
    assert "run.sh" not in paths


@pytest.mark.parametrize(
    ("rules", "path", "ignored"),
    [
        ("*.md", "README.md", True),
        ("*.md", "docs/README.md", False),
        ("**/*.md", "docs/deep/README.md", True),
        ("**/*.md", "README.md", True),
        ("docs", "docs/deep/file", True),
        ("docs/", "docs/file", True),
        ("/docs", "docs/file", True),
        ("docs", "other/docs/file", False),
        ("docs/**", "docs/a/b", True),
        ("a/**/z", "a/z", True),
        ("a/**/z", "a/b/c/z", True),
        ("a/**/z", "a/b/c/zz", False),
        ("?.txt", "a.txt", True),
        ("?.txt", "ab.txt", False),
        ("*.py[cod]", "x.pyc", True),
        ("*.py[cod]", "x.py", False),
        ("[a-c].txt", "b.txt", True),
        ("[^a-c].txt", "b.txt", False),
        ("a.b", "aXb", False),
        ("*\n!keep", "keep", False),
        ("*\n!keep", "keep/deep/file", False),
        ("*\n!keep\nkeep/secret", "keep/secret", True),
        ("!keep\n*", "keep", True),
        ("# a comment\n\n   \n", "# a comment", False),
        ("\\!odd", "!odd", True),
        ("  spaced.txt  ", "spaced.txt", True),
        (".", "anything", False),
        ("x/../y", "y", True),
        ("a+b(c)", "a+b(c)", True),
    ],
)
def test_ignore_rules_are_those_of_docker(rules: str, path: str, ignored: bool) -> None:
    assert is_ignored(path, ignore_rules(rules)) is ignored


def test_a_stage_is_exactly_what_was_digested(context: Path, tmp_path: Path) -> None:
    (context / ".dockerignore").write_text("notes\n")
    (context / "notes").write_text("x")
    (context / "link").symlink_to("run.sh")
    entries = read_context(context, context / "Dockerfile")
    destination = tmp_path / "stage"
    destination.mkdir()
    stage(context, entries, destination)
    assert read_context(destination, destination / "Dockerfile") == entries
    assert not (destination / "notes").exists()
    assert (destination / "run.sh").stat().st_mode & 0o777 == 0o755
    assert (destination / "package/main.py").stat().st_mode & 0o777 == 0o644


def test_a_file_that_changes_meanwhile_is_a_fault(context: Path, tmp_path: Path) -> None:
    entries = read_context(context, context / "Dockerfile")
    (context / "package/main.py").write_text("changed\n")
    with pytest.raises(ContentError, match=r"main\.py changed between") as caught:
        stage(context, entries, tmp_path / "stage")
    assert caught.value.reason == "changed"


def test_a_file_that_goes_away_meanwhile_is_a_fault(context: Path, tmp_path: Path) -> None:
    entries = read_context(context, context / "Dockerfile")
    (context / "run.sh").unlink()
    with pytest.raises(ContentError, match=r"run\.sh changed") as caught:
        stage(context, entries, tmp_path / "stage")
    assert caught.value.reason == "changed"


@pytest.mark.parametrize(
    ("context_name", "dockerfile", "reason"),
    [("nowhere", "Dockerfile", "no_context"), ("context", "Containerfile", "no_dockerfile")],
)
def test_what_is_not_there_is_named(context: Path, context_name: str, dockerfile: str, reason: str) -> None:
    root = context.parent / context_name
    with pytest.raises(ContentError, match="There is no") as caught:
        read_context(root, root / dockerfile)
    assert caught.value.reason == reason


def test_a_name_that_is_not_utf8_is_no_obstacle(context: Path) -> None:
    before = digest_of(context)
    Path(os.fsdecode(os.fsencode(context) + b"/\xff\xfe")).write_text("x")
    assert digest_of(context) != before


def test_the_tag_is_a_valid_image_tag() -> None:
    assert content_tag("0123456789abcdef" * 4) == "c-0123456789abcdef"
