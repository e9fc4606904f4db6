"""The texts of role `monitoring` as Ansible renders them, and promtool in the image that the role builds."""

from __future__ import annotations

import json
from typing import Any

from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

from tests.support.sites import REPO
from tests.support.templates import role_variables

ROLE = REPO / "roles" / "monitoring"
TESTS = REPO / "tests" / "promtool"
DASHBOARD = ROLE / "files" / "dashboard.json"


def texts(**variables: Any) -> dict[str, str]:
    """All files of the role by name; keyword arguments stand for the inventory's variables."""
    names = (
        "docker-compose.yml",
        "prometheus/prometheus.yml",
        "prometheus/rules.yml",
        "alertmanager/alertmanager.yml",
    )
    known = {
        "inventory_hostname": "localhost",
        "role_path": str(ROLE),
        "ansible_search_path": [str(ROLE)],
        **role_variables("site", "defaults"),
        **role_variables("monitoring", "defaults"),
        "__monitoring_images": {
            "images": {
                f"aisha-{name}": {"tag": "c-0123456789abcdef"} for name in ("prometheus", "alertmanager")
            }
        },
        **variables,
        **role_variables("monitoring", "vars"),
    }
    templar = Templar(loader=DataLoader(), variables=known)
    return {
        name: str(templar.template(trust_as_template(f"{{{{ __monitoring_files['{name}'] }}}}")))
        for name in names
    }


def rules(**variables: Any) -> str:
    """The file of rules."""
    return texts(**variables)["prometheus/rules.yml"]


def dashboard_queries() -> list[str]:
    """Every expression of the dashboard, with Grafana's own interval as a fixed one."""
    found: list[str] = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        found += [target["expr"].replace("$__rate_interval", "5m") for target in panel.get("targets", ())]
    return found
