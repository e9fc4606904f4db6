"""scripts/vault.py: every secret in an encrypted file, nothing shown, nothing overwritten."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible.parsing.vault import VaultLib, VaultSecret

REPO = Path(__file__).resolve().parents[2]
PASSWORD = "the vault's own"
EXAMPLE = REPO / "inventory" / "production" / "group_vars" / "all" / "vault.yml.example"


class Inventory:
    """An inventory in a temporary directory, and the command run against it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.vault = directory / "group_vars" / "all" / "vault.yml"
        self.password_file = directory / "password"
        self.password_file.write_text(f"{PASSWORD}\n")

    def run(self, *arguments: str, values: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(REPO / "scripts" / "vault.py"), "--inventory", str(self.directory)]
        command += ["--password-file", str(self.password_file), *arguments]
        return subprocess.run(command, input=values, capture_output=True, text=True, timeout=240, check=False)

    def contents(self) -> dict:
        text = VaultLib([("default", VaultSecret(PASSWORD.encode()))]).decrypt(self.vault.read_bytes())
        return yaml.safe_load(text)


@pytest.fixture
def inventory(tmp_path: Path) -> Inventory:
    return Inventory(tmp_path)


def secrets_of(document: dict) -> dict[str, str]:
    return document["vault_secrets"] | {
        name: value for name, value in document.items() if name != "vault_secrets"
    }


def test_every_secret_of_the_example_is_generated_and_none_is_shown(inventory: Inventory) -> None:
    run = inventory.run()
    assert run.returncode == 0, run.stderr
    document = inventory.contents()
    example = yaml.safe_load(EXAMPLE.read_text())
    assert document.keys() == example.keys()
    assert document["vault_secrets"].keys() == example["vault_secrets"].keys()
    values = list(secrets_of(document).values())
    assert len(set(values)) == len(values)
    assert all(len(value) >= 20 for value in values)
    for value in values:
        assert value not in run.stdout + run.stderr
        assert value.encode() not in inventory.vault.read_bytes()
    assert stat.S_IMODE(inventory.vault.stat().st_mode) == 0o600
    assert list(inventory.vault.parent.iterdir()) == [inventory.vault]


def test_optional_names_of_the_example_can_be_given(inventory: Inventory) -> None:
    names = re.findall(r"^\s*# (\w+): \"\"$", EXAMPLE.read_text(), re.MULTILINE)
    assert names == [
        "fal_webhook_secret_previous",
        "fal_api_key",
        "forward_secret",
        "telegram_bot_token",
        "vault_become_password",
    ]
    given = {name: f"given-{name}" for name in [*names, "source_replicate"]}
    run = inventory.run("--values", "-", values=yaml.safe_dump(given))
    assert run.returncode == 0, run.stderr
    assert secrets_of(inventory.contents()).items() >= given.items()
    assert inventory.contents()["vault_become_password"] == "given-vault_become_password"


def test_the_signing_key_is_one_that_images_can_be_signed_with(inventory: Inventory) -> None:
    assert inventory.run().returncode == 0
    key = inventory.contents()["vault_secrets"]["image_signing_key"]
    command = ["openssl", "pkey", "-noout", "-text"]
    told = subprocess.run(command, input=key, capture_output=True, text=True, check=True).stdout
    assert "prime256v1" in told
    inventory.run("--renew", "image_signing_key", "--renew", "backup_passphrase")
    assert inventory.contents()["vault_secrets"]["image_signing_key"] != key


def test_every_secret_that_the_roles_ask_for_in_production_is_known() -> None:
    """Of role secrets: what it writes and does not generate itself."""
    role = yaml.safe_load((REPO / "roles" / "secrets" / "vars" / "main.yml").read_text())
    asked = set(role["__secrets_service"].values())
    asked |= {file["name"] for file in (*role["__secrets_root"], *role["__secrets_builder"])}
    example = EXAMPLE.read_text()
    assert {name for name in asked if f"{name}:" not in example} == set()
    source = (REPO / "scripts" / "vault.py").read_text()
    assert {name for name in asked if f'"{name}"' not in source} == set()


def test_what_exists_already_is_taken_as_it_is(inventory: Inventory) -> None:
    run = inventory.run("--values", "-", values="postgres_webhook_password: 'p@ss: #1'\n")
    assert run.returncode == 0, run.stderr
    assert inventory.contents()["vault_secrets"]["postgres_webhook_password"] == "p@ss: #1"
    assert "p@ss" not in run.stdout + run.stderr
    assert "As given: postgres_webhook_password" in run.stdout


def test_a_vault_that_stands_is_left_as_it_is(inventory: Inventory) -> None:
    assert inventory.run().returncode == 0
    before = inventory.vault.read_bytes()
    run = inventory.run()
    assert run.returncode == 1
    assert "is there already" in run.stderr
    assert inventory.vault.read_bytes() == before


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("postgres_pasword: secret-text", "postgres_pasword is not the name of a secret"),
        ("redis_password: ''", "redis_password must be a text"),
        ("redis_password: 123456", "redis_password must be a text"),
        ("fal_webhook_secret: short", "at least 16 characters"),
        ("fal_webhook_secret_previous: short", "fal_webhook_secret_previous has at least 16 characters"),
        ("redis_password: [secret-text", "cannot be read"),
        ("- secret-text", "one `name: value` a line"),
    ],
)
def test_wrong_values_are_named_and_not_shown(inventory: Inventory, values: str, words: str) -> None:
    run = inventory.run("--values", "-", values=values)
    assert run.returncode == 1
    assert words in run.stderr
    assert "secret-text" not in run.stderr
    assert not inventory.vault.exists()


def test_one_secret_is_renewed_and_all_others_stay(inventory: Inventory) -> None:
    inventory.run()
    before = inventory.contents()
    run = inventory.run("--renew", "redis_password", "--renew", "vault_registry_password")
    assert run.returncode == 0, run.stderr
    after = inventory.contents()
    differ = {name for name, value in secrets_of(after).items() if secrets_of(before)[name] != value}
    assert differ == {"redis_password", "vault_registry_password"}
    assert after["vault_secrets"]["redis_password"] not in run.stdout
    assert stat.S_IMODE(inventory.vault.stat().st_mode) == 0o600


def test_the_webhook_secret_is_renewed_in_two_steps(inventory: Inventory) -> None:
    inventory.run()
    first = inventory.contents()["vault_secrets"]["fal_webhook_secret"]
    run = inventory.run("--renew", "fal_webhook_secret")
    assert run.returncode == 0, run.stderr
    both = inventory.contents()["vault_secrets"]
    assert both["fal_webhook_secret_previous"] == first != both["fal_webhook_secret"]
    assert "--drop fal_webhook_secret_previous" in run.stdout
    assert first not in run.stdout
    run = inventory.run("--drop", "fal_webhook_secret_previous")
    assert run.returncode == 0, run.stderr
    after = inventory.contents()["vault_secrets"]
    assert after == {name: value for name, value in both.items() if name != "fal_webhook_secret_previous"}


def test_a_webhook_secret_that_got_out_is_renewed_in_one_step(inventory: Inventory) -> None:
    inventory.run()
    before = inventory.contents()["vault_secrets"]
    run = inventory.run("--renew", "fal_webhook_secret", "--drop", "fal_webhook_secret_previous")
    assert run.returncode == 0, run.stderr
    after = inventory.contents()["vault_secrets"]
    assert after.keys() == before.keys()
    assert after["fal_webhook_secret"] != before["fal_webhook_secret"]


@pytest.mark.parametrize("name", ["redis_password", "nothing"])
def test_what_the_roles_need_is_not_dropped(inventory: Inventory, name: str) -> None:
    inventory.run()
    before = inventory.vault.read_bytes()
    run = inventory.run("--drop", name)
    assert run.returncode == 1
    assert f"{name} cannot be dropped" in run.stderr
    assert inventory.vault.read_bytes() == before


def test_a_wrong_password_changes_nothing(inventory: Inventory) -> None:
    inventory.run()
    before = inventory.vault.read_bytes()
    inventory.password_file.write_text("another")
    run = inventory.run("--renew", "fal_webhook_secret")
    assert run.returncode == 1
    assert "cannot be opened with this password" in run.stderr
    assert inventory.vault.read_bytes() == before


def test_without_a_terminal_a_password_file_is_asked_for(inventory: Inventory) -> None:
    command = [sys.executable, str(REPO / "scripts" / "vault.py"), "--inventory", str(inventory.directory)]
    run = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 1
    assert "--password-file" in run.stderr
    assert "Traceback" not in run.stderr


def test_an_empty_password_protects_nothing(inventory: Inventory) -> None:
    inventory.password_file.write_text("\n")
    run = inventory.run()
    assert run.returncode == 1
    assert "is empty" in run.stderr
