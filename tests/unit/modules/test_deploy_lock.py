"""The deployment lock: who has it, when it is free, and what is said to those who don't get it."""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime, timedelta

import pytest
from ansible.module_utils import run_process
from ansible.module_utils.deploy_lock import Clock, DeployLock, Holder, LockError, new_run_id
from ansible.module_utils.run_process import ProcessTable, RunProcess, is_ansible

ONE, TWO = "d-20261123T040000-aaaaaa", "d-20261123T040001-bbbbbb"


class Host:
    """A host's clocks and processes, in the test's hands."""

    def __init__(self):
        self.boot_id, self.seconds = "boot-1", 1000.0
        self.day = datetime(2026, 11, 23, 4, tzinfo=UTC)
        self.run: RunProcess | None = None
        self.alive: dict[int, int] = {}
        self.slept = 0

    def advance(self, seconds):
        self.seconds += seconds
        self.day += timedelta(seconds=seconds)

    # ProcessTable
    def boot(self):
        return self.boot_id

    def ansible_run(self):
        return self.run

    def is_over(self, process):
        if process.boot != self.boot_id:
            return True
        return None if process.namespace != "ns-1" else self.alive.get(process.pid) != process.start

    # Clock
    def sleep(self, seconds):
        self.slept += 1
        self.advance(seconds)

    def clock(self):
        return Clock(now=lambda: self.day, since_boot=lambda: self.seconds, sleep=self.sleep)

    def starts(self, pid, start=7):
        self.alive[pid] = start
        self.run = RunProcess("boot-1", "ns-1", pid, start, "ansible-playbook")


@pytest.fixture
def host():
    return Host()


@pytest.fixture
def lock(host, tmp_path):
    return DeployLock(tmp_path, table=host, clock=host.clock())


def test_the_second_is_told_who_has_it_since_when_and_what_to_do(lock, host):
    host.starts(41)
    taken = lock.acquire(ONE, "aida@laptop", "deploy", "4f2c1aa")
    assert (taken.changed, taken.dead) == (True, None)
    with pytest.raises(LockError) as refused:
        lock.acquire(TWO, "ci@runner", wait=2)
    assert refused.value.reason == "locked"
    assert refused.value.holder.run == ONE
    text = str(refused.value)
    for part in (
        "aida@laptop",
        "deploy of version 4f2c1aa",
        ONE,
        "2026-11-23T04:00:00Z",
        "process 41",
        "Waited 2 s",
    ):
        assert part in text
    assert f"playbooks/unlock.yml -e lock_break={ONE}" in text
    assert host.slept >= 8


def test_it_is_had_as_soon_as_it_is_given_back(lock, host):
    host.starts(41)
    lock.acquire(ONE, "aida")
    naps = iter([False, False, True])
    host.sleep = lambda seconds: (host.advance(seconds), next(naps) and lock.release(ONE))
    waiting = DeployLock(lock.directory.parent, table=host, clock=host.clock())
    assert waiting.acquire(TWO, "ci", wait=30).holder.run == TWO


def test_the_same_run_may_take_it_again(lock, host):
    since = lock.acquire(ONE, "aida", lease=60).holder.since
    host.advance(50)
    again = lock.acquire(ONE, "aida", lease=60)
    assert (again.changed, again.holder.since) == (False, since)
    host.advance(50)
    assert not lock.is_dead(lock.read())


def test_a_run_whose_process_ended_is_dead_at_once_and_one_whose_process_lives_never_is(lock, host):
    host.starts(41)
    lock.acquire(ONE, "aida", lease=60)
    host.advance(86400)
    assert not lock.is_dead(lock.read())
    del host.alive[41]
    host.starts(42)
    taken = lock.acquire(TWO, "ci")
    assert taken.dead.run == ONE


def test_a_process_id_that_was_given_again_is_another_process(lock, host):
    host.starts(41, start=7)
    lock.acquire(ONE, "aida")
    host.alive[41] = 9_000
    assert lock.is_dead(lock.read())


def test_a_process_of_another_boot_is_dead_and_one_of_another_namespace_has_its_lease(lock, host):
    host.starts(41)
    lock.acquire(ONE, "aida", lease=60)
    host.boot_id = "boot-2"
    assert lock.is_dead(lock.read())
    lock.break_()
    host.boot_id, host.run = "boot-1", RunProcess("boot-1", "ns-other", 41, 7)
    lock.acquire(TWO, "aida", lease=60)
    assert not lock.is_dead(lock.read())
    host.advance(61)
    assert lock.is_dead(lock.read())


def test_without_a_process_the_lease_counts_on_the_boot_clock_and_can_be_renewed(lock, host):
    lock.acquire(ONE, "aida", lease=60)
    host.day += timedelta(days=1)  # somebody sets the clock
    assert not lock.is_dead(lock.read())
    host.seconds += 59
    lock.renew(ONE, lease=60)
    host.seconds += 59
    assert not lock.is_dead(lock.read())
    host.seconds += 2
    assert lock.is_dead(lock.read())
    # Nobody has taken it: whoever was so slow may go on.
    assert lock.check(ONE).run == ONE


def test_after_a_reboot_a_lease_counts_by_the_time_of_day(lock, host):
    lock.acquire(ONE, "aida", lease=60)
    host.boot_id, host.seconds = "boot-2", 5.0
    assert not lock.is_dead(lock.read())
    host.advance(61)
    assert lock.is_dead(lock.read())


def test_who_lost_it_is_told_at_the_next_check(lock, host):
    lock.acquire(ONE, "aida", lease=60)
    host.advance(61)
    lock.acquire(TWO, "ci@runner")
    for ask in (lock.check, lock.renew):
        with pytest.raises(LockError, match="ci@runner") as lost:
            ask(ONE)
        assert lost.value.reason == "lost"
    assert lock.release(ONE) is False
    assert lock.read().run == TWO
    lock.break_(TWO)
    with pytest.raises(LockError, match="broke it") as lost:
        lock.check(TWO)
    assert lost.value.reason == "lost"


def test_only_the_run_that_is_named_is_broken(lock):
    lock.acquire(ONE, "aida")
    with pytest.raises(LockError, match=ONE):
        lock.break_(TWO)
    assert lock.break_().run == ONE
    assert lock.break_() is None


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"run": "d-2026', "null", "[]", '{"run": 1}', "\x00" * 300, '{"run": "x", "owner": "y"}'],
)
def test_a_file_that_is_no_lock_holds_for_a_while_and_says_so(lock, host, text):
    lock.acquire(ONE, "aida")
    file = lock.directory / "deployment.lock"
    file.write_text(text)
    os.utime(file, (host.day.timestamp(), host.day.timestamp()))
    with pytest.raises(LockError, match=r"cannot be read.*lock_break=any") as refused:
        lock.acquire(TWO, "ci")
    assert refused.value.reason == "locked"
    with pytest.raises(LockError) as lost:
        lock.check(ONE)
    assert lost.value.reason == "lost"
    host.advance(601)
    assert not lock.acquire(TWO, "ci").dead.readable


def test_bytes_that_are_no_text_are_no_lock_either(lock):
    lock.acquire(ONE, "aida")
    (lock.directory / "deployment.lock").write_bytes(b"\xff\xfe\x00")
    assert not lock.read().readable


def test_fields_of_a_later_version_do_no_harm(lock):
    lock.acquire(ONE, "aida")
    file = lock.directory / "deployment.lock"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"more": [1]}))
    assert lock.check(ONE).owner == "aida"


def test_the_files_are_roots_alone(lock):
    lock.acquire(ONE, "aida")
    assert lock.directory.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in lock.directory.iterdir()} == {
        "deployment.lock": 0o600,
        ".guard": 0o600,
    }


def test_what_the_disk_refuses_is_said(tmp_path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(LockError, match="free space and rights") as error:
        DeployLock(tmp_path).acquire(ONE, "aida")
    assert error.value.reason == "io"


def test_an_id_that_is_none_is_refused(lock):
    with pytest.raises(LockError) as error:
        lock.acquire("../x", "aida")
    assert error.value.reason == "invalid"
    lock.acquire(new_run_id(), "aida")


def test_of_threads_that_race_for_a_dead_runs_lock_one_wins(tmp_path):
    lock = DeployLock(tmp_path)
    lock.acquire(ONE, "aida", lease=-1)
    wins, refused, barrier = [], [], threading.Barrier(8)

    def race(number):
        barrier.wait()
        try:
            lock.acquire(f"d-20261123T040000-00000{number}", "ci")
            wins.append(number)
        except LockError as error:
            refused.append(error.reason)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(wins), refused) == (1, ["locked"] * 7)


# -- processes ----------------------------------------------------------------------------------------------------------


def process(root, pid, parent, command, state="S", start=5):
    directory = root / str(pid)
    directory.mkdir()
    (directory / "stat").write_text(f"{pid} (a) name) {state} {parent} " + "0 " * 17 + f"{start} 0 0\n")
    (directory / "cmdline").write_text("\0".join(command) + "\0")


PLAYBOOK = ["/venv/bin/python3", "/venv/bin/ansible-playbook", "site.yml"]


@pytest.fixture
def table(tmp_path):
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "sys/kernel/random/boot_id").write_text("boot-1\n")
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").symlink_to("pid:[1]")
    process(tmp_path, 10, 1, ["bash"])
    process(tmp_path, 20, 10, ["bash", "scripts/up.sh"])
    process(tmp_path, 30, 20, PLAYBOOK, start=30)
    process(tmp_path, 31, 30, PLAYBOOK, start=31)
    process(tmp_path, 32, 31, ["sudo", "-n", "/bin/sh", "-c", "echo BECOME; python3"])
    process(tmp_path, 33, 32, ["/venv/bin/python3"])
    return ProcessTable(tmp_path)


def test_the_run_is_the_main_process_and_not_the_worker_it_forked(table):
    assert table.ansible_run(33) == RunProcess("boot-1", "pid:[1]", 30, 30, "ansible-playbook")
    assert table.ansible_run(20) is None


def test_of_a_run_inside_a_run_it_is_the_inner_one(table, tmp_path):
    process(tmp_path, 40, 33, ["/venv/bin/python3", "/venv/bin/ansible-playbook", "inner.yml"], start=40)
    process(tmp_path, 41, 40, ["python3"])
    assert table.ansible_run(41).pid == 40


def test_a_run_is_over_when_it_is_gone_or_not_yet_buried(table, tmp_path):
    found = table.ansible_run(33)
    assert table.is_over(found) is False
    assert table.is_over(RunProcess("boot-0", "pid:[1]", 30, 30)) is True
    assert table.is_over(RunProcess("boot-1", "pid:[2]", 30, 30)) is None
    assert table.is_over(RunProcess("boot-1", "pid:[1]", 30, 29)) is True
    assert table.is_over(RunProcess("boot-1", "pid:[1]", 99, 30)) is True
    process(tmp_path, 50, 1, PLAYBOOK, state="Z", start=50)
    assert table.is_over(RunProcess("boot-1", "pid:[1]", 50, 50)) is True


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (PLAYBOOK, True),
        (["ansible-playbook", "site.yml"], True),
        (["/usr/bin/python3", "-u", "/usr/bin/ansible-pull"], True),
        (["python3", "/root/.ansible/tmp/ansible-tmp-1-2/AnsiballZ_deploy_lock.py"], False),
        (["/bin/sh", "-c", "/venv/bin/python3"], False),
        (["bash"], False),
        ([""], False),
    ],
)
def test_commands_of_ansible_are_known_by_name(command, found):
    assert is_ansible(command) is found


def test_a_record_of_a_process_that_is_none_is_no_process():
    whole = RunProcess("b", "n", 1, 2, "ansible-playbook").as_record()
    assert RunProcess.from_record(whole) is not None
    assert RunProcess.from_record(None) is None
    assert RunProcess.from_record(whole | {"pid": "1"}) is None


def test_a_holder_survives_being_written(lock, host):
    host.starts(41)
    holder = lock.acquire(ONE, "aida", "rollback", "v1").holder
    assert Holder.parse(holder.text()) == holder == lock.read()


def test_the_run_on_its_controller_is_named_for_whoever_comes_from_there(lock):
    controller = RunProcess("boot-c", "ns-c", 7, 8, "ansible-playbook")
    lock.acquire(ONE, "aida", controller=controller)
    assert lock.read().controller == controller
    assert RunProcess.from_record(lock.facts(lock.read())["controller"]) == controller


def test_as_a_program_it_says_whether_a_run_is_over(monkeypatch, table):
    monkeypatch.setattr(run_process, "ProcessTable", lambda: table)
    known = table.ansible_run(33).as_record()
    assert json.loads(run_process.main([json.dumps(known)])) is False
    assert json.loads(run_process.main([json.dumps(known | {"start": 1})])) is True
    assert json.loads(run_process.main([json.dumps(known | {"namespace": "pid:[2]"})])) is None
    assert json.loads(run_process.main(["{}"])) is None
