"""What is installed is locked by hashes, everywhere; and an audit that asked nobody says so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import audit

REPO = audit.REPO
FIXTURE = {
    "dependencies": [
        {"name": "flask", "version": "3.1.0", "vulns": []},
        {
            "name": "jinja2",
            "version": "3.1.0",
            "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-2026-1"], "fix_versions": ["3.1.6"]}],
        },
        {"name": "ours", "skip_reason": "Dependency not found on PyPI and could not be audited: ours (1)"},
    ]
}


def requirements(path: Path) -> list[str]:
    """The requirements of a file, one string each, without comments."""
    text = re.sub(r"(^|\s)#.*$", "", path.read_text(), flags=re.MULTILINE)
    return [line.strip() for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]


@pytest.mark.parametrize("path", audit.locks(), ids=lambda path: str(path.relative_to(REPO)))
def test_every_requirement_is_pinned_and_hashed(path: Path) -> None:
    lines = requirements(path)
    assert lines
    for line in lines:
        assert re.match(r"[\w.\[\]-]+==\S+", line), f"{line[:80]} is not pinned"
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", line), f"{line[:80]} has no hash"


def test_all_locks_are_found() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*requirements*.txt"], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert {REPO / name for name in listed.stdout.split()} <= set(audit.locks())


def test_nothing_is_installed_from_an_index_without_hashes() -> None:
    places = [*REPO.glob("**/Dockerfile"), *REPO.glob("scripts/*.sh")]
    places = [path for path in places if ".venv" not in path.parts and ".cache" not in path.parts]
    commands = [
        (path, match[0])
        for path in places
        for match in re.finditer(r"\bpip\b[^;\n]*\binstall\s+-(?:\\\n|[^;\n])*", path.read_text())
    ]
    assert len(commands) >= 3
    for path, command in commands:
        assert "--require-hashes" in command or "--no-index" in command, f"{path}: {command}"


def test_an_audit_says_what_it_found_and_what_it_could_not_ask_for() -> None:
    seen = audit.verdict(FIXTURE)
    assert seen.found == ["jinja2 3.1.0: PYSEC-1 CVE-2026-1; mended in 3.1.6"]
    assert (seen.skipped, seen.audited) == (["ours"], 2)


def test_an_audit_without_a_way_to_the_data_is_no_good_news() -> None:
    closed = "http://127.0.0.1:9"
    environment = {**os.environ, "HTTPS_PROXY": closed, "https_proxy": closed, "NO_PROXY": "", "no_proxy": ""}
    command = [sys.executable, "scripts/audit.py"]
    run = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == audit.UNREACHABLE, run.stderr
    assert "Nothing was audited" in run.stdout
    lint = subprocess.run(
        [*command, "--if-reachable"], cwd=REPO, env=environment, capture_output=True, text=True, check=False
    )
    assert (lint.returncode, lint.stdout) == (0, run.stdout)
