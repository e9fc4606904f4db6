"""container_health with real containers: healthy, slow, looping, out of memory, broken."""

from __future__ import annotations

import time

import pytest
from ansible.module_utils.container_health import HealthGate, Wanted
from ansible.module_utils.docker_engine import Engine, EngineError

pytestmark = pytest.mark.engine

SECOND = 1_000_000_000
FOREVER = "exec sleep 600"


def check(command: str, *, interval: float = 0.3, retries: int = 2, start_period: float = 0) -> dict:
    return {
        "test": ["CMD-SHELL", command],
        "interval": int(interval * SECOND),
        "timeout": 30 * SECOND,
        "retries": retries,
        "start_period": int(start_period * SECOND),
    }


@pytest.fixture
def shell(containers, base_image):
    def start(script: str, **options):
        return containers(base_image, ["sh", "-c", script], **options)

    return start


def test_it_returns_as_soon_as_the_last_one_is_healthy(run_module, shell):
    slow = shell(f"sleep 3; touch /ready; {FOREVER}", healthcheck=check("test -e /ready", start_period=120))
    plain = shell(FOREVER)
    result = run_module(
        "container_health",
        timeout=240,
        containers=[{"name": slow.name}, {"name": plain.name, "require_healthcheck": False}],
    )
    assert not result.get("failed"), result.get("msg")
    assert result["changed"] is False
    assert result["events"] is True
    assert [item["reason"] for item in result["containers"]] == ["healthy", "running"]
    assert result["waited"] < 120


def test_a_crash_loop_is_given_up_long_before_the_timeout(run_module, shell):
    loop = shell("echo SETTING_X is not set >&2; exit 78", restart_policy={"Name": "always"})
    result = run_module("container_health", timeout=600, containers=[{"name": loop.name}])
    assert result["failed"]
    assert result["waited"] < 300
    (item,) = result["containers"]
    assert item["reason"] == "crash_loop"
    assert item["exit_code"] == 78
    assert item["restart_count"] >= 2
    assert "SETTING_X is not set" in item["log"]
    for words in (loop.name, "EX_CONFIG", "SETTING_X is not set", "deploy again"):
        assert words in result["msg"]


def test_a_slow_start_with_one_crash_is_waited_for(run_module, shell):
    script = f"if [ -e /second ]; then touch /ready; {FOREVER}; fi; touch /second; sleep 1; exit 1"
    slow = shell(
        script, restart_policy={"Name": "on-failure"}, healthcheck=check("test -e /ready", start_period=120)
    )
    result = run_module("container_health", timeout=240, containers=[{"name": slow.name}])
    assert not result.get("failed"), result.get("msg")
    assert result["containers"][0]["restart_count"] == 1


def test_a_container_that_ended_for_want_of_memory(run_module, shell):
    for _ in range(5):
        hungry = shell("tail /dev/zero; exit $?", mem_limit="16m", memswap_limit="16m")
        hungry.wait(timeout=120)
        hungry.reload()
        if hungry.attrs["State"]["OOMKilled"]:
            break  # on a busy machine the engine itself misses it now and then, and then nobody can know
    result = run_module("container_health", containers=[{"name": hungry.name}])
    (item,) = result["containers"]
    assert item["reason"] == "exited"
    assert item["oom_killed"] is True
    assert "memory limit" in result["msg"]


def test_an_unhealthy_container_shows_what_its_check_said(run_module, shell):
    sick = shell(FOREVER, healthcheck=check("echo database is down; exit 1"))
    result = run_module("container_health", timeout=240, unhealthy_grace=1, containers=[{"name": sick.name}])
    (item,) = result["containers"]
    assert item["reason"] == "unhealthy"
    assert item["health_log"][-1]["exit_code"] == 1
    assert "database is down" in result["msg"]


def test_one_that_could_not_be_started_says_what_the_engine_said(run_module, engine, base_image, project):
    container = engine.containers.create(base_image, ["/no/such/command"], name=project)
    try:
        with pytest.raises(Exception, match="no such file"):
            container.start()
        result = run_module("container_health", containers=[{"name": project}])
        assert result["containers"][0]["reason"] == "start_failed"
        assert "no such file" in result["msg"]
    finally:
        container.remove(force=True)


def test_all_faults_at_once_and_check_mode_only_looks(run_module, shell, project):
    ended, plain = shell("exit 3"), shell(FOREVER)
    ended.wait(timeout=120)
    wanted = [
        {"name": ended.name},
        {"name": plain.name, "require_healthcheck": True},
        {"name": project},
        {"name": plain.name, "expect_image": "127.0.0.1:5000/other:tag"},
        {"name": plain.name, "expect_labels": {"release": "r-1"}},  # the same name with other wishes
    ]
    result = run_module("container_health", containers=wanted, check=True)
    assert not result.get("failed")
    assert result["ready"] is False
    result = run_module("container_health", containers=wanted)
    assert result["failed"]
    reasons = [item["reason"] for item in result["containers"]]
    assert reasons == ["exited", "no_healthcheck", "missing", "wrong_image", "wrong_label"]
    assert "5 of 5" in result["msg"]


def test_without_a_stream_of_events_it_asks_at_intervals(shell):
    class WithoutEvents(Engine):
        def events(self, since, names, actions):
            raise EngineError("engine_error", "no events through this proxy")

    slow = shell(f"sleep 2; touch /ready; {FOREVER}", healthcheck=check("test -e /ready", start_period=120))
    engine = WithoutEvents()
    gate = HealthGate(engine, [Wanted(slow.name, timeout=240)])
    (result,) = gate.wait()
    engine.close()
    assert result["ok"], result
    assert gate.events_used is False


def test_a_change_is_heard_of_without_polling(shell, monkeypatch):
    """With the net under the events taken away, only an event can end the wait."""
    monkeypatch.setattr("ansible.module_utils.container_health.NET_INTERVAL", 1000)
    slow = shell(f"sleep 2; touch /ready; {FOREVER}", healthcheck=check("test -e /ready", start_period=120))
    engine = Engine()
    start = time.monotonic()
    (result,) = HealthGate(engine, [Wanted(slow.name, timeout=240)]).wait()
    engine.close()
    assert result["ok"]
    assert time.monotonic() - start < 120


def test_an_engine_that_is_not_there(run_module, tmp_path):
    result = run_module(
        "container_health", docker_host=f"unix://{tmp_path}/none.sock", containers=[{"name": "x"}]
    )
    assert result["failed"]
    assert result["reason"] == "unreachable"
    assert "--tags engine" in result["msg"]
