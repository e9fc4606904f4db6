"""``doctor``: everything that the service stands on, with a remedy for what is wrong."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from webhook_api.cli.common import EX_FAILED, echo_json, json_option, printable, settings

_MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL", "skip": "skip"}
_COLORS = {"ok": "green", "warn": "yellow", "fail": "red", "skip": None}


@click.command("doctor")
@click.option("--strict", is_flag=True, help="A warning counts as a failure.")
@json_option
def command(strict: bool, as_json: bool) -> None:
    """Look at everything that the service stands on: a verdict for each, and what to do about it.

    Database, schema, rights, stuck deliveries, workers, clocks, Redis, stream, object store, keys, disk, spool, API.
    Takes 12 s at most. Exits 0 when nothing fails, 1 when something does, 78 when the settings cannot be used.
    """
    from webhook_api.config import NEEDS_SERVE
    from webhook_api.doctor import Verdict, examine, standard_checks

    findings = examine(settings(NEEDS_SERVE), standard_checks())
    bad = {Verdict.FAIL, Verdict.WARN} if strict else {Verdict.FAIL}
    well = not any(finding.verdict in bad for finding in findings)
    counts = {verdict.value: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}
    if as_json:
        echo_json({"well": well, "counts": counts, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            mark = click.style(_MARKS[finding.verdict], fg=_COLORS[finding.verdict])
            click.echo(f"{mark}  {finding.check}: {printable(finding.message)}")
            if finding.remedy:
                click.echo(f"      -> {printable(finding.remedy)}")
        click.echo(", ".join(f"{number} {verdict}" for verdict, number in counts.items() if number))
    if not well:
        sys.exit(EX_FAILED)
