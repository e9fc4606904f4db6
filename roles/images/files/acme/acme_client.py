#!/usr/bin/python3
"""Keeps one certificate valid: certbot (HTTP-01), challenges in a directory that nginx serves, the result in another.

    acme-client run      until it is stopped: issue, then look twice a day whether it is time to renew
    acme-client ensure   issue now unless the certificate in place is good; prints how it stands, exit status 1 if it is not
    acme-client renew    a new certificate now, whatever stands; the private key stays the same
    acme-client status   how it stands, as JSON; asks nobody

Settings come from the environment: ACME_NAMES (separated by spaces), ACME_SERVER (directory URL), ACME_EMAIL (may be empty),
ACME_EDGE (nginx's address on this host, to see that it serves challenges), ACME_INTERVAL and ACME_RETRY (seconds).

The private key stays the same from renewal to renewal (--reuse-key): nginx reads certificate and key for each handshake, and
so never sees a certificate beside a key of another. When to renew is certbot's decision.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509

STATE, CHALLENGES, CERTIFICATE = Path("/acme/state"), Path("/acme/challenges"), Path("/acme/certificate")
WELL_KNOWN = ".well-known/acme-challenge"
#: The two files that nginx reads, and certbot's links to them. The key first: see `install`.
FILES = ("privkey.pem", "fullchain.pem")
LINEAGE = STATE / "live" / "site"
LAST = STATE / "last-attempt.json"
CERTBOT_SECONDS = 600
EDGE_SECONDS = 120
LINES_KEPT = 12


@dataclass(frozen=True)
class Settings:
    """What the container was started with."""

    names: tuple[str, ...]
    server: str
    email: str
    edge: str
    interval: float
    retry: float

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Settings:
        """From the environment; exits with 78 (EX_CONFIG) when something is missing."""
        names = tuple(environ.get("ACME_NAMES", "").split())
        if not names or not environ.get("ACME_SERVER"):
            say("error", "ACME_NAMES and ACME_SERVER have to be set")
            sys.exit(78)
        return cls(
            names=names,
            server=environ["ACME_SERVER"],
            email=environ.get("ACME_EMAIL", ""),
            edge=environ.get("ACME_EDGE", ""),
            interval=float(environ.get("ACME_INTERVAL", "43200")),
            retry=float(environ.get("ACME_RETRY", "3600")),
        )


def say(level: str, event: str, **fields: Any) -> None:
    """One line of log, as the service writes its own."""
    stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
    print(
        json.dumps({"ts": stamp, "level": level, "logger": "acme", "event": event, **fields}),
        file=sys.stderr,
        flush=True,
    )


# -- the certificate in place -----------------------------------------------------------------------------------------


def certificate_state(names: tuple[str, ...], path: Path = CERTIFICATE / FILES[1]) -> dict[str, Any]:
    """How the certificate that nginx reads stands."""
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        return {"present": False, "issued": False, "error": str(error)}
    alternative = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    held = set(alternative.get_values_for_type(x509.DNSName))
    ends, now = found.not_valid_after_utc, datetime.now(UTC)
    life = (ends - found.not_valid_before_utc).total_seconds()
    left = (ends - now).total_seconds()
    return {
        "present": True,
        # The one that stands in until the first is issued has signed itself.
        "issued": found.issuer != found.subject,
        "issuer": found.issuer.rfc4514_string(),
        "names": sorted(held),
        "covers": set(names) <= held,
        "serial": f"{found.serial_number:x}",
        "not_after": ends.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "days_left": round(left / 86400, 1),
        "part_left": round(left / life, 3) if life > 0 else 0.0,
    }


def is_good(state: Mapping[str, Any]) -> bool:
    """Whether the certificate is a CA's, for all names, and not due."""
    return bool(state.get("issued") and state.get("covers") and state["part_left"] > 1 / 3)


def install(names: tuple[str, ...]) -> bool:
    """Put what certbot has where nginx reads it, each file as a whole; return whether it was another one."""
    new = {name: (LINEAGE / name).read_bytes() for name in FILES}
    if all(
        (CERTIFICATE / name).exists() and (CERTIFICATE / name).read_bytes() == new[name] for name in FILES
    ):
        return False
    for name, content in new.items():
        descriptor = os.open(CERTIFICATE / f".{name}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o400)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    # Nothing between the two: where the key does change (the first time), a handshake in this moment may see both.
    for name in FILES:
        os.replace(CERTIFICATE / f".{name}.new", CERTIFICATE / name)
    state = certificate_state(names)
    say(
        "info",
        "certificate_installed",
        **{key: state.get(key) for key in ("issuer", "names", "not_after", "serial")},
    )
    return True


# -- certbot ----------------------------------------------------------------------------------------------------------


def command(settings: Settings, *, force: bool = False) -> list[str]:
    """certbot's arguments. Nothing secret is among them."""
    words = [
        "certbot",
        "certonly",
        "--non-interactive",
        "--agree-tos",
        "--quiet",
        "--cert-name",
        LINEAGE.name,
    ]
    words += ["--config-dir", str(STATE), "--work-dir", "/tmp/certbot", "--logs-dir", "/tmp/certbot"]  # noqa: S108
    words += ["--server", settings.server, "--webroot", "--webroot-path", str(CHALLENGES)]
    words += ["--key-type", "ecdsa", "--elliptic-curve", "secp256r1", "--reuse-key"]
    words += [
        "--force-renewal" if force else "--keep-until-expiring",
        "--renew-with-new-domains",
        "--max-log-backups",
        "0",
    ]
    words += (
        ["--email", settings.email, "--no-eff-email"]
        if settings.email
        else ["--register-unsafely-without-email"]
    )
    return [*words, *(word for name in settings.names for word in ("--domain", name))]


@contextmanager
def alone() -> Any:
    """Only one attempt at a time, by the loop or by `ensure`."""
    with (STATE / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def attempt(settings: Settings, *, force: bool = False) -> bool:
    """One attempt: issue or renew if it is time, and install. False, and a log line, when it failed."""
    with alone():
        try:
            done = subprocess.run(
                command(settings, force=force),
                capture_output=True,
                text=True,
                timeout=CERTBOT_SECONDS,
                check=False,
            )
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-LINES_KEPT:]
            good = done.returncode == 0
            if good:
                install(settings.names)
        except (OSError, subprocess.TimeoutExpired) as error:
            good, said = False, [str(error)]
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        LAST.write_text(json.dumps({"at": stamp, "good": good, "said": said}))
    if not good:
        say("error", "not_issued", names=settings.names, said=said)
    return good


def last_attempt() -> dict[str, Any]:
    """What came of the attempt before; nothing when there was none."""
    try:
        return dict(json.loads(LAST.read_text()))
    except (OSError, ValueError):
        return {}


def edge_serves(settings: Settings, seconds: float = EDGE_SECONDS) -> bool:
    """Wait until nginx serves what stands among the challenges: a CA counts every attempt that fails."""
    name = f"probe-{secrets.token_hex(8)}"
    path = CHALLENGES / WELL_KNOWN / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
    path.chmod(0o644)
    request = urllib.request.Request(  # noqa: S310  (our own address)
        f"{settings.edge}/{WELL_KNOWN}/{name}", headers={"Host": settings.names[0]}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + seconds
    try:
        while True:
            try:
                with opener.open(request, timeout=5) as answer:
                    if answer.read(100).decode() == name:
                        return True
            except (OSError, urllib.error.URLError, ValueError):
                pass
            if time.monotonic() > deadline:
                say("warning", "challenges_not_served", edge=settings.edge)
                return False
            time.sleep(0.5)
    finally:
        path.unlink(missing_ok=True)


# -- commands ---------------------------------------------------------------------------------------------------------


def run(settings: Settings) -> int:
    """Keep it valid, until SIGTERM."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    while not ended.is_set():
        good = edge_serves(settings) and attempt(settings)
        pause = settings.interval if good else settings.retry
        # Not all sites at the same moment.
        ended.wait(pause * random.uniform(0.9, 1.1))  # noqa: S311
    return 0


def report(settings: Settings) -> dict[str, Any]:
    """How certificate and attempts stand."""
    state = certificate_state(settings.names)
    return {**state, "good": is_good(state), "wanted": list(settings.names), "last_attempt": last_attempt()}


def ensure(settings: Settings, *, force: bool = False) -> int:
    """Issue now, unless what is in place is good; the rollout asks for it at its end."""
    before = certificate_state(settings.names)
    if (force or not is_good(before)) and edge_serves(settings):
        attempt(settings, force=force)
    seen = report(settings)
    fetched = seen.get("serial") != before.get("serial")
    print(json.dumps({**seen, "fetched": fetched}))
    return 0 if seen["good"] and (fetched or not force) else 1


def renew(settings: Settings) -> int:
    """A new certificate now."""
    return ensure(settings, force=True)


def main() -> int:
    """Do what the one argument says."""
    commands = {"run": run, "ensure": ensure, "renew": renew}
    what = sys.argv[1] if len(sys.argv) == 2 else ""
    settings = Settings.from_environment(os.environ)
    if what == "status":
        print(json.dumps(report(settings)))
        return 0
    if what not in commands:
        print(__doc__, file=sys.stderr)
        return 64
    return commands[what](settings)


if __name__ == "__main__":
    sys.exit(main())
