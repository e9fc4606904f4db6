"""What roles compute of the inventory, where a wrong expression would leave something out in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

ROLES = Path(__file__).resolve().parents[2] / "roles"


def trusted(value: Any) -> Any:
    """As Ansible takes what it reads from a role: texts are templates."""
    if isinstance(value, dict):
        return {key: trusted(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [trusted(entry) for entry in value]
    return trust_as_template(value) if isinstance(value, str) else value


def computed(role: str, expression: str, **given: Any) -> Any:
    variables: dict[str, Any] = {"inventory_hostname": "one", "groups": {"webhook": ["one"]}, "bundle": ""}
    for path in ("site/defaults/main.yml", f"{role}/defaults/main.yml", f"{role}/vars/main.yml"):
        if (ROLES / path).exists():
            variables |= trusted(yaml.safe_load((ROLES / path).read_text()) or {})
    return Templar(DataLoader(), variables=variables | trusted(given)).template(trust_as_template(expression))


@pytest.mark.parametrize(("names", "there"), [([], False), (["hooks.example"], True)])
def test_the_doctor_looks_at_the_acme_client_where_there_is_one(names: list[str], there: bool) -> None:
    containers = computed(
        "doctor", "{{ __doctor_site.containers }}", site_acme_names=names, __doctor_bundled=False
    )
    assert ("aisha-webhook-acme" in containers) is there
    assert {"aisha-webhook-api-1", "aisha-webhook-api-2", "aisha-webhook-worker"} < set(containers)


@pytest.mark.parametrize(("names", "retired"), [([], ["acme-webhook"]), (["hooks.example"], [])])
def test_the_acme_clients_images_stay_for_being_new_only_where_it_is_used(
    names: list[str], retired: list[str]
) -> None:
    assert computed("prune", "{{ __prune_retired }}", site_acme_names=names) == retired
    assert "acme-webhook" in computed("prune", "{{ __prune_repositories }}", site_acme_names=names)


@pytest.mark.parametrize(
    ("given", "asked"), [({}, True), ({"bundle": "/b.tar"}, False), ({"prune_registry_keep": 0}, False)]
)
def test_a_registry_is_pruned_where_one_is_used(given: dict[str, Any], asked: bool) -> None:
    assert computed("prune", "{{ __prune_registry_asked }}", **given) is asked
