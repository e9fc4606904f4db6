"""What nginx is asked, and what it means when it cannot be asked: a gate that does not open, not one that is left out."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible.module_utils.docker_engine import EngineError
from ansible.module_utils.rollout import edge
from ansible.module_utils.rollout.edge import Edge
from ansible.module_utils.rollout.gates import Answer, Asking, Gate
from ansible.module_utils.rollout.model import RolloutError, Settings, parse_release
from ansible.module_utils.rollout.signals import StopRequest

sys.path.insert(0, str(Path(__file__).parent))

from rollout_releases import description
from test_rollout_instances import Time


def container(label="e-new", status="running"):
    labels = {"org.aisha.edge": label} if label else {}
    return {
        "Id": "c1",
        "Name": "/wht-nginx",
        "Config": {"Labels": labels},
        "State": {"Status": status, "Pid": 0},
    }


class Nginx:
    """nginx's container as the engine gives it, and what it answers over its control socket."""

    def __init__(self, tmp_path, monkeypatch):
        self.time = Time()
        self.found = container()
        self.answers = {}
        self.own = {"api-1": 200, "api-2": 200}
        (tmp_path / "docker-compose.webhook.prod.yml").write_text("services: {}\n")
        self.release = parse_release("r-000000000001", tmp_path, description())
        asking = Asking(self)
        monkeypatch.setattr(asking, "local", lambda port, *_: Answer(self.own[f"api-{port - 8000}"], ""))
        monkeypatch.setattr(edge, "collect", lambda *_: {"name": "wht-nginx"})
        journal = SimpleNamespace(step=lambda *_: nullcontext(), touching=lambda _name: None)
        project = SimpleNamespace(containers=lambda _name: [self.found] if self.found else [])
        switches = SimpleNamespace(out=list, draining=list)
        instances = SimpleNamespace(healthy=lambda *_: None)
        gate = Gate(3, 0.3, 5, self.time.clock, self.time.sleep)
        self.edge = Edge(
            project, self, asking, gate, switches, journal, StopRequest(), Settings(site_dir=tmp_path), instances,
            self.time.clock, self.time.sleep,
        )  # fmt: skip

    def inspect(self, _name):
        return {"State": {"Status": "running", "Health": {"Status": "unhealthy"}}}

    def run_in(self, _name, command):
        given = self.answers[command[-1].removeprefix("http://edge")]
        answer = given.pop(0) if isinstance(given, list) and len(given) > 1 else given
        answer = answer[0] if isinstance(answer, list) else answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    def says(self, path, *answers):
        self.answers[path] = list(answers)


@pytest.fixture
def nginx(tmp_path, monkeypatch):
    return Nginx(tmp_path, monkeypatch)


ALIVE = (0, "e-new\n200", "")
REFUSED = (7, "\n000", "curl: (7) could not connect")
SILENT = EngineError("unreachable", "cannot run curl: timed out")


def health(release="s-new", code=200):
    return (0, json.dumps({"status": "healthy", "release": release}) + f"\n{code}", "")


# Whether nginx can be asked


def test_nginx_that_is_down_and_one_of_a_release_from_before_have_no_control_socket(nginx):
    nginx.found = None
    assert nginx.edge.control(nginx.release) == ""
    nginx.found = container(status="exited")
    assert nginx.edge.control(nginx.release) == ""
    nginx.found = container(label="")
    assert nginx.edge.control(nginx.release) == ""


@pytest.mark.parametrize(
    "fault", [SILENT, REFUSED, (28, "\n000", "curl: (28) timed out"), (0, "x\n502", "")], ids=repr
)
def test_one_that_cannot_be_asked_just_now_is_asked_again(nginx, fault):
    nginx.says("/edge_alive", fault, fault, ALIVE)
    assert nginx.edge.control(nginx.release) == "c1"
    assert 0 < nginx.time.now < 5


@pytest.mark.parametrize("fault", [SILENT, REFUSED], ids=repr)
def test_one_that_never_answers_is_a_fault_and_no_reason_to_leave_its_gate_out(nginx, fault):
    nginx.says("/edge_alive", fault)
    with pytest.raises(
        RolloutError, match=r"wht-nginx has a control socket.*within 5 s.*docker restart wht-nginx"
    ) as caught:
        nginx.edge.control(nginx.release)
    assert (caught.value.reason, caught.value.service) == ("gate_failed", "nginx")
    assert nginx.time.now >= 5


def test_nginx_says_itself_whether_it_knows_an_instance(nginx):
    nginx.says("/instance/api-1/health", SILENT, REFUSED, (0, "bad gateway\n502", ""))
    assert nginx.edge.knows("c1", "api-1") is True
    nginx.says("/instance/api-3/health", SILENT, (0, "not found\n404", ""))
    assert nginx.edge.knows("c1", "api-3") is False
    assert nginx.edge.knows("", "api-1") is False
    nginx.says("/instance/api-1/health", SILENT)
    with pytest.raises(RolloutError, match="within 5 s"):
        nginx.edge.knows("c1", "api-1")


# Whether a new nginx leads to the release


def prove(nginx, *, settled=True):
    nginx.answers.setdefault("/edge_alive", [ALIVE])
    nginx.edge.prove(nginx.found, nginx.release, settled=settled)


def test_a_new_nginx_must_reach_every_instance_also_those_that_docker_calls_unhealthy(nginx):
    nginx.says("/instance/api-1/health", health())
    nginx.says("/instance/api-2/health", (0, "bad gateway\n502", ""))
    with pytest.raises(RolloutError, match="api-2 through the new nginx: HTTP 502"):
        prove(nginx)
    nginx.says("/instance/api-2/health", (0, "bad gateway\n502", ""), health())
    prove(nginx)


def test_a_new_nginx_must_lead_to_the_release(nginx):
    nginx.says("/instance/api-1/health", health())
    nginx.says("/instance/api-2/health", health("s-old"))
    with pytest.raises(RolloutError, match="names release 's-old', expected 's-new'"):
        prove(nginx)


def test_on_the_way_back_instances_are_of_either_release_and_one_that_is_dead_is_not_nginxs_fault(nginx):
    nginx.says("/instance/api-1/health", health("s-bad"))
    nginx.says("/instance/api-2/health", (0, "bad gateway\n502", ""))
    nginx.own["api-2"] = 0
    prove(nginx, settled=False)
    nginx.own["api-2"] = 200
    with pytest.raises(RolloutError, match="api-2 through the new nginx: HTTP 502"):
        prove(nginx, settled=False)
