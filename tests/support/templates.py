"""Renders a role's template as Ansible does, with the role's own defaults; an undefined variable is an error."""

from __future__ import annotations

from typing import Any

from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar, trust_as_template

from tests.support.sites import REPO

init_plugin_loader()


def role_variables(role: str, directory: str) -> dict[str, Any]:
    """Variables of a role's `defaults` or `vars`, trusted as templates as Ansible trusts them."""
    path = REPO / "roles" / role / directory / "main.yml"
    return DataLoader().load_from_file(str(path), trusted_as_template=True) or {} if path.exists() else {}


def render(role: str, template: str, **variables: Any) -> str:
    """Text of a template of a role; keyword arguments stand for the inventory's variables."""
    known = {
        "inventory_hostname": "localhost",
        **role_variables("site", "defaults"),
        **role_variables(role, "defaults"),
        **variables,
        **role_variables(role, "vars"),
        "template_path": str(REPO / "roles" / role / "templates" / template),
    }
    lookup = trust_as_template("{{ lookup('ansible.builtin.template', template_path) }}")
    return str(Templar(loader=DataLoader(), variables=known).template(lookup))
