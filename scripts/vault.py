#!/usr/bin/env python3
"""Writes the encrypted vault of an inventory, with every secret that a real site needs. No secret is ever shown.

    make vault                                                 asks for a password, generates everything
    make vault ARGS="--ask postgres_webhook_password"          … but asks for those that exist already
    make vault ARGS="--without redis_password"                 … where Redis asks for none
    make vault ARGS="--password-file FILE --values -"          … without a terminal: given ones as YAML on standard input
    make vault ARGS="--renew fal_webhook_secret"               one new secret in the vault that stands; of this one the old
                                                               is accepted as well …
    make vault ARGS="--drop fal_webhook_secret_previous"       … until it is taken out

The file is `<inventory>/group_vars/all/vault.yml`. One that stands is never overwritten. To look into it or to change it:
`ansible-vault view FILE`, `ansible-vault edit FILE`.
"""

from __future__ import annotations

import argparse
import getpass
import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import ansible.module_utils
import yaml
from ansible.errors import AnsibleError
from ansible.parsing.vault import VaultLib, VaultSecret, is_encrypted

REPO = Path(__file__).resolve().parent.parent
ansible.module_utils.__path__.append(str(REPO / "module_utils"))

from ansible.module_utils.secret_files import SecretError, generate  # noqa: E402

#: Secrets of `secrets_given` that are generated: kind and length in characters (a key has a length of its own).
GENERATED = {
    "postgres_webhook_password": ("password", 32),
    "redis_password": ("password", 32),
    "minio_access_key": ("hex", 20),
    "minio_secret_key": ("password", 40),
    "fal_webhook_secret": ("hex", 48),
    "image_signing_key": ("p256", 0),
}
#: Secrets of their own, outside `secrets_given`, as the inventory names them.
GENERATED_BESIDE = {"vault_registry_password": ("password", 32), "backup_passphrase": ("hex", 64)}
#: What only others can give: left out unless it is given.
OPTIONAL = ("fal_webhook_secret_previous", "fal_api_key", "forward_secret", "telegram_bot_token")
#: Callers have the old one until they are given the new one: meanwhile it goes on as another secret.
OVERLAPS = {"fal_webhook_secret": "fal_webhook_secret_previous"}
OPTIONAL_BESIDE = ("vault_become_password",)
_SENDER = re.compile(r"source_[a-z0-9_]+")
SHORTEST_SECRET = 16
PLACE = Path("group_vars") / "all" / "vault.yml"


class VaultError(Exception):
    """The vault cannot be written as asked. `str()` says what is wrong and what to do."""


def known(name: str) -> bool:
    """Whether a secret of this name is of any use to the roles."""
    names = (*GENERATED, *GENERATED_BESIDE, *OPTIONAL, *OPTIONAL_BESIDE)
    return name in names or bool(_SENDER.fullmatch(name))


def check_given(given: Mapping[str, object]) -> dict[str, str]:
    """The given secrets as text; `VaultError` names those that are unknown, no text, or empty."""
    faults = [f"{name} is not the name of a secret here" for name in given if not known(name)]
    faults += [
        f"{name} must be a text that is not empty"
        for name, value in given.items()
        if not isinstance(value, str) or not value.strip()
    ]
    faults += [
        f"{name} has at least {SHORTEST_SECRET} characters"
        for name in ("fal_webhook_secret", "fal_webhook_secret_previous")
        if isinstance(given.get(name), str) and 0 < len(str(given[name])) < SHORTEST_SECRET
    ]
    if faults:
        raise VaultError("; ".join(faults))
    return {name: str(value) for name, value in given.items()}


def contents(given: Mapping[str, str], without: Collection[str] = ()) -> dict[str, object]:
    """What the vault holds: given secrets, and fresh ones in the place of those that are neither given nor left out."""
    wanted = {name: how for name, how in GENERATED.items() if name not in without}
    inside = {name: given.get(name) or generate(*how) for name, how in wanted.items()}
    inside |= {name: value for name, value in given.items() if name in OPTIONAL or _SENDER.fullmatch(name)}
    beside = {name: given.get(name) or generate(*how) for name, how in GENERATED_BESIDE.items()}
    beside |= {name: given[name] for name in OPTIONAL_BESIDE if name in given}
    return {"vault_secrets": inside, **beside}


def renewed(
    before: Mapping[str, object], names: Iterable[str], given: Mapping[str, str], dropped: Iterable[str] = ()
) -> dict[str, object]:
    """The vault's contents with new secrets under these names, and without those that are dropped; all else stays."""
    after = {**before, "vault_secrets": dict(before.get("vault_secrets") or {})}  # type: ignore[call-overload]
    for name in names:
        old = after["vault_secrets"].get(name)
        if name in OVERLAPS and old and OVERLAPS[name] not in given:
            after["vault_secrets"][OVERLAPS[name]] = old
        how = (GENERATED | GENERATED_BESIDE).get(name)
        if name not in given and how is None:
            raise VaultError(f"{name} cannot be generated: give it with --ask {name}")
        value = given.get(name) or generate(*how)
        inside = name not in GENERATED_BESIDE and name not in OPTIONAL_BESIDE
        (after["vault_secrets"] if inside else after)[name] = value
    for name in dropped:
        if name not in (*OPTIONAL, *OPTIONAL_BESIDE) and not _SENDER.fullmatch(name):
            raise VaultError(f"{name} cannot be dropped: the roles need it, or do not know it")
        (after if name in OPTIONAL_BESIDE else after["vault_secrets"]).pop(name, None)
    return after


def to_text(document: Mapping[str, object]) -> bytes:
    """The vault's contents as YAML."""
    head = '# Written by scripts/vault.py. To change it: ansible-vault edit FILE, or make vault ARGS="--renew NAME".\n'
    return (head + yaml.safe_dump(dict(document), sort_keys=False)).encode()


def write_new(path: Path, data: bytes, *, replace: bool) -> None:
    """Write a file of mode 0600, whole or not at all; one that stands is replaced only when `replace` says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".vault-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        if replace:
            Path(temporary).replace(path)
        else:
            os.link(temporary, path)  # fails where something stands, whoever put it there meanwhile
    except FileExistsError as error:
        raise VaultError(stands(path)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def stands(path: Path) -> str:
    """The refusal to overwrite."""
    return (
        f"{path} is there already, and was left as it is. Look into it: ansible-vault view {path}. "
        "For one new secret: --renew NAME; to begin anew, move the file away first"
    )


def password(file: Path | None, *, new: bool) -> VaultSecret:
    """The vault's password: from a file, or asked for at the terminal (twice for a new vault)."""
    if file:
        try:
            text = file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise VaultError(f"the password file {file} cannot be read: {error.strerror}") from error
        if not text:
            raise VaultError(f"the password file {file} is empty: write the vault's password into it")
        return VaultSecret(text.encode())
    if not sys.stdin.isatty():
        raise VaultError("there is no terminal to ask for the vault's password: give --password-file")
    text = getpass.getpass("Password of the vault: ")
    if new and text != getpass.getpass("The same again: "):
        raise VaultError("the two are not the same; nothing was written")
    if not text:
        raise VaultError("an empty password protects nothing")
    return VaultSecret(text.encode())


def ask_for(names: Iterable[str]) -> dict[str, str]:
    """Secrets that exist already, typed at the terminal without an echo."""
    names = list(names)
    if names and not sys.stdin.isatty():
        raise VaultError("there is no terminal to ask on: give them with --values")
    return {name: getpass.getpass(f"{name}: ") for name in names}


def read_values(source: str | None) -> dict[str, object]:
    """Given secrets from a YAML file, or from standard input for `-`."""
    if not source:
        return {}
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        values = yaml.safe_load(text) or {}
    except (OSError, yaml.YAMLError) as error:
        # A parser's message may show a line of the file.
        raise VaultError(f"the values in {source} cannot be read ({type(error).__name__})") from None
    if not isinstance(values, dict):
        raise VaultError("the values are to be names and texts, one `name: value` a line")
    return values


def read_vault(path: Path, secret: VaultSecret) -> dict[str, object]:
    """The contents of a vault that stands."""
    try:
        data = path.read_bytes()
        if not is_encrypted(data):
            raise VaultError(f"{path} is not encrypted: ansible-vault encrypt {path}")
        return yaml.safe_load(VaultLib([("default", secret)]).decrypt(data)) or {}
    except FileNotFoundError as error:
        raise VaultError(f"there is no {path} yet: leave --renew and --drop away to make it") from error
    except AnsibleError as error:
        raise VaultError(f"{path} cannot be opened with this password") from error


def run(given: argparse.Namespace) -> list[str]:
    """Do what the command line asks for; what to tell, without any secret."""
    path = given.inventory / PLACE
    if not given.inventory.is_dir():
        raise VaultError(f"there is no inventory {given.inventory}")
    changes = bool(given.renew or given.drop)
    if path.exists() and not changes:
        raise VaultError(stands(path))
    secret = password(given.password_file, new=not changes)
    values = check_given(read_values(given.values) | ask_for(given.ask))
    if changes:
        names = list(dict.fromkeys([*given.renew, *values]))
        document = renewed(read_vault(path, secret), names, values, given.drop)
        told = changed(path, names, given.drop)
    else:
        document = contents(values, given.without)
        fresh = [name for name in (*GENERATED, *GENERATED_BESIDE) if name not in (*values, *given.without)]
        told = [f"Written: {path}, encrypted.", f"Generated: {', '.join(fresh) or 'nothing'}."]
        told += [f"As given: {', '.join(values)}."] if values else []
    encrypted = VaultLib([("default", secret)]).encrypt(to_text(document), secret)
    write_new(path, encrypted, replace=changes)
    return [*told, f"To look: ansible-vault view {path}"]


def changed(path: Path, names: Collection[str], dropped: Collection[str]) -> list[str]:
    """What to tell of a vault that was changed."""
    told = [f"Renewed in {path}: {', '.join(names)}."] if names else []
    told += [f"Taken out of {path}: {', '.join(dropped)}."] if dropped else []
    told += [
        f"The old {name} is accepted as well until --drop {OVERLAPS[name]} (docs/rotation.md)."
        for name in names
        if name in OVERLAPS and OVERLAPS[name] not in dropped
    ]
    return told


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inventory", type=Path, default=REPO / "inventory" / "production")
    parser.add_argument("--password-file", type=Path, help="file with the vault's password")
    parser.add_argument(
        "--values", metavar="FILE", help="YAML of secrets that exist already; - for standard input"
    )
    parser.add_argument(
        "--ask", metavar="NAME", action="append", default=[], help="ask for one that exists already"
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=["redis_password"],
        help="leave one out that is not used",
    )
    parser.add_argument(
        "--renew", metavar="NAME", action="append", default=[], help="a new secret in a standing vault"
    )
    parser.add_argument(
        "--drop", metavar="NAME", action="append", default=[], help="take one out that is not needed any more"
    )
    return parser.parse_args()


def main() -> int:
    """Run; 0 when the vault was written, 1 when not."""
    try:
        told = run(arguments())
    except (VaultError, SecretError) as error:
        print(f"No vault was written: {error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nNo vault was written.", file=sys.stderr)
        return 1
    print("\n".join(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
