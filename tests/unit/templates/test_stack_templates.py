"""The Compose file and prod.env: what holds for every inventory, and that no secret stands in them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleError

from tests.support.templates import render

COMPOSE, ENVIRONMENT = "docker-compose.webhook.prod.yml.j2", "prod.env.j2"
SECRETS = {
    "DATABASE_PASSWORD": "api/postgres_webhook_password",
    "REDIS_PASSWORD": "api/redis_password",
    "FAL_JWKS": "api/fal_jwks.json",
}
KNOWN: dict[str, Any] = {
    "groups": {"backends": ["localhost"]},
    "secrets_service": SECRETS,
    "secrets_versions": dict.fromkeys(SECRETS.values(), "0f1e2d3c4b5a"),
    "stack_image_api": "127.0.0.1:5000/webhook-api@sha256:" + "a" * 64,
    "stack_image_nginx": "127.0.0.1:5000/nginx-webhook@sha256:" + "b" * 64,
    "stack_webhook_release": "r-0123456789ab",
    "stack_edge": {
        "id": "e",
        "path": "/opt/x/edge/e",
        "certificate_directory": "/opt/x/ssl",
        "certificate": "c",
    },
}


def compose(**variables: Any) -> dict[str, Any]:
    document = yaml.safe_load(render("stack", COMPOSE, **{**KNOWN, **variables}))
    assert isinstance(document, dict)
    return document


def environment(**variables: Any) -> dict[str, str]:
    lines = render("stack", ENVIRONMENT, **{**KNOWN, **variables}).splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize(
    "missing", ["stack_image_api", "stack_webhook_release", "stack_edge", "secrets_service"]
)
def test_an_undefined_variable_is_an_error(missing: str) -> None:
    known = {name: value for name, value in KNOWN.items() if name != missing}
    with pytest.raises(AnsibleError, match=missing):
        render("stack", COMPOSE, **known)


@pytest.mark.parametrize("ports", [[8001], [8001, 8002], [9001, 9002, 9003]])
def test_one_instance_a_port_at_its_fixed_address(ports: list[int]) -> None:
    services = compose(site_api_ports=ports)["services"]
    assert set(services) == {"migrate", "worker", "nginx"} | {f"api-{n + 1}" for n in range(len(ports))}
    for number, port in enumerate(ports, start=1):
        service = services[f"api-{number}"]
        assert service["ports"] == [f"127.0.0.1:{port}:8000"]
        assert service["networks"]["cluster"]["ipv4_address"] == f"172.31.240.{10 + number}"
        assert service["container_name"] == f"aisha-webhook-api-{number}"
        assert service["environment"]["INSTANCE_ID"] == f"api-{number}"


def test_names_of_the_replaced_system_are_kept() -> None:
    document = compose()
    names = {service.get("container_name") for service in document["services"].values()}
    assert {"aisha-webhook-api-1", "aisha-webhook-api-2", "aisha-webhook-worker"} <= names
    # Two of it stand side by side while it is replaced; the rollout names the one that stays aisha-nginx-webhook.
    assert "container_name" not in document["services"]["nginx"]
    assert document["networks"]["cluster"]["name"] == "aisha_webhook_cluster"


def test_every_container_is_hardened_and_limited() -> None:
    for name, service in compose(stack_console=True)["services"].items():
        assert service["user"] in ("10001:10001", "10002:10002"), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["mem_limit"], name
        assert service["pids_limit"] > 0, name
        assert service["logging"]["options"]["max-size"], name
        assert service["tmpfs"], name
        assert "depends_on" not in service, name
        assert "@sha256:" in service["image"], name
        if name != "migrate":
            assert service["healthcheck"]["start_interval"], name
            assert service["healthcheck"]["start_period"], name
            assert service["restart"] == "unless-stopped", name


def test_bodies_lie_on_disk_and_nginx_keeps_a_small_tmpfs() -> None:
    document = compose(site_name="x")
    (volume,) = [each for each in document["services"]["nginx"]["volumes"] if each["type"] == "volume"]
    assert volume == {"type": "volume", "source": "nginx-body", "target": "/var/cache/nginx-body"}
    assert document["volumes"]["nginx-body"] == {"name": "x-nginx-body"}
    assert document["services"]["nginx"]["tmpfs"][0].startswith("/tmp:size=16m,")


def test_no_secret_stands_in_compose_file_or_environment() -> None:
    canary = {
        "secrets_values": {"redis_password": "canary-secret"},
        "site_registry_password": "canary-secret",
    }
    for template in (COMPOSE, ENVIRONMENT):
        assert "canary" not in render("stack", template, **{**KNOWN, **canary})
    settings = environment()
    for name in (
        "DATABASE_PASSWORD",
        "REDIS_PASSWORD",
        "MINIO_SECRET_KEY",
        "FAL_WEBHOOK_SECRET",
        "FAL_API_KEY",
    ):
        assert name not in settings
    given = compose()["services"]["api-1"]["environment"]
    assert given["REDIS_PASSWORD_FILE"] == "/run/secrets/api_redis_password"
    assert given["FAL_JWKS_FILE"] == "/run/secrets/api_fal_jwks.json"
    assert "@" not in settings["REDIS_URL"]


ALL_SECRETS = SECRETS | {
    "FAL_WEBHOOK_SECRET": "api/fal_webhook_secret",
    "FAL_WEBHOOK_SECRET_PREVIOUS": "api/fal_webhook_secret_previous",
    "SOURCE_REPLICATE": "api/source_replicate",
    "FORWARD_SECRET": "api/forward_secret",
    "TELEGRAM_BOT_TOKEN": "api/telegram_bot_token",
    "FAL_API_KEY": "api/fal_api_key",
}


@pytest.mark.parametrize(
    ("service", "not_its"),
    [
        ("api-1", {"FORWARD_SECRET", "TELEGRAM_BOT_TOKEN", "FAL_API_KEY"}),
        ("worker", {"FAL_WEBHOOK_SECRET", "FAL_WEBHOOK_SECRET_PREVIOUS", "SOURCE_REPLICATE", "FAL_JWKS"}),
        ("migrate", set(ALL_SECRETS) - {"DATABASE_PASSWORD"}),
        (
            "console",
            set(ALL_SECRETS) - {"DATABASE_PASSWORD", "FAL_JWKS", "MINIO_ACCESS_KEY", "MINIO_SECRET_KEY"},
        ),
    ],
)
def test_a_container_sees_the_secrets_that_it_needs(service: str, not_its: set[str]) -> None:
    document = compose(
        stack_console=True,
        secrets_service=ALL_SECRETS,
        secrets_versions=dict.fromkeys(ALL_SECRETS.values(), "0f1e2d3c4b5a"),
    )
    found = document["services"][service]
    named = {name[:-5]: value for name, value in found["environment"].items() if name.endswith("_FILE")}
    assert set(named) == set(ALL_SECRETS) - not_its
    assert set(named.values()) == {f"/run/secrets/{name}" for name in found["secrets"]}
    for name in found["secrets"]:
        assert document["secrets"][name]["file"].startswith("/opt/aisha-webhook/secrets/api/")


def test_embedded_backends_are_reached_over_their_network() -> None:
    document = compose()
    assert document["networks"]["backends"] == {"name": "aisha_webhook_backends", "external": True}
    assert "backends" in document["services"]["worker"]["networks"]
    assert environment()["DATABASE_URL"] == "postgresql://aisha_webhook@postgres:5432/aisha"


def test_backends_elsewhere_need_no_further_network() -> None:
    elsewhere = {
        "groups": {"backends": []},
        "stack_database_url": "postgresql://aisha_webhook@192.168.0.4:5432/aisha",
        "stack_redis_url": "redis://192.168.0.3:6379/0",
        "stack_minio_endpoint": "192.168.0.4:9000",
    }
    document = compose(**elsewhere)
    assert set(document["networks"]) == {"cluster"}
    assert all("backends" not in service.get("networks", {}) for service in document["services"].values())
    settings = environment(**elsewhere)
    assert settings["MINIO_ENDPOINT"] == "192.168.0.4:9000"
    assert settings["FAL_ACCOUNT_IDS"] == ""


def test_the_worker_gets_less_time_to_stop_than_docker_waits() -> None:
    seconds = int(compose()["services"]["worker"]["stop_grace_period"].removesuffix("s"))
    assert int(environment()["WORKER_STOP_SECONDS"]) < seconds


def test_other_secrets_replace_the_containers() -> None:
    changed = {**KNOWN["secrets_versions"], "api/redis_password": "ffffffffffff"}
    before, after = compose(), compose(secrets_versions=changed)
    label = "org.aisha.secrets"
    for name in ("api-1", "worker"):
        assert before["services"][name]["labels"][label] != after["services"][name]["labels"][label]
    assert before["services"]["nginx"] == after["services"]["nginx"]


def test_another_certificate_replaces_nginx_alone() -> None:
    after = compose(stack_edge={**KNOWN["stack_edge"], "certificate": "d"})["services"]
    before = compose()["services"]
    assert [name for name in before if before[name] != after[name]] == ["nginx"]


def test_dynamic_addresses_never_meet_the_fixed_ones() -> None:
    (pool,) = compose()["networks"]["cluster"]["ipam"]["config"]
    assert pool == {"subnet": "172.31.240.0/24", "gateway": "172.31.240.1", "ip_range": "172.31.240.128/25"}


def test_the_spool_can_be_left_out() -> None:
    assert environment()["SPOOL_DIR"] == "/var/lib/webhook/spool"
    assert "SPOOL_DIR" not in environment(stack_spool_enabled=False)


def test_further_senders_stand_in_one_quoted_line() -> None:
    sources = {
        "replicate": {"scheme": "standard", "secrets": [{"file": "/run/secrets/api_source_replicate"}]}
    }
    value = environment(stack_sources=sources)["WEBHOOK_SOURCES"]
    # Quoted, or Compose would put variables in the place of a $.
    assert (value[0], value[-1]) == ("'", "'")
    assert json.loads(value[1:-1]) == sources
    assert "WEBHOOK_SOURCES" not in environment()


def test_the_console_is_there_only_when_it_is_asked_for() -> None:
    assert "console" not in compose()["services"]
    services = compose(stack_console=True, stack_console_port=9003)["services"]
    console = services["console"]
    assert console["command"] == ["console"]
    assert console["container_name"] == "aisha-webhook-console"
    assert console["ports"] == ["127.0.0.1:9003:8000"]
    assert console["networks"]["cluster"]["ipv4_address"] == "172.31.240.22"
    assert (
        console["environment"]["CONSOLE_INSTANCES"] == "http://172.31.240.11:8000,http://172.31.240.12:8000"
    )
    assert console["environment"]["CONSOLE_EDGE"] == "172.31.240.1:443"
    assert all(mount["read_only"] for mount in console["volumes"])
    assert not any(mount.get("read_only") for mount in services["api-1"]["volumes"])
    assert console["labels"] == services["worker"]["labels"]


@pytest.mark.parametrize(("port", "behind"), [(0, "false"), (8444, "true")])
def test_the_console_believes_nginx_only_where_it_is_in_front(port: int, behind: str) -> None:
    edge = {**KNOWN["stack_edge"], "console_port": port}
    console = compose(stack_console=True, stack_edge=edge)["services"]["console"]
    assert console["environment"]["CONSOLE_BEHIND_EDGE"] == behind


def test_the_rest_of_the_stack_knows_nothing_of_the_console() -> None:
    without, beside = compose()["services"], compose(stack_console=True)["services"]
    assert {name: beside[name] for name in without} == without


ACME = {
    "site_acme_names": ["hook.example", "www.example"],
    "stack_image_acme": "127.0.0.1:5000/acme-webhook@sha256:" + "c" * 64,
    "stack_acme_label": "l",
    "stack_edge": {**KNOWN["stack_edge"], "acme_directory": "/opt/x/acme"},
}


def test_the_acme_client_is_there_only_with_names_and_sees_only_its_own_files() -> None:
    assert "acme" not in compose()["services"]
    services = compose(**ACME)["services"]
    acme, nginx = services["acme"], services["nginx"]
    assert acme["environment"]["ACME_NAMES"] == "hook.example www.example"
    assert acme["environment"]["ACME_SERVER"].startswith("https://acme-v02.api.letsencrypt.org/")
    assert [mount["source"] for mount in acme["volumes"]] == [
        f"/opt/x/acme/{name}" for name in ("state", "challenges", "certificate")
    ]
    assert "secrets" not in acme
    for key in ("user", "read_only", "cap_drop", "security_opt", "mem_limit", "pids_limit", "logging"):
        assert key in acme
    challenges = [mount for mount in nginx["volumes"] if mount["target"] == "/etc/nginx/acme"]
    assert [(mount["source"], mount["read_only"]) for mount in challenges] == [
        ("/opt/x/acme/challenges", True)
    ]
    assert "/opt/x/acme/state" not in [mount["source"] for mount in nginx["volumes"]]
