"""What the intake hands to an inbox, and what it gets back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from webhook_api.db import DatabaseUnavailable


@dataclass(frozen=True, slots=True)
class Delivery:
    """An accepted delivery, as it will stand in ``webhook.deliveries``."""

    source: str
    request_id: str
    dedup_key: str
    status: str
    body: bytes = field(repr=False)
    body_sha256: str
    gateway_request_id: str | None = None
    training_type_hint: str | None = None
    account_id: str | None = None
    headers: Mapping[str, Any] = field(default_factory=dict, repr=False)
    edge_request_id: str | None = None
    probe: bool = False
    state: str = "pending"
    """``pending``, or ``dead`` for what is only kept aside."""
    last_error: str | None = None
    aside: str | None = None
    """Why it is only kept aside, in one word. ``None``: it is processed."""

    @property
    def identity(self) -> tuple[str, str, str]:
        """What makes two arrivals one event: the table's unique key."""
        return self.source, self.request_id, self.dedup_key


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of a delivery. It is durable."""

    id: int | None
    """Its row; ``None`` while it stands in the spool."""
    created: bool
    """False: this identity was there before."""
    attempts: int
    """How often it has arrived by now."""
    variant: bool
    """It was there before with another body that reports the same."""
    another_result: bool = False
    """It is new, and ends a request that another delivery had ended differently."""
    spooled: bool = False
    """It is on the local disk and goes into the database later; what it is there is not known yet."""

    @property
    def outcome(self) -> str:
        """One word for metrics and logs."""
        if self.spooled:
            return "spooled"
        if self.created:
            return "another_result" if self.another_result else "stored"
        return "variant" if self.variant else "duplicate"


class Inbox(Protocol):
    """Where the intake puts what it accepted."""

    def store(self, delivery: Delivery, *, until: float | None = None) -> Stored:
        """Return when the delivery is durable. Raises DatabaseUnavailable in time.

        ``until`` (monotonic seconds): a batch could not decide it; it is stored alone, by then.
        """
        ...

    def store_many(
        self, deliveries: Sequence[Delivery], until: float
    ) -> Sequence[Stored | DatabaseUnavailable | None]:
        """Commit those that one batch can decide. ``None``: to be stored one by one, with the same ``until``.

        Never raises for a database that is not available: that is the result then, and nothing is tried twice.
        """
        ...

    @property
    def available(self) -> bool:
        """Whether the last attempt to store succeeded (or none was made)."""
        ...
