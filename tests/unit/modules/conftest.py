"""Lets tests import `library/`, and `module_utils/` as `ansible.module_utils`, as modules do on a target."""

from __future__ import annotations

import sys
from pathlib import Path

import ansible.module_utils

ROOT = Path(__file__).resolve().parents[3]
for directory, path in ((ROOT / "module_utils", ansible.module_utils.__path__), (ROOT / "library", sys.path)):
    if str(directory) not in path:
        path.insert(0, str(directory))
