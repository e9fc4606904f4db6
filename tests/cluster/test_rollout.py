"""The rollout on a site of its own, under a steady stream of deliveries: nothing fails, whatever the release is like.

Good releases of every kind, bad releases of every kind, and kills at random points with a fixed seed (ROLLOUT_KILLS and
ROLLOUT_SEED to change them). With ROLLOUT_SITE=DIRECTORY a site that stands already is used, and left standing.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.rollouts import Done, Host, docker, of_kind, patient
from tests.support.sites import Site
from tests.support.steady import Steady

NUMBER = 10
BASE = 20_000 + 100 * NUMBER
PORTS = {
    "backends_postgres_port": BASE + 32,
    "backends_redis_port": BASE + 79,
    "backends_s3_port": BASE + 90,
}
SETTINGS = {**PORTS, "edge_keepalive_seconds": 20}
KILLS = int(os.environ.get("ROLLOUT_KILLS", "30"))
SEED = int(os.environ.get("ROLLOUT_SEED", "20261123"))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A standing site."""
    standing = os.environ.get("ROLLOUT_SITE")
    directory = Path(standing) if standing else tmp_path_factory.mktemp("rollout")
    site = Site("wht-roll", directory, NUMBER, SETTINGS)
    try:
        if not standing:
            site.site().must_pass()
        found = Host(site)
        base = found.variant(patient)
        succeeded(found.rollout(base))
        yield found
    finally:
        if not standing:
            site.teardown()


@pytest.fixture
def stream(host: Host) -> Callable[..., Steady]:
    """A stream of deliveries to the site's public ports."""

    def begin(**options: float) -> Steady:
        settings, options = host.site.settings, {"clients": 2, "pause": 0.1} | options
        return Steady(
            f"http://127.0.0.1:{settings['site_http_port']}",
            f"https://127.0.0.1:{settings['site_https_alt_port']}",
            host.site.secret("fal_webhook_secret"),
            **options,
        )

    return begin


def stored_once(host: Host, stream: Steady) -> None:
    """Assert that every delivery that was answered with 200 is one row; what stands in the spool is on its way."""
    password = host.site.secret("postgres_password")
    address = f"postgresql://postgres:{password}@127.0.0.1:{PORTS['backends_postgres_port']}/aisha"
    stream.must_be_stored_once(address)


def succeeded(done: Done) -> Done:
    assert not done.failed, done.message
    return done


def throwaways() -> str:
    """Containers that were made to try something, and are there still."""
    return docker("ps", "--all", "--quiet", "--filter", "label=org.aisha.throwaway=wht-roll")


# Good releases


def louder(compose: dict, _rollout: dict) -> None:
    """Another setting of the service."""
    for kind in ("api", "worker"):
        for service in of_kind(compose, kind):
            service["environment"]["LOG_LEVEL"] = "WARNING"


def comment(text: str) -> str:
    """Another configuration of nginx that says the same."""
    return f"# changed at {time.time_ns()}\n{text}"


def test_a_changed_setting_reaches_both_instances_and_no_request_fails(host, stream):
    release = host.variant(louder, name=f"s-{time.time_ns():x}")
    planned = host.rollout(release, check=True)
    assert planned.result["pending"] == ["api-1", "api-2", "worker"]
    with stream() as steady:
        done = succeeded(host.rollout(release))
        steady.wait_for(20)
    steady.must_be_undisturbed()
    stored_once(host, steady)
    host.must_be(release)
    assert done.result["pending"] == planned.result["pending"]
    assert done.result["plan"] == planned.result["plan"]
    record = host.records()[-1]
    assert (record["result"], record["to"]) == ("done", release)
    assert record["changed"] == ["api-1", "api-2", "worker"]

    again = succeeded(host.rollout(release))
    assert again.result["changed"] is False
    assert host.records()[-1]["result"] == "unchanged"


def test_another_nginx_takes_over_and_no_request_fails(host, stream):
    before = host.containers()[host.site.name + "-nginx"]["Id"]
    release = host.variant(edge=comment)
    with stream() as steady:
        done = succeeded(host.rollout(release))
        steady.wait_for(20)
    steady.must_be_undisturbed()
    stored_once(host, steady)
    host.must_be(release)
    assert done.result["pending"] == ["nginx"]
    assert not throwaways()
    steps = {step["step"]: step["seconds"] for step in host.records()[-1]["steps"]}
    print(f"rehearsed in {steps['rehearse']} s, all in {host.records()[-1]['seconds']} s")
    assert host.containers()[host.site.name + "-nginx"]["Id"] != before


def test_all_of_it_at_once_and_back_again(host, stream):
    """A rollback is the same path: also without a registry, because nothing is pulled that is here."""
    base = host.current
    release = host.variant(louder, name=f"s-{time.time_ns():x}", edge=comment)
    with stream() as steady:
        succeeded(host.rollout(release))
        host.must_be(release)
        back = succeeded(host.rollout(base, kind="rollback"))
        steady.wait_for(20)
    steady.must_be_undisturbed()
    stored_once(host, steady)
    host.must_be(base)
    assert back.result["record"]["kind"] == "rollback"
    assert "migrate" not in [step["step"] for step in back.result["record"]["steps"]]


# Bad releases


def crashes(compose: dict, _rollout: dict) -> None:
    for service in of_kind(compose, "api"):
        service["entrypoint"] = ["sh", "-c", "echo a setting is broken >&2; exit 3"]


def never_healthy(compose: dict, _rollout: dict) -> None:
    for service in of_kind(compose, "api"):
        service["healthcheck"] |= {"test": ["CMD", "sh", "-c", "echo not yet; exit 1"], "interval": "1s"}
        service["healthcheck"]["start_period"] = "1s"


def wrong_version(compose: dict, _rollout: dict) -> None:
    for service in of_kind(compose, "api"):
        service["environment"]["WEBHOOK_RELEASE"] = "s-somebody-else"


def out_of_memory(compose: dict, _rollout: dict) -> None:
    for service in of_kind(compose, "api"):
        service["mem_limit"] = "24m"
        service["memswap_limit"] = "24m"


def bad_migration(compose: dict, _rollout: dict) -> None:
    for service in of_kind(compose, "migrate"):
        service["command"] = ["migrate", "--no-such-option"]


def no_image(compose: dict, rollout: dict) -> None:
    for services in (compose["services"].values(), rollout["services"]):
        for service in services:
            service["image"] = service["image"].partition("@")[0] + "@sha256:" + "0" * 64


def deaf_worker(compose: dict, _rollout: dict) -> None:
    for service in of_kind(compose, "worker"):
        # Through a shell: what the service has as its command would be arguments of sleep's.
        service["entrypoint"] = ["sh", "-c", "exec sleep 3600"]
        service["healthcheck"]["test"] = ["CMD", "true"]


def refused(text: str) -> str:
    return text.replace("http {", "http {\n    no_such_directive on;", 1)


def astray(text: str) -> str:
    """nginx starts, and leads nowhere."""
    return text.replace(":8000", ":8999")


def closed(text: str) -> str:
    """nginx starts, and knows no deliveries."""
    return text.replace("location /api/v1/avatar/ {", "location /api/v1/avatar_no_more/ {")


def mute(text: str) -> str:
    """nginx starts, and says nothing of itself."""
    return text.replace("location = /edge_alive {", "location = /edge_alive_no_more {")


BAD = {
    "crashes": (
        crashes,
        None,
        "unhealthy",
        ["crashes again and again", "a setting is broken", "exit code 3"],
    ),
    "never healthy": (never_healthy, None, "unhealthy", ["health check", "not yet"]),
    "wrong version": (wrong_version, None, "wrong_release", ["'s-somebody-else'", "expected"]),
    "out of memory": (out_of_memory, None, "unhealthy", ["api-1"]),
    "migration fails": (
        bad_migration,
        None,
        "migration_failed",
        ["no container was replaced", "no-such-option"],
    ),
    "image missing": (no_image, None, "image_missing", ["sha256:000", "cannot be pulled"]),
    "nginx refuses": (None, refused, "edge_refused", ["no_such_directive"]),
    "nginx leads nowhere": (None, astray, "rehearsal_failed", ["nginx", "api-1 through nginx: HTTP 502"]),
    "nginx knows no deliveries": (
        None,
        closed,
        "rehearsal_failed",
        ["POST /api/v1/avatar/status_update: HTTP 404"],
    ),
    "nginx is mute": (None, mute, "rehearsal_failed", ["nginx's control socket"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_release_is_rolled_back_and_no_request_fails(host, stream, kind):
    edit, edge, reason, words = BAD[kind]
    base, runs = host.current, host.running_release()
    name = "" if edge else f"s-{time.time_ns():x}"
    release = host.variant(*([edit] if edit else []), name=name, edge=edge)
    with stream() as steady:
        done = host.rollout(release, health_timeout=30)
        steady.wait_for(20)
    assert done.failed
    assert done.result["reason"] == reason, done.message
    for word in [*words, "What was done:", "What to do:"]:
        assert word in done.message, done.message
    steady.must_be_undisturbed()
    stored_once(host, steady)
    assert host.running_release() == runs
    host.must_be(base)
    assert not throwaways()
    record = host.records()[-1]
    assert record["result"] == ("rolled_back" if record["changed"] else "failed")
    assert not edge or record["changed"] == [], "nginx was not touched"
    assert done.result["rolled_back"] is bool(record["changed"])


def test_a_release_that_fails_its_probe_is_rolled_back(host, stream):
    base = host.current
    settings, home = host.site.settings, host.site.home
    address = f"https://127.0.0.1:{settings['site_https_alt_port']}"
    probe = {
        "urls": [{"url": f"{address}/health"}],
        "delivery_url": f"{address}/api/v1/avatar/status_update",
        "validate_certs": False,
        "secret_file": f"{home}/secrets/fal_webhook_secret",
        "container": f"{host.site.name}-api-1",
        "timeout": 8,
    }
    release = host.variant(deaf_worker, name=f"s-{time.time_ns():x}")
    with stream() as steady:
        done = host.rollout(release, probe=probe)
        steady.wait_for(20)
    assert (done.failed, done.result["reason"], done.result["rolled_back"]) == (True, "probe_failed", True)
    steady.must_be_undisturbed()
    host.must_be(base)


# Being asked to end, and killed


def wait_at_work(host: Host, seconds: float = 60) -> int:
    deadline = time.monotonic() + seconds
    while not (pid := host.module_pid()):
        assert time.monotonic() < deadline, "the module did not begin"
        time.sleep(0.02)
    return pid


def wait_for_step(host: Host, name: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if f'"{name}"' in (host.site.home / "run" / "deployment.json").read_text():
                return
        assert time.monotonic() < deadline, f"step {name} did not begin"
        time.sleep(0.02)


def test_sigterm_ends_a_run_in_order(host, stream):
    base = host.current
    release = host.variant(louder, name=f"s-{time.time_ns():x}")
    with stream() as steady:
        run = host.start(release)
        wait_for_step(host, "replace")
        assert host.kill_module(signal.SIGTERM)
        output = run.communicate(timeout=300)[0]
        steady.wait_for(20)
    assert "interrupted" in output
    assert "SIGTERM" in output
    steady.must_be_undisturbed()
    host.must_be(base)
    assert host.records()[-1]["result"] == "rolled_back"


def test_a_second_run_at_the_same_time_is_refused(host):
    release = host.variant(louder, name=f"s-{time.time_ns():x}")
    first = host.start(release)
    wait_for_step(host, "replace")
    second = host.rollout(release, wait=0)
    assert (second.failed, second.result["reason"]) == (True, "locked")
    assert "another rollout is at work" in second.message
    first.communicate(timeout=300)
    assert first.returncode == 0
    host.must_be(release)


def test_it_goes_on_when_its_controller_is_killed(host, stream):
    release = host.variant(louder, name=f"s-{time.time_ns():x}")
    with stream() as steady:
        run = host.start(release)
        wait_at_work(host)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait(30)
        run.stdout.close()
        done = succeeded(host.rollout(release, wait=200))
        steady.wait_for(20)
    steady.must_be_undisturbed()
    host.must_be(release)
    assert done.result["result"] == "unchanged"
    assert [record["result"] for record in host.records()[-2:]] == ["done", "unchanged"]


def kill_somewhere(host: Host, release: str, moment: float, victim: str) -> None:
    """Begin a run, and kill the module, its controller, or both, after `moment` seconds at work."""
    run = host.start(release)
    wait_at_work(host)
    with suppress(subprocess.TimeoutExpired):
        run.wait(moment)
    if victim in ("controller", "both"):
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    if victim in ("module", "both"):
        host.kill_module()
    with suppress(subprocess.TimeoutExpired):
        run.communicate(timeout=300)


@pytest.mark.timeout(7200)
def test_killed_anywhere_it_serves_on_and_the_next_run_completes(host, stream):
    chance = random.Random(SEED)
    first = host.current
    second = host.variant(louder, name=f"s-{time.time_ns():x}", edge=comment)
    begun = time.monotonic()
    succeeded(host.rollout(second))
    whole = time.monotonic() - begun
    target = first
    for number in range(KILLS):
        moment, victim = chance.uniform(0, whole), chance.choice(["module", "module", "controller", "both"])
        what = f"kill {number} of seed {SEED}: {victim} after {moment:.1f} s on the way to {target}"
        print(what, flush=True)
        with stream() as steady:
            kill_somewhere(host, target, moment, victim)
            steady.wait_for(20)
            goal = chance.choice([first, second])
            done = host.rollout(goal, wait=200)
            steady.wait_for(10)
        assert not done.failed, f"{what}: {done.message}"
        steady.must_be_undisturbed()
        host.must_be(goal)
        target = second if goal == first else first
    assert "interrupted" in {record["result"] for record in host.records()[-2 * KILLS :]}
    assert not throwaways()
