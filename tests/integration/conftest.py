"""How the integration tests are shared out: file by file (`--dist loadfile`), the longest first, so that none ends alone."""

from __future__ import annotations

from pathlib import Path

import pytest

LONGEST = (
    "test_base_image_real",
    "test_content_images_real",
    "test_compose_plan_real",
    "test_worker_kills",
    "test_spool_service",
    "test_table_plans",
    "test_overload",
    "test_release_directory_real",
    "test_deploy_lock_real",
    "test_image_prune_real",
)
"""Files by the time that they take."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the same in every process."""
    here = Path(__file__).parent
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)) if here in item.path.parents else 0)
