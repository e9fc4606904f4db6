"""Wherever a run breaks off: killed, failed or asked to end at every single call, the host serves, and becomes whole."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from ansible.module_utils.deploy_lock import DeployLock
from ansible.module_utils.deploy_record import DeployRecords
from ansible.module_utils.rollout import edge
from ansible.module_utils.rollout.gates import Asking
from ansible.module_utils.rollout.journal import only_one
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


def differs(world, release, **options):
    """That it is said that something differs, and nothing is touched or recorded."""
    before = (world.state(), world.records())
    with pytest.raises(RolloutError) as caught:
        world.confirm(release, **options)
    assert (world.state(), world.records()) == before
    return caught.value.reason


def test_where_nothing_differs_it_is_said_and_nothing_touched_or_recorded(make):
    world, old, new = make()
    identities, records = [container["Id"] for container in world.containers], world.records()
    confirmed = world.confirm(old, run="d-20261123T040000-1a2b3c")
    assert (confirmed["changed"], confirmed["record"]["result"]) == (False, "unchanged")
    DeployRecords(world.site).append_once(confirmed["record"])
    assert [record["id"] for record in world.records()[len(records) :]] == ["d-20261123T040000-1a2b3c"]
    assert world.state() == world.at(old)
    assert [container["Id"] for container in world.containers] == identities
    assert differs(world, new) == "differs"


@pytest.mark.parametrize("result", ["failed", "rolled_back", "interrupted"])
def test_after_a_run_that_did_not_succeed_nothing_is_called_unchanged(make, result):
    world, old, _ = make()
    record = {"id": "d-20261123T040000-1a2b3c", "host": "h", "started": "2026-11-23T04:00:00Z"}
    DeployRecords(world.site).append(record | {"kind": "deploy", "result": result})
    assert differs(world, old) == "differs"
    assert world.run(old)["after_failure"] is True
    assert world.confirm(old)["result"] == "unchanged"


def test_under_another_runs_lock_nothing_is_called_unchanged(make):
    world, old, _ = make()
    ours, theirs = "d-20261123T040000-1a2b3c", "d-20261123T040001-1a2b3c"
    lock = DeployLock(world.site)
    lock.acquire(theirs, "boris")
    assert differs(world, old, run=ours) == "locked"
    lock.release(theirs)
    lock.acquire(ours, "aida")
    assert world.confirm(old, run=ours)["result"] == "unchanged"


def test_while_a_rollout_is_at_work_nothing_is_called_unchanged(make):
    world, old, _ = make()
    with only_one(world.site, 0):
        assert differs(world, old) == "locked"


@pytest.mark.parametrize("left", ["api-2.down", "e-old.draining", "ghost.down"])
def test_with_something_left_of_a_run_nothing_is_called_unchanged(make, left):
    world, old, _ = make()
    (world.site / "state").mkdir(exist_ok=True)
    (world.site / "state" / left).touch()
    assert differs(world, old) == "differs"
    world.run(old)
    assert world.confirm(old)["result"] == "unchanged"


def test_with_a_migration_that_is_left_nothing_is_called_unchanged(make):
    world, old, _ = make()
    worker = world.of("worker")[0]
    labels = worker["Config"]["Labels"] | {"com.docker.compose.oneoff": "True"}
    one_off = worker | {
        "Id": "x" * 64,
        "Name": "/wht-migrate-run",
        "Config": worker["Config"] | {"Labels": labels},
    }
    world.containers.append(one_off)
    assert differs(world, old) == "differs"


@pytest.mark.parametrize("goal", ["old", "new"])
def test_killed_at_any_call_nothing_is_called_unchanged_that_is_not_whole(make, goal):
    called_whole, fuses = 0, range(1, calls(make) + 1, EVERY)
    for fuse in fuses:
        world, old, new = make()
        world.fuse = fuse
        assert quietly(world, new), fuse
        world.fuse, wanted, world.dead = 0, {"old": old, "new": new}[goal], False
        interrupted = (world.site / "run" / "deployment.json").exists()
        with suppress(RolloutError):
            world.confirm(wanted)
            called_whole += 1
            assert not interrupted, f"the record of the run that was killed at call {fuse} is to be closed"
            assert world.state() == world.at(wanted), fuse
    assert called_whole < len(fuses) / 4, (
        "before its first step a run has changed nothing, and after its last one all"
    )


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
