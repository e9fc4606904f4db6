"""What the README promises, as numbers: twenty thousand deliveries through everything that a deployment can replace, and
`site.yml` ended at random moments. Nothing is forgiven here, however busy the machine is.

PROMISE_SENT, PROMISE_KILLS and PROMISE_SEED change the sizes. With PROMISE_SITE=DIRECTORY a site that stands already is
used, and left standing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.test_rollout import comment, louder
from tests.support.rollouts import Host, environment, patient
from tests.support.sites import REPO, Site
from tests.support.steady import Steady

NUMBER = 15
BASE = 20_000 + 100 * NUMBER
POSTGRES_PORT = BASE + 32
VARIABLES = {
    "backends_postgres_port": POSTGRES_PORT,
    "backends_redis_port": BASE + 79,
    "backends_s3_port": BASE + 90,
    "edge_keepalive_seconds": 5,
}
SENT = int(os.environ.get("PROMISE_SENT", "20000"))
KILLS = int(os.environ.get("PROMISE_KILLS", "30"))
SEED = int(os.environ.get("PROMISE_SEED", "20261129"))
#: What the runs that are ended want, and what they find.
LEVELS = ("WARNING", "INFO")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A standing site."""
    standing = os.environ.get("PROMISE_SITE")
    directory = Path(standing) if standing else tmp_path_factory.mktemp("promise")
    site = Site("wht-promise", directory, NUMBER, VARIABLES)
    try:
        if not standing:
            site.site().must_pass()
        yield Host(site)
    finally:
        if not standing:
            site.teardown()


def stream(host: Host, **options: float) -> Steady:
    settings = host.site.settings
    return Steady(
        f"http://127.0.0.1:{settings['site_http_port']}",
        f"https://127.0.0.1:{settings['site_https_alt_port']}",
        host.site.secret("fal_webhook_secret"),
        **{"clients": 4, "pause": 0.1, **options},
    )


def nothing_failed(host: Host, steady: Steady) -> None:
    """Every single delivery was answered with 200, and is one row."""
    print(steady.summary(), flush=True)
    assert not steady.failures, steady.summary()
    password = host.site.secret("postgres_password")
    address = f"postgresql://postgres:{password}@127.0.0.1:{POSTGRES_PORT}/aisha"
    steady.must_be_stored_once(address)


@pytest.mark.timeout(3600)
def test_twenty_thousand_deliveries_while_instances_worker_and_nginx_are_replaced(host: Host) -> None:
    """Over http and TLS, by clients that keep their connections and by clients that do not."""
    first = host.variant(patient)
    second = host.variant(louder, of=first, name=f"s-{time.time_ns():x}", edge=comment)
    replaced: set[str] = set()
    rollouts = 0
    with stream(host) as steady:
        while steady.sent < SENT or rollouts < 4:
            done = host.rollout((first, second)[rollouts % 2])
            assert not done.failed, done.message
            replaced |= set(done.result["pending"])
            rollouts += 1
    print(f"{rollouts} rollouts", flush=True)
    assert replaced == {"api-1", "api-2", "worker", "nginx"}
    assert len(steady.attempts) >= SENT
    assert {kind for _, kind, *_ in steady.attempts} == {
        "http-kept",
        "http-single",
        "https-kept",
        "https-single",
    }
    nothing_failed(host, steady)


def command(host: Host, level: str) -> list[str]:
    variables = json.dumps({"stack_log_level": level})
    return ["ansible-playbook", "-i", str(host.site.directory), "site.yml", "-e", variables]


@pytest.mark.timeout(7200)
def test_site_yml_ended_anywhere_serves_on_and_the_next_run_completes(host: Host) -> None:
    """Ctrl-C as a terminal sends it, and SIGKILL, to `ansible-playbook site.yml` itself; at any of its tasks."""
    chance = random.Random(SEED)
    host.site.site("-e", json.dumps({"stack_log_level": LEVELS[0]})).must_pass()
    begun = time.monotonic()
    host.site.site("-e", json.dumps({"stack_log_level": LEVELS[1]})).must_pass()
    whole = time.monotonic() - begun
    ends: list[int] = []
    for number in range(KILLS):
        level, moment = LEVELS[number % 2], chance.uniform(0, whole)
        how = chance.choice([signal.SIGINT, signal.SIGKILL])
        what = f"end {number} of seed {SEED}: {how.name} after {moment:.1f} of {whole:.1f} s"
        with stream(host, clients=1) as steady:
            ends.append(ended(command(host, level), moment, how))
            steady.wait_for(10)
            again = host.site.site("-e", json.dumps({"stack_log_level": level}))
            steady.wait_for(10)
        print(f"{what}: exit {ends[-1]}, {steady.summary()}", flush=True)
        assert again.code == 0, f"{what}: {again.output[-6000:]}"
        nothing_failed(host, steady)
        host.must_be(host.current)
        logged = {c["Name"]: level_of(c) for c in host.containers().values() if "-api-" in c["Name"]}
        assert set(logged.values()) == {level}, f"{what}: {logged}"
        assert not host.locked, what
    assert any(code != 0 for code in ends)


def ended(argv: list[str], moment: float, how: signal.Signals) -> int:
    """The exit code of a run that gets a signal in its terminal's place, unless it was quicker."""
    run = subprocess.Popen(
        argv,
        cwd=REPO,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with suppress(subprocess.TimeoutExpired):
        return run.wait(moment)
    with suppress(ProcessLookupError):
        os.killpg(run.pid, how)
    try:
        return run.wait(90)
    except subprocess.TimeoutExpired:
        # Once in sixteen times Ansible itself waits for ever for a worker that it has ended (docs/releases.md). A person
        # presses Ctrl-C again; that ends it.
        os.killpg(run.pid, how)
        return run.wait(30)


def level_of(container: dict) -> str:
    """What a container was told to log."""
    return next(
        entry.partition("=")[2] for entry in container["Config"]["Env"] if entry.startswith("LOG_LEVEL=")
    )
