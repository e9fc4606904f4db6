"""A release that fails because of a new secret is gone back from with the old one, wherever the run breaks off."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from ansible.module_utils import kept_secrets
from ansible.module_utils.deploy_record import DeployRecords
from ansible.module_utils.rollout import edge
from ansible.module_utils.rollout.gates import Asking
from ansible.module_utils.rollout.journal import only_one
from ansible.module_utils.rollout.model import RolloutError
from ansible.module_utils.rollout.rotation_end import RotationEnd
from ansible.module_utils.secret_files import SecretFiles, SecretSpec

sys.path.insert(0, str(Path(__file__).parent))

from rollout_world import World, quietly

EVERY = int(os.environ.get("ROLLOUT_EVERY", "4"))
KEY, MORE = "api/key", "api/more"


class Site(World):
    """A host whose instances and worker mount secrets."""

    def write(self, **values):
        """What role secrets does in each run before the rollout: given values, by name without `api/`."""
        specs = [
            SecretSpec(f"api/{name}", value, owner=os.geteuid(), group=os.getegid(), keep=True)
            for name, value in values.items()
        ]
        files = SecretFiles(self.site / "secrets", specs, release=self.store.linked("current") or "")
        if files.plan():
            files.apply()
        return files

    def render(self, name, **values):
        """A release that mounts these secrets, and their files."""
        self.write(**values)
        return self.release(name, f"e-{name}", secrets={f"api/{key}": value for key, value in values.items()})

    def key(self, name=KEY):
        return (self.site / "secrets" / name).read_text()

    def inode(self, name=KEY):
        return (self.site / "secrets" / name).stat().st_ino

    def kept(self):
        return sorted(
            p.name for p in (self.site / "secrets").rglob("*") if ".before" in str(p) and p.is_file()
        )

    def sees(self, service):
        """What a service's container has for a key."""
        (container,) = self.of(service)
        return Path(f"{self.site}/proc/{container['State']['Pid']}/root/run/secrets/key").read_text()

    def identities(self):
        return [container["Id"] for container in self.containers]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Sites that serve release `old` with the key `good`."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    monkeypatch.setattr(edge, "connections", lambda _pid, _ports: set())
    made = iter(range(100_000))

    def site():
        found = Site(tmp_path / str(next(made)))
        found.site.mkdir()
        monkeypatch.setattr(Asking, "local", lambda _self, *args, **options: found.local(*args, **options))
        old = found.render("old", key="good")
        assert found.run(old)["result"] == "done"
        assert found.state() == found.at(old)
        assert found.kept() == []
        found.calls, found.guarded = 0, True
        return found, old

    return site


def fails(site, release, **options):
    with pytest.raises(RolloutError) as caught:
        site.run(release, **options)
    return caught.value


# The way back


def test_a_bad_secret_is_rolled_back_with_the_one_of_before(make):
    site, old = make()
    before = site.inode()
    new = site.render("new", key="bad and secret")
    error = fails(site, new)
    assert error.evidence["rolled_back"] is True
    assert site.state() == site.at(old)
    assert (site.key(), site.inode(), site.kept()) == ("good", before, [])
    assert [site.sees(name) for name in ("api-1", "api-2", "worker")] == ["good"] * 3
    assert "secrets of before stand again: api/key" in str(error)
    assert "bad and secret" not in str(error)


def test_a_good_secret_stays_and_nothing_is_kept(make):
    site, _ = make()
    new = site.render("new", key="better")
    assert site.kept() == [".release", "key"]
    result = site.run(new)
    assert (result["result"], result["kept_secrets"]) == ("done", [])
    assert (site.key(), site.kept()) == ("better", [])
    again = site.run(new)
    assert (again["result"], again["changed"]) == ("unchanged", False)


def test_a_run_that_changes_nothing_says_whether_it_follows_one_that_failed(make):
    site, old = make()
    assert site.run(old)["after_failure"] is False
    fails(site, site.render("new", key="bad"))
    assert [site.run(old)["after_failure"] for _ in range(2)] == [True, False]


def test_after_two_failures_it_is_still_the_one_that_was_proven(make):
    site, old = make()
    for value in ("bad", "bad, too"):
        fails(site, site.render("new", key=value))
        assert (site.key(), site.state()) == ("good", site.at(old))
    assert site.run(site.render("new", key="better"))["result"] == "done"
    assert site.kept() == []


@pytest.mark.parametrize("step", ["pull", "test", "migrate"])
def test_what_is_refused_before_a_container_is_touched_puts_it_back(make, step):
    site, old = make()
    before, containers = site.inode(), site.identities()
    new = site.render("new", key="better")
    site.refused = {step}
    error = fails(site, new)
    assert error.evidence["result"] == "failed"
    assert "no container was replaced" in str(error)
    assert "secrets of before stand again: api/key" in str(error)
    assert (site.key(), site.inode(), site.kept()) == ("good", before, [])
    assert site.identities() == containers
    assert site.state() == site.at(old)


def test_that_it_cannot_be_put_back_hides_no_fault(make, monkeypatch):
    site, _ = make()
    new = site.render("new", key="better")
    site.refused = {"test"}

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_secrets.KeptSecrets, "put_back", full)
    assert fails(site, new).reason == "edge_refused"
    assert any(
        "secrets of before could not be put back" in text and "No space" in text for text in site.warnings
    )


def test_a_secret_that_is_new_goes_with_the_release_that_wanted_it(make):
    site, old = make()
    fails(site, site.render("new", key="good", more="bad"))
    assert not (site.site / "secrets" / MORE).exists()
    assert (site.state(), site.kept()) == (site.at(old), [])


def test_a_file_that_was_missing_stays_where_the_release_of_before_needs_it(make):
    site, old = make()
    (site.site / "secrets" / KEY).unlink()
    new = site.render("new", key="better")
    site.refused = {"migrate"}
    fails(site, new)
    assert (site.key(), site.kept()) == ("better", [])
    assert site.state() == site.at(old)


# Containers that have another file than the release says


def test_secrets_alone_prove_nothing_and_the_way_back_stays_open(make):
    """--tags secrets, and a rollout of the release that was rendered before."""
    site, old = make()
    site.write(key="bad")
    assert site.foresee(old)["changed"] is False
    result = site.run(old)
    assert (result["result"], result["changed"], result["kept_secrets"]) == ("unchanged", False, [KEY])
    assert any(
        "api-1, api-2, worker" in text and "--tags secrets,stack,rollout" in text for text in site.warnings
    )
    assert site.kept() == [".release", "key"]
    fails(site, site.render("new", key="bad"))
    assert (site.key(), site.state()) == ("good", site.at(old))


def test_secrets_of_a_release_that_is_brought_without_them_belong_to_it(make):
    site, _ = make()
    site.write(key="bad")
    other = site.release("old", "e-other", secrets={KEY: "good"})
    assert site.run(other)["result"] == "done"
    assert site.sees("api-1") == "good"
    fails(site, site.render("new", key="bad"))
    assert (site.key(), site.state()) == ("good", site.at(other))


def test_a_container_that_was_started_again_with_the_bad_one_is_mended_on_the_way_back(make):
    """The host was restarted between --tags secrets and the rollout: its hash says nothing of it."""
    site, old = make()
    new = site.render("new", key="bad")
    site.restart("api-2")
    site.restart("worker")
    fails(site, new)
    assert site.state() == site.at(old)
    assert [site.sees(name) for name in ("api-1", "api-2", "worker")] == ["good"] * 3


def test_a_container_made_anew_with_the_bad_one_is_mended_though_no_other_release_is_there(make):
    site, old = make()
    site.write(key="bad")
    site.containers.remove(site.of("api-1")[0])
    error = fails(site, old)
    assert error.evidence["rolled_back"] is True
    assert site.state() == site.at(old)
    assert (site.sees("api-1"), site.key()) == ("good", "good")


def test_nothing_is_put_back_under_a_container_that_has_the_new_one(make):
    site, _ = make()
    new = site.render("new", key="better")
    site.restart("api-2")
    site.refused = {"test"}
    error = fails(site, new)
    assert (site.key(), site.kept()) == ("better", [".release", "key"])
    assert "stand again" not in str(error)


# Broken off


def test_what_was_kept_goes_in_the_next_run_when_the_last_one_was_killed_at_its_end(make):
    site, _ = make()
    new = site.render("new", key="better")
    site.run(new, settle=False)
    assert site.foresee(new)["changed"] is True
    assert site.kept() == [".release", "key"]
    result = site.run(new)
    assert (result["result"], result["changed"], result["kept_secrets"]) == ("unchanged", True, [])
    assert site.kept() == []
    assert site.foresee(new)["changed"] is False
    assert site.run(new)["changed"] is False


def test_killed_after_its_last_step_the_next_rotation_goes_back_to_the_one_that_serves(make):
    site, _ = make()
    new = site.render("new", key="better")
    site.run(new, settle=False)
    fails(site, site.render("newer", key="bad"))
    assert (site.key(), site.state(), site.kept()) == ("better", site.at(new), [])


def calls(make, value):
    site, _ = make()
    new = site.render("new", key=value)
    with suppress(RolloutError):
        site.run(new)
    return site.calls


@pytest.mark.parametrize("value", ["better", "bad"])
def test_killed_at_any_call_the_next_run_ends_with_one_release_and_its_secret(make, value):
    for fuse in range(1, calls(make, value) + 1, 2 * EVERY):
        site, old = make()
        new = site.render("new", key=value)
        site.fuse = fuse
        assert quietly(site, new), fuse
        site.fuse = 0
        again = site.render("new", key=value)
        with suppress(RolloutError):
            site.run(again)
        goal, key = (new, "better") if value == "better" else (old, "good")
        assert (site.state(), site.key(), site.kept()) == (site.at(goal), key, []), fuse
        assert site.sees("api-1") == site.sees("worker") == key, fuse


def test_killed_at_any_call_of_a_bad_rotation_the_right_value_makes_it_whole(make):
    for fuse in range(1, calls(make, "bad") + 1, 3 * EVERY):
        site, _ = make()
        site.fuse = fuse
        assert quietly(site, site.render("new", key="bad")), fuse
        site.fuse = 0
        newest = site.render("newest", key="better")
        assert site.run(newest)["result"] == "done", fuse
        assert (site.state(), site.key(), site.kept()) == (site.at(newest), "better", []), fuse


def test_killed_at_any_call_of_a_bad_rotation_the_old_value_makes_it_whole(make):
    """The operator takes the rotation back in the vault."""
    for fuse in range(1, calls(make, "bad") + 1, 3 * EVERY):
        site, old = make()
        site.fuse = fuse
        assert quietly(site, site.render("new", key="bad")), fuse
        site.fuse = 0
        assert site.render("old", key="good") == old
        site.run(old)
        assert (site.state(), site.key(), site.kept()) == (site.at(old), "good", []), fuse


# Rollbacks


def test_a_rollback_uses_the_secrets_that_stand(make):
    site, old = make()
    site.run(site.render("new", key="better"))
    assert site.run(old, "rollback")["result"] == "done"
    assert (site.state(), site.key(), site.sees("api-1")) == (site.at(old), "better", "better")


def test_a_rollback_proves_what_stands_as_well(make):
    site, old = make()
    new = site.render("new", key="good", more="x")
    site.run(new)
    site.write(key="better", more="x")
    assert site.run(old, "rollback")["result"] == "done"
    assert (site.sees("api-1"), site.kept()) == ("better", [])


def test_a_rollback_that_fails_goes_back_with_the_secrets_of_the_release_that_serves(make):
    site, old = make()
    new = site.render("new", key="better")
    site.run(new)
    site.write(key="bad")
    fails(site, old, kind="rollback")
    assert (site.state(), site.key(), site.kept()) == (site.at(new), "better", [])


def test_a_host_goes_back_with_the_others_and_has_its_secret_of_before(make):
    site, old = make()
    before = site.inode()
    new = site.render("new", key="better")
    result = site.run(new, settle=False)
    assert result["kept_secrets"] == [KEY]
    assert site.run(old, "rollback")["result"] == "done"
    assert (site.state(), site.key(), site.inode(), site.kept()) == (site.at(old), "good", before, [])


def test_a_host_that_cannot_go_back_with_the_others_has_its_new_secret_again(make):
    site, old = make()
    new = site.render("new", key="better")
    site.run(new, settle=False)
    start = site._start
    site._start = lambda container, service: start(container, service | {"crash": service["says"] == "old"})
    fails(site, old, kind="rollback")
    assert (site.state(), site.key(), site.kept()) == (site.at(new), "better", [])


# The end of a run of several hosts: module kept_secrets


def end(site, state, *, check=False):
    ending = RotationEnd(site.site, site, site.warnings.append, proc=site.site / "proc")
    return ending.end(state, check=check)


def test_when_all_hosts_serve_nothing_is_kept(make):
    site, _ = make()
    site.run(site.render("new", key="better"), settle=False)
    for check in (True, False):
        done = end(site, "settled", check=check)
        assert (done.action, done.names, done.changed) == ("removed", [KEY], True)
        assert bool(site.kept()) is check
    again = end(site, "settled")
    assert (again.action, again.names, again.changed) == ("none", [], False)
    assert site.key() == "better"


def test_what_no_container_uses_yet_is_kept_on(make):
    site, _ = make()
    site.write(key="better")
    done = end(site, "settled")
    assert (done.action, done.changed) == ("left", False)
    assert site.kept() == [".release", "key"]


def test_a_host_that_was_not_reached_has_its_secrets_of_before(make):
    """An image could not be built, or another host has failed: what was written here is not in use."""
    site, _ = make()
    before = site.inode()
    site.render("new", key="better")
    for check in (True, False):
        done = end(site, "restored", check=check)
        assert (done.action, done.names, done.changed) == ("restored", [KEY], True)
        assert (site.key() == "good") is not check
    assert (site.inode(), site.kept()) == (before, [])
    assert end(site, "restored").changed is False


def test_nothing_is_restored_on_a_host_that_serves_with_the_new_ones(make):
    """rollout_on_failure: host."""
    site, _ = make()
    site.run(site.render("new", key="better"), settle=False)
    assert end(site, "restored").action == "removed"
    assert (site.key(), site.kept()) == ("better", [])


def test_nothing_is_restored_under_a_container_that_has_the_new_ones(make):
    site, _ = make()
    site.write(key="better")
    site.restart("api-1")
    assert end(site, "restored").action == "left"
    assert (site.key(), site.kept()) == ("better", [".release", "key"])


def test_nothing_is_restored_under_a_rollout_that_was_killed_or_goes_on(make):
    """Its controller is gone: it goes on to its end, or the next run undoes it."""
    site, _ = make()
    new = site.render("new", key="better")
    with only_one(site.site, 0):
        assert end(site, "restored").action == "left"
    DeployRecords(site.site).begin({"id": "d-1", "host": "h", "to": new})
    assert end(site, "restored").action == "left"
    assert (site.key(), site.kept()) == ("better", [".release", "key"])


def test_where_no_release_serves_any_more_nothing_is_kept(make):
    site, _ = make()
    site.render("new", key="better")
    (site.site / "current").unlink()
    assert end(site, "restored").action == "removed"
    assert (site.key(), site.kept()) == ("better", [])
