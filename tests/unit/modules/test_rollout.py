"""The parts of a rollout: releases, the order of a plan, gates, the way back, journal, switches, requests to end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ansible.module_utils.compose_plan import Planned
from ansible.module_utils.deploy_record import DeployRecords
from ansible.module_utils.rollout import gates
from ansible.module_utils.rollout.evidence import tell
from ansible.module_utils.rollout.gates import Answer, Asking, Gate, health_fault
from ansible.module_utils.rollout.journal import Journal, only_one
from ansible.module_utils.rollout.model import RolloutError, Settings, parse_release, unlike
from ansible.module_utils.rollout.plan import make_rollout_plan, risks
from ansible.module_utils.rollout.signals import StopRequest
from ansible.module_utils.rollout.sockets import established, family, sockets_of
from ansible.module_utils.rollout.switch import Switches
from ansible.module_utils.rollout.undo import plan_undo

sys.path.insert(0, str(Path(__file__).parent))

from rollout_releases import IMAGE, description, release


def planned(**actions):
    """Planned services, `api_1="replace"` and so on; the others need nothing."""
    names = ("api-1", "api-2", "worker", "nginx")
    containers = {name: (f"wht-{name}",) for name in names}
    return [
        Planned(name, actions.get(name.replace("-", "_"), "none"), "why", IMAGE, IMAGE, containers[name])
        for name in names
    ]


def make(entries, current="r-000000000000", healthy=("api-1", "api-2", "worker"), orphans=(), out=()):
    return make_rollout_plan(release(), current, entries, list(orphans), healthy, out)


# What a release is


def test_a_release_is_read_from_its_description():
    read = release()
    assert read.names == ["api-1", "api-2", "worker", "nginx"]
    assert [service.port for service in read.instances] == [8001, 8002]
    assert read.https == (443, 8443)
    assert read.keepalive == 60
    assert read.nginx.labels == {"org.aisha.edge": "e-new"}
    assert read.compose_file.name == "docker-compose.webhook.prod.yml"


@pytest.mark.parametrize("key", ["services", "edge", "ports", "project", "webhook_release"])
def test_a_release_that_does_not_say_enough_is_refused_by_name(key):
    half = description()
    del half[key]
    with pytest.raises(RolloutError, match=r"r-00.*does not say how.*Render it again") as caught:
        parse_release("r-000000000001", Path("/x"), half)
    assert caught.value.reason == "bad_release"
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gate_count", 0),
        ("gate_interval", -1),
        ("gate_timeout", -5),
        ("health_timeout", 0),
        ("drain_seconds", -1),
    ],
)
def test_a_number_with_which_a_gate_would_be_none_is_refused(tmp_path, name, value):
    with pytest.raises(RolloutError, match=f"{name} is {value}") as caught:
        Settings(site_dir=tmp_path, **{name: value})
    assert caught.value.reason == "bad_setting"


def test_a_release_without_an_instance_is_none():
    with pytest.raises(RolloutError, match="at least one instance"):
        release(instances=0)


def test_a_release_from_before_has_the_services_of_the_next_one_and_its_own_images_and_name():
    image = IMAGE.replace("1" * 64, "2" * 64)
    before = unlike(
        release(), "r-000000000000", Path("/opt/wht/releases/r-0"), {"webhook-api": image}, "s-old"
    )
    assert (before.id, before.webhook_release, before.names) == ("r-000000000000", "s-old", release().names)
    assert before.service("api-1").image == image
    assert before.service("api-1").labels == {"org.aisha.release": "s-old"}
    assert before.nginx.labels == {}


# The plan


def test_instances_come_first_then_the_worker_then_nginx():
    plan = make(planned(api_1="replace", api_2="replace", worker="replace", nginx="replace"))
    assert [task.service.name for task in plan.tasks] == ["api-1", "api-2", "worker", "nginx"]
    assert plan.edge.service.name == "nginx"
    assert plan.migrate
    assert not plan.idle


def test_an_instance_that_does_not_serve_is_replaced_before_one_that_does():
    plan = make(planned(api_1="replace", api_2="replace"), healthy=["api-1", "worker"])
    assert [task.service.name for task in plan.instances] == ["api-2", "api-1"]


def test_an_instance_that_is_out_of_use_is_replaced_before_one_that_is_in_use():
    """The other way round, the one in use would wait for another one in use, and there is none."""
    plan = make(planned(api_1="replace", api_2="replace"), out=["api-2"])
    assert [task.service.name for task in plan.instances] == ["api-2", "api-1"]


def test_nothing_differs():
    plan = make(planned(), current="r-000000000001")
    assert not plan.changed
    assert plan.lines() == []


@pytest.mark.parametrize(
    ("entries", "options"),
    [
        (planned(), {}),
        (planned(worker="start"), {"current": "r-000000000001"}),
        (planned(), {"current": "r-000000000001", "orphans": [{"name": "wht-api-3"}]}),
        (planned(), {"current": "r-000000000001", "out": ["api-2"]}),
    ],
)
def test_a_link_a_stopped_container_an_orphan_or_a_switch_is_something_to_do(entries, options):
    assert make(entries, **options).changed


def test_a_switch_of_a_service_that_is_replaced_anyway_is_not_told_twice():
    assert make(planned(api_2="create"), out=["api-2", "api-9"]).out == ()


def test_where_no_instance_runs_all_may_start_at_once():
    assert make(planned(api_1="create", api_2="start", worker="create", nginx="create"), current=None).idle
    assert not make(planned(api_1="create")).idle


def test_only_nginx_needs_no_migration():
    assert not make(planned(nginx="replace")).migrate
    assert not any("migrat" in line for line in make(planned(nginx="replace")).lines())


def test_a_container_under_another_name_is_replaced():
    entries = planned()
    entries[0] = Planned("api-1", "none", "unchanged", IMAGE, IMAGE, ("0123456789ab_wht-api-1",))
    (task,) = make(entries).tasks
    assert (task.service.name, task.action) == ("api-1", "replace")
    assert "0123456789ab_wht-api-1" in task.reason


def test_the_plan_is_told_step_by_step():
    orphans = [{"name": "wht-api-3"}]
    assert make(planned(api_1="replace", nginx="replace"), orphans=orphans).lines() == [
        "the database is migrated, if the release brings migrations",
        "api-1: replace, out of use meanwhile (why)",
        "nginx: replace, two side by side for a while (why)",
        "wht-api-3: is removed (no service of the release)",
        "release r-000000000001 becomes the current one, after r-000000000000",
    ]
    assert not any("migrat" in line for line in make(planned(api_1="replace")).lines("rollback"))


def test_risks_are_told_of_what_is_touched_and_of_nothing_else():
    everything = {"migrate_requests": None, "live_restore": False}
    edge = risks(make(planned(nginx="replace")), **everything)
    assert [text.split()[0] for text in edge] == ["net.ipv4.tcp_migrate_req", "the"]
    assert "not known to this kernel" in edge[0]
    assert "is off" in risks(make(planned(nginx="replace")), migrate_requests=False, live_restore=True)[0]
    assert risks(make(planned(api_1="replace")), migrate_requests=None, live_restore=True) == []
    assert risks(make(planned()), **everything) == []
    assert (
        risks(make(planned(api_1="replace", nginx="replace")), migrate_requests=True, live_restore=True) == []
    )


def test_one_instance_only_is_a_risk():
    entries = [entry for entry in planned(api_1="replace") if entry.name != "api-2"]
    plan = make_rollout_plan(release(instances=1), "r-0", entries, [], ["api-1"])
    (told,) = risks(plan, migrate_requests=True, live_restore=True)
    assert "one instance only" in told


# The way back


def test_what_was_touched_is_undone_in_the_reverse_order():
    back = plan_undo(release(), ["api-1", "worker", "nginx"], planned(api_1="replace", nginx="replace"))
    assert [service.name for service in back.replace] == ["nginx", "api-1"]
    assert [service.name for service in back.keep] == ["worker"]
    assert back.remove == ()


def test_what_was_not_touched_stays_also_when_it_differs():
    back = plan_undo(release(), ["api-1"], planned(api_1="replace", worker="replace"))
    assert [service.name for service in back.replace] == ["api-1"]


def test_a_service_that_the_release_before_did_not_have_is_removed():
    back = plan_undo(release(), ["api-3", "api-1", "api-3"], planned(api_1="replace"))
    assert back.remove == ("api-3",)


def test_services_with_other_secrets_are_replaced_last_whatever_their_hash_says():
    back = plan_undo(release(), ["api-1", "worker"], planned(api_1="replace"), ["api-2", "api-1", "worker"])
    assert [service.name for service in back.replace] == ["worker", "api-1", "api-2"]
    assert back.keep == ()


# Gates


def healthy(name="s-new", **more):
    return Answer(200, json.dumps({"status": "healthy", "release": name, **more}))


def test_health_names_the_release():
    assert health_fault(healthy(), "s-new") == ""
    assert health_fault(healthy(status="degraded"), "s-new") == ""
    assert "names release 's-old', expected 's-new'" in health_fault(healthy("s-old"), "s-new")
    assert "names release None" in health_fault(Answer(200, "welcome"), "s-new")
    assert health_fault(Answer(0, "refused"), "s-new") == "no answer (refused)"
    bad = json.dumps({"status": "unhealthy", "checks": {"database": {"ok": False, "error": "refused"}}})
    assert "database (refused)" in health_fault(Answer(503, bad), "s-new")
    assert "HTTP 502" in health_fault(Answer(502, "<html>"), "s-new")


class Time:
    def __init__(self):
        self.now = 0.0

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def gate(answers, count=3, timeout=10.0):
    moment, given = Time(), iter(answers)
    asked = []

    def ask():
        asked.append(moment.now)
        return next(given, answers[-1])

    Gate(count, 1.0, timeout, moment.clock, moment.sleep).hold("it", ask, service="api-1")
    return len(asked)


def test_a_gate_opens_after_good_answers_in_a_row_only():
    assert gate(["", "", ""]) == 3
    assert gate(["no", "", "", "no", "", "", ""]) == 7


def test_a_gate_that_stays_shut_says_the_last_fault():
    with pytest.raises(RolloutError, match=r"3 good answers in a row within 10 s: no answer") as caught:
        gate(["no answer"])
    assert (caught.value.reason, caught.value.service) == ("gate_failed", "api-1")


def test_an_instance_that_goes_to_and_fro_does_not_hold_a_gate_for_ever():
    with pytest.raises(RolloutError, match="to and fro"):
        gate(["", "", "to and fro"] * 20)


class Nginx:
    def __init__(self, out, code=0):
        self.answer = (code, out, "curl: (7) refused" if code else "")

    def inspect(self, name):
        return None

    def run_in(self, name, command):
        assert command[-1].startswith("http://edge/")
        return self.answer


def test_nginx_is_asked_over_its_control_socket():
    read = release()
    assert Asking(Nginx("e-new\n200")).edge("c", read) == ""
    assert "'e-old', expected 'e-new'" in Asking(Nginx("e-old\n200")).edge("c", read)
    assert "refused" in Asking(Nginx("\n000", code=7)).edge("c", read)
    through = Asking(Nginx(f"{healthy().text}\n200")).through("c", read.service("api-1"), read)
    assert through == ""
    assert "api-1 through nginx: HTTP 502" in Asking(Nginx("\n502")).through("c", read.service("api-1"), read)


class Reached:
    """An engine whose container's process is this one; commands in it are not allowed."""

    def inspect(self, _name):
        return {"State": {"Pid": os.getpid()}}

    def run_in(self, _name, _command):
        raise AssertionError("the socket could be reached")


@pytest.fixture
def edge_socket(tmp_path, monkeypatch):
    """The control socket as root sees it through nginx's process; it accepts, and answers what it was given, if anything."""
    monkeypatch.setattr(gates, "PROC", str(tmp_path))
    monkeypatch.setattr(gates, "ASK_SECONDS", 0.2)
    place = tmp_path / str(os.getpid()) / "root" / gates.SOCKET.lstrip("/")
    place.parent.mkdir(parents=True)
    heard = []

    def serve(answer):
        listener = socket.create_server(str(place), family=socket.AF_UNIX)

        def take():
            with listener, listener.accept()[0] as line:
                heard.append(line.recv(4096).decode())
                line.sendall(answer)
                ended.wait(5)

        threading.Thread(target=take, daemon=True).start()
        return heard

    ended = threading.Event()
    yield serve
    ended.set()


def test_nginx_is_asked_through_its_process_where_that_can_be_reached(edge_socket):
    heard = edge_socket(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\ne-new")
    assert Asking(Reached()).control("c", "/edge_alive") == Answer(200, "e-new")
    assert heard[0].startswith("GET /edge_alive HTTP/1.1")


def test_an_nginx_that_takes_the_question_and_is_silent_has_given_no_answer(edge_socket):
    edge_socket(b"")
    assert Asking(Reached()).control("c", "/edge_alive") == Answer(0, "timed out")


def test_another_release_on_the_instances_own_port_is_final(monkeypatch):
    asking, read = Asking(Nginx("")), release()
    monkeypatch.setattr(asking, "local", lambda *_args, **_options: healthy("s-old"))
    with pytest.raises(RolloutError, match="wht-api-1 is healthy, but it names release 's-old'") as caught:
        asking.instance(read.service("api-1"), read)
    assert caught.value.reason == "wrong_release"


# Journal


def settings(tmp_path, **options):
    return Settings(site_dir=tmp_path, host="web-1", owner="aida", **options)


def test_a_run_leaves_one_record(tmp_path):
    journal = Journal(settings(tmp_path, kind="deploy"))
    journal.begin(release(), "r-000000000000")
    with journal.step("replace", "api-1"):
        journal.touching("api-1")
        journal.touching("api-1")
    journal.finish("done")
    (record,) = DeployRecords(tmp_path).read()
    assert record["result"] == "done"
    assert (record["from"], record["to"], record["host"]) == ("r-000000000000", "r-000000000001", "web-1")
    assert record["changed"] == ["api-1"]
    assert [(step["step"], step["service"]) for step in record["steps"]] == [("replace", "api-1")]
    assert record["steps"][0]["seconds"] >= 0
    assert DeployRecords(tmp_path).in_hand() is None


def test_a_killed_run_is_recorded_by_the_next_one_which_inherits_what_it_touched(tmp_path):
    killed = Journal(settings(tmp_path))
    killed.begin(release(), "r-000000000000")
    with killed.step("replace", "api-1"):
        killed.touching("api-1")
        noted = DeployRecords(tmp_path).in_hand()
    assert noted["steps"][-1]["service"] == "api-1"

    following = Journal(settings(tmp_path))
    assert following.recover()["result"] == "interrupted"
    following.begin(release("r-000000000002"), "r-000000000000")
    following.touching("worker")
    assert following.touched == ["api-1", "worker"]
    following.finish("done")
    assert [record["result"] for record in DeployRecords(tmp_path).read()] == ["interrupted", "done"]
    assert Journal(settings(tmp_path)).recover() is None


def test_two_rollouts_at_once_are_one_too_many(tmp_path):
    with only_one(tmp_path, wait=0):
        second = only_one(tmp_path, wait=0.1)
        with pytest.raises(RolloutError, match=f"process {os.getpid()} since") as caught:
            second.__enter__()
        assert caught.value.reason == "locked"
    with only_one(tmp_path, wait=0):
        pass


HOLDER = """
import os, signal, sys
from pathlib import Path
import ansible.module_utils
ansible.module_utils.__path__.insert(0, sys.argv[1])
from ansible.module_utils.docker_cli import Docker
from ansible.module_utils.rollout.journal import only_one
with only_one(Path(sys.argv[2]), 0) as descriptor:
    command = "echo begun > $0/begun; until [ -e $0/go ]; do sleep 0.05; done"
    Docker(program="sh").holding(descriptor).attempt("-c", command, sys.argv[2])
"""


def test_the_next_run_waits_for_a_command_of_a_killed_one(tmp_path):
    module_utils = str(Path(__file__).resolve().parents[3] / "module_utils")
    run = subprocess.Popen([sys.executable, "-c", HOLDER, module_utils, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        run.kill()
        run.wait()
        second = only_one(tmp_path, wait=0)
        with pytest.raises(RolloutError, match=f"process {run.pid} since"):
            second.__enter__()
    finally:
        run.kill()
        (tmp_path / "go").touch()
    with only_one(tmp_path, wait=60):
        pass


def test_a_run_without_the_deployments_lock_is_refused(tmp_path):
    journal = Journal(settings(tmp_path, run="d-20261123T040000-1a2b3c"))
    with pytest.raises(RolloutError, match="the lock of run") as caught:
        journal.check_lock()
    assert caught.value.reason == "locked"
    Journal(settings(tmp_path)).check_lock()


# Switches


def test_switches_are_files_that_nginx_may_read(tmp_path):
    switches = Switches(tmp_path / "state")
    before = os.umask(0o077)
    try:
        switches.take_out("api-1")
        switches.drain("e-old")
    finally:
        os.umask(before)
    assert (switches.out(), switches.draining()) == (["api-1"], ["e-old"])
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "state" / "api-1.down").stat().st_mode & 0o777 == 0o644
    switches.take_in("api-1")
    switches.take_in("api-1")
    switches.undrain("e-old")
    assert (switches.out(), switches.draining()) == ([], [])


# Requests to end


@pytest.fixture
def asked():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop = StopRequest()
    stop.listen()
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_request_to_end_cuts_a_wait_short(asked):
    def wait():
        with asked.waiting():
            signal.raise_signal(signal.SIGTERM)
            time.sleep(30)

    begun = time.monotonic()
    with pytest.raises(RolloutError, match="SIGTERM") as caught:
        wait()
    assert time.monotonic() - begun < 20
    assert caught.value.reason == "interrupted"


def test_a_request_in_the_middle_of_something_waits_for_its_end(asked):
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(RolloutError, match="SIGINT"):
        asked.check()


def test_on_the_way_back_nobody_is_listened_to(asked):
    asked.ignore()
    with asked.waiting():
        signal.raise_signal(signal.SIGTERM)
    asked.check()


# Who is connected


def test_connections_are_told_from_proc(tmp_path):
    for pid, parent, name in (
        (10, 1, "nginx: (master)"),
        (11, 10, "nginx) S 1"),
        (12, 11, "x"),
        (99, 1, "other"),
    ):
        (tmp_path / str(pid) / "fd").mkdir(parents=True)
        (tmp_path / str(pid) / "stat").write_text(f"{pid} ({name}) S {parent} 0 0")
    (tmp_path / "11" / "fd" / "3").symlink_to("socket:[501]")
    (tmp_path / "11" / "fd" / "4").symlink_to("/dev/null")
    (tmp_path / "12" / "fd" / "5").symlink_to("socket:[502]")
    (tmp_path / "10" / "net").mkdir()
    line = "   0: 0100007F:{port:04X} 0100007F:D431 {state} 00000000:00000000 00:00000000 00000000 10002 0 {inode} 1"
    lines = [
        "  sl  local_address rem_address   st …",
        line.format(port=8443, state="01", inode=501),
        line.format(port=8443, state="0A", inode=502),
        line.format(port=22, state="01", inode=503),
    ]
    (tmp_path / "10" / "net" / "tcp").write_text("\n".join(lines))
    assert sorted(family(10, tmp_path)) == [10, 11, 12]
    assert sockets_of([10, 11, 12, 4000], tmp_path) == {"501", "502"}
    assert established(10, {8443, 80}, tmp_path) == {"501"}


# What is told of a container


def test_evidence_is_told_in_words():
    lines = tell(
        {
            "name": "wht-api-1",
            "status": "restarting",
            "health": "unhealthy",
            "exit": "exit code 137: out of memory, raise its memory limit",
            "restart_count": 3,
            "health_log": [{"exit_code": 1, "output": "connection refused\n"}],
            "log": ["starting", "killed"],
        }
    )
    assert (
        lines[0]
        == "wht-api-1: restarting, unhealthy, last exit code 137: out of memory, raise its memory limit, 3 restarts"
    )
    assert lines[1:] == ["  health check: connection refused", "  log: starting", "  log: killed"]
    assert tell({}) == []
