"""What takes data away asks first, and understands a no however it is given."""

from __future__ import annotations

import re
from pathlib import Path

TASKS = Path(__file__).resolve().parents[2] / "roles" / "teardown" / "tasks" / "main.yml"


def test_answers_from_the_command_line_are_texts() -> None:
    """`-e teardown_data=false` is the text "false", which is true unless it is read as a boolean."""
    text = "\n".join(line for line in TASKS.read_text().splitlines() if "fail_msg" not in line)
    answers = r"\bteardown_(?:data|images|confirmed)\b"
    assert len(re.findall(answers, text)) >= 6
    assert re.findall(rf"{answers}(?!\)? \| bool)", text) == []
