"""Action `unchanged`: a task file is gone through in one process, to the first task that is not as it should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
WHOLE = """
- name: All of it
  check_mode: true
  block:
    - name: A role is included
      ansible.builtin.include_role:
        name: greeter
      vars:
        greeter_word: hello
- name: What a role has set is known
  ansible.builtin.debug:
    msg: ["{{ greeter_said }}", "{{ greeter_loop.results | map(attribute='ansible_facts.greeter_one') | join('+') }}"]
- name: What is skipped counts for nothing
  ansible.builtin.command: touch {{ touched }}
  when: false
"""
ROLE = """
- name: It is looked at what stands
  ansible.builtin.stat:
    path: /etc/passwd
  register: greeter_stat
- name: More of it
  ansible.builtin.include_tasks: more.yml
  when: greeter_stat.stat.exists
"""
MORE = """
- name: What is said is known
  ansible.builtin.set_fact:
    greeter_said: "{{ greeter_word }} {{ greeter_whom }} {{ greeter_stat.stat.pw_name }}"
- name: It may be said often
  ansible.builtin.set_fact:
    greeter_one: "{{ item }}"
  loop: [1, 2]
  register: greeter_loop
"""
ENDS = {
    "changes": (
        "- {name: Written, ansible.builtin.copy: {dest: '{{ touched }}', content: x}, check_mode: true}",
        "would change something",
    ),
    "fails": ("- {name: Refused, ansible.builtin.fail: {msg: s3cret}, no_log: true}", "does not succeed"),
    "undefined": ("- {name: Unknown, ansible.builtin.debug: {msg: '{{ nowhere }}'}}", "does not succeed"),
    "no_file": (
        "- {name: Nowhere, ansible.builtin.include_tasks: nowhere.yml}",
        "It is not known what is left to do",
    ),
    "no_yaml": (
        "- {name: Broken, ansible.builtin.nothing_of_the_kind: {}}",
        "It is not known what is left to do",
    ),
}
AFTER = "\n- {name: Never reached, ansible.builtin.command: 'touch {{ touched }}'}\n"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results by file, after one run of them all, and its output."""
    home = tmp_path_factory.mktemp("unchanged")
    for directory in ("roles/greeter/tasks", "roles/greeter/defaults", "tasks"):
        (home / directory).mkdir(parents=True)
    (home / "ansible.cfg").write_text(
        f"[defaults]\naction_plugins = {REPO}/action_plugins\nroles_path = roles\n"
    )
    (home / "roles/greeter/tasks/main.yml").write_text(ROLE)
    (home / "roles/greeter/tasks/more.yml").write_text(MORE)
    (home / "roles/greeter/defaults/main.yml").write_text("greeter_whom: world\n")
    (home / "tasks/whole.yml").write_text(WHOLE)
    for name, (text, _) in ENDS.items():
        (home / f"tasks/{name}.yml").write_text(text + AFTER)
    (home / "tasks/lost.yml").write_text("- {name: Asked, ansible.builtin.ping: {}}\n")
    names = ["whole", *ENDS, "missing"]
    tasks = [
        {
            "name": name,
            "unchanged": {"tasks": f"tasks/{name}.yml", "group": f"g_{name}"},
            "register": name,
            "changed_when": False,
        }
        for name in names
    ]
    lost = {"name": "lost", "unchanged": {"tasks": "tasks/lost.yml", "group": "g_lost"}, "register": "lost"}
    told = "{{ dict(names | zip(names | map('extract', vars))) | combine(more) | to_json }}"
    more = {"groups": "{{ groups }}", "said": "{{ greeter_said | default('') }}"}
    written = {
        "name": "Kept",
        "ansible.builtin.copy": {"content": told, "dest": f"{home}/results.json"},
        "vars": {"names": names, "more": more},
    }
    plays = [
        {"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": [*tasks, written]},
        {"hosts": "away", "gather_facts": False, "tasks": [lost]},
    ]
    (home / "play.yml").write_text(json.dumps(plays))
    (home / "inventory.yml").write_text(
        "all: {hosts: {localhost: {}, away: {ansible_host: 127.0.0.1, ansible_port: 1, ansible_connection: ssh}}}\n"
    )
    command = [
        str(Path(sys.executable).with_name("ansible-playbook")),
        "-i",
        "inventory.yml",
        "play.yml",
        "-v",
    ]
    command += [
        "-e",
        json.dumps({"touched": str(home / "touched"), "ansible_python_interpreter": sys.executable}),
    ]
    environment = os.environ | {"ANSIBLE_CONFIG": str(home / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    run = subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found: dict[str, Any] = json.loads((home / "results.json").read_text())
    return found | {"output": run.stdout + run.stderr, "touched": (home / "touched").exists()}


def test_where_nothing_changes_the_host_is_in_the_group_and_it_is_told_what_was_said(
    seen: dict[str, Any],
) -> None:
    assert seen["whole"]["msg"] == ["hello world root", "1+2"]
    assert seen["groups"]["g_whole"] == ["localhost"]
    assert "hello world root" in seen["output"]


def test_what_its_tasks_set_stays_with_them(seen: dict[str, Any]) -> None:
    assert seen["said"] == ""


@pytest.mark.parametrize("name", ENDS)
def test_it_ends_at_the_first_task_that_is_not_as_it_should_be(seen: dict[str, Any], name: str) -> None:
    assert f"g_{name}" not in seen["groups"]
    assert ENDS[name][1] in seen[name]["msg"]
    assert not seen[name].get("failed")
    assert not seen["touched"], "no task after it has run, and the one that would change something did not"


def test_a_file_that_is_not_there_is_no_whole_one(seen: dict[str, Any]) -> None:
    assert "g_missing" not in seen["groups"]
    assert "missing" in seen["missing"]["msg"]


def test_a_host_that_cannot_be_reached_is_not_called_unchanged_and_not_given_up(seen: dict[str, Any]) -> None:
    assert "the host cannot be reached" in seen["output"]
    assert "unreachable=0" in seen["output"].partition("PLAY RECAP")[2].partition("away")[2]


def test_what_a_task_hides_stays_hidden(seen: dict[str, Any]) -> None:
    assert "s3cret" not in seen["output"]
