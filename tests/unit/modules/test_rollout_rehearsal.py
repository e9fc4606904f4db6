"""A new nginx is tried out of the clients' sight: what it is asked, what counts as good, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from ansible.module_utils.docker_cli import Result
from ansible.module_utils.rollout import edge
from ansible.module_utils.rollout.gates import SOCKET, Answer, Asking
from ansible.module_utils.rollout.model import RolloutError
from ansible.module_utils.rollout.private_listeners import PLAIN, TLS, directives
from ansible.module_utils.rollout.rehearsal import (
    END,
    command,
    first_fault,
    override,
    questions,
    refusal_fault,
)

sys.path.insert(0, str(Path(__file__).parent))

from rollout_releases import release
from rollout_world import World, quietly

SOCKETS = ((PLAIN, False), (TLS, True))
HEALTHY = json.dumps({"status": "healthy", "release": "s-new"})
REFUSED = json.dumps({"error": "missing_credentials", "message": "…", "request_id": "r"})
NGINX_404 = json.dumps(
    {"error": "not_found", "message": "There is nothing at this address.", "request_id": "r"}
)


# What is asked


def test_nginx_each_instance_and_what_stands_for_each_public_port_are_asked():
    asked = [(each.socket, each.url, each.delivery) for each in questions(release(), SOCKETS)]
    assert asked == [
        (SOCKET, "http://edge/edge_alive", False),
        (SOCKET, "http://edge/instance/api-1/health", False),
        (SOCKET, "http://edge/instance/api-2/health", False),
        (PLAIN, "http://edge/health", False),
        (PLAIN, "http://edge/api/v1/avatar/status_update", True),
        (TLS, "https://edge/health", False),
        (TLS, "https://edge/api/v1/avatar/status_update", True),
    ]


def test_one_command_asks_all_of_it_each_over_its_socket():
    asked = questions(release(instances=1), [(TLS, True)])
    words = command(asked)
    rounds = " ".join(words).split(" --next ")
    assert len(rounds) == len(asked) == 4
    assert rounds[0].startswith("curl --silent --show-error --fail-early --max-time 5")
    for each, said in zip(asked, rounds, strict=True):
        assert f"--unix-socket {each.socket} " in said
        assert said.endswith(each.url)
        assert ("--data {}" in said) is each.delivery
    assert "secret" not in " ".join(words).lower()


def written(*answers):
    return "".join(f"{text}\n{status:03d}{END}" for status, text in answers)


GOOD = (
    (200, "e-new"),
    (200, HEALTHY),
    (200, HEALTHY),
    (200, HEALTHY),
    (401, REFUSED),
    (200, HEALTHY),
    (401, REFUSED),
)
OLD = json.dumps({"status": "healthy", "release": "s-old"})


@pytest.mark.parametrize(
    ("number", "answer", "fault"),
    [
        (0, (200, "e-old"), "nginx: nginx has configuration 'e-old', expected 'e-new'"),
        (1, (502, "<html>"), "api-1 through nginx: HTTP 502"),
        (2, (404, NGINX_404), "api-2 through nginx: HTTP 404"),
        (2, (200, OLD), "api-2 through nginx: it names release 's-old'"),
        (3, (503, "{}"), "http /health: HTTP 503"),
        (4, (404, NGINX_404), "http POST /api/v1/avatar/status_update: HTTP 404"),
        (4, (502, ""), "http POST /api/v1/avatar/status_update: HTTP 502"),
        (4, (200, "{}"), "HTTP 200"),
        (6, (429, '{"error":"too_many_requests"}'), "https POST /api/v1/avatar/status_update: HTTP 429"),
    ],
)
def test_the_first_bad_answer_is_named(number, answer, fault):
    asked = questions(release(), SOCKETS)
    assert first_fault(asked, written(*GOOD), "") == ""
    said = first_fault(asked, written(*GOOD[:number], answer, *GOOD[number + 1 :]), "")
    assert said.startswith(fault) or fault in said


def test_where_curl_ended_early_its_own_words_are_told():
    asked = questions(release(), SOCKETS)
    certificate = "curl: (35) TLS connect error"
    assert (
        first_fault(asked, written(*GOOD[:5], (0, "")), certificate)
        == f"https /health: no answer ({certificate})"
    )
    assert "nginx: nginx's control socket: curl: (7)" in first_fault(asked, "", "curl: (7) could not connect")
    assert "no answer" in first_fault(asked, written(*GOOD[:6]), "")


def test_only_the_service_itself_refuses_a_delivery():
    assert refusal_fault(Answer(401, REFUSED)) == ""
    assert refusal_fault(Answer(400, '{"error": "not_json"}')) == ""
    for answer in (
        Answer(401, "<html>"),
        Answer(404, NGINX_404),
        Answer(502, "{}"),
        Answer(204, ""),
        Answer(0, "x"),
    ):
        assert refusal_fault(answer)


def test_only_configuration_health_check_and_label_differ_from_the_service_itself(tmp_path):
    assert override(release(), tmp_path) == {
        "services": {
            "nginx": {
                "volumes": [
                    {"type": "bind", "source": str(tmp_path), "target": "/etc/nginx/site", "read_only": True}
                ],
                "labels": {"org.aisha.throwaway": "wht"},
                "restart": "no",
                "healthcheck": {"disable": True},
            }
        }
    }


# In a whole run


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A world that serves release `old`, and `new` beside it with another nginx (and what is bad about it)."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    monkeypatch.setattr(edge, "connections", lambda _pid, _ports: set())

    def world(**bad):
        found = World(tmp_path)
        monkeypatch.setattr(Asking, "local", lambda _self, *args, **options: found.local(*args, **options))
        old, new = found.release("old", "e-old"), found.release("new", "e-new", **bad)
        assert found.run(old)["result"] == "done"
        found.guarded = True
        return found, old, new

    return world


def nginxes(world):
    """Every nginx that there ever was in a run, at each call: names."""
    seen, tick = set(), world.tick

    def looking():
        seen.update(c["Name"] for c in world.containers if "nginx" in c["Name"])
        return tick()

    world.tick = looking
    return seen


def test_an_nginx_that_leads_nowhere_never_stands_on_the_public_ports(make):
    world, old, new = make(nginx={"leads_nowhere": True})
    before, seen = world.of("nginx")[0]["Id"], nginxes(world)
    with pytest.raises(RolloutError, match="tried out of the clients' sight, and failed") as caught:
        world.run(new)
    assert caught.value.reason == "rehearsal_failed"
    assert "api-1 through nginx: HTTP 502" in str(caught.value)
    assert caught.value.evidence["container"]["name"] == "wht-nginx-rehearsal"
    assert caught.value.evidence["container"]["log"] == ["last words"]
    assert caught.value.evidence["rolled_back"] is True, "the instances went back"
    assert world.of("nginx")[0]["Id"] == before
    assert seen == {"/wht-nginx", "/wht-nginx-rehearsal"}
    assert world.state() == world.at(old)


def test_what_is_tried_listens_on_no_port_and_is_gone_before_the_new_one_begins(make):
    world, _, new = make()
    listened, together, tick = set(), set(), world.tick

    def looking():
        tried = [c for c in world.containers if c["Name"] == "/wht-nginx-rehearsal"]
        for text in (c["Listens"] for c in tried if "Listens" in c):
            listened.update(each.words[1] for each in directives(text) if each.name == "listen")
        together.add((bool(tried), len(world.of("nginx"))))
        return tick()

    world.tick = looking
    assert world.run(new)["result"] == "done"
    assert listened == {f"unix:{PLAIN}", f"unix:{TLS}", f"unix:{SOCKET}"}
    assert (True, 1) in together
    assert (True, 2) not in together
    assert world.state() == world.at(new)
    steps = [step["step"] for step in world.records()[-1]["steps"] if step["service"] == "nginx"]
    assert steps.index("rehearse") < steps.index("start beside")


def test_a_configuration_of_an_unknown_form_is_told_and_not_tried(make):
    world, _, new = make()
    path = world.site / "edge" / "e-new" / "nginx.conf"
    path.write_text(path.read_text().replace("listen 80", "listen 80 proxy_protocol"))
    seen = nginxes(world)
    assert world.run(new)["result"] == "done"
    assert "/wht-nginx-rehearsal" not in seen
    assert any("not known here (proxy_protocol)" in text for text in world.warnings)


def test_one_that_ends_by_itself_is_not_waited_for(make, monkeypatch):
    world, old, new = make()
    start = World._start
    monkeypatch.setattr(
        World, "_start", lambda self, container, service: _ended(self, container, service, start)
    )
    with pytest.raises(RolloutError, match="and failed: it ended by itself"):
        world.run(new)
    assert world.state() == world.at(old)


def _ended(world, container, service, start):
    start(world, container, service)
    if container["Name"] == "/wht-nginx-rehearsal":
        container["State"] = {"Status": "exited", "ExitCode": 1}


def test_what_compose_says_is_told(make, monkeypatch):
    world, old, new = make()
    monkeypatch.setattr(World, "_run", lambda *_: Result(1, "", "no space left on device"))
    with pytest.raises(RolloutError, match="Compose could not start it: no space left on device"):
        world.run(new)
    assert world.state() == world.at(old)


def test_killed_while_it_is_tried_the_next_run_removes_it(make):
    world, _, new = make()
    world.run(new)
    world.guarded = False
    steps = 0
    for fuse in range(1, world.calls, 3):
        world.run(world.store.linked("previous"))
        world.fuse = world.calls + fuse
        if not quietly(world, new):
            break
        world.fuse = 0
        steps += any(c["Name"] == "/wht-nginx-rehearsal" for c in world.containers)
        world.run(new)
        assert world.state() == world.at(new), fuse
    assert steps > 1, "it was killed in the middle of it"
