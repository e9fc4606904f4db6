"""The command line as an operator types it, in this process, with an environment of the test's own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from webhook_api.cli import main

PREFIXES = ("DATABASE", "REDIS", "MINIO", "FAL", "WEBHOOK", "INSTANCE", "SUDO", "SPOOL", "ENVIRONMENT")


def typed(env: Mapping[str, str], *arguments: str | int | Path, answer: str | None = None) -> Result:
    """Run `webhook-api ARGUMENTS`. Nothing of the tests' own environment is seen."""
    clean = {name: None for name in os.environ if name.startswith(PREFIXES)}
    result = CliRunner().invoke(main, [str(item) for item in arguments], env={**clean, **env}, input=answer)
    assert "Traceback" not in result.output
    return result


def good(env: Mapping[str, str], *arguments: str | int | Path) -> Result:
    """The same, and it must succeed."""
    result = typed(env, *arguments)
    assert result.exit_code == 0, f"{arguments}: exit code {result.exit_code}\n{result.output}"
    return result


def document(env: Mapping[str, str], *arguments: str | int | Path) -> Any:
    """The one JSON document that a successful command prints."""
    return json.loads(good(env, *arguments, "--json").stdout)


def lines(env: Mapping[str, str], *arguments: str | int | Path) -> list[Any]:
    """The JSON objects that a successful command prints, one a line."""
    return [json.loads(line) for line in good(env, *arguments, "--json").stdout.splitlines()]
