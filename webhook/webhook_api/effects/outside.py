"""The outlets of the effects that speak to servers of others, made from the settings."""

from __future__ import annotations

import threading

from webhook_api.config import Settings
from webhook_api.effects.forward import ForwardOutlet
from webhook_api.effects.telegram import TelegramOutlet
from webhook_api.outbound import Outbound


def make_outlets(settings: Settings) -> tuple[ForwardOutlet | None, TelegramOutlet | None]:
    """Those that the settings ask for.

    At most half of the worker's threads speak to these servers at a time: when one hangs, the others go on.
    """
    slots = threading.BoundedSemaphore(max(1, settings.worker_concurrency // 2))
    forward = telegram = None
    if settings.forward is not None:
        forward = ForwardOutlet(
            Outbound(
                "forward",
                settings.forward.place,
                slots,
                seconds=float(settings.forward.timeout_seconds),
            ),
            settings.forward.keys,
        )
    if settings.telegram is not None:
        given = settings.telegram
        outbound = Outbound("telegram", given.place, slots)
        telegram = TelegramOutlet(outbound, given.token, given.chat_id, given.notify)
    return forward, telegram
