"""How quick are the console's pages when its tables are full? `python -m bench.console` from the repository's root."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "webhook"))
