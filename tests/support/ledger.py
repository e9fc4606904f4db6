"""The sender's side of the proof: what was sent, what was answered, and whether the receiver's side agrees, id by id.

A `Sender` delivers as fal does: signed afresh at each attempt, again under the same request id until the answer is 2xx, now
and then once more although it was, and between all this what somebody forged. Everything goes into a `Ledger`. `compare`
holds the ledger against what was found in the backends (`Observed`) and names every difference; it does no I/O.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import heapq
import http.client
import json
import random
import select
import threading
import time
import uuid
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nacl.signing import SigningKey
from webhook_api.shapes import CONFIG_NAME, LORA_NAME, SHAPES, Credentials, Shape

from tests.support.apiservice import PATH
from tests.support.falfake import ACCOUNT, SECRET

FAL_TIMEOUT = 15.0
"""Seconds that fal waits for an answer."""
WINDOW = 300.0
"""Seconds that fal allows two clocks to differ."""
ARTIFACTS = (LORA_NAME, CONFIG_NAME)
"""Files that the media host of a stack must serve under these names."""

Key = tuple[str, str, str, str]
"""Source, request id, sha256 of the body, and why it is kept aside, if it is."""


@dataclass(frozen=True)
class Kind:
    """A shape, and what must come of it."""

    shape: str
    avatar: str | None
    """Training type of the avatar that waits for it; None: there is none."""
    after: frozenset[str] = frozenset()
    """What the avatar's status may be in the end."""
    processed: bool = True
    """False: kept aside."""
    files: bool = False
    """Whether it names media files."""


PORTRAIT = Kind("portrait-ok", "portrait", frozenset({"completed"}), files=True)
STYLE = Kind("style-ok", "style", frozenset({"completed"}))
MALFORMED = Kind("not-json", None, processed=False)
MIX: tuple[tuple[Kind, int], ...] = (
    (PORTRAIT, 4),
    (STYLE, 4),
    (Kind("error-422", "portrait", frozenset({"error"})), 2),
    (Kind("error-text", "style", frozenset({"error"})), 2),
    # Succeeded, but the result has to be fetched: the avatar may wait for it.
    (Kind("ok-null-payload", "portrait", frozenset({"error", "training", "completed"})), 1),
    (Kind("old-completed", "portrait", frozenset({"completed"}), files=True), 2),
    (Kind("old-failed", "style", frozenset({"error"})), 1),
    (Kind("cancelled", "portrait", frozenset({"cancelled"})), 1),
    (MALFORMED, 1),
)
"""Kinds and how often they come."""
FORGERIES = ("forged", "tampered", "missing-header", "wrong-secret", "unauthenticated")
"""Shapes that nobody may believe."""


@dataclass(frozen=True)
class Event:
    """One event to deliver. `shift`: seconds by which the sender's clock is wrong."""

    request_id: str
    kind: Kind
    body: bytes = field(repr=False)
    forged: bool = False
    shift: float = 0.0
    shape: Shape | None = None
    """How it is authorised where that is not the kind's own way."""

    @property
    def sha256(self) -> str:
        """Of the body."""
        return hashlib.sha256(self.body).hexdigest()

    @property
    def source(self) -> str:
        """Whom the receiver will believe it to be from."""
        return "fal" if "fal:" in SHAPES[self.kind.shape].about else "manual"

    @property
    def aside(self) -> str:
        """Why the receiver must keep it aside instead of processing it; empty: it is processed."""
        if abs(self.shift) > WINDOW:
            return "stale" if self.shift < 0 else "future"
        return "" if self.kind.processed else "malformed"

    @property
    def key(self) -> Key:
        """What makes it one event."""
        return self.source, self.request_id, self.sha256, self.aside


@dataclass(frozen=True)
class Attempt:
    """One request and its answer. `status` None: the connection failed, and nobody knows what happened."""

    status: int | None
    seconds: float
    at: float
    """Seconds since the ledger was opened."""
    target: str = ""
    answer: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass
class Entry:
    """All that is known of an event."""

    event: Event
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        """How often it was answered 2xx."""
        return sum(1 for attempt in self.attempts if attempt.status is not None and attempt.status < 300)


class Ledger:
    """Every event, every attempt, every answer. Thread-safe."""

    def __init__(self, name: str, media: str, key: SigningKey, seed: int = 0) -> None:
        self.name = name
        self.credentials = Credentials(key=key, account_id=ACCOUNT, secret=SECRET)
        self.entries: dict[Key, Entry] = {}
        self.forged: list[Entry] = []
        self._forged: dict[int, Entry] = {}
        self.ambiguous = False
        """Set where answers of the database get lost: the receiver cannot always know whether a delivery is a copy."""
        self.permitted: set[int] = {503}
        """Statuses other than 2xx that a genuine delivery may be answered with."""
        self._media = media
        self._random = random.Random(f"{seed}/{name}")
        self._lock = threading.Lock()
        self._opened = time.monotonic()

    def event(self, kind: Kind | None = None, shift: float = 0.0, request_id: str | None = None) -> Event:
        """A new genuine event."""
        kind = kind or self._random.choices([k for k, _ in MIX], [weight for _, weight in MIX])[0]
        request_id = request_id or f"{self.name}-{uuid.UUID(int=self._random.getrandbits(128))}"
        made = Event(request_id, kind, SHAPES[kind.shape].build(request_id, self._media), shift=shift)
        with self._lock:
            self.entries[made.key] = Entry(made)
        return made

    def events(self, count: int, kind: Kind | None = None) -> list[Event]:
        """New genuine events."""
        return [self.event(kind) for _ in range(count)]

    def forgery(self, of: str | None = None) -> Event:
        """A forged event, perhaps with the request id `of` of a genuine one."""
        shape = SHAPES[self._random.choice(FORGERIES)]
        request_id = of or f"forged-{self.name}-{self._random.getrandbits(64):016x}"
        document = {"request_id": request_id, "status": "OK", "payload": {"finetune_id": "forged"}}
        made = Event(request_id, STYLE, json.dumps(document).encode(), forged=True, shape=shape)
        with self._lock:
            self.forged.append(Entry(made))
            self._forged[id(made)] = self.forged[-1]
        return made

    def note(self, event: Event, attempt: Attempt) -> None:
        """Write an answer down."""
        with self._lock:
            entry = self._forged[id(event)] if event.forged else self.entries[event.key]
            entry.attempts.append(attempt)

    def headers(self, event: Event) -> dict[str, str]:
        """Headers of an attempt made now."""
        credentials = Credentials(
            key=self.credentials.key,
            account_id=ACCOUNT,
            secret=SECRET,
            clock=lambda: time.time() + event.shift,
        )
        shape = event.shape or SHAPES[event.kind.shape]
        headers = {"Content-Type": "application/json", "User-Agent": "ledger/1"}
        return headers | shape.authorise(credentials, event.request_id, event.body)

    def now(self) -> float:
        """Seconds since it was opened."""
        return time.monotonic() - self._opened

    @property
    def accepted(self) -> int:
        """Events that were answered 2xx at least once."""
        with self._lock:
            return sum(1 for entry in self.entries.values() if entry.accepted)

    @property
    def attempts(self) -> list[Attempt]:
        """All attempts at genuine events."""
        with self._lock:
            return [attempt for entry in self.entries.values() for attempt in entry.attempts]

    def between(self, start: float, end: float) -> list[Attempt]:
        """Attempts at genuine events that were begun in that time (seconds of `now`)."""
        return [attempt for attempt in self.attempts if start <= attempt.at < end]

    def answers(self) -> dict[str, int]:
        """How often each answer came, `none` for a failed connection."""
        return dict(Counter(str(a.status or "none") for a in self.attempts))

    def undisturbed(self) -> None:
        """Assert that the fault was none of the sender's business: only the machine's own load may ask to come again."""
        answers = self.answers()
        reasons = {str(a.answer.get("error")) for a in self.attempts if a.status != 200}
        assert reasons <= {"busy", "timeout", "locked"}, f"{self.name}: {answers}, {reasons}"
        assert answers.get("503", 0) <= answers.get("200", 0) / 20, f"{self.name}: {answers}, {reasons}"

    def summary(self) -> dict[str, Any]:
        """Numbers for people."""
        seconds = sorted(a.seconds for a in self.attempts if a.status is not None) or [0.0]
        return {
            "events": len(self.entries),
            "accepted": self.accepted,
            "forged": len(self.forged),
            "answers": dict(sorted(self.answers().items())),
            "answered_twice": sum(1 for entry in self.entries.values() if entry.accepted > 1),
            "slowest_answer_s": round(seconds[-1], 2),
        }

    def write(self, path: Path) -> None:
        """Keep it, one line an event, for a look after a failure."""
        with path.open("w") as out:
            for entry in [*self.entries.values(), *self.forged]:
                tried = [(round(a.at, 3), a.status, a.target, a.answer) for a in entry.attempts]
                out.write(
                    json.dumps([*entry.event.key, entry.event.kind.shape, entry.event.forged, tried]) + "\n"
                )


class Lines:
    """A kept connection to each target, for one thread. Whatever goes wrong, or ends, closes it."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._open: dict[str, http.client.HTTPConnection] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        for line in self._open.values():
            line.close()

    def post(self, target: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """Status and body of the answer. Raises OSError or HTTPException when there is none."""
        line = self._open.pop(target, None)
        if line is not None and _ended(line):
            line.close()
            line = None
        if line is None:
            line = http.client.HTTPConnection(target.removeprefix("http://"), timeout=self._timeout)
        try:
            line.request("POST", PATH, body, dict(headers))
            with line.getresponse() as answer:
                said = answer.status, answer.read()
        except BaseException:
            line.close()
            raise
        self._open[target] = line
        return said


def _ended(line: http.client.HTTPConnection) -> bool:
    """Whether the other side has closed an idle connection: there is something to read, which can only be its end."""
    return line.sock is None or bool(select.select([line.sock], [], [], 0)[0])


class Sender:
    """Delivers events by real HTTP until each is accepted, in threads. A context manager."""

    def __init__(
        self,
        ledger: Ledger,
        targets: Sequence[str],
        *,
        threads: int = 12,
        rate: float = 0.0,
        again: float = 0.05,
        forge: float = 0.1,
        seed: int = 0,
        timeout: float = FAL_TIMEOUT,
    ) -> None:
        self._ledger = ledger
        self._targets = list(targets)
        self._rate = rate
        self._again = again
        self._forge = forge
        self._random = random.Random(f"{seed}/{ledger.name}/sender")
        self._timeout = timeout
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, int, Event]] = []
        self._serial = 0
        self._open = 0
        self._ending = False
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]

    def __enter__(self) -> Sender:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(FAL_TIMEOUT + 5)

    def send(self, events: Iterable[Event]) -> None:
        """Have events delivered, `rate` a second, with forgeries and repetitions among them."""
        start, gap = time.monotonic(), 1 / self._rate if self._rate else 0.0
        for number, event in enumerate(events):
            at = start + number * gap
            self._put(at, event)
            if self._random.random() < self._again:
                self._put(at + self._random.uniform(0, 1), event)
            if self._random.random() < self._forge:
                self._put(at, self._ledger.forgery(self._random.choice((None, event.request_id))))

    def copies(self, event: Event, count: int) -> None:
        """Have one event delivered many times at once."""
        now = time.monotonic() + 0.05
        for _ in range(count):
            self._put(now, event)

    def wait(self, seconds: float) -> None:
        """Wait until every event is accepted and every forgery was tried."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._open:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise AssertionError(
                        f"{self._open} deliveries without a final answer after {seconds:.0f} s: "
                        f"{self._ledger.summary()}"
                    )
                self._changed.wait(min(left, 1.0))

    @property
    def open(self) -> int:
        """Deliveries that still wait for a final answer."""
        return self._open

    def _put(self, at: float, event: Event, tries: int = 0, *, new: bool = True) -> None:
        with self._changed:
            self._serial += 1
            heapq.heappush(self._due, (at, self._serial, tries, event))
            self._open += 1 if new else 0
            self._changed.notify()

    def _run(self) -> None:
        lines = Lines(self._timeout)
        with lines:
            self._deliver_all(lines)

    def _deliver_all(self, lines: Lines) -> None:
        while (work := self._next()) is not None:
            event, tries = work
            final = event.forged
            try:
                final = self._attempt(event, tries, lines) or final
            finally:
                if final:
                    with self._changed:
                        self._open -= 1
                        self._changed.notify_all()
                else:
                    pause = min(1.0, 0.1 * 2 ** min(tries, 8)) * self._random.uniform(0.5, 1.0)
                    self._put(time.monotonic() + pause, event, tries + 1, new=False)

    def _next(self) -> tuple[Event, int] | None:
        with self._changed:
            while not self._ending:
                wait = self._due[0][0] - time.monotonic() if self._due else 1.0
                if wait <= 0:
                    _, _, tries, event = heapq.heappop(self._due)
                    return event, tries
                self._changed.wait(min(wait, 1.0))
        return None

    def _attempt(self, event: Event, tries: int, lines: Lines) -> bool:
        """One request. True: the answer is 2xx."""
        # Another instance after a failure, as the edge does.
        target = self._targets[(zlib.crc32(event.request_id.encode()) + tries) % len(self._targets)]
        started, at = time.monotonic(), self._ledger.now()
        status, answer = None, {}
        with suppress(OSError, http.client.HTTPException):
            status, data = lines.post(target, event.body, self._ledger.headers(event))
            answer = _document(data)
        self._ledger.note(event, Attempt(status, time.monotonic() - started, at, target, answer))
        return status is not None and status < 300


def _document(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


@dataclass
class Observed:
    """What was found behind the receiver."""

    deliveries: list[dict[str, Any]] = field(default_factory=list)
    """Rows: id, source, request_id, body_sha256 (as stored), real_sha256 (of the stored body), state, aside, attempts."""
    variants: list[tuple[int, str]] = field(default_factory=list)
    """Delivery id and body's sha256 of other bodies under one identity."""
    effects: dict[int, dict[str, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))
    """By delivery id and name: state, detail."""
    avatars: dict[str, str] = field(default_factory=dict)
    """Status by request id."""
    updates: Counter[str] = field(default_factory=Counter)
    """How often an avatar's row was changed, by request id."""
    entries: list[dict[str, str]] = field(default_factory=list)
    """Stream entries."""
    contents: dict[str, bytes] = field(default_factory=dict)
    """Content of all archived deliveries and of some files."""
    files: dict[str, bytes] = field(default_factory=dict)
    """What the media host serves, by name."""
    spooled: int = 0
    """Deliveries that stand in the spool."""


def unsettled(ledgers: Sequence[Ledger], seen: Observed) -> list[str]:
    """What is still on its way: accepted, but not a row yet, or a row with work to do."""
    rows = {row_key(row) for row in seen.deliveries}
    waiting = [f"in the spool: {seen.spooled}"] if seen.spooled else []
    for ledger in ledgers:
        for key, entry in ledger.entries.items():
            if entry.accepted and key not in rows:
                waiting.append(f"{_name(key)}: no row")
    waiting += [
        f"{row['request_id']}: {row['state']}"
        for row in seen.deliveries
        if row["state"] not in ("done", "dead")
    ]
    return waiting


def row_key(row: dict[str, Any]) -> Key:
    """What makes a row one event."""
    return row["source"], row["request_id"], row["body_sha256"], row["aside"] or ""


def compare(ledgers: Sequence[Ledger], seen: Observed) -> list[str]:
    """Every difference between what was answered and what is there. Empty: nothing lost, doubled, forged or changed."""
    faults: list[str] = []
    entries = {key: entry for ledger in ledgers for key, entry in ledger.entries.items()}
    rows: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for row in seen.deliveries:
        rows[row_key(row)].append(row)
        if row["body_sha256"] != row["real_sha256"]:
            faults.append(f"changed: the body of delivery {row['id']} is not the one that its hash names")
    for key in rows.keys() - entries.keys():
        faults.append(f"forged: {_name(key)} was never sent by us")
    faults += [f"forged: delivery {number} has a body {sha} besides" for number, sha in seen.variants]
    faults += _believed(ledgers)
    for key, entry in entries.items():
        faults += _answered(key, entry, ledgers)
        found = rows.get(key, [])
        if len(found) > 1:
            faults.append(f"doubled: {_name(key)} is in rows {[row['id'] for row in found]}")
        elif not found and entry.accepted:
            faults.append(f"lost: {_name(key)} was answered 2xx and is not there")
        elif found:
            ambiguous = any(ledger.ambiguous for ledger in ledgers if key in ledger.entries)
            faults += _row(key, entry, found[0], seen, ambiguous=ambiguous)
    return faults + _outside(seen, entries, rows)


def _believed(ledgers: Sequence[Ledger]) -> list[str]:
    return [
        f"forged: {entry.event.request_id} ({entry.event.shape and entry.event.shape.name}) was answered {a.status}"
        for ledger in ledgers
        for entry in ledger.forged
        for a in entry.attempts
        if a.status is not None and (a.status < 400 or a.status == 500)
    ]


def _answered(key: Key, entry: Entry, ledgers: Sequence[Ledger]) -> list[str]:
    permitted = next(ledger.permitted for ledger in ledgers if key in ledger.entries)
    return [
        f"wrong answer: {_name(key)} is genuine and was answered {a.status} {a.answer}"
        for a in entry.attempts
        if a.status is not None and a.status != 200 and a.status not in permitted
    ]


def _row(key: Key, entry: Entry, row: dict[str, Any], seen: Observed, *, ambiguous: bool) -> list[str]:
    """One event and its one row."""
    name, faults, tried = _name(key), [], len(entry.attempts)
    told = {a.answer.get("delivery_id") for a in entry.attempts if a.status == 200} - {None}
    if told - {row["id"]}:
        faults.append(f"lied: {name} is row {row['id']} and was answered {sorted(told)}")
    # From the spool, nobody can say yet whether it was there before.
    spooled = any(a.status == 200 and a.answer.get("delivery_id", 0) is None for a in entry.attempts)
    if not ambiguous and not spooled:
        if not entry.accepted <= row["attempts"] <= tried:
            faults.append(
                f"miscounted: {name} counts {row['attempts']} arrivals, {tried} tried, {entry.accepted} accepted"
            )
        if tried == 1 and entry.attempts[0].answer.get("duplicate"):
            faults.append(f"lied: {name} was sent once and called a duplicate")
    if entry.event.aside:
        if row["state"] != "dead" or seen.effects.get(row["id"]):
            faults.append(f"processed: {name} should be kept aside, and is {row['state']}")
        return faults
    if row["state"] != "done":
        return [*faults, f"not done: {name} is {row['state']}: {row['last_error']}"]
    return faults + _effects(name, entry.event, row, seen)


def _effects(name: str, event: Event, row: dict[str, Any], seen: Observed) -> list[str]:
    done, faults = seen.effects.get(row["id"], {}), []
    wanted = {"avatar", "stream", "raw_archive"} | ({"archive"} if event.kind.files else set())
    for effect in wanted:
        if done.get(effect, {}).get("state") != "done":
            faults.append(f"effect missing: {effect} of {name} is {done.get(effect)}")
    if event.kind.avatar is not None:
        changes, status = seen.updates[event.request_id], seen.avatars.get(event.request_id)
        if changes != 1:
            faults.append(f"avatar: that of {name} was changed {changes} times")
        if status not in event.kind.after:
            faults.append(f"avatar: that of {name} is {status}, not {sorted(event.kind.after)}")
    return faults


def _outside(
    seen: Observed,
    entries: dict[Key, Entry],
    rows: dict[Key, list[dict[str, Any]]],
) -> list[str]:
    """Stream and objects: one each for every processed row, and none for anything else."""
    processed = {
        row["id"]: (key, row) for key, found in rows.items() for row in found if row["state"] == "done"
    }
    faults: list[str] = []
    told = Counter(int(entry["delivery_id"]) for entry in seen.entries)
    faults += [
        f"stream: delivery {number} ({_name(key)}) has {told[number]} entries"
        for number, (key, _) in processed.items()
        if told[number] != 1
    ]
    faults += [
        f"stream: an entry for delivery {number}, which is none that was processed"
        for number in told.keys() - processed.keys()
    ]
    return faults + _archive(seen, processed, entries) + _files(seen)


def _archive(
    seen: Observed, processed: dict[int, tuple[Key, dict[str, Any]]], entries: dict[Key, Entry]
) -> list[str]:
    """Each processed delivery stands whole where its record says, and no object holds anything that was not sent.

    A worker that dies before it has recorded a segment leaves it behind, and its deliveries go into another one: a copy
    that no record names is none of these faults.
    """
    faults, named = [], set()
    for number, (key, _) in processed.items():
        place = seen.effects.get(number, {}).get("raw_archive", {}).get("detail", {})
        content = seen.contents.get(place.get("key", ""))
        if content is None:
            faults.append(f"archive: {place.get('key')} of {_name(key)} is not there")
            continue
        start = place.get("offset", 0)
        spot = (place["key"], start)
        if spot in named:
            faults.append(f"archive: {_name(key)} and another delivery share {spot}")
        named.add(spot)
        if _sent(content[start : start + place.get("length", len(content))], entries) != (number, key[:3]):
            faults.append(f"archive: {place['key']} at {start} does not hold {_name(key)} as it was sent")
    known = {row["id"]: row_key(row)[:3] for row in seen.deliveries}
    for name, content in seen.contents.items():
        if name.startswith("deliveries/"):
            for line in content.splitlines():
                found = _sent(line, entries)
                if found is None or known.get(found[0]) != found[1]:
                    faults.append(f"archive: {name} holds what was never sent or is no delivery: {found}")
    return faults


def _sent(line: bytes, entries: dict[Key, Entry]) -> tuple[int, tuple[str, str, str]] | None:
    """Delivery id and identity of an archived delivery whose bytes are those that were sent."""
    try:
        document = json.loads(line)
        body = base64.b64decode(document["body_base64"], validate=True)
        key = (document["source"], document["request_id"], hashlib.sha256(body).hexdigest())
    except (ValueError, KeyError, TypeError, binascii.Error):
        return None
    known = any((*key, aside) in entries for aside in ("", "malformed", "stale", "future"))
    return (document["delivery_id"], key) if known else None


def _files(seen: Observed) -> list[str]:
    """Whether every archived media file that was read is whole."""
    faults = []
    for name, content in seen.contents.items():
        file = seen.files.get(name.rpartition("/")[2])
        if name.startswith("webhooks/") and file is not None and content != file:
            faults.append(f"archive: {name} has {len(content)} bytes that are not the file's {len(file)}")
    return faults


def _name(key: Key) -> str:
    source, request_id, sha256, aside = key
    return f"{source}/{request_id}/{sha256[:8]}" + (f" ({aside})" if aside else "")
