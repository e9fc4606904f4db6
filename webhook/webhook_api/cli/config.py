"""``config``: what is in force."""

from __future__ import annotations

import click

from webhook_api.cli.common import echo_json, json_option, settings


@click.command("config")
@json_option
def command(as_json: bool) -> None:  # noqa: ARG001  (it is JSON always)
    """Check the configuration and show it, without its secrets. Always JSON."""
    from dataclasses import fields, is_dataclass
    from typing import Any

    from webhook_api.config import NEEDS_SERVE

    loaded = settings(NEEDS_SERVE)

    def shown(value: Any) -> Any:
        if not is_dataclass(value):
            return value
        return {item.name: shown(getattr(value, item.name)) for item in fields(value) if item.repr}

    echo_json(shown(loaded))
