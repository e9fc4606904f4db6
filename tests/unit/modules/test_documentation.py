"""Every module in library/ is documented as it is: options, attributes, examples, results; and thin."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
MODULES = sorted(path.stem for path in (ROOT / "library").glob("*.py"))
FIELDS = {"type": "str", "default": None, "choices": None, "elements": None, "required": False}


class Spec(Exception):
    """Carries what a module hands to AnsibleModule."""


def spec_of(name, monkeypatch):
    module = importlib.import_module(name)

    def capture(argument_spec=None, **options):
        raise Spec(argument_spec, options)

    monkeypatch.setattr(module, "AnsibleModule", capture)
    with pytest.raises(Spec) as caught:
        module.main()
    return module, *caught.value.args


def differences(path, documented, spec):
    if set(documented) != set(spec):
        yield f"{path}: {sorted(set(documented) ^ set(spec))}"
    for name in set(documented) & set(spec):
        for field, usual in FIELDS.items():
            said, done = documented[name].get(field, usual), spec[name].get(field, usual)
            if said != done and not (field == "type" and "type" not in spec[name]):
                yield f"{path}.{name}: {field} is documented as {said!r}, and is {done!r}"
        if "options" in spec[name]:
            yield from differences(
                f"{path}.{name}", documented[name].get("suboptions", {}), spec[name]["options"]
            )


@pytest.mark.parametrize("name", MODULES)
def test_options_are_documented_as_they_are(name, monkeypatch):
    module, spec, _ = spec_of(name, monkeypatch)
    documentation = yaml.safe_load(module.DOCUMENTATION)
    assert documentation["module"] == name
    assert list(differences(name, documentation["options"], spec)) == []


@pytest.mark.parametrize("name", MODULES)
def test_attributes_are_true(name, monkeypatch):
    module, _, options = spec_of(name, monkeypatch)
    attributes = yaml.safe_load(module.DOCUMENTATION)["attributes"]
    assert {"check_mode", "diff_mode", "idempotent"} <= set(attributes)
    supports = attributes["check_mode"]["support"] in ("full", "partial")
    assert options.get("supports_check_mode", False) is supports
    assert yaml.safe_load(module.EXAMPLES)
    assert yaml.safe_load(module.RETURN)


@pytest.mark.parametrize("name", MODULES)
def test_main_only_wires(name):
    tree = ast.parse((ROOT / "library" / f"{name}.py").read_text())
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert main.end_lineno - main.lineno < 40


def test_ansible_doc_shows_them_from_the_root_of_the_repository():
    program = Path(sys.executable).parent / "ansible-doc"
    command = [str(program), "--json", "-t", "module", *MODULES]
    env = os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert sorted(shown) == MODULES
    assert all(entry["doc"]["short_description"] and entry["return"] for entry in shown.values())
