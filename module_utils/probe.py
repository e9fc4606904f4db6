"""A probe from outside to the last backend: health addresses, then one signed delivery followed to all it leaves.

The delivery is signed as fal.ai signs (Ed25519 over request id, user id, timestamp and the body's SHA-256, separated
by newlines), or carries the shared secret. Its request id starts with ``probe-``, so the service keeps it apart.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ansible.module_utils.docker_engine import EngineError

REQUESTS_IMPORT_ERROR: str | None = None
try:
    import requests
    import urllib3
except ImportError:  # reported by the module, with the package to install
    REQUESTS_IMPORT_ERROR = traceback.format_exc()

PREFIX = "probe-"
POLL_SECONDS = 0.3
REMOVE_SECONDS = 10.0
ANSWER_SHOWN = 300
TRACED = ("row", "effects", "stream", "object")
_SEED = re.compile(r"^[0-9a-fA-F]{64}$")

REMEDIES = {
    "health": "Look at the log of the instance behind this address, and at what its 'checks' call not ok",
    "delivery": "401: key or secret here and in the service differ, or the clocks do; 404 or 502: look at nginx's log; "
    "503: its database is away",
    "row": "Look at the worker's log; webhook-api trace shows where the delivery is",
    "effects": "Look at the worker's log for the effect that is named; it is retried once its backend answers",
    "stream": "Check Redis: address, password, and that it takes writes",
    "object": "Check the object store: address, keys, bucket",
    "removed": "Remove it with: webhook-api trace REQUEST_ID --remove",
}


class ProbeError(Exception):
    """The probe cannot be made at all. `reason`: no_key, bad_key, no_signer, bad_parameters."""

    def __init__(self, reason: str, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}. {remedy}".strip() if remedy else message)
        self.reason = reason


@dataclass(frozen=True)
class Address:
    """One address to ask, and what is expected of it. `verify` as `requests` takes it."""

    url: str
    verify: bool | str = True
    accept: tuple[str, ...] = ("healthy",)
    version: str | None = None
    release: str | None = None


@dataclass
class Check:
    """What came of one check."""

    kind: str
    name: str
    ok: bool
    latency_ms: float
    detail: str = ""

    def as_result(self) -> dict[str, Any]:
        """As the module returns it."""
        return {
            "check": self.kind,
            "name": self.name,
            "ok": self.ok,
            "latency_ms": self.latency_ms,
            "detail": self.detail,
        }


class Container(Protocol):
    """What the probe needs of an engine (`docker_engine.Engine`)."""

    def run_in(self, name: str, command: list[str]) -> tuple[int, str, str]:
        """Run an argument list in a container: exit code, output, error output."""


# The delivery


def read_secret(path: str, what: str) -> str:
    """The one line of a secret file."""
    try:
        text = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(
            "no_key", f"{what} {path} cannot be read: {error}", "Run --tags secrets first"
        ) from error
    if not text:
        raise ProbeError("no_key", f"{what} {path} is empty", "Run --tags secrets first")
    return text


def ed25519_sign(seed_hex: str, message: bytes) -> bytes:
    """Sign with an Ed25519 seed (64 hex digits), by PyNaCl or else by cryptography."""
    if not _SEED.match(seed_hex):
        raise ProbeError("bad_key", "the signing key is not a seed of 64 hexadecimal digits", "Make it anew")
    seed = bytes.fromhex(seed_hex)
    try:
        from nacl.signing import SigningKey

        return bytes(SigningKey(seed).sign(message).signature)
    except ImportError:
        pass
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError as error:
        raise ProbeError(
            "no_signer", "neither PyNaCl nor cryptography is installed here", "Install python3-nacl"
        ) from error
    return Ed25519PrivateKey.from_private_bytes(seed).sign(message)


def fal_headers(request_id: str, user_id: str, timestamp: int, body: bytes, seed_hex: str) -> dict[str, str]:
    """The four headers of a delivery by fal. Source: fal's documentation of webhooks, "Verification"."""
    digest = hashlib.sha256(body).hexdigest()
    message = "\n".join([request_id, user_id, str(timestamp), digest]).encode()
    return {
        "X-Fal-Webhook-Request-Id": request_id,
        "X-Fal-Webhook-User-Id": user_id,
        "X-Fal-Webhook-Timestamp": str(timestamp),
        "X-Fal-Webhook-Signature": ed25519_sign(seed_hex, message).hex(),
    }


def make_delivery(
    request_id: str, now: float, *, seed_hex: str = "", user_id: str = "", secret: str = ""
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a probe delivery: fal's shape with a key, the old shape with a secret."""
    if seed_hex:
        content: dict[str, Any] = {"request_id": request_id, "gateway_request_id": request_id, "status": "OK"}
        content["payload"] = {"probe": True}
    else:
        content = {"request_id": request_id, "status": "completed", "message": "probe"}
    body = json.dumps(content, separators=(",", ":")).encode()
    headers = {"Content-Type": "application/json"}
    if seed_hex:
        headers |= fal_headers(request_id, user_id, int(now), body, seed_hex)
    else:
        headers["X-Webhook-Secret"] = secret
    return body, headers


# Judging answers: pure


def health_fault(address: Address, status: int, text: str) -> str:
    """What is wrong with an answer of a health address; empty when nothing is."""
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        return f"HTTP {status}, no JSON: {text[:ANSWER_SHOWN]!r}"
    bad = [
        f"{name} ({check.get('error', 'not ok')})"
        for name, check in (answer.get("checks") or {}).items()
        if isinstance(check, dict) and not check.get("ok", True)
    ]
    broken = f"; not ok: {', '.join(bad)}" if bad else ""
    if status != 200:
        return f"HTTP {status}, expected 200 (status {answer.get('status')!r}){broken}"
    if answer.get("status") not in address.accept:
        return f"status is {answer.get('status')!r}, expected {' or '.join(address.accept)}{broken}"
    for key, expected in (("version", address.version), ("release", address.release)):
        if expected and answer.get(key) != expected:
            return f"{key} is {answer.get(key)!r}, expected {expected!r}: another one answers here"
    return ""


@dataclass(frozen=True)
class Traced:
    """How far a delivery has come: which parts are there, what is missing, and whether it is hopeless."""

    row: bool = False
    effects: bool = False
    stream: bool = False
    object: bool = False
    hopeless: bool = False
    removed: bool = False
    detail: str = "no row yet"
    problems: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether everything is where it belongs."""
        return self.row and self.effects and self.stream and self.object


def read_trace(document: Mapping[str, Any]) -> Traced:
    """Judge what ``webhook-api trace REQUEST_ID --json`` printed."""
    deliveries = document.get("deliveries") or []
    removed = "removed" in document
    if not deliveries:
        return Traced(removed=removed)
    row = deliveries[0]
    state, problems = str(row.get("state")), {}
    failed = [
        f"{effect.get('name')}: {effect.get('last_error') or 'failed'}"
        for effect in row.get("effects") or []
        if effect.get("state") == "failed"
    ]
    if state != "done":
        error = f", last error: {row['last_error']}" if row.get("last_error") else ""
        problems["row"] = f"the row is in state {state} after {row.get('tries', 0)} tries{error}"
    if failed:
        problems["effects"] = "; ".join(failed)
    entry = row.get("stream_entry")
    if not entry or entry.get("error"):
        problems["stream"] = (entry or {}).get("error") or "there is no stream entry"
    objects = row.get("objects") or []
    absent = [str(item.get("error") or item.get("key")) for item in objects if not item.get("exists")]
    if not objects or absent:
        problems["object"] = f"not in the bucket: {', '.join(absent)}" if absent else "no object was archived"
    return Traced(
        row=state == "done",
        effects=not failed,
        stream="stream" not in problems,
        object="object" not in problems,
        hopeless=state == "dead",
        removed=removed,
        detail="; ".join(problems.values()),
        problems=problems,
    )


def _trace_checks(
    traced: Traced, fault: str, request_id: str, reached: Mapping[str, float], waited: float
) -> list[Check]:
    """One check for each part; `reached` has the milliseconds after which a part was seen, else `waited` counts."""
    return [
        Check(
            kind,
            request_id,
            bool(getattr(traced, kind)),
            reached.get(kind, waited),
            "" if getattr(traced, kind) else fault or traced.problems.get(kind) or traced.detail,
        )
        for kind in TRACED
    ]


# Doing it


class Prober:
    """Asks, sends and follows. Session, engine, clock and sleep are given."""

    def __init__(
        self,
        session: requests.Session,
        engine: Container | None = None,
        *,
        request_timeout: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._session = session
        self._engine = engine
        self._request_timeout = request_timeout
        self._clock = clock
        self._sleep = sleep
        self._wall = wall

    def health(self, addresses: list[Address], wait: float) -> list[Check]:
        """Ask every address; one that is not as expected is asked again for up to `wait` seconds in all."""
        deadline = self._clock() + wait
        return [self._healthy(address, deadline) for address in addresses]

    def _healthy(self, address: Address, deadline: float) -> Check:
        while True:
            start = self._clock()
            try:
                answer = self._session.get(
                    address.url, verify=address.verify, timeout=self._request_timeout, allow_redirects=False
                )
                fault = health_fault(address, answer.status_code, answer.text)
            except (requests.RequestException, OSError) as error:
                fault = f"no answer: {_bottom(error)}"
            check = Check("health", address.url, not fault, self._since(start), fault)
            if check.ok or self._clock() + POLL_SECONDS > deadline:
                return check
            self._sleep(POLL_SECONDS)

    def deliver(self, address: Address, body: bytes, headers: Mapping[str, str]) -> Check:
        """POST the delivery once."""
        start = self._clock()
        try:
            answer = self._session.post(
                address.url,
                data=body,
                headers=dict(headers),
                verify=address.verify,
                timeout=self._request_timeout,
                allow_redirects=False,
            )
            good = answer.status_code == 200
            detail = "" if good else f"HTTP {answer.status_code}: {answer.text[:ANSWER_SHOWN]}"
        except (requests.RequestException, OSError) as error:
            good, detail = False, f"no answer: {_bottom(error)}"
        return Check("delivery", address.url, good, self._since(start), detail)

    def prove(
        self, container: str, command: list[str], request_id: str, timeout: float, removing: bool = True
    ) -> list[Check]:
        """Have one `trace` wait until the delivery is done everywhere, and remove the probe.

        Starting `trace` costs most of its time, so it is started once. When that fails (a worker holds the probe, a
        backend is away, a release that does not know ``--wait``), `follow` and `remove` do it step by step.
        """
        start = self._clock()
        options = ["--wait", f"{timeout:g}", *(["--remove"] if removing else []), "--json"]
        traced, fault = self._trace(container, [*command, request_id, *options])
        if fault:
            checks = self.follow(container, command, request_id, timeout - (self._clock() - start))
        else:
            checks = _trace_checks(traced, "", request_id, {}, self._since(start))
        if removing and traced.removed:
            checks.append(Check("removed", request_id, True, self._since(start)))
        elif removing:
            checks.append(self.remove(container, command, request_id, REMOVE_SECONDS))
        return checks

    def follow(self, container: str, command: list[str], request_id: str, timeout: float) -> list[Check]:
        """Ask `trace` until the delivery is done everywhere, has failed for good, or time is up."""
        start = self._clock()
        reached: dict[str, float] = {}
        while True:
            traced, fault = self._trace(container, [*command, request_id, "--json"])
            for kind in TRACED:
                if getattr(traced, kind):
                    reached.setdefault(kind, self._since(start))
            if traced.complete or traced.hopeless or self._clock() - start + POLL_SECONDS > timeout:
                break
            self._sleep(POLL_SECONDS)
        return _trace_checks(traced, fault, request_id, reached, self._since(start))

    def remove(self, container: str, command: list[str], request_id: str, timeout: float) -> Check:
        """Remove all that the probe left; while a worker holds it, wait."""
        start = self._clock()
        while True:
            traced, fault = self._trace(container, [*command, request_id, "--remove", "--json"])
            if not fault or traced.hopeless or self._clock() - start + POLL_SECONDS > timeout:
                return Check("removed", request_id, not fault, self._since(start), fault)
            self._sleep(POLL_SECONDS)

    def _trace(self, container: str, command: list[str]) -> tuple[Traced, str]:
        """What trace says, and what went wrong with asking (empty: nothing)."""
        assert self._engine is not None  # noqa: S101 - follow() and remove() are only called with one
        try:
            code, out, err = self._engine.run_in(container, command)
        except EngineError as error:
            # A container that is not there will not come while we wait.
            return Traced(detail="trace could not be asked", hopeless=error.reason == "not_found"), str(error)
        try:
            document = json.loads(out)
        except ValueError:
            words = (err or out).strip()[-ANSWER_SHOWN:] or "it printed nothing"
            return Traced(
                detail="trace failed"
            ), f"`{command[0]} trace` in {container} ended with {code}: {words}"
        return read_trace(document if isinstance(document, dict) else {}), ""

    def _since(self, start: float) -> float:
        return round((self._clock() - start) * 1000, 1)


def new_request_id() -> str:
    """An id that marks a delivery as a probe."""
    return f"{PREFIX}{uuid.uuid4()}"


def quiet_session() -> requests.Session:
    """A session without proxies, netrc, or warnings about certificates that were not to be validated."""
    urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    session = requests.Session()
    session.trust_env = False
    return session


def failure_message(checks: list[Check], logs: Mapping[str, list[str]]) -> str:
    """One message with every check that failed, its remedy, and the last words of the containers."""
    parts = []
    for check in checks:
        if not check.ok:
            remedy = REMEDIES[check.kind].replace("REQUEST_ID", check.name)
            parts.append(f"Check '{check.kind}' failed ({check.name}): {check.detail}. {remedy}.")
    for name, lines in logs.items():
        parts += [f"  {name}: {line[:300]}" for line in lines[-10:]]
    return "\n".join(parts)


def _bottom(error: BaseException) -> str:
    """The innermost cause in words, without addresses in memory."""
    for inner in (getattr(error, "reason", None), *getattr(error, "args", ())):
        if isinstance(inner, BaseException):
            return _bottom(inner)
    return re.sub(r"<[^>]*object at 0x[0-9a-f]+>:?\s*", "", str(error) or type(error).__name__)[:ANSWER_SHOWN]
