"""``webhook-api doctor``: everything that the service stands on, looked at once, with a remedy for what is wrong.

A check is a function from settings to findings; it never changes anything but an object of its own in the bucket, which
it removes again. Checks run side by side and are bounded, so that a backend that hangs costs its own verdict only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from webhook_api.config import Settings

SECONDS: Final = 12.0
"""For all checks together."""


class Verdict(StrEnum):
    """What a finding means."""

    OK = "ok"
    WARN = "warn"
    """Works, but an operator should know."""
    FAIL = "fail"
    """Deliveries are refused, wait, or are lost track of."""
    SKIP = "skip"
    """Could not be looked at here, or is not configured."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One verdict. ``remedy`` says what to do; it is empty only when all is well."""

    check: str
    verdict: Verdict
    message: str
    remedy: str = ""
    detail: dict[str, Any] = field(default_factory=dict)


Check = Callable[[Settings], Iterable[Finding]]


def ok(check: str, message: str, **detail: Any) -> Finding:
    """All is well."""
    return Finding(check, Verdict.OK, message, detail=detail)


def warn(check: str, message: str, remedy: str, **detail: Any) -> Finding:
    """It works; somebody should look at it."""
    return Finding(check, Verdict.WARN, message, remedy, detail)


def fail(check: str, message: str, remedy: str, **detail: Any) -> Finding:
    """It does not work."""
    return Finding(check, Verdict.FAIL, message, remedy, detail)


def skip(check: str, message: str, remedy: str = "") -> Finding:
    """It could not be looked at."""
    return Finding(check, Verdict.SKIP, message, remedy)


def examine(
    settings: Settings, checks: Sequence[tuple[str, Check]], seconds: float | None = None
) -> list[Finding]:
    """Run the checks side by side; in the order of ``checks``, whatever their speed. Takes ``seconds`` (SECONDS) at most."""
    seconds = SECONDS if seconds is None else seconds
    found: dict[str, list[Finding]] = {}
    threads = [
        threading.Thread(target=_run, args=(name, check, settings, found), name=f"doctor-{name}", daemon=True)
        for name, check in checks
    ]
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    silent = "it hangs: look at the host that it stands on, and at the network between"
    return [
        finding
        for name, _ in checks
        for finding in found.get(name) or [fail(name, f"gave no answer within {seconds:.0f} s", silent)]
    ]


def _run(name: str, check: Check, settings: Settings, found: dict[str, list[Finding]]) -> None:
    try:
        findings = list(check(settings))
    except Exception as error:
        said = (str(error) or type(error).__name__).splitlines()[0][:300]
        findings = [
            fail(
                name, f"the check itself failed: {type(error).__name__}: {said}", "report it, with this line"
            )
        ]
    found[name] = findings


def standard_checks() -> list[tuple[str, Check]]:
    """All checks by name."""
    from webhook_api.doctor import backends, database, local

    return [
        ("settings", local.settings_in_force),
        ("database", database.server),
        ("schema", database.schema),
        ("rights", database.rights),
        ("deliveries", database.deliveries),
        ("worker", database.workers),
        ("clock", backends.clocks),
        ("redis", backends.redis_server),
        ("stream", backends.stream),
        ("object store", backends.object_store),
        ("keys", backends.keys),
        ("disk", local.disk),
        ("spool", local.spool),
        ("api", local.api),
    ]
