"""When an instance may be taken out, and when what it had is done: with answers that are late, missing or wrong."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible.module_utils.rollout.gates import Answer, Gate
from ansible.module_utils.rollout.instances import Instances, load_of
from ansible.module_utils.rollout.model import RolloutError, Settings, parse_release
from ansible.module_utils.rollout.signals import StopRequest
from ansible.module_utils.rollout.switch import Switches

sys.path.insert(0, str(Path(__file__).parent))

from rollout_releases import description

FAMILY = "# TYPE webhook_request_seconds histogram\n"


class Time:
    """Passes only while somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Host:
    """Two instances: what docker says of them, and what they answer."""

    def __init__(self, tmp_path):
        self.time = Time()
        self.health = {"api-1": "healthy", "api-2": "healthy"}
        self.answers = {"api-1": 200, "api-2": 200}
        self.metrics = lambda: Answer(404, "")
        self.switches = Switches(tmp_path / "state")
        self.switches.prepare()
        self.release = parse_release("r-000000000001", tmp_path, description())
        settings = Settings(site_dir=tmp_path, drain_seconds=10, drain_settle=0.5, health_timeout=90)
        journal = SimpleNamespace(step=lambda *_: nullcontext(), touching=lambda _name: None)
        gate = Gate(1, 0.1, 5, self.time.clock, self.time.sleep)
        self.instances = Instances(
            SimpleNamespace(), self, self, gate, self.switches, journal, StopRequest(), settings,
            self.time.clock, self.time.sleep,
        )  # fmt: skip

    def inspect(self, container):
        status = self.health[container.removeprefix("wht-")]
        return {"State": {"Status": "running" if status else "exited", "Health": {"Status": status}}}

    def local(self, port, path="/health", *, tls=False):
        if path == "/metrics":
            return self.metrics()
        return Answer(self.answers[f"api-{port - 8000}"], json.dumps({"release": "s-new"}))

    def take_out(self, name):
        self.instances._take_out(self.release.service(name), self.release)


@pytest.fixture
def host(tmp_path: Path):
    return Host(tmp_path)


# Until it has nothing left to do


def metrics(answered, in_progress=None):
    text = (
        FAMILY + f'webhook_request_seconds_count{{code="200",endpoint="intake.status_update"}} {answered}.0\n'
    )
    more = "" if in_progress is None else f"webhook_deliveries_in_progress {in_progress}.0\n"
    return Answer(200, text + more)


def test_load_is_what_was_answered_without_our_own_and_what_is_in_progress():
    ours = """
webhook_request_seconds_count{code="200",endpoint="status.health"} 900.0
webhook_request_seconds_count{code="200",endpoint="status.show_metrics"} 3.0
"""
    assert load_of(metrics(42, 1).text + ours) == (42, 1)
    assert load_of(metrics(42).text + ours) == (42, None)
    assert load_of(FAMILY + ours) == (0, None), "it has answered nothing yet, and says so"
    assert load_of(ours) == (0, None)
    assert load_of("# nothing") is None
    assert load_of("<html>") is None


def given(host, *answers):
    left = list(answers)
    host.metrics = lambda: left.pop(0) if len(left) > 1 else left[0]


@pytest.mark.parametrize(
    "answers",
    [[Answer(0, "timed out")], [Answer(404, "")], [Answer(200, "# nothing")], [Answer(503, ""), Answer(0, "")]],
    ids=str,
)  # fmt: skip
def test_an_instance_that_does_not_say_what_it_does_is_given_all_the_time(host, answers):
    given(host, *answers)
    host.take_out("api-1")
    assert 10 <= host.time.now < 11


def test_an_instance_that_answers_nothing_more_is_ended_soon(host):
    given(host, metrics(42))
    host.take_out("api-1")
    assert 0.5 < host.time.now < 1
    assert host.switches.out() == ["api-1"]


def test_one_answer_that_is_missing_in_between_ends_no_wait(host):
    given(host, metrics(40), Answer(0, "timed out"), metrics(41), metrics(42), metrics(42))
    host.take_out("api-1")
    assert host.time.now > 0.5 + 3 * 0.15


def test_while_deliveries_are_in_progress_it_is_waited_for_however_still_the_count_is(host):
    given(host, *[metrics(42, 1)] * 20, metrics(43, 0), metrics(43, 0))
    host.take_out("api-1")
    assert host.time.now > 0.5 + 20 * 0.15
    assert host.time.now < 10


def test_a_delivery_that_never_ends_does_not_hold_it_for_ever(host):
    given(host, metrics(42, 1))
    host.take_out("api-1")
    assert 10 <= host.time.now < 11


# Never below one that serves


@pytest.mark.parametrize("verdict", ["starting", "unhealthy"])
def test_one_that_serves_stays_while_the_other_is_dead_whatever_docker_says_of_it(host, verdict):
    host.health["api-1"] = verdict
    host.answers["api-2"] = 0
    with pytest.raises(RolloutError, match="wht-api-1 is the only healthy instance that is in use") as caught:
        host.take_out("api-1")
    assert caught.value.reason == "no_other_instance"
    assert host.switches.out() == []


def test_docker_calls_the_other_one_healthy_but_it_does_not_answer(host):
    host.answers["api-2"] = 0
    with pytest.raises(RolloutError, match="only healthy instance"):
        host.take_out("api-1")


def test_another_one_that_answers_is_enough_before_docker_says_so(host):
    given(host, metrics(1))
    host.health["api-2"] = "starting"
    host.take_out("api-1")
    assert host.switches.out() == ["api-1"]
    assert host.time.now < 1


def test_one_that_is_switched_off_does_not_count_as_another(host):
    host.switches.take_out("api-2")
    with pytest.raises(RolloutError, match="only healthy instance"):
        host.take_out("api-1")


def test_one_that_is_out_of_use_already_waits_for_nobody(host):
    given(host, metrics(1))
    host.switches.take_out("api-1")
    host.health["api-2"], host.answers["api-2"] = "starting", 0
    host.take_out("api-1")
    assert host.time.now < 1


def test_one_that_serves_nothing_is_taken_out_at_once(host):
    host.health["api-1"], host.answers["api-1"] = "", 0
    host.health["api-2"], host.answers["api-2"] = "starting", 0
    host.take_out("api-1")
    assert host.time.now == 0
