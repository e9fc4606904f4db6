"""Does the receiver keep its speed when its table is full? `python -m bench.table` from the repository's root."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "webhook"))
