"""``python -m webhook_api`` is the command ``webhook-api``."""

from __future__ import annotations

from webhook_api.cli import main

if __name__ == "__main__":
    main(prog_name="webhook-api")
