"""Settings of the worker's own jobs: asking fal's queue for what never came, and clearing away what is old."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

TRAINING_TYPES: Final = ("portrait", "style")
MODELS: Final = {"portrait": "fal-ai/flux-lora-portrait-trainer", "style": "fal-ai/flux-pro-trainer"}
AFTER_SECONDS: Final = {"portrait": 1800, "style": 1800}
QUEUE_HOST: Final = "queue.fal.run"
AUDIT_MIN_DAYS: Final = 30
"""The database itself refuses to let go of younger records (migration 0008)."""
MAX_DAYS: Final = 36_500


class Reader(Protocol):
    """What of the settings' reader is needed here."""

    faults: list[str]

    def text(self, name: str, default: str = "") -> str:
        """Value of a setting."""
        ...

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """Whole number within bounds."""
        ...


@dataclass(frozen=True, slots=True)
class ReconcileSettings:
    """Asking fal's queue API. All of it is off without ``key``. Durations are seconds."""

    key: str | None = field(default=None, repr=False)
    host: str = QUEUE_HOST
    """``host`` or ``host:port``, over https."""
    models: Mapping[str, str] = field(default_factory=lambda: dict(MODELS))
    """Model id by training type: the queue has no address of a request without it."""
    after: Mapping[str, int] = field(default_factory=lambda: dict(AFTER_SECONDS))
    """How long a training may take before it is asked for, by training type."""
    every: int = 60
    requests_per_minute: int = 30
    give_up: int = 3 * 86_400


@dataclass(frozen=True, slots=True)
class RetentionSettings:
    """How long what is finished is kept, in days. 0: for ever."""

    bodies: int = 30
    """Body and headers of what is done, in the database. The archive has them as well, or they stay."""
    variants: int = 90
    effects: int = 180
    deliveries: int = 400
    """The row itself, and with it the key by which a duplicate is known."""
    dead_letters: int = 0
    discarded: int = 0
    aside: int = 0
    samples: int = 30
    audit: int = 0
    reconciliations: int = 90
    every: int = 3600
    """Seconds between two runs."""
    batch_rows: int = 500


def read_reconcile(reader: Reader, key: str | None) -> ReconcileSettings:
    """Read the settings of the reconciler."""
    models = _by_type(reader, "RECONCILE_MODELS", reader.text("RECONCILE_MODELS"), MODELS)
    for kind, model in models.items():
        if not re.fullmatch(r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+){1,6}", model):
            reader.faults.append(
                f"RECONCILE_MODELS: {model!r} of {kind} is no model id such as {MODELS['portrait']}"
            )
    return ReconcileSettings(
        key=key,
        host=_host(reader),
        models=models,
        after=_after(reader),
        every=reader.integer("RECONCILE_EVERY_SECONDS", 60, 1, 86_400),
        requests_per_minute=reader.integer("RECONCILE_REQUESTS_PER_MINUTE", 30, 1, 6000),
        give_up=reader.integer("RECONCILE_GIVE_UP_SECONDS", 3 * 86_400, 60, 366 * 86_400),
    )


def read_retention(reader: Reader) -> RetentionSettings:
    """Read the settings of retention."""
    found = RetentionSettings(
        bodies=reader.integer("RETENTION_BODIES_DAYS", 30, 0, MAX_DAYS),
        variants=reader.integer("RETENTION_VARIANTS_DAYS", 90, 0, MAX_DAYS),
        effects=reader.integer("RETENTION_EFFECTS_DAYS", 180, 0, MAX_DAYS),
        deliveries=reader.integer("RETENTION_DELIVERIES_DAYS", 400, 0, MAX_DAYS),
        dead_letters=reader.integer("RETENTION_DEAD_LETTERS_DAYS", 0, 0, MAX_DAYS),
        discarded=reader.integer("RETENTION_DISCARDED_DAYS", 0, 0, MAX_DAYS),
        aside=reader.integer("RETENTION_ASIDE_DAYS", 0, 0, MAX_DAYS),
        samples=reader.integer("RETENTION_SAMPLES_DAYS", 30, 0, MAX_DAYS),
        audit=reader.integer("RETENTION_AUDIT_DAYS", 0, 0, MAX_DAYS),
        reconciliations=reader.integer("RETENTION_RECONCILIATIONS_DAYS", 90, 0, MAX_DAYS),
        every=reader.integer("RETENTION_EVERY_SECONDS", 3600, 1, 7 * 86_400),
        batch_rows=reader.integer("RETENTION_BATCH_ROWS", 500, 1, 10_000),
    )
    reader.faults.extend(contradictions(found))
    return found


def contradictions(ages: RetentionSettings) -> list[str]:
    """What in the ages cannot be meant."""
    faults = []
    if ages.effects and (not ages.bodies or ages.effects < ages.bodies):
        faults.append(
            "RETENTION_EFFECTS_DAYS: effects say where a body is archived, so they stay at least as long as the "
            "bodies: give RETENTION_BODIES_DAYS, and no more than this"
        )
    for name, value in (("BODIES", ages.bodies), ("EFFECTS", ages.effects)):
        if ages.deliveries and value > ages.deliveries:
            faults.append(
                f"RETENTION_{name}_DAYS is more than RETENTION_DELIVERIES_DAYS: they go with the delivery"
            )
    if 0 < ages.audit < AUDIT_MIN_DAYS:
        faults.append(f"RETENTION_AUDIT_DAYS: give 0 or at least {AUDIT_MIN_DAYS}")
    return faults


def _host(reader: Reader) -> str:
    host = reader.text("FAL_QUEUE_RUN_HOST", QUEUE_HOST).lower()
    if not re.fullmatch(r"(?:[a-z0-9.-]+|\[[0-9a-f:]+\])(?::[0-9]{1,5})?", host):
        reader.faults.append(f"FAL_QUEUE_RUN_HOST is {host!r}: give host or host:port, without a scheme")
        return QUEUE_HOST
    return host


def _after(reader: Reader) -> dict[str, int]:
    name = "RECONCILE_AFTER_SECONDS"
    default = {kind: str(seconds) for kind, seconds in AFTER_SECONDS.items()}
    found = {}
    for kind, text in _by_type(reader, name, reader.text("RECONCILE_AFTER_SECONDS"), default).items():
        if not re.fullmatch(r"[0-9]{1,8}", text) or int(text) < 1:
            reader.faults.append(f"{name}: {text!r} of {kind} is no number of seconds")
        else:
            found[kind] = int(text)
    return {**AFTER_SECONDS, **found}


def _by_type(reader: Reader, name: str, text: str, default: Mapping[str, str]) -> dict[str, str]:
    """``portrait=…,style=…``; what is not named keeps its default."""
    found = dict(default)
    for item in filter(None, (part.strip() for part in text.split(","))):
        kind, separator, value = item.partition("=")
        if not separator or kind.strip() not in TRAINING_TYPES or not value.strip():
            reader.faults.append(f"{name}: {item!r} is not <training type>=<value> (portrait, style)")
        else:
            found[kind.strip()] = value.strip()
    return found
