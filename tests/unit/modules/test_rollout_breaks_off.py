"""Wherever a run breaks off: killed, failed or asked to end at every single call, the host serves, and becomes whole."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from ansible.module_utils.rollout import edge
from ansible.module_utils.rollout.gates import Asking
from ansible.module_utils.rollout.model import RolloutError

sys.path.insert(0, str(Path(__file__).parent))

from rollout_world import World, quietly

EVERY = int(os.environ.get("ROLLOUT_EVERY", "4"))
"""Of the calls at which a run is broken off, every so manieth is tried; `make test-cluster` tries all."""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Worlds that serve release `old`, beside which `new` stands."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    monkeypatch.setattr(edge, "connections", lambda _pid, _ports: set())
    made = iter(range(100_000))

    def world(**bad):
        found = World(tmp_path / str(next(made)))
        found.site.mkdir()
        monkeypatch.setattr(Asking, "local", lambda _self, *args, **options: found.local(*args, **options))
        old, new = found.release("old", "e-old"), found.release("new", "e-new", **bad)
        assert found.run(old)["result"] == "done"
        assert found.state() == found.at(old)
        found.calls, found.guarded = 0, True
        return found, old, new

    return world


def calls(make, **bad):
    """How many calls a whole run makes."""
    world, _, new = make(**bad)
    with suppress(RolloutError):
        world.run(new)
    return world.calls


def test_a_run_brings_the_host_to_the_release_and_a_second_one_changes_nothing(make):
    world, _, new = make()
    assert world.run(new)["record"]["changed"] == ["api-1", "api-2", "worker", "nginx"]
    assert world.state() == world.at(new)
    assert world.run(new)["changed"] is False


@pytest.mark.parametrize("service", ["api_1", "api_2", "worker", "nginx"])
def test_a_release_that_crashes_anywhere_is_rolled_back(make, service):
    world, old, new = make(**{service: {"crash": True}})
    (world.site / "staged").unlink()
    (world.site / "staged").symlink_to(f"releases/{new}")
    with pytest.raises(RolloutError, match="crashes again and again") as caught:
        world.run(new)
    assert caught.value.evidence["rolled_back"] is True
    assert world.store.linked("staged") == old, "a run that renders nothing does not try it again"
    assert caught.value.evidence["container"]["log"] == ["last words"]
    assert world.state() == world.at(old)


@pytest.mark.parametrize("service", ["api_1", "nginx"])
def test_a_release_that_names_another_one_is_rolled_back(make, service):
    world, old, new = make(
        **{service: {"says": "other", "labels": {"org.aisha.release": "new", "org.aisha.edge": "x"}}}
    )
    with pytest.raises(RolloutError):
        world.run(new)
    assert world.state() == world.at(old)


@pytest.mark.parametrize("way", ["on", "back"])
def test_killed_at_any_call_it_serves_on_and_the_next_run_makes_it_whole(make, way):
    for fuse in range(1, calls(make) + 1, EVERY if way == "on" else 3 * EVERY):
        world, old, new = make()
        world.fuse = fuse
        assert quietly(world, new), fuse
        world.fuse = 0
        goal = new if way == "on" else old
        world.run(goal)
        assert world.state() == world.at(goal), fuse


def test_killed_twice_it_serves_on_and_the_next_run_makes_it_whole(make):
    whole = calls(make)
    for first in range(20, whole, 31 * min(EVERY, 2)):
        for second in range(1, whole, 13 * min(EVERY, 2)):
            world, _, new = make()
            world.fuse = first
            quietly(world, new)
            world.fuse = world.calls + second
            quietly(world, new)
            world.fuse = 0
            world.run(new)
            assert world.state() == world.at(new), (first, second)


@pytest.mark.parametrize("service", [None, "api_2", "nginx"])
def test_killed_on_the_way_back_the_next_run_goes_all_the_way(make, service):
    bad = {service: {"crash": True}} if service else {}
    for fuse in range(1, calls(make, **bad) + 1, 7 * min(EVERY, 2)):
        world, old, new = make(**bad)
        world.fuse = fuse
        try:
            quietly(world, new)
        except RolloutError:
            pytest.fail(f"it ended before call {fuse}")
        world.fuse = 0
        world.run(old)
        assert world.state() == world.at(old), fuse


def test_a_fault_at_any_call_is_undone_or_does_no_harm(make):
    for broken in range(1, calls(make) + 1, 2 * EVERY):
        world, old, new = make()
        world.broken = broken
        try:
            world.run(new)
        except RolloutError:
            world.run(world.store.linked("current"))  # a fault among the leftovers, before anything was begun
        current = world.store.linked("current")
        assert current in (old, new)
        assert world.state() == world.at(current), broken


def test_a_fault_in_the_middle_is_undone_at_once(make):
    for broken in range(20, calls(make) - 5, 2 * EVERY):
        world, _, new = make()
        world.broken = broken
        with suppress(RolloutError):
            world.run(new)
        current = world.store.linked("current")
        assert world.state() == world.at(current), broken
        assert (current == new) == (world.result() == "done"), broken


def test_asked_to_end_at_any_call_it_is_wholly_at_one_of_the_two(make):
    ended = []
    for number in range(1, calls(make) + 1, 2 * EVERY):
        world, old, new = make()
        world.signal = number
        with suppress(RolloutError):
            world.run(new)
        ended.append(world.result())
        assert world.state() == world.at(new if ended[-1] == "done" else old), number
    assert ended.count("rolled_back") > 20 // EVERY


def test_the_worker_of_a_release_whose_first_instance_is_bad_never_starts(make):
    world, old, new = make(api_1={"crash": True})
    with pytest.raises(RolloutError, match=r"put back \(api-1\)"):
        world.run(new)
    assert world.state() == world.at(old)


def test_a_way_back_that_was_meant_from_another_release_touches_nothing(make):
    world, old, new = make()
    world.options["expect_current"] = "r-000000000000"
    calls = world.calls
    with pytest.raises(RolloutError, match=f"release {old} came after r-000000000000") as caught:
        world.run(new, "rollback")
    assert caught.value.reason == "moved_on"
    assert f"-e release={new}" in str(caught.value)
    assert (world.state(), world.calls) == (world.at(old), calls)
    world.options["expect_current"] = old
    assert world.run(new, "rollback")["result"] == "done"
