"""The shape of the playbooks that change a site: what fails always ends the run, whatever tags it was started with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

REPO = Path(__file__).resolve().parents[2]
CHANGING = ("site.yml", "rollback.yml")
#: Plays before the lock is asked for, or after all is done: there is nothing to give back.
OUTSIDE = {
    "Every precondition is met",
    # It looks, and never fails.
    "It is known where something is left to do",
    "What can be gone back to is known",
    "Images that no release needs are gone",
    "Another run may change the site",
    "The rollback is noted",
}


def plays(name: str) -> list[dict[str, Any]]:
    """What a playbook does to hosts: not what it asks of the controller before."""
    found: list[dict[str, Any]] = yaml.safe_load((REPO / "playbooks" / name).read_text())
    return [play for play in found if play["hosts"] != "localhost"]


@pytest.mark.parametrize("name", CHANGING)
def test_a_play_that_fails_ends_the_run_under_every_tag(name: str) -> None:
    inside = [play for play in plays(name) if play["name"] not in OUTSIDE]
    assert len(inside) >= 2
    for play in inside:
        (task,) = play["tasks"]
        (stop,) = task["rescue"]
        # An include would run and do nothing under --tags: its tasks don't have the tags that it has itself.
        assert stop["ansible.builtin.import_tasks"] == "tasks/stop.yml", play["name"]
        assert name != "site.yml" or stop["tags"] == ["always"], play["name"]


@pytest.mark.parametrize("name", CHANGING)
def test_one_host_that_fails_stops_all_of_them(name: str) -> None:
    for play in plays(name)[:-2]:
        assert play["any_errors_fatal"] is True, play["name"]


def test_stop_gives_the_lock_back_and_fails() -> None:
    tasks = yaml.safe_load((REPO / "playbooks/tasks/stop.yml").read_text())
    assert "ansible.builtin.fail" in tasks[-1]
    assert "when" not in tasks[-1]
    assert any(task.get("deploy_lock", {}).get("state") == "released" for task in tasks)


GROUPS = {name: [name] for name in ("builders", "registry", "backends", "webhook")}


def matched(hosts: str, groups: dict[str, list[str]] | None = None, **given: str) -> set[str]:
    """The hosts that a play's pattern names in a site where every group has a host of its own, called as the group is."""
    variables = {key: trust_as_template(value) for key, value in given.items()}
    variables |= {"groups": groups or GROUPS, "hostvars": {"webhook": {"lock_first": "webhook"}}}
    pattern = Templar(DataLoader(), variables=variables).template(trust_as_template(hosts))
    named = {part for part in (pattern if isinstance(pattern, str) else ":".join(pattern)).split(":") if part}
    assert {part.removeprefix("!") for part in named} <= {*GROUPS, "unchanged"}
    without = {host for part in named if part.startswith("!") for host in (groups or GROUPS)[part[1:]]}
    return {part for part in named if not part.startswith("!")} - without


def test_with_a_bundle_hosts_that_only_build_or_have_the_registry_are_not_touched() -> None:
    bundled = {play["name"]: matched(play["hosts"], bundle="/bundle.tar") for play in plays("site.yml")}
    for name, hosts in bundled.items():
        assert hosts <= {"backends", "webhook"}, name
        # Nothing is known of a bundle before it has come to the hosts, so none is left out.
        assert hosts or name in {
            "The base image stands",
            "The embedded registry answers",
            "The images are in the registry",
            "It is known where something is left to do",
        }
    assert "webhook" in bundled["The engine runs"]


def test_a_host_on_which_nothing_is_left_to_do_is_in_no_further_play_but_for_its_lock() -> None:
    names = [play["name"] for play in plays("site.yml")]
    last = names.index("It is known where something is left to do")
    for play in plays("site.yml")[last + 1 :]:
        assert "webhook" in matched(play["hosts"]), play["name"]
        left = matched(play["hosts"], GROUPS | {"unchanged": ["webhook"]})
        assert ("webhook" in left) == (play["name"] == "Another run may change the site"), play["name"]


def test_what_is_signed_finds_the_sites_key_before_it_is_built() -> None:
    tasks = {
        "site.yml": next(p for p in plays("site.yml") if p["name"] == "The images are in the registry")[
            "tasks"
        ][0]["block"],
        "bundle.yml": plays("bundle.yml")[-1]["tasks"],
    }
    for name, found in tasks.items():
        roles = [
            (task.get("ansible.builtin.include_role") or task.get("ansible.builtin.import_role"))["name"]
            for task in found
        ]
        assert "secrets" in roles[: roles.index("images")], name
        (key,) = (
            task for task in found if task.get("ansible.builtin.include_role", {}).get("name") == "secrets"
        )
        assert key["when"] == "site_image_signatures | default(false) | bool"


def test_no_option_is_used_that_the_oldest_compose_has_not_got() -> None:
    """`pull --policy` and `run --pull` are younger than preflight_compose_min."""
    for path in [
        *REPO.glob("roles/*/tasks/*.yml"),
        *REPO.glob("roles/*/vars/*.yml"),
        *REPO.glob("playbooks/**/*.yml"),
    ]:
        assert "--policy" not in path.read_text(), path


def test_a_run_that_failed_puts_secrets_back_when_hosts_have_gone_back_and_under_its_lock() -> None:
    tasks = yaml.safe_load((REPO / "playbooks/tasks/stop.yml").read_text())
    steps = ("import_tasks", "kept_secrets", "deployment_records", "deploy_lock", "include_role", "fail")
    order = [next(step for step in steps if {step, f"ansible.builtin.{step}"} & set(task)) for task in tasks]
    # The record is written, and goes into the database; then the lock is given back, then the hook is told.
    assert order == [
        *("import_tasks", "kept_secrets", "deployment_records"),
        *("include_role", "deploy_lock", "include_role", "fail"),
    ]
    (put_back,) = [task for task in tasks if "kept_secrets" in task]
    assert put_back["kept_secrets"]["state"] == "restored"
    assert put_back["failed_when"] is False, "it hides no fault of the run"


def test_of_several_hosts_each_can_go_back_with_its_secrets_until_all_are_proven() -> None:
    found = {play["name"]: play for play in plays("site.yml")}
    for name in ("The release runs, host by host", "The whole site is proven"):
        assert found[name]["vars"]["rollout_settle"] == "{{ ansible_play_hosts_all | length == 1 }}"
    (block,) = found["The whole site is proven"]["tasks"]
    names = [task["name"] for task in block["block"]]
    assert names.index("The site is proven") < names.index("Nothing is kept of the secrets of before")
    rollout = yaml.safe_load((REPO / "roles/rollout/tasks/main.yml").read_text())
    assert rollout[1]["rollout"]["settle"] == "{{ rollout_settle | bool }}"
    back = yaml.safe_load((REPO / "playbooks/tasks/back.yml").read_text())
    assert "settle" not in back[0]["rollout"], "a host that has gone back is done"


def test_an_inventory_without_hosts_of_a_site_is_refused(tmp_path: Path) -> None:
    """All plays would be skipped, and a run of nothing end well."""
    run = site_for(tmp_path, "all: {hosts: {elsewhere: {ansible_connection: local}}}\n")
    assert run.returncode == 2, run.stdout
    assert "No host is in the groups webhook, backends or registry" in run.stdout


def test_backends_may_be_a_site_by_themselves(tmp_path: Path) -> None:
    """For webhook hosts of another inventory. What stops this run is the preflight of the host, not the inventory."""
    run = site_for(tmp_path, not_ready("backends"))
    assert run.returncode == 2, run.stdout
    assert "No host is in the groups" not in run.stdout
    assert "elsewhere is not ready" in run.stdout


def test_a_value_that_the_monitoring_would_refuse_is_named_before_a_host_is_touched(tmp_path: Path) -> None:
    wrong = {
        "monitoring": True,
        "monitoring_for_urgent": "banana",
        "monitoring_window": "1h30m",
        "monitoring_alert_webhook_url": "nourl",
        "monitoring_rejects": 0,
        "edge_console_port": 8443,
    }
    run = site_for(tmp_path, not_ready("webhook", **wrong))
    said = " ".join(run.stdout.split())
    assert run.returncode == 2, run.stdout
    for fault in (
        "monitoring_for_urgent is banana",
        "monitoring_alert_webhook_url is no address",
        "monitoring_rejects is 0: give a number from 1",
        "edge_console_port is 8443, which nginx has for deliveries",
    ):
        assert fault in said, fault
    assert "monitoring_window" not in said
    assert "nourl" not in said, "it may hold a secret"


def not_ready(group: str, **variables: Any) -> str:
    """An inventory with one host, this machine, that has too little memory: no run goes beyond its preflight."""
    own = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    return yaml.safe_dump(
        {group: {"hosts": {"elsewhere": own | variables | {"preflight_memory_mb": 900_000_000}}}}
    )


def site_for(inventory: Path, hosts: str) -> subprocess.CompletedProcess[str]:
    """site.yml with an inventory of its own."""
    (inventory / "hosts.yml").write_text(hosts)
    program = Path(sys.executable).with_name("ansible-playbook")
    return subprocess.run(
        [program, "-i", inventory, "site.yml"], cwd=REPO, capture_output=True, text=True, timeout=120
    )


def test_a_run_with_nothing_to_do_is_on_record_when_it_is_proven_and_not_before() -> None:
    tasks = yaml.safe_load((REPO / "playbooks/tasks/unchanged.yml").read_text())
    assert tasks[0]["check_mode"] is True
    assert [task["ansible.builtin.include_role"]["name"] for task in tasks[1:]] == [
        "rollout",
        "verify",
        "records",
    ]
