"""The rollout on the site of these tests, under a stream of deliveries: the short form of tests/cluster/test_rollout.py.

`make test` runs a bad release and a good one; the kills are part of `make test-cluster`.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.e2e.conftest import Stack, wait_for
from tests.support.rollouts import Host, of_kind
from tests.support.steady import Steady

pytestmark = pytest.mark.timeout(900)
KILLS, SEED = 3, 20261123
#: Sessions of other tests keep connections that nobody uses: a replaced nginx need not wait for them.
KEEPALIVE = 3


@pytest.fixture
def host(stack: Stack) -> Iterator[Host]:
    """The site's host, which is at its own release again afterwards."""
    found = Host(stack.site)
    base = found.current
    yield found
    if found.current != base or found.switches:
        found.rollout(base, keepalive=KEEPALIVE)
    found.forget()


def steady(stack: Stack) -> Steady:
    settings = stack.site.settings
    return Steady(
        f"http://127.0.0.1:{settings['site_http_port']}",
        f"https://127.0.0.1:{settings['site_https_alt_port']}",
        stack.site.secret("fal_webhook_secret"),
        clients=2,
        pause=0.1,
    )


def louder(compose: dict, _rollout: dict) -> None:
    for kind in ("api", "worker"):
        for service in of_kind(compose, kind):
            service["environment"]["LOG_LEVEL"] = "WARNING"


def crashes(compose: dict, _rollout: dict) -> None:
    for service in of_kind(compose, "api"):
        service["entrypoint"] = ["sh", "-c", "echo a setting is broken >&2; exit 3"]


def comment(text: str) -> str:
    return f"# changed at {time.time_ns()}\n{text}"


def test_no_request_fails_whatever_the_release_is_like(stack: Stack, host: Host) -> None:
    base = host.current
    with steady(stack) as stream:
        bad = host.rollout(host.variant(crashes, name="s-bad"), keepalive=KEEPALIVE)
        assert bad.failed
        assert bad.result["rolled_back"], bad.message
        host.must_be(base)

        good = host.variant(louder, name="s-good", edge=comment)
        done = host.rollout(good, keepalive=KEEPALIVE)
        assert not done.failed, done.message
        host.must_be(good)
        stream.wait_for(20)
    stream.must_be_undisturbed()
    for word in ("crashes again and again", "exit code 3", "a setting is broken", "What to do:"):
        assert word in bad.message, bad.message
    assert [record["result"] for record in host.records()[-2:]] == ["rolled_back", "done"]
    sent = "SELECT request_id FROM webhook.deliveries WHERE request_id LIKE %s"

    def stored() -> list[str]:
        rows = [row["request_id"] for row in stack.query(sent, f"{stream.name}-%")]
        return rows if set(stream.accepted) <= set(rows) else []

    rows = wait_for("every delivery that was answered with 200 is stored", stored)
    assert len(rows) == len(set(rows))


@pytest.mark.cluster
def test_killed_anywhere_it_serves_on_and_the_next_run_completes(stack: Stack, host: Host) -> None:
    chance = random.Random(SEED)
    base = host.current
    other = host.variant(louder, name="s-other", edge=comment)
    with steady(stack) as stream:
        for number in range(KILLS):
            run = host.start(other, keepalive=KEEPALIVE)
            deadline = time.monotonic() + 60
            while not host.module_pid():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            with suppress(subprocess.TimeoutExpired):
                run.wait(chance.uniform(0, 20))
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            host.kill_module()
            run.communicate()
            goal = (other, base)[number % 2]
            done = host.rollout(goal, keepalive=KEEPALIVE)
            assert not done.failed, done.message
            host.must_be(goal)
    stream.must_be_undisturbed()
