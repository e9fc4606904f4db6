#!/usr/bin/env python3
"""Asks PyPI for known vulnerabilities of everything that the locked requirements name (pip-audit).

pip-audit says "No known vulnerabilities found" also where it found nobody to ask: each package is then skipped. Here that
is told as what it is.

Exit status: 0 nothing is known; 1 vulnerabilities are known; 3 the data could not be reached, nothing was audited
(with --if-reachable that is 0, for machines without a way to PyPI's own service).
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from packaging.version import Version
from pip_audit._service import PyPIService, ResolvedDependency, ServiceError

REPO = Path(__file__).resolve().parent.parent
#: A version that is known to be vulnerable: mirrors of the index may have pages of projects, and no vulnerability data.
KNOWN = ResolvedDependency("pip", Version("25.0"))
TIMEOUT = 10
UNREACHABLE = 3


@dataclass(frozen=True)
class Verdict:
    """What an audit came to: known vulnerabilities, and packages that nothing could be learned of."""

    found: list[str]
    skipped: list[str]
    audited: int


def verdict(report: dict[str, Any]) -> Verdict:
    """Read pip-audit's JSON report."""
    found, skipped, audited = [], [], 0
    for entry in report.get("dependencies", []):
        if "skip_reason" in entry:
            skipped.append(entry["name"])
            continue
        audited += 1
        for known in entry.get("vulns", []):
            fixed = ", ".join(known.get("fix_versions", [])) or "no version yet"
            names = " ".join([known["id"], *known.get("aliases", [])])
            found.append(f"{entry['name']} {entry['version']}: {names}; mended in {fixed}")
    return Verdict(sorted(set(found)), sorted(set(skipped)), audited)


def locks() -> list[Path]:
    """All locked requirements of the repository."""
    return sorted(
        path
        for path in REPO.glob("**/*requirements*.txt")
        if not {".venv", ".cache", "node_modules"} & set(path.relative_to(REPO).parts)
    )


def why_unreachable() -> str:
    """Why the vulnerability data can't be had here; empty when it can."""
    try:
        _, known = PyPIService(timeout=TIMEOUT).query(KNOWN)
    except (ServiceError, requests.RequestException) as error:
        return f"Asking it failed: {type(error).__name__}"
    return (
        ""
        if known
        else "It knows nothing of a version with known vulnerabilities (a mirror of the index may have none)"
    )


def audit(files: list[Path]) -> Verdict:
    """Run pip-audit over the files; nothing is installed or resolved, since they are locked."""
    command = [sys.executable, "-m", "pip_audit", "--require-hashes", "--disable-pip", "--format", "json"]
    command += [
        "--progress-spinner",
        "off",
        *(word for file in files for word in ("--requirement", str(file))),
    ]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    try:
        return verdict(json.loads(run.stdout))
    except ValueError:
        sys.exit(f"pip-audit gave no report (exit status {run.returncode}):\n{run.stderr[-2000:]}")


def main() -> int:
    """Audit, and say what came of it."""
    if reason := why_unreachable():
        print(f"Nothing was audited: PyPI's vulnerability data can't be reached from here. {reason}.")
        print("Where it can be, `make audit` asks it; `make lint` does so by itself there.")
        return 0 if "--if-reachable" in sys.argv[1:] else UNREACHABLE
    files = locks()
    result = audit(files)
    for line in result.found:
        print(line)
    if result.skipped:
        print(f"Not audited: {', '.join(result.skipped)}")
    print(
        f"{result.audited} packages of {len(files)} files audited, {len(result.found)} known vulnerabilities."
    )
    if result.found:
        return 1
    return UNREACHABLE if result.skipped and not result.audited else 0


if __name__ == "__main__":
    sys.exit(main())
