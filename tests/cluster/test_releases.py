"""Lock, hooks, records, status and rollback on a site of its own, as an operator meets them.

With RELEASES_SITE=DIRECTORY a site that stands already is used (its inventory is there), and left standing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.sites import REPO, PlaybookResult, Site

NUMBER = 12
BASE = 20_000 + 100 * NUMBER
PORTS = {"backends_postgres_port": BASE + 32, "backends_redis_port": BASE + 79, "backends_s3_port": BASE + 90}
# A busy machine: what is slow here is not what is tested.
PATIENCE = {
    "rollout_health_timeout": 300,
    "rollout_gate_timeout": 120,
    "verify_probe_timeout": 120,
    "verify_health_timeout": 200,
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    standing = os.environ.get("RELEASES_SITE")
    directory = Path(standing) if standing else tmp_path_factory.mktemp("releases")
    made = Site("wht-lock", directory, NUMBER, {**PORTS, **PATIENCE})
    try:
        if not standing:
            made.site().must_pass()
        yield made
    finally:
        if not standing:
            made.teardown()


@pytest.fixture
def hooks(site: Site, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Write a hook; what it gets on standard input is in the file that is given back."""
    directory = site.directory / "hooks"
    written = []

    def write(name: str, body: str = "", *, mode: int = 0o755) -> Path:
        directory.mkdir(exist_ok=True)
        heard = tmp_path / f"{name}.json"
        (directory / name).write_text(f"#!/bin/sh\ncat >{heard}\n{body}\n")
        (directory / name).chmod(mode)
        written.append(directory / name)
        return heard

    yield write
    for path in written:
        path.unlink()


@pytest.fixture
def runs(site: Site) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `site.yml` (or another playbook) and do not wait for it."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, playbook: str = "site.yml") -> subprocess.Popen[str]:
        command = [
            str(Path(sys.executable).parent / "ansible-playbook"),
            "-i",
            str(site.directory),
            playbook,
            *arguments,
        ]
        environment = {**os.environ, "ANSIBLE_NOCOLOR": "1"}
        started.append(
            subprocess.Popen(
                command,
                cwd=REPO,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_for(what: str, probe: Callable[[], Any], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := probe()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return found


def lock_of(site: Site) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((site.home / "run/deployment.lock").read_text())
    except FileNotFoundError:
        return None
    return found


def current(site: Site) -> str:
    return os.path.basename(os.readlink(site.home / "current"))


def records(site: Site) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (site.home / "deployments.jsonl").read_text().splitlines()]


def containers(site: Site) -> list[str]:
    names = ["api-1", "api-2", "worker", "nginx"]
    command = [
        "docker",
        "inspect",
        "--format",
        "{{.Id}} {{.State.StartedAt}}",
        *(f"{site.name}-{name}" for name in names),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def written(site: Site) -> dict[str, float]:
    """Every file of the site outside run/, and when it was changed."""
    found = (path for path in site.home.rglob("*") if "run" not in path.relative_to(site.home).parts[:1])
    return {str(path): path.lstat().st_mtime for path in found}


def deploy(site: Site, level: str, *arguments: str) -> PlaybookResult:
    """Another release: the service logs at another level."""
    return site.site("--tags", "stack,rollout", "-e", f"stack_log_level={level}", *arguments)


def status(site: Site, tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "status.json"
    result = site.playbook(
        "playbooks/status.yml", "-e", f"status_file={file}", "-e", "status_certificate_days=1"
    ).must_pass()
    assert result.recap["changed"] == 0
    found: dict[str, Any] = json.loads(file.read_text())["localhost"]
    return found


def kinds(found: dict[str, Any]) -> set[tuple[str, str]]:
    return {(finding["kind"], finding["name"]) for finding in found["findings"]}


def test_a_hook_that_refuses_stops_the_run_before_the_host_is_touched(
    site: Site, hooks: Callable[..., Path]
) -> None:
    heard = hooks("pre-deploy", "echo 'not on a Friday' >&2; exit 3")
    told = hooks("post-deploy", "exit 9")
    before, serving = (written(site), containers(site)), current(site)
    result = deploy(site, "ERROR")
    assert result.code == 2
    assert "pre-deploy failed with exit code 3. It said: not on a Friday" in " ".join(result.output.split())
    note = records(site)[-1]
    assert (note["result"], note["from"], note["to"]) == ("failed", serving, None)
    assert "not on a Friday" in note["reason"]
    after = written(site)
    # The run is on record; nothing else was written.
    changed = {path for path in after | before[0] if after.get(path) != before[0].get(path)}
    assert changed <= {str(site.home), str(site.home / "deployments.jsonl")}
    assert containers(site) == before[1]
    assert lock_of(site) is None
    record = json.loads(heard.read_text())
    assert (record["kind"], record["hook"], record["result"]) == ("deploy", "pre-deploy", None)
    assert json.loads(told.read_text())["result"] == "failed"
    assert "post-deploy failed with exit code 9" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("body", "mode", "said"),
    [("sleep 60", 0o755, "did not end within 1 s"), ("", 0o644, "make it executable")],
)
def test_a_hook_that_hangs_or_cannot_be_started_stops_it_too(
    site: Site, hooks: Callable[..., Path], body: str, mode: int, said: str
) -> None:
    hooks("pre-deploy", body, mode=mode)
    result = site.site("--tags", "rollout", "-e", "hooks_timeout=1")
    assert (result.code, said in result.output, lock_of(site)) == (2, True, None)


def test_check_mode_runs_no_hook_takes_no_lock_and_writes_nothing(
    site: Site, hooks: Callable[..., Path]
) -> None:
    heard = hooks("pre-deploy", "exit 3")
    before = (written(site), containers(site), records(site))
    result = deploy(site, "ERROR", "--check", "--diff").must_pass()
    assert "replace" in result.output
    assert (written(site), containers(site), records(site)) == before
    assert (heard.exists(), lock_of(site)) == (False, None)


NAMES = ("api-1", "api-2", "worker", "nginx")


@pytest.mark.parametrize(
    ("change", "replaced"),
    [
        ({"stack_log_level": "DEBUG"}, ["api-1", "api-2", "worker"]),
        ({"stack_log_level": "DEBUG", "edge_keepalive_seconds": 7}, ["nginx"]),
    ],
)
def test_what_a_dry_run_shows_is_what_the_run_does(
    site: Site, change: dict[str, Any], replaced: list[str]
) -> None:
    """Release, files of it, and containers: no more, no fewer."""
    before, ids = current(site), dict(zip(NAMES, containers(site), strict=True))
    options = ("--tags", "edge,stack,rollout", "-e", json.dumps(change))
    shown = site.site(*options, "--check", "--diff").must_pass().output
    services = re.findall(r"^\+([\w-]+): (?:replace|start|make)", shown, re.MULTILINE)
    (to,) = set(re.findall(r"^\+(r-[0-9a-f]{12})$", shown, re.MULTILINE))
    files = set(re.findall(rf"^\+\+\+ after: releases/{to}/(\S+)$", shown, re.MULTILINE))
    assert services == replaced
    site.site(*options).must_pass()
    record = records(site)[-1]
    assert (record["from"], record["to"], record["changed"]) == (before, to, replaced)
    after = dict(zip(NAMES, containers(site), strict=True))
    assert [name for name in NAMES if after[name] != ids[name]] == replaced
    old, new = (site.home / "releases" / identity for identity in (before, to))
    assert {name for name in RENDERED if (old / name).read_text() != (new / name).read_text()} == files


#: What a release consists of, beside what describes it.
RENDERED = ("docker-compose.webhook.prod.yml", "prod.env")


def test_of_runs_at_once_one_is_refused_and_one_waits_and_none_is_half_done(
    site: Site,
    runs: Callable[..., subprocess.Popen[str]],
    hooks: Callable[..., Path],
    tmp_path: Path,
) -> None:
    change = ("--tags", "stack,rollout", "-e")
    # The first run has the lock, and stays where it is until the others have met it.
    go_on = tmp_path / "go-on"
    held = hooks("pre-deploy", f"while [ ! -e {go_on} ]; do sleep 0.2; done")
    first = runs(*change, "stack_log_level=WARNING", "-e", "hooks_timeout=1200")
    wait_for("the first run's hook", held.exists)
    assert (lock_of(site) or {})["process"]["pid"] == first.pid
    waiting = runs(*change, "stack_log_level=ERROR", "-e", "lock_wait_seconds=1200")
    refused = deploy(site, "DEBUG", "-e", "lock_wait_seconds=1")
    assert waiting.stdout is not None
    heard = ""
    while "Waiting 1200 s at most for" not in heard:
        line = waiting.stdout.readline()
        assert line, heard
        heard += line
    assert first.poll() is None
    go_on.touch()
    assert refused.code == 2
    assert "another deployment has the lock" in refused.output
    assert f"process {first.pid} of this machine" in refused.output
    outputs = [first.communicate(timeout=900)[0], heard + waiting.stdout.read()]
    assert (first.returncode, waiting.wait(timeout=60)) == (0, 0), outputs
    last, before = records(site)[-1], records(site)[-2]
    assert (before["result"], last["result"], last["from"], last["to"]) == (
        "done",
        "done",
        before["to"],
        current(site),
    )
    assert lock_of(site) is None
    assert status(site, tmp_path)["findings"] == []


def test_a_deployment_tells_the_hook_and_the_database(site: Site, hooks: Callable[..., Path]) -> None:
    told, before = hooks("post-deploy"), current(site)
    deploy(site, "INFO").must_pass()
    record = json.loads(told.read_text())
    assert (record["result"], record["from"], record["to"]) == ("done", before, current(site))
    assert [host["host"] for host in record["hosts"]] == ["localhost"]
    command = [
        "docker",
        "exec",
        f"{site.name}-api-1",
        "webhook-api",
        "deployments",
        "list",
        "--json",
        "--limit",
        "1",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(shown) == records(site)[-1]
    assert record["id"] == records(site)[-1]["id"]


def test_the_way_back_needs_no_registry_and_is_told_to_the_hooks(
    site: Site, hooks: Callable[..., Path], tmp_path: Path
) -> None:
    asked, told, before = hooks("pre-rollback"), hooks("post-rollback"), current(site)
    previous = os.path.basename(os.readlink(site.home / "previous"))
    listed = site.playbook("playbooks/rollback.yml", "-e", "list=true").must_pass().output
    assert previous in listed
    assert "images are here" in listed
    assert current(site) == before
    registry = f"{site.name}-registry"
    subprocess.run(["docker", "stop", registry], check=True, capture_output=True)
    try:
        site.playbook("playbooks/rollback.yml").must_pass()
    finally:
        subprocess.run(["docker", "start", registry], check=True, capture_output=True)
    assert (current(site), os.path.basename(os.readlink(site.home / "previous"))) == (previous, before)
    assert [json.loads(heard.read_text())["to"] for heard in (asked, told)] == [previous, previous]
    assert (records(site)[-1]["kind"], records(site)[-1]["result"]) == ("rollback", "done")
    site.playbook("playbooks/rollback.yml", "-e", f"release={before}").must_pass()
    assert current(site) == before
    assert status(site, tmp_path)["findings"] == []


def test_a_way_back_that_waited_for_a_deployment_goes_nowhere_by_itself(
    site: Site, hooks: Callable[..., Path], runs: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """After it, the release of before is the one that was to be left."""
    if not (site.home / "previous").exists():  # alone, without the tests before it
        deploy(site, "WARNING").must_pass()
    go, before = tmp_path / "go", current(site)
    meant = os.path.basename(os.readlink(site.home / "previous"))
    heard = hooks("pre-deploy", f"while [ ! -e {go} ]; do sleep 0.1; done")
    first = runs("--tags", "stack,rollout", "-e", "stack_log_level=DEBUG")
    wait_for("the first run's hook", heard.exists)
    waiting = runs("-e", "lock_wait_seconds=1200", playbook="playbooks/rollback.yml")
    assert waiting.stdout is not None
    told = ""
    while "Waiting 1200 s" not in told:
        line = waiting.stdout.readline()
        assert line, told
        told += line
    go.touch()
    outputs = [first.communicate(timeout=900)[0], waiting.communicate(timeout=1200)[0]]
    assert (first.returncode, waiting.returncode) == (0, 2), outputs
    assert f"-e release={meant}" in " ".join(outputs[1].split())
    assert os.path.basename(os.readlink(site.home / "previous")) == before
    assert current(site) not in (before, meant)
    assert lock_of(site) is None


def test_what_cannot_be_gone_back_to_is_refused_with_what_can(site: Site) -> None:
    previous = os.path.basename(os.readlink(site.home / "previous"))
    unknown = site.playbook("playbooks/rollback.yml", "-e", "release=r-000000000000")
    assert unknown.code == 2
    assert "there is no release r-000000000000" in unknown.output
    assert previous in unknown.output
    secret = site.home / "secrets/api/redis_password"
    aside = secret.rename(secret.with_name("aside"))
    try:
        gone = site.playbook("playbooks/rollback.yml")
    finally:
        aside.rename(secret)
    assert gone.code == 2
    assert "redis_password, which is gone" in gone.output
    assert lock_of(site) is None


def test_status_names_what_is_not_as_the_release_says_and_a_rollout_mends_it(
    site: Site, tmp_path: Path
) -> None:
    assert status(site, tmp_path)["ok"] is True
    edge = json.loads((site.home / "current/release.json").read_text())["metadata"]["rollout"]["edge"]
    conf = site.home / "edge" / edge / "nginx.conf"
    subprocess.run(["docker", "stop", f"{site.name}-worker"], check=True, capture_output=True)
    (site.home / "state/api-2.down").touch()
    settings = site.home / "current/prod.env"
    settings.write_text(f"{settings.read_text()}# by hand\n")
    conf.with_name("extra.conf").touch()
    secret = site.home / "secrets/api/redis_password"
    copy = secret.with_name("copy")
    subprocess.run(["cp", "--preserve=all", str(secret), str(copy)], check=True)
    copy.write_text(f"{secret.read_text()}x")
    copy.rename(secret)
    found = kinds(status(site, tmp_path))
    release = current(site)
    for expected in (("health", "worker"), ("switch", "state/api-2.down"), ("file", f"releases/{release}/prod.env"),
                     ("edge", f"edge/{conf.parent.name}/extra.conf"), ("secret", str(secret))):  # fmt: skip
        assert expected in found
    strict = site.playbook("playbooks/status.yml", "-e", "status_strict=true")
    assert (strict.code, "health worker" in strict.output) == (2, True)
    conf.with_name("extra.conf").unlink()
    deploy(site, "INFO").must_pass()
    assert status(site, tmp_path)["findings"] == []
