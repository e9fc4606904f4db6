"""The site as an operator meets it: repeated runs, dry runs, partial runs, hardening, and refusals."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import requests

from tests.support import hardening
from tests.support.playbook_tags import site_tags
from tests.support.sites import Site

from .conftest import Stack, docker

pytestmark = pytest.mark.e2e
PARTIAL_RUNS = ("engine", "images", "build", "push", "stack", "edge", "rollout", "verify", "update")


def state(stack: Stack, *, records: bool = True) -> dict[str, str]:
    """What must not move in a run without changes: containers with their start times, and every file with its time.

    `records`: also the deployment records and the lock's directory, which every run but a dry one writes to.
    """
    containers = docker(
        "ps", "--all", "--filter", f"name={stack.site.name}", "--format", "{{.ID}} {{.Names}}"
    )
    seen = {
        line: docker("inspect", "--format", "{{.State.StartedAt}}", line.split()[0])
        for line in containers.splitlines()
    }
    for path in sorted(stack.site.home.rglob("*")):
        if not records and path.relative_to(stack.site.home).parts[0] in ("run", "deployments.jsonl"):
            continue
        seen[str(path)] = f"{path.lstat().st_mtime_ns} {path.lstat().st_mode:o}"
    return seen


def current(stack: Stack) -> str:
    """Id of the release that serves."""
    return (stack.site.home / "current").resolve().name


def test_second_run_changes_nothing(stack: Stack) -> None:
    before = state(stack, records=False)
    recap = stack.site.site().must_pass().recap
    assert (recap["changed"], recap["failed"]) == (0, 0)
    assert state(stack, records=False) == before
    last = (stack.site.home / "deployments.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["result"] == "unchanged"
    assert not (stack.site.home / "run/deployment.lock").exists()


def test_a_run_with_nothing_to_do_says_so_in_one_task_and_task_by_task_it_is_the_same(stack: Stack) -> None:
    before = state(stack, records=False)
    short = stack.site.site().must_pass()
    assert f"release {current(stack)} runs and is proven" in short.output
    assert "TASK [rollout : The release runs]" not in short.output
    # With tags to skip, a part of the whole is asked for, and every task speaks for itself.
    long = stack.site.site("--skip-tags", "prune").must_pass()
    assert f"release {current(stack)} runs and is proven" in long.output
    assert "TASK [rollout : The release runs]" in long.output
    assert (short.recap["changed"], long.recap["changed"]) == (0, 0)
    assert state(stack, records=False) == before


def test_a_run_mends_what_is_not_as_the_release_says(stack: Stack) -> None:
    """Here a stopped instance, a secret that everybody may read, one that is gone, no key for nginx, another policy."""
    container, secret = f"{stack.site.name}-api-2", stack.site.home / "secrets/api/minio_secret_key"
    docker("stop", container)
    secret.chmod(0o444)
    (stack.site.home / "secrets/api/redis_password").unlink()
    (stack.site.home / "ssl/privkey.pem").unlink()
    docker("update", "--restart", "no", f"{stack.site.name}-worker")
    result = stack.site.site().must_pass()
    assert "TASK [rollout : The release runs]" in result.output
    assert result.recap["changed"] >= 2
    assert docker("inspect", "--format", "{{.State.Health.Status}}", container) == "healthy"
    policy = docker("inspect", "--format", "{{.HostConfig.RestartPolicy.Name}}", f"{stack.site.name}-worker")
    assert policy == "unless-stopped"
    assert secret.stat().st_mode & 0o777 == 0o400
    stack.site.playbook("playbooks/status.yml").must_pass()
    assert stack.site.site().must_pass().recap["changed"] == 0


def test_dry_run_on_a_standing_stack_is_silent_and_touches_nothing(stack: Stack) -> None:
    before = state(stack)
    result = stack.site.site("--check", "--diff").must_pass()
    assert result.recap["changed"] == 0
    assert state(stack) == before


def test_dry_run_of_a_change_says_so_and_touches_nothing(stack: Stack) -> None:
    before = state(stack)
    result = stack.site.site("--check", "--diff", "-e", '{"site_body_limit_bytes": 5242880}').must_pass()
    assert result.recap["changed"] > 0
    assert "5242880" in result.output
    assert state(stack) == before


def tag_case(tag: str) -> object:
    """Partial runs that the guide names are part of every test run; the others, of the long one."""
    return pytest.param(tag, marks=[] if tag in PARTIAL_RUNS else [pytest.mark.cluster])


@pytest.mark.parametrize("tag", [tag_case(tag) for tag in site_tags()])
def test_every_tag_works_alone_and_changes_nothing(stack: Stack, tag: str) -> None:
    recap = stack.site.site("--tags", tag).must_pass().recap
    assert recap["changed"] == 0, tag
    assert recap["ok"] > 0


def test_dry_run_where_nothing_stands_says_what_it_would_do(tmp_path: Path) -> None:
    bare = Site("wht-bare", tmp_path / "wht-bare", 2)
    result = bare.site("--check", "--diff").must_pass()
    assert result.recap["changed"] > 0
    assert not bare.home.exists()
    assert not docker("ps", "--all", "--quiet", "--filter", "name=wht-bare")
    assert not docker("network", "ls", "--quiet", "--filter", "name=wht-bare")


def test_preflight_names_every_fault_at_once_and_touches_nothing(tmp_path: Path) -> None:
    blocked = Site("wht-blocked", tmp_path / "wht-blocked", 3)
    ports = (blocked.settings["site_https_port"], blocked.settings["site_api_ports"][1])
    with socket.create_server(("127.0.0.1", ports[0])), socket.create_server(("127.0.0.1", ports[1])):
        result = blocked.site()
    assert result.code != 0
    for port in ports:
        assert str(port) in result.output
    assert "python" in result.output, "the process that holds the port is named"
    assert "Traceback" not in result.output
    assert not blocked.home.exists()


def test_health_answers_everywhere(stack: Stack) -> None:
    settings = stack.site.settings
    urls = [
        stack.url("/health", port) for port in ("site_http_port", "site_https_port", "site_https_alt_port")
    ]
    urls += [f"http://127.0.0.1:{port}/health" for port in settings["site_api_ports"]]
    for url in urls:
        answer = requests.get(url, verify=False, timeout=10)
        assert answer.status_code == 200, url
        body = answer.json()
        assert body["status"] == "healthy", url
        assert {"version", "release", "instance", "checks"} <= set(body)


def test_registry_holds_what_runs(stack: Stack) -> None:
    registry = f"http://{stack.site.settings['site_registry']}"
    assert requests.get(f"{registry}/v2/_catalog", timeout=10).json() == {
        "repositories": ["nginx-webhook", "webhook-api"]
    }
    for repository in ("webhook-api", "nginx-webhook"):
        tags = requests.get(f"{registry}/v2/{repository}/tags/list", timeout=10).json()["tags"]
        accept = {"Accept": "application/vnd.docker.distribution.manifest.v2+json"}
        head = requests.head(f"{registry}/v2/{repository}/manifests/latest", headers=accept, timeout=10)
        materials = head.headers["Docker-Content-Digest"].replace(":", "-")
        assert {"latest", materials} <= set(tags), "the image, and its bill of materials beside it"
        assert len(tags) == 3
    image = docker("inspect", "--format", "{{.Config.Image}}", f"{stack.site.name}-api-1")
    accept = {
        "Accept": "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"
    }
    head = requests.head(f"{registry}/v2/webhook-api/manifests/latest", headers=accept, timeout=10)
    assert image.endswith("@" + head.headers["Docker-Content-Digest"])


def test_containers_are_hardened(stack: Stack) -> None:
    """Every container of the site, registry and backends included: settings, mounts, and processes."""
    names = docker("ps", "--filter", f"name={stack.site.name}-", "--format", "{{.Names}}").splitlines()
    names = [name for name in names if not name.endswith("-media")]
    assert len(names) == 8
    nginx = f"{stack.site.name}-nginx"
    found = [fault for name in names for fault in hardening.faults(name, host_network=name == nginx)]
    assert found == []
    # The check itself: a container of the tests that was started without care.
    careless = " ".join(hardening.faults(f"{stack.site.name}-media"))
    for word in (
        "root file system",
        "capabilities",
        "gain privileges",
        "limits",
        "health check",
        "logs grow",
    ):
        assert word in careless


def test_instances_listen_on_loopback_alone(stack: Stack) -> None:
    addresses = socket.gethostbyname_ex(socket.gethostname())[2]
    for port in stack.site.settings["site_api_ports"]:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        for address in {a for a in addresses if not a.startswith("127.")}:
            with pytest.raises(OSError):
                socket.create_connection((address, port), timeout=5).close()


def test_local_pages_are_for_the_local_network_only(stack: Stack) -> None:
    for path in ("/api/v1/webhook/status", "/metrics", "/nginx_status"):
        assert requests.get(stack.url(path), verify=False, timeout=10).status_code == 200, path
    result = stack.site.site("--tags", "edge", "-e", '{"site_local_networks": ["192.0.2.0/24"]}').must_pass()
    assert result.recap["changed"] > 0
    try:
        for path in ("/api/v1/webhook/status", "/metrics", "/nginx_status"):
            answer = requests.get(stack.url(path), verify=False, timeout=10)
            assert answer.status_code == 403, path
            assert answer.json()["error"], path
        assert requests.get(stack.url("/health"), verify=False, timeout=10).status_code == 200
    finally:
        stack.site.site("--tags", "edge").must_pass()


def test_a_release_that_does_not_answer_stops_at_the_first_instance(stack: Stack) -> None:
    """The old release serves on, the message shows what the container said, and the same command goes back."""
    elsewhere = {"stack_environment": {"PORT": "8009"}, "rollout_health_timeout": 10}
    result = stack.site.site("--tags", "stack,rollout", "-e", json.dumps(elsewhere))
    try:
        assert result.code != 0
        assert "failed at api-1" in result.output
        assert "log: " in result.output
        assert "Traceback" not in result.output
        for _ in range(20):
            assert requests.get(stack.url("/health"), verify=False, timeout=10).status_code == 200
        seen = docker("inspect", "--format", "{{.State.Health.Status}}", f"{stack.site.name}-api-2")
        assert seen == "healthy", "the second instance was not touched"
    finally:
        stack.site.site("--tags", "stack,rollout").must_pass()
    shown = stack.site.playbook("playbooks/status.yml", "-e", "status_strict=true").must_pass()
    assert shown.recap["changed"] == 0
