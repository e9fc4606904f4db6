"""``keys``: what deliveries are verified with, samples of what was refused, and development keys of our own."""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from webhook_api.cli.common import (
    EX_FAILED,
    EX_UNAVAILABLE,
    READABLE,
    WRITABLE,
    echo_json,
    echo_table,
    fail,
    json_option,
    printable,
    read_text,
    settings,
)

if TYPE_CHECKING:
    from nacl.signing import SigningKey

    from webhook_api.auth import KeyStore
    from webhook_api.config import Settings

REFRESH_SECONDS: Final = 20.0
"""How long ``keys refresh`` waits; a fetch itself gives up earlier."""
_SAMPLES: Final = """
select seen_at, reason, source, instance, headers, body_bytes, body_sha256, detail, body from webhook.samples
where %(reason)s::text is null or reason = %(reason)s order by seen_at desc limit %(limit)s
"""


@click.group("keys")
def command() -> None:
    """Keys that verify deliveries, what they have refused, and development keys that stand in for fal's."""


@command.command("generate")
@click.option("--out", type=WRITABLE, required=True, help="File for the private key (hex seed, mode 0600).")
@json_option
def keys_generate(out: Path, as_json: bool) -> None:  # noqa: ARG001  (it is JSON always)
    """Make a key. The JWKS with its public half goes to standard output. Always JSON."""
    from nacl.signing import SigningKey

    key = SigningKey.generate()
    try:
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        fail(f"{out} exists already; a key is never overwritten")
    except OSError as error:
        fail(f"{out} cannot be written: {error.strerror}")
    with os.fdopen(handle, "w", encoding="ascii") as stream:
        stream.write(bytes(key).hex() + "\n")
    _write_jwks(key, None)


@command.command("jwks")
@click.option("--key-file", type=READABLE, required=True, help="Development key (hex seed).")
@click.option("--out", type=WRITABLE, help="File for the JWKS.  [default: standard output]")
@json_option
def keys_jwks(key_file: Path, out: Path | None, as_json: bool) -> None:  # noqa: ARG001  (it is JSON always)
    """Write the JWKS with a key's public half, for FAL_JWKS_FILE. Always JSON."""
    _write_jwks(read_key(key_file), out)


@command.command("show")
@json_option
def keys_show(as_json: bool) -> None:
    """Show what deliveries are verified with: fal's keys, the account, further senders. Fetches nothing.

    Exits 1 when there are no usable keys of fal.
    """
    loaded = settings(frozenset())
    document = _shown(loaded, _store(loaded))
    echo_json(document) if as_json else _tell(document)
    if not document["ok"]:
        sys.exit(EX_FAILED)


@command.command("refresh")
@json_option
def keys_refresh(as_json: bool) -> None:
    """Fetch fal's keys now. Running instances take them over within seconds, through FAL_JWKS_CACHE_FILE.

    Exits 69 when they cannot be had; the known ones stay.
    """
    loaded = settings(frozenset())
    store = _store(loaded)
    status = store.refresh(REFRESH_SECONDS)
    document = _shown(loaded, store) | {"refreshed": "error" not in status}
    echo_json(document) if as_json else _tell(document)
    if loaded.fal_jwks_cache_file is None:
        click.echo("FAL_JWKS_CACHE_FILE is not set: running instances do not see these keys", err=True)
    if not document["refreshed"]:
        sys.exit(EX_UNAVAILABLE)


@command.command("samples")
@click.option("--reason", type=click.Choice(["bad_signature", "account_not_allowed"]), help="Only these.")
@click.option("--limit", type=click.IntRange(1, 1024), default=20, show_default=True)
@json_option
def keys_samples(reason: str | None, limit: int, as_json: bool) -> None:
    """Show refused deliveries that were kept for another look, the newest first. --json has headers and bodies."""
    from webhook_api.cli.database import connected
    from webhook_api.config import NEEDS_MIGRATE

    with connected(settings(NEEDS_MIGRATE)) as connection:
        rows = connection.execute(_SAMPLES, {"reason": reason, "limit": limit}).fetchall()
    names = (
        "seen_at",
        "reason",
        "source",
        "instance",
        "headers",
        "body_bytes",
        "body_sha256",
        "detail",
        "body",
    )
    found = [dict(zip(names, row, strict=True)) for row in rows]
    if as_json:
        echo_json([sample | {"body": base64.b64encode(sample["body"]).decode()} for sample in found])
        return
    columns = ("seen", "reason", "source", "account", "request", "bytes", "sha256")
    echo_table(columns, [_sample_row(sample) for sample in found])


def _store(loaded: Settings) -> KeyStore:
    from webhook_api.auth.keys import KeyStore, key_source

    source = key_source(loaded.fal_jwks_url, loaded.fal_jwks_file)
    store = KeyStore(source, cache_file=loaded.fal_jwks_cache_file)
    if loaded.fal_jwks_file is not None:
        store.warm()
    return store


def _shown(loaded: Settings, store: KeyStore) -> dict[str, Any]:
    from webhook_api.auth import Accounts, LearnedFile

    known = store.key_set()
    path = loaded.fal_account_file
    return store.status() | {
        "source": str(loaded.fal_jwks_file or loaded.fal_jwks_url),
        "cache_file": str(loaded.fal_jwks_cache_file) if loaded.fal_jwks_cache_file else None,
        "fetched_at": known.fetched_at if known else None,
        "public_keys": [base64.urlsafe_b64encode(bytes(key)).decode() for key in known.keys] if known else [],
        "account": Accounts(loaded.fal_account_ids, LearnedFile(path) if path else None).status(),
        "senders": [
            {"name": sender.name, "scheme": sender.scheme, "shape": sender.shape} for sender in loaded.sources
        ],
    }


def _tell(document: dict[str, Any]) -> None:
    error = f", last fetch: {document['error']}" if "error" in document else ""
    age = f", {document['age_seconds']} s old" if document["ok"] else ""
    stale = ", STALE" if document.get("stale") else ""
    click.echo(printable(f"fal's keys: {document['keys']}{age}{stale}{error}, from {document['source']}"))
    for key in document["public_keys"]:
        click.echo(f"  {key}")
    if not document["ok"] and document["cache_file"] is None:
        click.echo("  (only running instances have them: FAL_JWKS_CACHE_FILE is not set)")
    account = document["account"]
    if account["mode"] == "pinned":
        click.echo(printable(f"accounts at fal: {', '.join(account['accounts'])} (pinned)"))
    else:
        kept = "" if account["persisted"] else ", not kept over a restart"
        click.echo(printable(f"account at fal: {account['learned'] or 'not learned yet'} (learning{kept})"))
    for sender in document["senders"]:
        click.echo(f"sender {sender['name']}: {sender['scheme']}, shape {sender['shape']}")


def _sample_row(sample: dict[str, Any]) -> tuple[Any, ...]:
    headers = sample["headers"]
    request = headers.get("x-fal-webhook-request-id") or headers.get("webhook-id")
    account = headers.get("x-fal-webhook-user-id")
    digest = sample["body_sha256"][:16]
    return (
        sample["seen_at"], sample["reason"], sample["source"], account, request, sample["body_bytes"], digest
    )  # fmt: skip


def _write_jwks(key: SigningKey, out: Path | None) -> None:
    from webhook_api.auth.signing import public_jwks

    text = json.dumps(public_jwks(key), indent=2)
    if out is None:
        click.echo(text)
        return
    try:
        out.write_text(text + "\n", encoding="ascii")
    except OSError as error:
        fail(f"{out} cannot be written: {error.strerror}")


def read_key(path: Path) -> SigningKey:
    """Read a development key: 64 hexadecimal digits."""
    from nacl.signing import SigningKey

    try:
        seed = bytes.fromhex(read_text(path))
        return SigningKey(seed)
    except (ValueError, TypeError):
        fail(f"{path} is not a development key: 64 hexadecimal digits are expected")
