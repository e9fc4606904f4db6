"""What a delivery causes, one module an effect. Each is idempotent, and recorded on its own when it is done.

`avatar` the bot's row, `raw_archive` the delivery as it arrived, `archive` the files that the payload names,
`stream` the entry that tells the bot; and, where the settings ask for them, `forward` to a server of one's own and
`telegram` messages. They run in the order of `ORDER`: a file that makes trouble does not keep the
delivery itself from being stored, and who reads the stream finds the row and, unless the object store is away, the
files.
"""

from __future__ import annotations

from typing import Final

from webhook_api.effects import archive, avatar, forward, raw_archive, stream, telegram
from webhook_api.effects.base import Effect

ORDER: Final[tuple[Effect, ...]] = (
    Effect("avatar", avatar.run, many=avatar.run_many),
    Effect("raw_archive", raw_archive.run, many=raw_archive.run_many),
    Effect("archive", archive.run, quick=archive.nothing_to_do),
    Effect("stream", stream.run, many=stream.run_many),
    Effect("forward", forward.run, wanted=forward.wanted, many=forward.many),
    Effect("telegram", telegram.run, wanted=telegram.wanted, many=telegram.many),
    Effect("telegram_alarm", telegram.run_alarm, wanted=telegram.wanted_alarm, many=telegram.many_alarms),
)

__all__ = ["ORDER"]
