"""Asking fal's queue for results that no webhook brought: trainings that take too long, and OK without a payload.

What is learned becomes a delivery of source ``reconcile`` in the same inbox, so that everything after it (avatar,
archive, stream) is the same as for a webhook. Nothing is invented: a request that fal does not know is recorded and
shown, and nothing else happens.

`answers` says what an answer means (pure), `fal_queue` asks, `ledger` is the SQL, `runner` puts them together.
Decision 0451.
"""

from __future__ import annotations

from webhook_api.reconcile.runner import Reconciler, Report, Runner, job

__all__ = ["Reconciler", "Report", "Runner", "job"]
