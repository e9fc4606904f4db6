"""The shape of the playbooks that change a site: what fails always ends the run, whatever tags it was started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
CHANGING = ("site.yml", "rollback.yml")
#: Plays before the lock is asked for, or after all is done: there is nothing to give back.
OUTSIDE = {
    "Every precondition is met",
    "What can be gone back to is known",
    "Images that no release needs are gone",
    "Another run may change the site",
    "The rollback is noted",
}


def plays(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((REPO / "playbooks" / name).read_text())
    return found


@pytest.mark.parametrize("name", CHANGING)
def test_a_play_that_fails_ends_the_run_under_every_tag(name: str) -> None:
    inside = [play for play in plays(name) if play["name"] not in OUTSIDE]
    assert len(inside) >= 2
    for play in inside:
        (task,) = play["tasks"]
        (stop,) = task["rescue"]
        # An include would run and do nothing under --tags: its tasks don't have the tags that it has itself.
        assert stop["ansible.builtin.import_tasks"] == "tasks/stop.yml", play["name"]
        assert name != "site.yml" or stop["tags"] == ["always"], play["name"]


@pytest.mark.parametrize("name", CHANGING)
def test_one_host_that_fails_stops_all_of_them(name: str) -> None:
    for play in plays(name)[:-2]:
        assert play["any_errors_fatal"] is True, play["name"]


def test_stop_gives_the_lock_back_and_fails() -> None:
    tasks = yaml.safe_load((REPO / "playbooks/tasks/stop.yml").read_text())
    assert "ansible.builtin.fail" in tasks[-1]
    assert "when" not in tasks[-1]
    assert any(task.get("deploy_lock", {}).get("state") == "released" for task in tasks)
