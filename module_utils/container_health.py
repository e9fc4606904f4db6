"""Waiting until containers are healthy, and saying precisely why when they are not.

`judge` is pure: it looks at one inspected container and says ready, wait or failed. `HealthGate` brings the news:
through the engine's events, and by asking again at intervals when the stream breaks.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from ansible.module_utils.docker_engine import EngineError

Outcome = Literal["ready", "wait", "failed"]

ACTIONS = ["start", "die", "oom", "stop", "destroy", "pause", "unpause", "restart", "rename", "health_status"]
#: With the stream of events this is only a net under it; without, it is how news arrives.
NET_INTERVAL, POLL_INTERVAL = 5.0, 0.5
#: A container that lived no longer than this before it was restarted is in a loop (the engine's own measure).
SHORT_LIFE = 10.0
HEALTH_LOG_ENTRIES, HEALTH_OUTPUT_LIMIT = 5, 2000
NEVER = "0001-01-01T00:00:00Z"

REMEDIES = {
    "missing": "Start it (ansible-playbook site.yml --tags rollout)",
    "crash_loop": "Read its last log lines below, mend what they name, and deploy again",
    "exited": "Read its last log lines below; start it again with the rollout",
    "start_failed": "Mend what the engine names; often a port that is taken or a file that is not there",
    "unhealthy": "Read the output of its health check and its last log lines below",
    "paused": "docker unpause it",
    "no_healthcheck": "Give the service a healthcheck in the Compose file",
    "wrong_image": "Replace the container (ansible-playbook site.yml --tags rollout)",
    "wrong_label": "Replace the container (ansible-playbook site.yml --tags rollout)",
    "timeout": "If it only starts slowly, raise the timeout; otherwise read its last log lines below",
}
EXIT_CODES = {
    78: "a setting is missing or wrong (EX_CONFIG)",
    126: "its command cannot be executed",
    127: "its command was not found",
    137: "killed (SIGKILL)",
    139: "it crashed (SIGSEGV)",
    143: "terminated (SIGTERM)",
}


class EngineView(Protocol):
    """What the gate needs of an engine (`docker_engine.Engine`)."""

    def inspect(self, name: str) -> dict[str, Any] | None:
        """One container, or None."""

    def image_names(self, image: str) -> list[str]:
        """All names of an image."""

    def last_lines(self, name: str, lines: int) -> list[str]:
        """The end of a log."""

    def events(self, since: int, names: list[str], actions: list[str]) -> Any:
        """A stream of events with close()."""


@dataclass(frozen=True)
class Wanted:
    """One container to wait for. Times in seconds."""

    name: str
    timeout: float = 60.0
    require_healthcheck: bool = False
    expect_image: str | None = None
    expect_labels: Mapping[str, str] = field(default_factory=dict)
    max_restarts: int = 2
    unhealthy_grace: float = 10.0
    settle: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """What one look came to: outcome, a reason for programs and a sentence for people."""

    outcome: Outcome
    reason: str
    text: str = ""


@dataclass
class Memory:
    """What earlier looks at a container have shown."""

    baseline_restarts: int | None = None
    unhealthy_since: float | None = None


def judge(
    wanted: Wanted, found: Mapping[str, Any] | None, memory: Memory, now: float, wall: datetime
) -> Verdict:
    """Say whether a container is ready, may become so, or never will. `now` is monotonic, `wall` UTC time."""
    if found is None:
        return Verdict("failed", "missing", "there is no such container")
    state = found["State"]
    restarts = int(found.get("RestartCount", 0))
    if memory.baseline_restarts is None or restarts < memory.baseline_restarts:
        memory.baseline_restarts = restarts  # fewer than before: another container took the name
    status = state.get("Status", "")
    wrong = _wrong_label(wanted, found)
    if wrong:
        return wrong
    if _loops(wanted, state, restarts, restarts - memory.baseline_restarts):
        # While it runs once more, the engine may know no exit code of the time before, and says 0.
        forgotten = state.get("Status") == "running" and not state.get("ExitCode")
        last = "" if forgotten else f", {exit_text(state)}"
        text = f"it crashes again and again ({restarts} restarts when that was seen{last})"
        return Verdict("failed", "crash_loop", text)
    if status == "running":
        return _judge_running(wanted, found, memory, now, wall)
    if status in ("exited", "dead"):
        return Verdict("failed", "exited", f"it has ended ({exit_text(state)}), and nothing restarts it")
    if status == "paused":
        return Verdict("failed", "paused", "it is paused")
    if status == "created" and state.get("Error"):
        return Verdict("failed", "start_failed", f"the engine could not start it: {state['Error'][:500]}")
    return Verdict("wait", status or "unknown", f"it is {status or 'in an unknown state'}")


def _wrong_label(wanted: Wanted, found: Mapping[str, Any]) -> Verdict | None:
    labels = found.get("Config", {}).get("Labels") or {}
    for name, value in wanted.expect_labels.items():
        if labels.get(name) != value:
            has = f"is {labels[name]!r}" if name in labels else "is not set"
            return Verdict("failed", "wrong_label", f"its label {name} {has}, expected {value!r}")
    return None


def _loops(wanted: Wanted, state: Mapping[str, Any], restarts: int, rising: int) -> bool:
    if rising >= wanted.max_restarts:
        return True
    if state.get("Status") != "restarting" or restarts < wanted.max_restarts:
        return False
    started, finished = parse_time(state.get("StartedAt")), parse_time(state.get("FinishedAt"))
    return bool(started and finished and (finished - started).total_seconds() < SHORT_LIFE)


def _judge_running(
    wanted: Wanted, found: Mapping[str, Any], memory: Memory, now: float, wall: datetime
) -> Verdict:
    health = found["State"].get("Health") or {}
    status = health.get("Status", "none")
    if status != "unhealthy":
        memory.unhealthy_since = None
    if status == "healthy":
        return Verdict("ready", "healthy")
    if status == "starting":
        return Verdict("wait", "starting", "its health check has not passed yet")
    if status == "unhealthy":
        since = memory.unhealthy_since = now if memory.unhealthy_since is None else memory.unhealthy_since
        outcome: Outcome = "failed" if now - since >= wanted.unhealthy_grace else "wait"
        streak = health.get("FailingStreak", 0)
        return Verdict(outcome, "unhealthy", f"its health check fails ({streak} times in a row)")
    if wanted.require_healthcheck:
        return Verdict("failed", "no_healthcheck", "it runs, but has no health check")
    started = parse_time(found["State"].get("StartedAt"))
    if started and (wall - started).total_seconds() < wanted.settle:
        return Verdict("wait", "settling", "it has only just started")
    return Verdict("ready", "running")


def parse_time(text: str | None) -> datetime | None:
    """A time as the engine writes it (RFC 3339, up to nanoseconds); None when it never happened."""
    if not text or text == NEVER:
        return None
    seconds, _, fraction = text.rstrip("Z").partition(".")
    try:
        moment = datetime.fromisoformat(seconds).replace(tzinfo=UTC)
        return moment.replace(microsecond=int(fraction[:6].ljust(6, "0")) if fraction else 0)
    except ValueError:
        return None


def exit_text(state: Mapping[str, Any]) -> str:
    """The last exit in words: code, what the code means, and whether memory ran out."""
    code = int(state.get("ExitCode", 0))
    if state.get("OOMKilled"):
        return f"exit code {code}: out of memory, raise its memory limit"
    meaning = EXIT_CODES.get(code)
    return f"exit code {code}" + (f": {meaning}" if meaning else "")


def describe(wanted: Wanted, found: Mapping[str, Any] | None, verdict: Verdict) -> dict[str, Any]:
    """What the module returns of one container, apart from its log."""
    result: dict[str, Any] = {
        "name": wanted.name,
        "ok": verdict.outcome == "ready",
        "reason": verdict.reason,
        "detail": verdict.text,
        "status": "missing",
    }
    if found is None:
        return result
    state, health = found["State"], found["State"].get("Health") or {}
    return result | {
        "id": found.get("Id", ""),
        "image": found.get("Config", {}).get("Image", ""),
        "image_id": found.get("Image", ""),
        "status": state.get("Status", ""),
        "health": health.get("Status", "none"),
        "exit_code": state.get("ExitCode", 0),
        "oom_killed": bool(state.get("OOMKilled")),
        "error": state.get("Error", ""),
        "restart_count": found.get("RestartCount", 0),
        "started_at": state.get("StartedAt", ""),
        "health_log": [
            {
                "end": entry.get("End", ""),
                "exit_code": entry.get("ExitCode", 0),
                "output": str(entry.get("Output", ""))[-HEALTH_OUTPUT_LIMIT:],
            }
            for entry in (health.get("Log") or [])[-HEALTH_LOG_ENTRIES:]
        ],
    }


def failure_message(results: list[dict[str, Any]]) -> str:
    """One message for all containers that are not ready: what, why, the last words, and the remedy."""
    bad = [result for result in results if not result["ok"]]
    parts = [f"{len(bad)} of {len(results)} containers are not ready."]
    for result in bad:
        reason = result["reason"]
        remedy = REMEDIES.get(reason, REMEDIES["timeout"])
        parts.append(f"{result['name']}: {result['detail']}. {remedy}.")
        checks = [entry["output"].strip() for entry in result.get("health_log", []) if entry["exit_code"]]
        if checks:
            parts.append(f"  health check: {checks[-1][:500]}")
        parts += [f"  log: {line[:300]}" for line in result.get("log", [])[-10:]]
    return "\n".join(parts)


@dataclass
class Watched:
    """One wish of the caller, what earlier looks have shown, and the last look with its verdict."""

    wanted: Wanted
    memory: Memory = field(default_factory=Memory)
    found: Mapping[str, Any] | None = None
    verdict: Verdict = Verdict("wait", "unknown")


class HealthGate:
    """Waits for containers. Clock, wall clock and engine are given, so that a test can be all of them."""

    def __init__(
        self,
        engine: EngineView,
        wanted: list[Wanted],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._engine = engine
        self._watched = [Watched(item) for item in wanted]
        self._clock = clock
        self._wall = wall
        self.events_used = False

    def look(self) -> list[dict[str, Any]]:
        """One look at every container, without waiting."""
        for item in self._watched:
            self._look_at(item)
        return self._results()

    def wait(self) -> list[dict[str, Any]]:
        """Wait until each container is ready, has failed, or is out of time. Says which in the results."""
        start = self._clock()
        names = sorted({item.wanted.name for item in self._watched})
        news = EventStream(self._engine, names, int(self._wall().timestamp()) - 1)
        self.events_used = not news.broken
        try:
            # The subscription stands before the first look: nothing can happen unseen in between.
            waiting = self._watched
            while waiting := [item for item in waiting if not self._settled(item, start)]:
                news.wait(self._pause(waiting, start, broken=news.broken))
        finally:
            news.close()
        return self._results()

    def _settled(self, item: Watched, start: float) -> bool:
        self._look_at(item)
        waited = self._clock() - start
        if item.verdict.outcome == "wait" and waited >= item.wanted.timeout:
            text = f"not ready after {waited:.0f} s: {item.verdict.text}"
            item.verdict = Verdict("failed", "timeout", text)
        return item.verdict.outcome != "wait"

    def _pause(self, items: list[Watched], start: float, *, broken: bool) -> float:
        """Until when there may be no news at most, before time itself changes a verdict."""
        now = self._clock()
        pauses = [POLL_INTERVAL if broken else NET_INTERVAL]
        for item in items:
            pauses.append(start + item.wanted.timeout - now)
            if item.verdict.reason == "settling":
                pauses.append(item.wanted.settle)
            since = item.memory.unhealthy_since
            if since is not None:
                pauses.append(since + item.wanted.unhealthy_grace - now)
        return max(min(pauses), 0.02)

    def _look_at(self, item: Watched) -> None:
        wanted, found = item.wanted, self._engine.inspect(item.wanted.name)
        verdict = judge(wanted, found, item.memory, self._clock(), self._wall())
        if found is not None and verdict.outcome != "failed" and wanted.expect_image:
            verdict = self._judge_image(wanted.expect_image, found) or verdict
        item.found, item.verdict = found, verdict

    def _judge_image(self, expected: str, found: Mapping[str, Any]) -> Verdict | None:
        configured = found.get("Config", {}).get("Image", "")
        if expected in (configured, found.get("Image")) or expected in self._engine.image_names(
            found["Image"]
        ):
            return None
        return Verdict("failed", "wrong_image", f"it runs {configured}, expected {expected}")

    def _results(self) -> list[dict[str, Any]]:
        return [describe(item.wanted, item.found, item.verdict) for item in self._watched]


class EventStream:
    """News of containers from the engine; `broken` when there is none, or no longer."""

    def __init__(self, engine: EngineView, names: list[str], since: int) -> None:
        self._news: queue.Queue[bool] = queue.Queue()
        self.broken = False
        self._closing = False
        self._stream: Any = None
        try:
            # `since` lies in the past: the engine answers before it subscribes, and replays what lies between.
            self._stream = engine.events(since, names, ACTIONS)
        except EngineError:
            self.broken = True
            return
        threading.Thread(target=self._read, name="docker-events", daemon=True).start()

    def _read(self) -> None:
        # Whatever ends the stream, asking at intervals takes its place. In a thread nobody else would hear of it.
        with suppress(Exception):
            for _ in self._stream:
                self._news.put(True)
        if not self._closing:
            self.broken = True
            self._news.put(True)

    def wait(self, seconds: float) -> None:
        """Return at the next event, or after `seconds`. Events that came together count as one."""
        with suppress(queue.Empty):
            self._news.get(timeout=seconds)
            while True:
                self._news.get_nowait()

    def close(self) -> None:
        """End the subscription."""
        self._closing = True
        if self._stream is not None:
            with suppress(Exception):  # it may have ended by itself, in any of the SDK's ways
                self._stream.close()
