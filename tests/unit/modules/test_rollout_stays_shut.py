"""What is not proven is not put into use: instances that are switched off, and what nginx cannot be asked about."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from ansible.module_utils.docker_engine import EngineError
from ansible.module_utils.rollout import edge, run
from ansible.module_utils.rollout.gates import Asking
from ansible.module_utils.rollout.model import RolloutError

sys.path.insert(0, str(Path(__file__).parent))

from rollout_world import PREFIX, World, quietly


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A world that serves release `old`, and more releases beside it: ``name={service: what is bad about it}``."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    monkeypatch.setattr(edge, "connections", lambda _pid, _ports: set())
    monkeypatch.setattr(run, "BACK_HEALTH", 0.5)
    monkeypatch.setattr(run, "BACK_GATE", 0.1)

    def world(**releases):
        found = World(tmp_path)
        found.options = {"health_timeout": 0.5}
        monkeypatch.setattr(Asking, "local", lambda _self, *args, **options: found.local(*args, **options))
        names = [found.release("old", "e-old")]
        names += [found.release(name, f"e-{name}", **bad) for name, bad in releases.items()]
        assert found.run(names[0])["result"] == "done"
        found.guarded = True
        return found, *names

    return world


def switch(world, name):
    (world.site / "state").mkdir(exist_ok=True)
    (world.site / "state" / f"{name}.down").touch()


def switches(world):
    return sorted(path.name for path in (world.site / "state").glob("*"))


# Switches that were left behind


def test_a_switched_off_instance_of_the_release_is_proven_and_used_again(make):
    world, old = make()
    switch(world, "api-1")
    assert world.run(old)["changed"] is True
    assert world.state() == world.at(old)


def test_a_switched_off_instance_of_another_release_stays_out_however_healthy_it_is(make):
    world, old = make()
    switch(world, "api-1")
    world.of("api-1")[0]["Config"]["Says"] = "somebody else"
    with pytest.raises(RolloutError, match="names release 'somebody else', expected 'old'"):
        world.run(old)
    assert switches(world) == ["api-1.down"]


def test_what_fails_before_anything_was_touched_puts_nothing_into_use_unproven(make, monkeypatch):
    world, _, new = make(new={})
    switch(world, "api-1")
    world.of("api-1")[0]["Config"]["Says"] = "somebody else"
    monkeypatch.setattr(World, "image_names", lambda _self, _image: [])
    monkeypatch.setattr(
        World, "_do", lambda self, arguments, options, do=World._do: _no_pull(self, arguments, options, do)
    )
    with pytest.raises(RolloutError, match="cannot be pulled"):
        world.run(new)
    assert switches(world) == ["api-1.down"]


def _no_pull(world, arguments, options, do):
    from ansible.module_utils.docker_cli import Result

    return Result(1, "", "no registry") if arguments[0] == "pull" else do(world, arguments, options)


def test_a_switch_of_a_service_that_does_not_exist_is_removed(make):
    world, old = make()
    switch(world, "api-9")
    assert world.run(old)["changed"] is True
    assert switches(world) == []


def test_an_instance_that_the_release_does_not_have_stays_out_until_it_is_removed(make):
    world, _, new = make(new={})
    extra = dict(world.of("api-2")[0], Id="f" * 64, Name="/wht-api-3")
    extra["Config"] = extra["Config"] | {"Labels": extra["Config"]["Labels"] | {PREFIX + "service": "api-3"}}
    world.containers.append(extra)
    switch(world, "api-3")
    seen, tick = [], world.tick
    world.tick = lambda: (bool(world.of("api-3")) and seen.append(switches(world))) or tick()
    world.run(new)
    assert all("api-3.down" in found for found in seen)
    assert world.state() == world.at(new)


# The way back


def test_on_the_way_back_the_one_that_is_out_comes_first(make):
    """A run was killed at its second instance, and the one after it fails at what was the first one's turn."""
    world, old, new, worse = make(new={}, worse={"api_1": {"crash": True}})
    world.tick = _killed_when(
        world, lambda: switches(world) == ["api-2.down"] and _says(world, "api-2") == "new"
    )
    assert quietly(world, new)
    del world.tick
    with pytest.raises(RolloutError, match="crashes again and again"):
        world.run(worse)
    assert world.result() == "rolled_back"
    assert world.state() == world.at(old)


def _says(world, service):
    return next((container["Config"]["Says"] for container in world.of(service)), None)


def _killed_when(world, condition):
    from rollout_world import Killed

    tick = world.tick

    def killing():
        if condition():
            raise Killed
        return tick()

    return killing


# The order


def test_one_that_answers_before_docker_calls_it_healthy_is_not_replaced_first(make, monkeypatch):
    world, _, new = make(new={})
    first, second = world.of("api-1")[0], world.of("api-2")[0]
    first["State"]["Health"]["Status"], first["Answers"] = "starting", True
    second["State"] = {"Status": "exited", "ExitCode": 1}
    assert world.run(new)["pending"][:2] == ["api-2", "api-1"]
    assert world.state() == world.at(new)


# nginx that cannot be asked


def _deaf(self, _identity, _command):
    raise EngineError("unreachable", "cannot run curl: timed out")


def test_while_nginx_cannot_be_asked_no_instance_is_replaced_behind_it(make, monkeypatch):
    world, old, new = make(new={})
    monkeypatch.setattr(World, "run_in", _deaf)
    with pytest.raises(RolloutError, match="could not be asked for /edge_alive") as caught:
        world.run(new)
    assert caught.value.evidence["result"] == "failed"
    assert "no container was replaced" in str(caught.value)
    assert world.state() == world.at(old)


def test_the_way_back_is_not_held_up_by_an_nginx_that_cannot_be_asked(make, monkeypatch):
    world, old, new = make(new={"worker": {"crash": True}})
    proven, asked, tick = [], World.run_in, world.tick

    def look():
        if _says(world, "api-2") == "new" and not switches(world):
            proven.append(True)
        return tick()

    world.tick = look
    monkeypatch.setattr(World, "run_in", lambda *args: (_deaf if proven else asked)(*args))
    with pytest.raises(RolloutError, match="crashes again and again"):
        world.run(new)
    assert world.result() == "rolled_back"
    assert world.state() == world.at(old)


def test_where_nothing_runs_an_instance_of_another_release_is_named_as_that(tmp_path, monkeypatch):
    world = World(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    monkeypatch.setattr(Asking, "local", lambda _self, *args, **options: world.local(*args, **options))
    first = world.release("first", "e-first", api_2={"says": "other"})
    with pytest.raises(RolloutError, match="it names release 'other', expected 'first'") as caught:
        world.run(first)
    assert caught.value.reason == "wrong_release"
