"""What is known of a container that failed, taken before it is removed, and told in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ansible.module_utils.container_health import Verdict, Wanted, describe, exit_text
from ansible.module_utils.docker_engine import Engine, EngineError

SHOWN_LINES, SHOWN_CHARACTERS = 15, 400
LOOKS, PAUSE = 25, 0.2


def collect(
    engine: Engine, container: str, lines: int, sleep: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """State, exit code, health log and last log lines of a container; empty when there is none."""
    try:
        found = _at_rest(engine, container, sleep)
    except EngineError:
        return {}
    if found is None:
        return {}
    known = describe(Wanted(found["Name"].lstrip("/")), found, Verdict("failed", ""))
    keys = ("name", "status", "health", "exit_code", "oom_killed", "error", "restart_count", "health_log")
    shown = {key: known[key] for key in keys if key in known}
    ended = known["exit_code"] or known["oom_killed"] or known["status"] in ("exited", "dead", "restarting")
    return shown | {
        "exit": exit_text(found["State"]) if ended else "",
        "log": engine.last_lines(found["Id"], lines),
    }


def _at_rest(engine: Engine, container: str, sleep: Callable[[float], None]) -> dict[str, Any] | None:
    """Inspected; one that crashes again and again in between: while it runs, its last exit code is not to be seen."""
    found: dict[str, Any] | None = None
    for _ in range(LOOKS):
        found = engine.inspect(container)
        if found is None or not found.get("RestartCount") or found["State"].get("Status") != "running":
            break
        sleep(PAUSE)
    return found


def tell(evidence: Mapping[str, Any]) -> list[str]:
    """Lines for a message."""
    if not evidence:
        return []
    name = evidence["name"]
    health = evidence.get("health", "none")
    state = f"{name}: {evidence.get('status')}" + ("" if health == "none" else f", {health}")
    if evidence.get("exit"):
        state += f", last {evidence['exit']}"
    if evidence.get("restart_count"):
        state += f", {evidence['restart_count']} restarts"
    lines = [state]
    if evidence.get("error"):
        lines.append(f"  the engine said: {evidence['error'][:SHOWN_CHARACTERS]}")
    checks = [entry["output"].strip() for entry in evidence.get("health_log", []) if entry["exit_code"]]
    if checks:
        lines.append(f"  health check: {checks[-1][:SHOWN_CHARACTERS]}")
    return lines + [f"  log: {line[:SHOWN_CHARACTERS]}" for line in evidence.get("log", [])[-SHOWN_LINES:]]
