"""inventory/production: what its files say fits together. The cluster tests deploy with it."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.support.role_specs import role_variables

REPO = Path(__file__).resolve().parents[2]
PRODUCTION = REPO / "inventory" / "production"
VARIABLES = yaml.safe_load((PRODUCTION / "group_vars" / "all" / "main.yml").read_text())


def test_the_addresses_are_those_of_the_old_site() -> None:
    hosts = yaml.safe_load((PRODUCTION / "hosts.yml").read_text())["all"]["children"]
    assert [host["ansible_host"] for host in hosts["webhook"]["hosts"].values()] == ["192.168.0.10"]
    assert hosts["webhook"]["hosts"]["webhook-1"]["ansible_user"] == "aisha"
    assert (hosts["registry"], hosts["backends"]) == (None, None)
    assert VARIABLES["site_registry"] == "192.168.0.4:5000"
    assert "192.168.0.4:5432/aisha" in VARIABLES["stack_database_url"]
    assert VARIABLES["stack_redis_url"].startswith("redis://192.168.0.3:6379")
    assert VARIABLES["stack_minio_endpoint"] == "192.168.0.4:9000"


def test_every_variable_is_one_of_a_role() -> None:
    assert set(VARIABLES) - role_variables() == set()


def test_no_secret_stands_in_clear() -> None:
    for path in PRODUCTION.rglob("*"):
        assert path.name != "vault.yml", "a vault belongs to a site, not into this repository"
    given = yaml.safe_load((PRODUCTION / "group_vars" / "all" / "vault.yml.example").read_text())
    assert not any([*given["vault_secrets"].values(), given["vault_registry_password"]])
