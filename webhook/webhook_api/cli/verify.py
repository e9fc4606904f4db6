"""``verify``: a delivery that was kept is proven once more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from webhook_api.cli.common import (
    EX_FAILED,
    EX_UNAVAILABLE,
    READABLE,
    echo_lines,
    fail,
    json_option,
    line,
    printable,
    settings,
)

if TYPE_CHECKING:
    from webhook_api.config import Settings
    from webhook_api.reverify import Report, Verifiers

MAX_FILE: Final = 256 * 1024 * 1024
"""Bytes of a file or an object that is read whole."""
_HEADERS: Final = ("request_id", "user_id", "timestamp", "signature")


@click.command("verify")
@click.argument("which", metavar="[ID|REQUEST_ID]", required=False)
@click.option(
    "--file", "path", type=click.File("rb"), help="An archived delivery or segment from a file; - is stdin."
)
@click.option("--key", help="An object of the bucket: a segment, or one delivery.")
@click.option("--jwks", type=READABLE, help="Key set of fal to verify with.  [default: the configured one]")
@click.option("--body-file", type=READABLE, help="A raw body, with the four values of its headers:")
@click.option("--request-id", help="X-Fal-Webhook-Request-Id")
@click.option("--user-id", help="X-Fal-Webhook-User-Id")
@click.option("--timestamp", help="X-Fal-Webhook-Timestamp")
@click.option("--signature", help="X-Fal-Webhook-Signature")
@click.option(
    "--now", type=float, help="With --body-file: Unix time to verify at.  [default: the timestamp itself]"
)
@json_option
def command(which: str | None, path: Any, key: str | None, jwks: Path | None, body_file: Path | None,
            now: float | None, as_json: bool, **headers: str | None) -> None:  # fmt: skip
    """Prove a delivery once more: its bytes, its signature, and its age when it arrived.

    By its number or request id it is read from the archive, where it was put (or from the inbox, where it was not yet).
    Exits 1 when something does not hold, or there is no such delivery; 69 when keys or backends cannot be reached.
    """
    if sum(given is not None for given in (which, path, key, body_file)) != 1:
        raise click.UsageError("give a delivery's number, a request id, --file, --key or --body-file")
    if body_file is not None:
        _one(jwks, body_file, now, headers)
        return
    from webhook_api.auth import AuthError
    from webhook_api.reverify import ReverifyError
    from webhook_api.states import EffectError, Failure

    try:
        reports = list(_reports(which, path, key, jwks))
    except ReverifyError as error:
        fail(str(error))
    except AuthError as error:
        fail(str(error), EX_UNAVAILABLE)
    except EffectError as error:
        fail(error.describe(), EX_FAILED if error.kind is Failure.PERMANENT else EX_UNAVAILABLE)
    if as_json:
        echo_lines(report.document() for report in reports)
    else:
        for report in reports:
            click.echo(_said(report))
    if not all(report.valid for report in reports):
        sys.exit(EX_FAILED)


def _reports(which: str | None, path: Any, key: str | None, jwks: Path | None) -> Iterator[Report]:
    from webhook_api.reverify import ReverifyError, check, documents

    if path is not None:
        data = path.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise ReverifyError("too_large", f"the file is larger than {MAX_FILE} bytes")
        verifiers = _verifiers(jwks, None)
        yield from (check(document, verifiers, "file") for document in documents(data))
        return
    loaded = _loaded(database=which is not None)
    verifiers = _verifiers(jwks, loaded)
    found = _from_bucket(loaded, key) if key is not None else _from_inbox(loaded, which or "")
    yield from (check(document, verifiers, where) for document, where in found)


def _loaded(*, database: bool) -> Settings:
    from webhook_api.config import Need

    needs = frozenset({Need.OBJECT_STORE, Need.VERIFIER})
    return settings(needs | {Need.DATABASE} if database else needs)


def _verifiers(jwks: Path | None, loaded: Settings | None) -> Verifiers:
    from webhook_api.auth import KeyStore
    from webhook_api.auth.keys import key_source
    from webhook_api.config import Need
    from webhook_api.reverify import Verifiers

    if jwks is not None and loaded is None:
        return Verifiers(KeyStore(key_source(None, jwks)))
    loaded = loaded or settings(frozenset({Need.VERIFIER}))
    if jwks is not None:
        return Verifiers(KeyStore(key_source(None, jwks)), loaded.sources)
    # The cache is read, so that no key server has to be asked.
    store = KeyStore(
        key_source(loaded.fal_jwks_url, loaded.fal_jwks_file), cache_file=loaded.fal_jwks_cache_file
    )
    click.get_current_context().call_on_close(store.stop)
    return Verifiers(store, loaded.sources)


def _from_bucket(loaded: Settings, key: str) -> Iterator[tuple[dict[str, Any], str]]:
    from webhook_api.outlets import ObjectStore, minio_client
    from webhook_api.reverify import ReverifyError, documents

    store = ObjectStore(minio_client(loaded), loaded.minio_bucket)
    if ".." in key.split("/") or not 0 < len(key.encode()) <= 1024:
        raise ReverifyError("missing", f"{printable(key)} cannot be the name of an object")
    found = store.stat(key)
    if found is None:
        raise ReverifyError("missing", f"there is no object {printable(key)} in {loaded.minio_bucket}")
    if found.size > MAX_FILE:
        raise ReverifyError("too_large", f"{printable(key)} is larger than {MAX_FILE} bytes")
    data = store.read(key)
    yield from ((document, "archive") for document in documents(data or b""))


def _from_inbox(loaded: Settings, which: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Each delivery as it stands in the archive, else as it stands in the inbox."""
    from webhook_api.cli.database import connected
    from webhook_api.console import found_by, with_body
    from webhook_api.effects.raw_archive import NAME, fetch
    from webhook_api.outlets import ObjectStore, minio_client
    from webhook_api.reverify import ReverifyError

    with connected(loaded) as connection:
        rows = found_by(connection, which)
        if not rows:
            raise ReverifyError(
                "missing", f"there is no delivery {which}, and none of a request with this id"
            )
        for row in rows:
            archived = next((e for e in row["effects"] if e["name"] == NAME and e["state"] == "done"), None)
            kept: dict[str, Any]
            if archived is not None and "key" in archived["detail"]:
                if not loaded.minio_endpoint:
                    fail("MINIO_ENDPOINT is not set: the archive cannot be read", 78)
                kept = fetch(ObjectStore(minio_client(loaded), loaded.minio_bucket), archived["detail"])
                kept = {**kept, "aside": row["aside"], "replayed_at": row["replayed_at"]}
                if kept.get("body_sha256") != row["body_sha256"]:
                    raise ReverifyError(
                        "other_delivery", f"the archive holds other bytes for delivery {row['id']}"
                    )
                yield kept, "archive"
                continue
            if row["pruned"]:
                said = f"the bytes of delivery {row['id']} are in the archive only, and where is recorded no more"
                raise ReverifyError("pruned", f"{said}: give their object with --key")
            kept = {**row, **with_body(connection, row["id"]), "delivery_id": row["id"],
                    "received_at": row["first_seen_at"].isoformat()}  # fmt: skip
            yield kept, "database"


def _one(jwks: Path | None, body_file: Path, now: float | None, headers: dict[str, str | None]) -> None:
    """A body and four header values, as they stand in somebody's log. Always JSON."""
    from webhook_api.auth import AuthError, FalVerifier, KeyStore
    from webhook_api.auth.keys import key_source
    from webhook_api.auth.signing import FAL_HEADERS

    missing = [f"--{name.replace('_', '-')}" for name in _HEADERS if headers[name] is None]
    missing += [] if jwks is not None else ["--jwks"]
    if missing:
        raise click.UsageError(f"with --body-file give also {', '.join(missing)}")
    given = dict(zip(FAL_HEADERS, (str(headers[name]) for name in _HEADERS), strict=True))
    store = KeyStore(key_source(None, jwks))
    try:
        claims = FalVerifier(store, frozenset()).claims(given)
        moment = now if now is not None else float(claims.timestamp or 0)
        verifier = FalVerifier(store, frozenset({str(headers["user_id"])}), lambda: moment)
        verified = verifier.verify(claims, body_file.read_bytes())
        if verified.aside is not None:
            raise AuthError(verified.aside, f"signed {verified.age:.0f} s before")
    except AuthError as error:
        click.echo(line({"valid": False, "reason": error.reason, "message": str(error)}))
        sys.exit(EX_FAILED)
    click.echo(line({"valid": True, "request_id": verified.request_id, "account_id": verified.account_id}))


def _said(report: Report) -> str:
    who = f"delivery {report.delivery_id}" if report.delivery_id is not None else "delivery"
    signature = {True: "right", False: "WRONG", None: f"none ({report.source} is not signed)"}[
        report.signature
    ]
    age = "" if report.age_seconds is None else f", {report.age_seconds:g} s old when it arrived"
    verdict = "valid" if report.valid else f"NOT VALID: {report.message}"
    bytes_ = "as they arrived" if report.sha256 else "OTHERS"
    return printable(
        f"{who} of {report.source}, request {report.request_id}, from the {report.where}: bytes {bytes_}, "
        f"signature {signature}{age}{f' ({report.aside})' if report.aside else ''}: {verdict}"
    )
