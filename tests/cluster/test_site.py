"""A real site over real SSH: inventory/production with other addresses, its vault, and three hosts with their own engines.

The tests build on each other, in their order: first the deployment, then what must stop a deployment, then what changes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.support.cluster import REPO, Cluster, Machine, wait_for
from tests.support.steady import Steady
from tests.support.typed_commands import typed_blocks

NAME = "wht-site"
NUMBER = 13
#: Something that a run would have to change on every host, were it let.
CHANGE = {"stack_log_level": "WARNING"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(NAME, tmp_path_factory.mktemp(NAME), NUMBER)
    try:
        cluster.make()
        cluster.make_infrastructure()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="module")
def bot(cluster: Cluster) -> dict[str, str]:
    """What others keep in the same registry, from before the first deployment."""
    for repository, tag in (("aisha/bot", "latest"), ("aisha/bot", "c-0000000000000001"), ("other", "v1")):
        cluster.push(repository, tag, {"org.aisha.content.digest": "0"})
    return cluster.manifests("aisha/bot") | cluster.manifests("other")


@pytest.fixture(scope="module")
def deployed(cluster: Cluster, bot: dict[str, str]) -> Cluster:
    cluster.site().must_pass()
    return cluster


@contextmanager
def undone(machine: Machine, do: str, undo: str) -> Iterator[None]:
    """Do something to a host, and undo it whatever happens."""
    machine.run(do)
    try:
        yield
    finally:
        machine.run(undo)


def record_of(cluster: Cluster, machine: Machine) -> dict:
    """The newest deployment record of a host."""
    return json.loads(machine.run(f"tail -n 1 /opt/{cluster.name}/deployments.jsonl"))


# -- the deployment ---------------------------------------------------------------------------------------------------


def test_both_hosts_serve_and_were_rolled_one_after_the_other(deployed: Cluster) -> None:
    first, second = (record_of(deployed, machine) for machine in deployed.webhooks)
    assert first["result"] == second["result"] == "done"
    assert first["id"] == second["id"]
    assert first["ended"] <= second["started"]
    for machine in deployed.webhooks:
        names = set(machine.containers())
        assert {f"{NAME}-api-1", f"{NAME}-api-2", f"{NAME}-worker", f"{NAME}-nginx"} <= names


def test_images_were_proven_in_the_registry_and_are_pinned_by_digest(deployed: Cluster) -> None:
    pushed = deployed.manifests("webhook-api")
    for machine in deployed.webhooks:
        image = machine.run(f"docker inspect --format '{{{{.Config.Image}}}}' {NAME}-api-1").strip()
        assert image == f"{deployed.registry}/webhook-api@{pushed['latest']}"


def test_the_public_ports_answer_and_the_instances_listen_on_loopback_only(deployed: Cluster) -> None:
    here, beside = deployed.webhooks
    ca = "--cacert /etc/ssl/site-ca.pem --resolve webhook.test:443:{0} --resolve webhook.test:8443:{0}"
    for url in ("https://webhook.test/health", "https://webhook.test:8443/health"):
        assert beside.succeeds(f"curl -sf {ca.format(here.address)} {url}"), url
    assert beside.succeeds(f"curl -sf http://{here.address}/health")
    for port in (8001, 8002):
        assert here.succeeds(f"curl -sf http://127.0.0.1:{port}/health"), port
        # 7: nothing listens on that address. Another address of the host is no way in either.
        code = beside.run(f"curl -s -m 5 http://{here.address}:{port}/health; echo $?").strip()
        assert code == "7", f"{port}: curl ended with {code}"
    listening = here.run("ss -Hltn '( sport = :8001 or sport = :8002 )'")
    assert set(re.findall(r"(\S+):800[12]\s", listening)) == {"127.0.0.1"}


def test_no_secret_is_in_a_log_of_the_hosts_or_readable_by_others(deployed: Cluster) -> None:
    secret = deployed.secret("fal_webhook_secret")
    for machine in deployed.webhooks:
        found = machine.run(f"grep -rlF {secret} /opt/{NAME} --exclude-dir=secrets || true")
        assert found == ""
        assert machine.run(f"find /opt/{NAME}/secrets -type f -perm /077 ! -name fal_jwks.json") == ""


def test_a_second_run_changes_nothing(deployed: Cluster) -> None:
    before = deployed.state()
    run = deployed.site().must_pass()
    assert set(run.changed.values()) == {0}, run.recap
    # Each host costs what is asked of it before anything is done, and one task that finds out that nothing is left to do.
    assert run.recap["webhook-2"]["ok"] <= 8, run.recap
    assert [record_of(deployed, machine)["result"] for machine in deployed.webhooks] == ["unchanged"] * 2
    assert {name: state[0] for name, state in deployed.state().items()} == {
        name: state[0] for name, state in before.items()
    }


def test_the_pages_commands_work_as_they_are_typed(deployed: Cluster) -> None:
    instead = {
        "inventory/mysite": str(deployed.inventory),
        "--ask-vault-pass": f"--vault-password-file {deployed.vault_password}",
        "src=site-ca.pem": f"src={deployed.authority.certificate}",
        "builders:webhook": "webhook",
    }
    commands = [command for block in typed_blocks("docs/production.md") for command in block]
    chosen = [command for command in commands if command.startswith(("make check", "make up", ".venv/bin/"))]
    assert len(chosen) == 3
    for command in chosen:
        for old, new in instead.items():
            command = command.replace(old, new)
        run = subprocess.run(
            command,
            shell=True,
            cwd=REPO,
            env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert run.returncode == 0, f"{command}: {run.stdout[-3000:]}{run.stderr[-2000:]}"
        assert not re.search(r"^webhook-\d\s.*(changed|failed|unreachable)=[1-9]", run.stdout, re.MULTILINE)


# -- the engine ------------------------------------------------------------------------------------------------------


def test_an_engine_that_ends_and_starts_again_fails_no_request(deployed: Cluster) -> None:
    """`live-restore`: containers go on while there is no engine. Role `engine` starts it again, and changes nothing else."""
    here = deployed.webhooks[0]
    before = here.containers()
    address = f"http://{here.address}", f"https://{here.address}:8443"
    with Steady(*address, deployed.secret("fal_webhook_secret"), clients=3, pause=0.1) as steady:
        here.run("kill -TERM $(pgrep -x dockerd) && while pgrep -x dockerd; do sleep 0.1; done")
        steady.wait_for(150)
        deployed.site("--tags", "engine", "--limit", "localhost,webhook-1").must_pass()
        wait_for(lambda: here.succeeds("docker info"), "the engine")
        steady.wait_for(150)
    print(steady.summary())
    assert not steady.failures, steady.summary()
    assert here.containers() == before


# -- what stops a deployment ------------------------------------------------------------------------------------------


def stopped(cluster: Cluster, *words: str, **variables: object) -> None:
    """A run that would change every host stops with these words, and no host is touched."""
    before = cluster.state()
    cluster.site(*cluster.with_variables(**CHANGE, **variables)).must_fail(*words)
    assert cluster.state() == before


def test_a_host_out_of_reach_stops_the_run_before_any_host_is_touched(deployed: Cluster) -> None:
    rule = "INPUT -p tcp --dport 22 -j REJECT --reject-with tcp-reset"
    # Of one that a run before has left open, it would be said that it was closed.
    deployed.end_connections()
    with undone(deployed.webhooks[1], f"iptables -I {rule}", f"iptables -D {rule}"):
        refused = f"connect to host {deployed.webhooks[1].address} port 22: Connection refused"
        stopped(deployed, "[webhook-2]: UNREACHABLE!", refused)


def test_a_full_disk_is_named_before_any_host_is_touched(deployed: Cluster) -> None:
    disk = f"/opt/{NAME}"
    full = f"mount -t tmpfs -o size=64m none {disk} && head -c 60M /dev/zero > {disk}/filler"
    before = deployed.state()
    with undone(deployed.webhooks[1], full, f"umount {disk}"):
        run = deployed.site(*deployed.with_variables(**CHANGE))
    run.must_fail("webhook-2 is not ready", f"{disk} has ", "and needs 200: free some")
    assert "webhook-1 is not ready" not in run.output
    assert deployed.state() == before


def test_a_user_who_cannot_become_root_is_told_so_before_any_host_is_touched(deployed: Cluster) -> None:
    before = deployed.state()
    run = deployed.site(*deployed.with_variables(ansible_become_password="wrong"))
    run.must_fail(
        "webhook-1 is not ready", "webhook-2 is not ready", "cannot become root", "--ask-become-pass"
    )
    assert "Traceback" not in run.output
    assert deployed.state() == before


def test_a_registry_out_of_one_hosts_reach_stops_before_a_container_is_touched(deployed: Cluster) -> None:
    rule = f"OUTPUT -d {deployed.infra.address} -p tcp --dport 5000 -j REJECT"
    with undone(deployed.webhooks[1], f"iptables -I {rule}", f"iptables -D {rule}"):
        stopped(deployed, "webhook-2 is not ready", f"no registry answers at https://{deployed.registry}")


def test_a_wrong_registry_password_is_refused_and_not_shown(deployed: Cluster) -> None:
    before = deployed.state()
    run = deployed.site(*deployed.with_variables(**CHANGE, site_registry_password="not-this-one"))
    run.must_fail("is not ready", "HTTP 401", "Give the right username and password")
    assert deployed.state() == before
    # Ansible shows what was given on the command line only to itself.
    assert "not-this-one" not in run.output


def test_plain_http_is_spoken_only_where_the_inventory_says_so(deployed: Cluster) -> None:
    stopped(deployed, "is not ready", "Use https:// for it", site_registry_scheme="http")
    # The object store stands in for a registry that speaks plain http.
    plain = f"{deployed.infra.address}:9000"
    stopped(deployed, "is not ready", "It speaks plain http on this port", site_registry=plain)


def test_a_registry_of_an_unknown_authority_is_refused(deployed: Cluster) -> None:
    stopped(deployed, "is not ready", "Give the authority that signed its certificate", site_registry_ca="")


# -- what changes -----------------------------------------------------------------------------------------------------


def fake_images(cluster: Cluster) -> dict[str, str]:
    """Old images of earlier deployments, by tag: one that somebody named, one that a kept release of webhook-2 needs."""
    found = {}
    for number in range(1, 6):
        tag = f"c-{number:016x}"
        labels = {
            "org.aisha.content.digest": f"{number:064x}",
            "org.opencontainers.image.created": f"2020-01-{number:02}T00:00:00Z",
        }
        found[tag] = cluster.push("webhook-api", tag, labels)
        if number == 1:
            assert cluster.push("webhook-api", "staging", labels) != found[tag]
    needed = {"images": {"webhook-api": f"{cluster.registry}/webhook-api@{found[f'c-{2:016x}']}"}}
    path = f"/opt/{NAME}/releases/r-000000000002"
    described = json.dumps(needed | {"files": {}, "metadata": {}, "created": "2020-01-02T00:00:00+00:00"})
    cluster.webhooks[1].run(f"mkdir -p {path} && echo '{described}' > {path}/release.json")
    return found


def test_limit_changes_one_host_and_leaves_the_registry(deployed: Cluster) -> None:
    fake_images(deployed)
    before = deployed.manifests("webhook-api")
    there = deployed.webhooks[1].containers()
    limit = ["--limit", "localhost,webhook-1"]
    few = deployed.with_variables(**CHANGE, prune_registry_keep=1)
    run = deployed.site(*limit, *few).must_pass()
    assert run.changed["webhook-1"] > 0
    assert "webhook-2" not in run.changed
    assert deployed.webhooks[1].containers() == there
    assert "what the kept releases of webhook-2 need is not known" in re.sub(r"\s+", " ", run.output)
    assert deployed.manifests("webhook-api") == before


def lock_of(cluster: Cluster, host: str, words: str) -> None:
    """Call module deploy_lock on a host, as another run would."""
    command = ["ansible", host, "-i", str(cluster.inventory), "--become", "-m", "deploy_lock"]
    command += ["-a", f"path=/opt/{NAME} {words}", "--vault-password-file", str(cluster.vault_password)]
    environment = os.environ | {"ANSIBLE_SSH_CONTROL_PATH_DIR": str(cluster.control)}
    subprocess.run(command, cwd=REPO, env=environment, check=True, capture_output=True, timeout=120)


def test_where_something_is_left_to_do_the_lock_is_taken_although_the_first_host_has_nothing_to_do(
    deployed: Cluster,
) -> None:
    """After the test before, webhook-2 is behind. Somebody else is at work there."""
    there = [machine.containers() for machine in deployed.webhooks]
    waiting = deployed.with_variables(**CHANGE, prune_registry_keep=0, lock_wait_seconds=2)
    lock_of(deployed, "webhook-2", "run=d-20261129T000000-abcdef owner=boris@elsewhere lease=600")
    deployed.site(*waiting).must_fail("boris@elsewhere")
    assert [machine.containers() for machine in deployed.webhooks] == there
    assert not deployed.webhooks[0].succeeds(f"test -e /opt/{NAME}/run/deployment.lock")
    lock_of(deployed, "webhook-2", "state=broken run=d-20261129T000000-abcdef")


def test_the_next_whole_run_brings_the_other_host_and_prunes_what_nobody_needs(
    deployed: Cluster, bot: dict[str, str]
) -> None:
    there = deployed.webhooks[0].containers()
    run = deployed.site(*deployed.with_variables(**CHANGE, prune_registry_keep=1)).must_pass()
    assert deployed.webhooks[0].containers() == there
    assert record_of(deployed, deployed.webhooks[1])["result"] == "done"
    tags = {tag for tag in deployed.manifests("webhook-api") if not tag.startswith("sha256-")}
    current = {tag for tag in tags if re.fullmatch(r"c-[0-9a-f]{16}", tag) and not tag.startswith("c-000")}
    assert tags == {"latest", "staging", f"c-{2:016x}", *current}, run.output[-3000:]
    assert len(current) == 1
    assert deployed.manifests("aisha/bot") | deployed.manifests("other") == bot


def test_nothing_is_pruned_where_nothing_changed(deployed: Cluster) -> None:
    labels = {
        "org.aisha.content.digest": "9",
        "org.opencontainers.image.created": "2020-01-09T00:00:00Z",
    }
    deployed.push("webhook-api", f"c-{9:016x}", labels)
    run = deployed.site(*deployed.with_variables(**CHANGE, prune_registry_keep=1)).must_pass()
    assert set(run.changed.values()) == {0}, run.recap
    assert f"c-{9:016x}" in deployed.manifests("webhook-api")


def test_pruning_by_hand_says_first_what_it_does(deployed: Cluster, bot: dict[str, str]) -> None:
    few = deployed.with_variables(prune_registry_keep=1)
    said = deployed.playbook("playbooks/prune.yml", "--check", "--diff", *few).must_pass()
    assert f"-webhook-api:c-{9:016x}" in said.output
    assert f"c-{9:016x}" in deployed.manifests("webhook-api")
    deployed.playbook("playbooks/prune.yml", *few).must_pass()
    assert f"c-{9:016x}" not in deployed.manifests("webhook-api")
    again = deployed.playbook("playbooks/prune.yml", *few).must_pass()
    assert set(again.changed.values()) == {0}
    assert deployed.manifests("aisha/bot") | deployed.manifests("other") == bot


def test_the_registrys_disk_is_freed_and_what_is_needed_can_still_be_pulled(
    deployed: Cluster, bot: dict[str, str]
) -> None:
    volume = deployed.infra.run(
        "docker volume inspect --format '{{.Mountpoint}}' wht-site-infra-registry"
    ).strip()
    blobs = f"find {volume}/docker/registry/v2/blobs -name data | wc -l"
    before = int(deployed.infra.run(blobs))
    deployed.playbook("playbooks/prune.yml", inventory=deployed.directory / "infrastructure").must_pass()
    assert int(deployed.infra.run(blobs)) < before
    assert deployed.manifests("aisha/bot") | deployed.manifests("other") == bot
    for machine in deployed.webhooks:
        image = machine.run(f"docker inspect --format '{{{{.Config.Image}}}}' {NAME}-api-1").strip()
        login = f"--config /opt/{NAME}/docker-auth"
        machine.run(f"docker {login} pull --quiet {image}")


# -- a host that is lost in the middle --------------------------------------------------------------------------------


def release_of(machine: Machine) -> str:
    return machine.run(f"readlink /opt/{NAME}/current").strip().rpartition("/")[2]


def test_a_host_lost_in_the_middle_of_its_rollout_leaves_no_mixed_site_and_no_lock(deployed: Cluster) -> None:
    """The hosts that were switched go back. What the lost one was at goes on to its end; the next run brings all of them."""
    first, second = deployed.webhooks
    before = release_of(first)
    louder = deployed.with_variables(stack_log_level="ERROR")
    rule = "INPUT -p tcp --dport 22 -j REJECT --reject-with tcp-reset"
    with ThreadPoolExecutor(1) as runner:
        run = runner.submit(deployed.site, *louder)
        wait_for(
            lambda: second.succeeds(f"test -e /opt/{NAME}/run/deployment.json"), "the second rollout", 300
        )
        with undone(second, f"iptables -I {rule}", f"iptables -D {rule}"):
            done = run.result(600)
    done.must_fail("UNREACHABLE!", f"Gone back: webhook-1 to {before}")
    assert release_of(first) == before
    assert not first.succeeds(f"test -e /opt/{NAME}/run/deployment.lock")
    deployed.site(*louder).must_pass()
    assert release_of(first) != before
    for machine in (first, second):
        assert "LOG_LEVEL=ERROR" in machine.run(f"docker inspect {NAME}-api-1"), "the next run brought both"


# -- secrets ----------------------------------------------------------------------------------------------------------


def stream(cluster: Cluster, secret: str) -> Steady:
    """Deliveries to the first host, which bring a secret."""
    address = cluster.webhooks[0].address
    return Steady(f"http://{address}", f"https://{address}:8443", secret, clients=2, pause=0.1)


def secrets_of(machine: Machine) -> str:
    """Digests of all secrets of a host, and whether any of before are kept."""
    return machine.run(f"cd /opt/{NAME}/secrets && find . -type f -exec sha256sum {{}} + | sort -k2")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        # The probe finds it: nothing that Redis is for holds up an answer.
        ("redis_password", ["What was done: release", "was put back"]),
        # The migration finds it, before any container is replaced.
        ("postgres_webhook_password", ["no container was replaced", "secrets of before stand again"]),
    ],
)
def test_a_wrong_password_is_gone_back_from_with_the_right_one(
    deployed: Cluster, name: str, words: list[str]
) -> None:
    given = deployed.vault["vault_secrets"] | {name: "not-the-right-one-0123456789"}
    before, secrets = deployed.state(), [secrets_of(machine) for machine in deployed.webhooks]
    releases = [release_of(machine) for machine in deployed.webhooks]
    with stream(deployed, deployed.secret("fal_webhook_secret")) as steady:
        run = deployed.site(*deployed.with_variables(stack_log_level="ERROR", secrets_given=given))
        steady.wait_for(20)
    print(steady.summary())
    run.must_fail(*words, "What to do:")
    assert "not-the-right-one" not in run.output
    assert not steady.failures, steady.summary()
    assert [secrets_of(machine) for machine in deployed.webhooks] == secrets
    assert [release_of(machine) for machine in deployed.webhooks] == releases
    second = deployed.webhooks[1].name
    assert deployed.state()[second][0] == before[second][0], "the second host was not touched"
    assert not deployed.webhooks[0].succeeds(f"test -e /opt/{NAME}/run/deployment.lock")


def test_the_webhook_secret_is_renewed_in_two_steps_and_no_caller_is_refused(deployed: Cluster) -> None:
    kept, old, new = deployed.vault["vault_secrets"], deployed.secret("fal_webhook_secret"), "5" * 48
    both = kept | {"fal_webhook_secret": new, "fal_webhook_secret_previous": old}
    with stream(deployed, old) as steady:
        deployed.site(*deployed.with_variables(stack_log_level="ERROR", secrets_given=both)).must_pass()
        steady.wait_for(20)
    assert not steady.failures, steady.summary()
    last = kept | {"fal_webhook_secret": new}
    with stream(deployed, new) as steady:
        deployed.site(*deployed.with_variables(stack_log_level="ERROR", secrets_given=last)).must_pass()
        steady.wait_for(20)
    assert not steady.failures, steady.summary()
    with stream(deployed, old) as steady:
        steady.wait_for(20)
    assert {status for _, _, status, *_ in steady.attempts} == {401}
    for machine in deployed.webhooks:
        assert machine.run(f"grep -rlF {old} /opt/{NAME} || true") == "", "nothing keeps the old one in clear"
