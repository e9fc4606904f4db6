"""What all cluster tests are: marked, and given the time that hosts of their own take."""

from __future__ import annotations

from pathlib import Path

import pytest

SECONDS = 2400
"""A test's own `timeout` marker goes first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(SECONDS))
