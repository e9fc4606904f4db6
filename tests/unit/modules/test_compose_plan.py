"""The plan from recorded models, hashes and inspections: one table row for each thing that can differ."""

from __future__ import annotations

import json

import pytest
from ansible.module_utils.compose_plan import (
    PlanError,
    hash_command,
    in_order,
    make_plan,
    model_command,
    parse_hashes,
    parse_model,
)

OLD, NEW = ("127.0.0.1:5000/webhook-api@sha256:" + digit * 64 for digit in "12")
IDS = {OLD: "sha256:" + "a" * 64, NEW: "sha256:" + "b" * 64}


class Images:
    def __init__(self, ids=IDS):
        self.ids = ids

    def image_names(self, image):
        return [self.ids[image]] if image in self.ids else []


def container(service="api-1", hashed="h1", image=OLD, status="running", health=None, name=None, **more):
    state = {"Status": status, "ExitCode": 1}
    if health:
        state["Health"] = {"Status": health}
    labels = {
        "com.docker.compose.service": service,
        "com.docker.compose.config-hash": hashed,
        "com.docker.compose.oneoff": more.get("oneoff", "False"),
        "org.aisha.release": "r-1",
    }
    return {
        "Name": f"/{name or service}",
        "Image": more.get("image_id", IDS[OLD]),
        "State": state,
        "Config": {"Image": image, "Labels": labels, "Env": ["A=1", "TZ=Asia/Almaty"]},
    }


LIMITS = {"mem_limit": "536870912", "pids_limit": 256, "restart": "unless-stopped"}


def limited(**host):
    """A container as Compose makes it of LIMITS, and what somebody has done to it since."""
    made = {"Memory": 536870912, "PidsLimit": 256, "RestartPolicy": {"Name": "unless-stopped"}}
    return container() | {"HostConfig": made | host}


def plan_one(containers, service=None, images=None, **options):
    services = {"api-1": {"image": OLD} | (service or {})}
    planned, orphans = make_plan(
        services, {"api-1": "h1"}, containers, images or Images(), ["api-1"], **options
    )
    return planned[0], orphans


@pytest.mark.parametrize(
    ("containers", "service", "action", "words"),
    [
        ([], {}, "create", "no container"),
        ([container()], {}, "none", "unchanged (running)"),
        ([limited()], LIMITS, "none", "unchanged (running)"),
        ([limited(Memory=67108864)], LIMITS, "replace", "changed by hand (memory)"),
        ([limited(PidsLimit=16)], LIMITS, "replace", "changed by hand (number of processes)"),
        ([limited(RestartPolicy={"Name": "no"})], LIMITS, "replace", "changed by hand (restart policy)"),
        # A kernel without such limits: the next container would not have them either.
        ([limited(Memory=0, PidsLimit=None)], LIMITS, "none", "unchanged (running)"),
        ([limited(RestartPolicy={"Name": "no"})], {"restart": "no"}, "none", "unchanged (running)"),
        ([container(health="healthy")], {}, "none", "unchanged (running, healthy)"),
        ([container(health="starting")], {}, "none", "starting"),
        ([container(health="unhealthy")], {}, "replace", "unhealthy"),
        ([container(status="restarting")], {}, "replace", "restarting"),
        ([container(status="exited")], {}, "start", "not running (exited, exit code 1)"),
        ([container(status="created")], {}, "start", "created"),
        ([container(status="paused")], {}, "replace", "paused"),
        ([container(hashed="h0")], {}, "replace", "configuration changed"),
        ([container(hashed="h0")], {"image": NEW}, "replace", "sha256:111111111111 -> "),
        ([container(hashed="h0")], {"environment": {"A": "2"}}, "replace", "environment changed (A)"),
        ([container(hashed="h0")], {"labels": {"org.aisha.release": "r-2"}}, "replace", "(org.aisha.release)"),
        ([container(image_id="sha256:" + "c" * 64)], {}, "replace", "image changed sha256:cccccccccccc"),
        ([container(), container(name="b")], {}, "replace", "2 containers, 1 wanted"),
        ([container()], {"deploy": {"replicas": 2}}, "create", "1 of 2"),
        ([container(), container(name="b", status="exited")], {"scale": 2}, "start", "not running"),
        ([], {"deploy": {"replicas": 0}}, "none", "none is wanted"),
    ],
)  # fmt: skip
def test_what_is_to_be_done_and_why(containers, service, action, words):
    planned, _ = plan_one(containers, service)
    assert planned.action == action
    assert words in planned.reason


def test_values_of_variables_are_never_told():
    planned, _ = plan_one([container(hashed="h0")], {"environment": {"A": "delicate"}})
    assert "delicate" not in json.dumps(planned.as_result())


def test_an_unhealthy_container_may_be_left_alone():
    planned, _ = plan_one([container(health="unhealthy")], replace_unhealthy=False)
    assert planned.action == "none"


def test_an_image_that_is_not_here_says_nothing_about_the_container():
    planned, _ = plan_one([container()], images=Images({}))
    assert planned.action == "none"


def test_orphans_are_listed_and_one_off_containers_are_not():
    containers = [
        container(),
        container("old", name="x-old"),
        container("migrate", name="run", oneoff="True"),
    ]
    _, orphans = plan_one(containers)
    assert orphans == [{"name": "x-old", "service": "old", "status": "running"}]


def test_a_one_off_container_of_a_service_is_not_its_container():
    planned, _ = plan_one([container(oneoff="True")])
    assert planned.action == "create"


def test_the_order_wanted_and_then_the_rest():
    assert in_order(["api-1", "api-2", "nginx", "worker"], ["worker", "api-2"], "f") == [
        "worker", "api-2", "api-1", "nginx",
    ]  # fmt: skip
    with pytest.raises(PlanError) as caught:
        in_order(["api-1"], ["wroker"], "compose.yml")
    assert caught.value.reason == "unknown_service"
    assert "wroker" in str(caught.value)
    assert "api-1" in str(caught.value)


def test_commands_are_argument_lists():
    assert model_command("p", "/r/c.yml", ["/r/prod.env"], ["x"]) == [
        "compose", "-p", "p", "-f", "/r/c.yml", "--env-file", "/r/prod.env", "--profile", "x",
        "config", "--format", "json",
    ]  # fmt: skip
    assert hash_command("p") == ["compose", "-p", "p", "-f", "-", "config", "--hash", "*"]


def test_recorded_output():
    recorded = (
        "a c2a8a352e05f310ace335fa30b564e06dd0eefd34f695eef74bcd31061de8b8b\n"
        "b 73e786ea02d0f11d2ed84c4191e861cc0f219baa3f459716ae89689ce33d362c\n"
    )
    assert set(parse_hashes(recorded)) == {"a", "b"}
    assert parse_model('{"name": "x", "services": {"a": {"image": "i"}}}') == {"a": {"image": "i"}}
    assert parse_model('{"name": "x"}') == {}


@pytest.mark.parametrize("text", ["", "no json", "[]", '{"services": [1]}'])
def test_output_that_is_no_model(text):
    with pytest.raises(PlanError) as caught:
        parse_model(text)
    assert caught.value.reason == "unexpected_answer"


def test_a_service_without_a_hash_is_not_passed_over():
    with pytest.raises(PlanError, match="no hash of service b"):
        make_plan({"a": {}, "b": {}}, {"a": "h"}, [], Images(), ["a", "b"])
