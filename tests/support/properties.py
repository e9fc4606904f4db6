"""How property tests run: the same examples each time by default, other and more ones in a soak."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("WEBHOOK_TEST_EXAMPLES_FACTOR", "1"))
"""Above 1: so many times the examples, and new ones at each run."""


def examples(count: int) -> settings:
    """Settings for a property that is worth `count` examples."""
    return settings(
        max_examples=count * FACTOR,
        derandomize=FACTOR == 1,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
