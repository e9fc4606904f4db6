"""The worker: takes deliveries out of the inbox and brings about their effects.

`queue` is the SQL of leases, `attempt` one attempt at one delivery, `loop` the process around them.
"""

from __future__ import annotations

from webhook_api.worker.loop import HEARTBEAT_FILE, run

__all__ = ["HEARTBEAT_FILE", "run"]
