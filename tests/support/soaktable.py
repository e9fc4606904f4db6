"""Prints the results of fault scenarios as a table (Markdown): python -m tests.support.soaktable RESULTS.jsonl"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = (
    "scenario",
    "deliveries",
    "200",
    "503",
    "no answer",
    "twice",
    "forged",
    "kills",
    "slowest s",
    "seconds",
)


def row(result: dict[str, Any]) -> list[str]:
    """One scenario's cells."""
    answers = result["answers"]
    name = result["scenario"].removeprefix("test_").replace("_", " ")
    return [
        name,
        *(str(result[key]) for key in ("events",)),
        *(str(answers.get(key, 0)) for key in ("200", "503", "none")),
        str(result["answered_twice"]),
        str(result["forged"]),
        str(result.get("kills", result.get("went_down", ""))),
        f"{result['slowest_answer_s']:.1f}",
        f"{result['seconds']:.0f}",
    ]


def table(results: list[dict[str, Any]]) -> str:
    """All of them, with a sum."""
    rows = [row(result) for result in results]
    total = ["all", *(str(sum(int(cells[i] or 0) for cells in rows)) for i in range(1, 8)), ""]
    total.append(f"{sum(result['seconds'] for result in results):.0f}")
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows, total]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
