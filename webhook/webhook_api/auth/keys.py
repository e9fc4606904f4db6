"""fal's public keys: where they come from, how long they hold, and what happens when they cannot be fetched.

Rules: cached at most 24 h; unauthenticated garbage must not cause more than one fetch a minute; a key set that cannot be
fetched is a reason to answer 503, never to call a signature invalid; last good keys survive a restart when a cache file
is configured. Keys are renewed in the background every hour; while that fails the old ones serve, with an alarm.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import logging
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import urllib3
from nacl.signing import VerifyKey

from webhook_api.auth.errors import AuthError
from webhook_api.metrics import JWKS_AGE, JWKS_FAILURES, JWKS_FETCHES, JWKS_KEYS, JWKS_STALE

LOG: Final = logging.getLogger(__name__)
REFRESH_AFTER: Final = 3600.0
"""Seconds after which known keys are fetched again in the background."""
MAX_AGE: Final = 86400.0
"""Seconds after which keys are no longer used when they could not be fetched again."""
RENEW_INTERVAL: Final = 60.0
"""At least so many seconds between two fetches that unknown signatures cause."""
FAILURE_PAUSE: Final = 10.0
"""Seconds for which a failed fetch counts, before the next one. In the background twice as many with each failure."""
FAILURE_PAUSE_MAX: Final = 300.0
STALE_AFTER: Final = REFRESH_AFTER + 600.0
"""Seconds after which keys that still serve are an alarm: the fetches of ten minutes have failed."""
FETCH_TIMEOUT: Final = 4.0
WAIT_FOR_FETCH: Final = 2.0
"""Seconds that a request waits for a fetch."""
WAITERS: Final = 12
"""Requests that wait for a fetch because no known key matches. Others are asked to come again."""
TICK: Final = 5.0
"""Seconds between two looks at what is due."""
MAX_DOCUMENT: Final = 1024 * 1024
MAX_KEYS: Final = 64
_X: Final = re.compile(r"[A-Za-z0-9_-]{43}=?")


class KeySourceError(Exception):
    """The key set cannot be had. ``reason``: unreachable, status, too_large, unreadable, not_jwks, no_keys."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class KeySource(Protocol):
    """Where a JWKS document comes from."""

    name: str

    def fetch(self) -> bytes:
        """Return the document. Raises KeySourceError."""
        ...


class UrlSource:
    """A JWKS behind an address. The HTTP pool is passed in; redirects are not followed."""

    def __init__(
        self, url: str, http: urllib3.PoolManager, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = url
        self._http = http
        self._clock = clock

    def fetch(self) -> bytes:
        """Fetch within FETCH_TIMEOUT seconds and MAX_DOCUMENT bytes."""
        deadline = self._clock() + FETCH_TIMEOUT
        try:
            response = self._http.request(
                "GET",
                self.name,
                preload_content=False,
                redirect=False,
                retries=False,
                timeout=urllib3.Timeout(connect=2.0, read=2.0),
                headers={"Accept": "application/json"},
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise KeySourceError("unreachable", f"{self.name}: {type(error).__name__}") from error
        try:
            return self._read(response, deadline)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise KeySourceError("unreachable", f"{self.name}: {type(error).__name__}") from error
        finally:
            # Not kept: keys are fetched hourly, and what is left unread must not be the next answer.
            response.close()

    def _read(self, response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
        if response.status != 200:
            raise KeySourceError("status", f"{self.name} answered {response.status}")
        document = bytearray()
        for chunk in response.stream(65536):
            document += chunk
            if len(document) > MAX_DOCUMENT:
                raise KeySourceError("too_large", f"{self.name}: more than {MAX_DOCUMENT} bytes")
            if self._clock() > deadline:
                raise KeySourceError("unreachable", f"{self.name}: not within {FETCH_TIMEOUT:.0f} s")
        return bytes(document)


class FileSource:
    """A JWKS in a file: development keys, or keys that someone else keeps fresh."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path

    def fetch(self) -> bytes:
        """Read the file."""
        try:
            with self._path.open("rb") as stream:
                return stream.read(MAX_DOCUMENT)
        except OSError as error:
            raise KeySourceError("unreadable", f"{self.name}: {error.strerror or error}") from error


def key_source(url: str | None, file: Path | None) -> KeySource:
    """Return the configured source: a file, or an address."""
    return FileSource(file) if file is not None else UrlSource(url or "", urllib3.PoolManager(maxsize=1))


@dataclass(frozen=True, slots=True)
class Known:
    """A key set that was fetched."""

    keys: tuple[VerifyKey, ...]
    fetched_at: float
    """Unix seconds."""


class Flight:
    """A fetch under way."""

    def __init__(self) -> None:
        self.landed = threading.Event()
        """Its keys are known, or it has failed: nobody need wait any longer."""
        self.ended = threading.Event()
        """Its keys are in the cache file as well, and another fetch may begin."""


class KeyStore:
    """The current keys. Thread-safe.

    Fetches are made one at a time, in a thread of their own, and are bounded in number and time: a request waits for
    one ``wait`` seconds at most. ``start`` keeps the keys fresh without any request. With a cache file the processes
    of a host share what any of them (or ``webhook-api keys refresh``) has fetched.
    """

    def __init__(
        self,
        source: KeySource,
        *,
        clock: Callable[[], float] = time.time,
        cache_file: Path | None = None,
        wait: float = WAIT_FOR_FETCH,
        waiters: int = WAITERS,
    ) -> None:
        self._source = source
        self._clock = clock
        self._cache = Cache(cache_file, source.name) if cache_file is not None else None
        self._wait = wait
        self._lock = threading.Lock()
        self._flight: Flight | None = None
        self._waiting = threading.BoundedSemaphore(waiters)
        self._known: Known | None = None
        self._attempted_at: float | None = None
        self._failures = 0
        self._error: KeySourceError | None = None
        self._was_stale = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._adopt_cache()

    def start(self) -> None:
        """Keep the keys fresh in the background. After the fork."""
        self._thread = threading.Thread(target=self._keep_fresh, name="jwks-refresh", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the background thread. Keys that were fetched are let reach the cache file."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(1.0)
        flight = self._flight
        if flight is not None and flight.landed.is_set():
            flight.ended.wait(self._wait)

    def current(self) -> tuple[VerifyKey, ...]:
        """Return the keys to try. Raises AuthError(keys_unknown) when there are none."""
        known = self._usable()
        if known is None:
            self._fetch(self._needed_at_once, self._wait)
            known = self._usable()
        elif not self._fresh(known):
            self._fetch(self._renewal_due, 0.0)
        if known is None:
            raise AuthError("keys_unknown", "fal's public keys are not known at the moment")
        return known.keys

    def known(self) -> tuple[VerifyKey, ...]:
        """Return the keys as ``current`` does, but without ever waiting: none when there are none."""
        known = self._usable()
        return self.current() if known is not None else ()

    def renewed(self, tried: tuple[VerifyKey, ...]) -> tuple[VerifyKey, ...] | None:
        """Return other keys than those ``tried``, after at most one fetch a RENEW_INTERVAL; ``None``: no others.

        Not all requests may wait for that fetch, so that forged deliveries cannot hold every thread of the service.
        For one that may not while a fetch is under way nobody can tell yet: AuthError(keys_unknown).
        """
        if self._waiting.acquire(blocking=False):
            try:
                self._fetch(self._others_due, self._wait)
            finally:
                self._waiting.release()
        elif self._others_coming():
            raise AuthError("keys_unknown", "fal's public keys are just being fetched: come again")
        known = self._usable()
        return known.keys if known is not None and known.keys != tried else None

    def warm(self) -> None:
        """Have keys before the first delivery needs them. Never raises."""
        if self._usable() is None:
            self._fetch(lambda: self._usable() is None, self._wait, kept=True)

    def refresh(self, wait: float) -> dict[str, Any]:
        """Fetch now, whenever the last attempt was, and return the status."""
        self._fetch(lambda: True, wait, kept=True, from_source=True)
        return self.status()

    def key_set(self) -> Known | None:
        """Return the usable keys and when they were fetched, without fetching any."""
        return self._usable()

    def status(self) -> dict[str, Any]:
        """Return what /health shows: whether keys are usable, how many, how old, and the last fetch's fault."""
        known = self._usable()
        result: dict[str, Any] = {"ok": known is not None, "keys": len(known.keys) if known else 0}
        if known is not None:
            result |= {"age_seconds": round(max(0.0, self._age(known))), "stale": self._stale(known)}
        error = self._error
        if error is not None:
            result["error"] = error.reason
        return result

    def tick(self) -> None:
        """Do what is due: take over what another process has fetched, fetch, show the state in the metrics."""
        self._adopt_cache()
        self._fetch(self._renewal_due, 0.0)
        self._show()

    def _keep_fresh(self) -> None:
        while not self._stop.is_set():
            try:
                self.tick()
            except Exception:  # a defect must not end what keeps the keys fresh
                LOG.exception("jwks_defect")
            self._stop.wait(TICK)

    def _age(self, known: Known) -> float:
        return self._clock() - known.fetched_at

    def _usable(self) -> Known | None:
        known = self._known
        # A clock that was set back makes keys look as if they came from the future: they are fetched again, not lost.
        return known if known is not None and abs(self._age(known)) < MAX_AGE else None

    def _fresh(self, known: Known) -> bool:
        return 0 <= self._age(known) <= REFRESH_AFTER

    def _stale(self, known: Known) -> bool:
        return abs(self._age(known)) > STALE_AFTER

    def _needed_at_once(self) -> bool:
        return self._usable() is None and self._due(FAILURE_PAUSE if self._error else 0.0)

    def _renewal_due(self) -> bool:
        known = self._usable()
        return (known is None or not self._fresh(known)) and self._due(self._pause())

    def _others_due(self) -> bool:
        return self._due(RENEW_INTERVAL)

    def _others_coming(self) -> bool:
        """Whether a fetch is under way, or whoever is about to ask will start one."""
        with self._lock:
            return self._others_due() if self._flight is None else not self._flight.landed.is_set()

    def _due(self, interval: float) -> bool:
        last = self._attempted_at
        # A clock that was set back must not stop fetches until it has caught up.
        return last is None or not 0 <= self._clock() - last < interval

    def _pause(self) -> float:
        """Seconds between two fetches of the background: longer with every failure, and not the same everywhere."""
        if self._failures == 0:
            return 0.0
        longest = min(FAILURE_PAUSE * 2.0 ** min(self._failures - 1, 10), FAILURE_PAUSE_MAX)
        return longest * (1 + self._jitter) / 2

    @property
    def _jitter(self) -> float:
        # Of this object, not of this call: the pause must not shrink with every look at it.
        return (id(self) >> 4) % 1009 / 1009

    def _fetch(
        self, wanted: Callable[[], bool], wait: float, *, kept: bool = False, from_source: bool = False
    ) -> None:
        """Have the keys fetched if that is ``wanted``; wait for them ``wait`` seconds, also until they are ``kept``.

        Whoever comes while a fetch is under way waits for that one. What is wanted is asked under the lock: a fetch
        that ended since the caller looked may have brought what the caller lacks, or have failed just now.
        """
        with self._lock:
            flight = self._flight
            if flight is None:
                if not wanted():
                    return
                flight = Flight()
                made = threading.Thread(
                    target=self._fly, args=(flight, from_source), name="jwks-fetch", daemon=True
                )
                try:
                    made.start()
                except RuntimeError as error:
                    LOG.warning("jwks_fetch_failed", extra={"reason": "no_thread", "detail": str(error)})
                    return
                # Only now: a thread that could not be started must not stand in the way of all later ones.
                self._flight = flight
        if wait > 0:
            (flight.ended if kept else flight.landed).wait(wait)

    def _fly(self, flight: Flight, from_source: bool) -> None:
        try:
            if from_source or not self._adopt_cache():
                self._fetch_now(flight)
        finally:
            self._show()
            with self._lock:
                self._attempted_at = self._clock()
                self._flight = None
            flight.landed.set()
            flight.ended.set()

    def _fetch_now(self, flight: Flight) -> None:
        JWKS_FETCHES.inc()
        try:
            document = self._source.fetch()
            keys = parse_jwks(document)
        except KeySourceError as error:
            self._error = error
            self._failures += 1
            JWKS_FAILURES.labels(reason=error.reason).inc()
            LOG.warning("jwks_fetch_failed", extra={"reason": error.reason, "detail": str(error)})
        else:
            known = Known(keys, self._clock())
            with self._lock:
                self._known, self._error, self._failures = known, None, 0
            LOG.info("jwks_fetched", extra={"source": self._source.name, "keys": len(keys)})
            # Before the file is written: a slow disk must not keep requests from keys that are known.
            flight.landed.set()
            if self._cache is not None:
                self._cache.save(document, known.fetched_at)

    def _adopt_cache(self) -> bool:
        """Take over newer keys from the cache file. True: they are so new that nothing need be fetched."""
        found = self._cache.load_if_changed() if self._cache is not None else None
        if found is None or not -RENEW_INTERVAL < self._age(found) < MAX_AGE:
            return False
        with self._lock:
            if self._known is not None and found.fetched_at <= self._known.fetched_at:
                return False
            self._known, self._error, self._failures = found, None, 0
        LOG.info("jwks_cache_loaded", extra={"age_seconds": round(self._age(found))})
        return self._age(found) < RENEW_INTERVAL

    def _show(self) -> None:
        # All of it under the lock: an older view must not be shown after a newer one.
        with self._lock:
            known, error = self._usable(), self._error
            stale = known is not None and self._stale(known)
            JWKS_KEYS.set(len(known.keys) if known else 0)
            JWKS_AGE.set(max(0.0, self._age(known)) if known else 0.0)
            JWKS_STALE.set(1 if stale else 0)
            alarm = stale and not self._was_stale
            self._was_stale = stale
        if alarm:
            reason = error.reason if error else "not_fetched"
            LOG.error("jwks_stale", extra={"reason": reason, "hours_left": _hours_left(known, self._clock())})


def _hours_left(known: Known | None, now: float) -> float:
    return round((MAX_AGE - (now - known.fetched_at)) / 3600, 1) if known else 0.0


class Cache:
    """The file that holds the last good key set of one source. Several processes may share it."""

    def __init__(self, path: Path, source: str) -> None:
        self._path = path
        self._source = source
        self._seen: tuple[int, int, int] | None = None

    def load_if_changed(self) -> Known | None:
        """Return what the file holds unless it is the same file as at the last call; ``None``: nothing usable."""
        try:
            state = self._path.stat()
        except OSError:
            return None
        seen = (state.st_mtime_ns, state.st_ino, state.st_size)
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            with self._path.open("rb") as stream:
                entry = json.loads(stream.read(2 * MAX_DOCUMENT))
            fetched_at, source = float(entry["fetched_at"]), str(entry["source"])
            keys = parse_jwks(str(entry["jwks"]).encode())
        except (OSError, ValueError, KeyError, TypeError, RecursionError, KeySourceError) as error:
            LOG.warning("jwks_cache_unreadable", extra={"detail": type(error).__name__})
            return None
        return Known(keys, fetched_at) if source == self._source and math.isfinite(fetched_at) else None

    def save(self, document: bytes, fetched_at: float) -> None:
        """Replace the file, at once and durably. A disk that does not take it is logged and no obstacle."""
        entry = {"source": self._source, "fetched_at": fetched_at, "jwks": document.decode("utf-8")}
        name = None
        try:
            # mkstemp: mode 0600, and a name of its own, since several processes may share the directory.
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(entry, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(name, self._path)
        except OSError as error:
            LOG.warning("jwks_cache_not_written", extra={"detail": error.strerror or str(error)})
            if name is not None:
                with contextlib.suppress(OSError):
                    os.unlink(name)


def parse_jwks(document: bytes) -> tuple[VerifyKey, ...]:
    """Return the Ed25519 keys of a JWKS. Other keys are passed over; a set without any is an error."""
    try:
        keys = json.loads(document.decode("utf-8"))["keys"]
        entries = list(keys)[:MAX_KEYS] if isinstance(keys, list) else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise KeySourceError("not_jwks", "the document is not a JWKS") from error
    if entries is None:
        raise KeySourceError("not_jwks", "the document is not a JWKS: keys is not a list")
    found = tuple(key for key in map(_verify_key, entries) if key is not None)
    if not found:
        raise KeySourceError("no_keys", "the JWKS holds no Ed25519 key")
    return found


def _verify_key(entry: Any) -> VerifyKey | None:
    if not isinstance(entry, dict):
        return None
    x = entry.get("x")
    other = entry.get("kty", "OKP") != "OKP" or entry.get("crv", "Ed25519") != "Ed25519"
    if other or not isinstance(x, str) or not _X.fullmatch(x):
        return None
    try:
        return VerifyKey(base64.urlsafe_b64decode(x.rstrip("=") + "="))
    except (binascii.Error, ValueError):
        return None
