"""The state of a site, as module_utils/site_status.py saw it, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

REASON = 300
"""Characters of a reason that are shown."""


def lines(shown: Mapping[str, Any]) -> Iterator[str]:
    """The state for people."""
    release = shown["release"]
    if release:
        before = f", before it {release['previous']}" if release["previous"] else ""
        yield f"release {release['id']} ({release['webhook_release']}) since {release['since']}{before}"
        for name, image in release["images"].items():
            yield f"  image {name}: {image}"
    for service in [*shown["services"], *shown.get("embedded", [])]:
        health = f", {service['health']}" if service["health"] else ""
        since = f"since {service['since'] or 'never'}, restarts {service['restarts']}"
        yield f"  {service['container']}: {service['status']}{health}, {since}"
    for name, instance in (shown.get("instances") or {}).items():
        spool = instance.get("spool") or {}
        waits = f", spool {spool.get('rows')} waiting" if spool else ""
        inbox = ", ".join(
            f"{key} {value}" for key, value in (instance.get("inbox") or {}).items() if isinstance(value, int)
        )
        yield f"  /health of {name}: {instance['status']}, release {instance.get('release') or 'unknown'}{waits}"
        if inbox:
            yield f"    inbox: {inbox}"
    if certificate := shown.get("certificate"):
        left, until = certificate["days_left"], certificate["not_after"]
        yield f"  certificate: {left} days left, until {until} ({certificate['file']})"
    for disk in shown["disk"]:
        yield f"  disk {disk['path']}: {disk['free_mb']} of {disk['total_mb']} MB free"
    yield f"  lock: {shown['lock']['described'] if shown['lock'] else 'nobody deploys'}"
    for record in shown["deployments"]:
        yield f"  {_told(record)}"
    for kept in shown["releases"]:
        marks = [mark for mark in ("current", "previous", "staged") if kept[mark]] + (
            [] if kept["whole"] else ["DAMAGED"]
        )
        yield f"  release {kept['id']} of {str(kept['created'])[:19]}{', ' + ', '.join(marks) if marks else ''}"
    for finding in shown["findings"]:
        yield f"  NOT AS IT SHOULD BE: {finding['kind']} {finding['name']}: {finding['what']}"
    if shown["ok"]:
        yield "  all is as the release says"


def _told(record: Mapping[str, Any]) -> str:
    # All lines: the first one often only announces what the next one names.
    words = " ".join(str(record.get("reason") or "").split())
    reason = f" ({words[:REASON]}{'…' if len(words) > REASON else ''})" if words else ""
    seconds = f", {record['seconds']} s" if record.get("seconds") is not None else ""
    way = f"{record.get('from') or 'nothing'} -> {record.get('to')}"
    return f"{record['id']} {record['kind']} by {record.get('who') or 'unknown'}: {record['result']}{reason}, {way}{seconds}"
