"""The deployment lock between real processes: races, kills, and two ansible-playbook runs at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ansible.module_utils.deploy_lock import DeployLock, LockError
from module_support import wait_for

ROOT = Path(__file__).resolve().parents[3]
RUN = "d-20261123T040000-{:06x}"

# Its name is what makes it a run: the lock belongs to the process, not to a lease.
PROGRAM = """
import os, sys, time
import ansible.module_utils
ansible.module_utils.__path__.insert(0, {modules!r})
from ansible.module_utils.deploy_lock import DeployLock

site, log, number, ends = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
lock, run = DeployLock(site), {run!r}.format(number)
lock.acquire(run, f"run {{number}}", wait=600)
with open(log, "a") as file:
    file.write(f"+{{number}}\\n")
    file.flush()
    while ends == "stays":
        time.sleep(1)
    time.sleep(0.01)
    file.write(f"-{{number}}\\n")
if ends == "releases":
    lock.release(run)
os._exit(0)
"""


@pytest.fixture
def start(tmp_path):
    program = tmp_path / "ansible-playbook"
    program.write_text(PROGRAM.format(modules=str(ROOT / "module_utils"), run=RUN))
    started = []

    def begin(number, ends):
        command = [
            sys.executable,
            str(program),
            str(tmp_path / "site"),
            str(tmp_path / "log"),
            str(number),
            ends,
        ]
        started.append(subprocess.Popen(command))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def log_of(tmp_path):
    file = tmp_path / "log"
    return file.read_text().split() if file.exists() else []


def test_of_twenty_at_once_each_has_it_alone_though_half_of_them_die_with_it(start, tmp_path):
    processes = [start(number, "releases" if number % 2 else "dies") for number in range(20)]
    assert [process.wait(timeout=600) for process in processes] == [0] * 20
    log = log_of(tmp_path)
    assert sorted(log) == sorted(f"{sign}{number}" for sign in "+-" for number in range(20))
    assert all(log[i][1:] == log[i + 1][1:] and log[i][0] == "+" for i in range(0, 40, 2))


def test_a_killed_holder_is_dead_at_once_and_a_stopped_one_is_not(start, tmp_path):
    lock = DeployLock(tmp_path / "site")
    holder = start(1, "stays")
    wait_for(lambda: log_of(tmp_path), what="the first holder")
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(LockError, match=f"process {holder.pid} of this machine"):
        lock.acquire(RUN.format(2), "ci")
    holder.kill()
    # Not yet buried: a process that nobody has waited for.
    wait_for(lambda: lock.is_dead(lock.read()), what="the end of the killed holder")
    taken = lock.acquire(RUN.format(2), "ci")
    assert taken.dead.run == RUN.format(1)


# -- playbooks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def playbook(tmp_path):
    """Start a run of a small playbook that takes the lock, waits for a file, and gives the lock back."""
    site = str(tmp_path / "site")
    tasks = [
        {"deploy_lock": {"path": site, "owner": "{{ who }}", "wait": 300}, "register": "lock"},
        {"ansible.builtin.copy": {"dest": str(tmp_path / "has-{{ who }}"), "content": "{{ lock.run }}"}},
        {"ansible.builtin.wait_for": {"path": str(tmp_path / "go-{{ who }}"), "timeout": 600, "sleep": 1}},
        {"deploy_lock": {"path": site, "state": "released", "run": "{{ lock.run }}"}},
    ]
    interpreter = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    (tmp_path / "hosts.yml").write_text(json.dumps({"all": {"hosts": {"localhost": interpreter}}}))
    play = {"hosts": "localhost", "gather_facts": False, "tasks": tasks}
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    started = []

    def begin(who):
        program = str(Path(sys.executable).parent / "ansible-playbook")
        command = [program, "-i", str(tmp_path / "hosts.yml"), str(tmp_path / "play.yml"), "-e", f"who={who}"]
        env = os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        with (tmp_path / f"output-{who}").open("w") as output:
            started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def test_of_two_playbooks_one_waits_and_one_that_is_killed_holds_up_nobody(playbook, tmp_path):
    lock = DeployLock(tmp_path / "site")
    first = playbook("one")
    wait_for((tmp_path / "has-one").exists, 240, "the first run's lock")
    assert lock.read().process.pid == first.pid
    second = playbook("two")
    third = playbook("three")
    first.kill()
    first.wait()
    wait_for(
        lambda: any((tmp_path / f"has-{who}").exists() for who in ("two", "three")), 240, "the second's lock"
    )
    winner = "two" if (tmp_path / "has-two").exists() else "three"
    other = {"two": "three", "three": "two"}[winner]
    assert not (tmp_path / f"has-{other}").exists()
    (tmp_path / f"go-{winner}").touch()
    wait_for((tmp_path / f"has-{other}").exists, 240, "the third's lock")
    (tmp_path / f"go-{other}").touch()
    assert (second.wait(240), third.wait(240)) == (0, 0), (tmp_path / f"output-{other}").read_text()
    assert lock.read() is None
