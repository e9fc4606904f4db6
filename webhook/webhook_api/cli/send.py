"""``send``: deliveries of every shape, valid and broken in each way."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from webhook_api.cli.common import (
    EX_FAILED,
    EX_OK,
    EX_UNAVAILABLE,
    READABLE,
    echo_lines,
    fail,
    json_option,
    read_text,
)
from webhook_api.cli.keys import read_key


@click.command("send")
@click.argument("url", required=False)
@click.option("--shape", "shape_name", default="portrait-ok", show_default=True, help="See --list.")
@click.option("--list", "list_shapes", is_flag=True, help="List the shapes and the answer each must get.")
@click.option("--key-file", type=READABLE, envvar="WEBHOOK_DEV_KEY_FILE", help="Development key (hex seed).")
@click.option("--secret-file", type=READABLE, envvar="FAL_WEBHOOK_SECRET_FILE", help="Shared secret.")
@click.option(
    "--user-id", default="dev-account", show_default=True, help="fal account that the delivery names."
)
@click.option("--request-id", help="One id for all requests.  [default: a new one each]")
@click.option("--media", help="Base address of the artifacts.")
@click.option("--body-file", type=READABLE, help="Send this body (signed, or with --manual by the secret).")
@click.option("--manual", is_flag=True, help="Authorise --body-file by the shared secret.")
@click.option("--count", type=click.IntRange(1, 1_000_000), default=1, show_default=True)
@click.option("--concurrency", type=click.IntRange(1, 256), default=1, show_default=True)
@click.option(
    "--expect", type=click.IntRange(100, 599), help="Expected status.  [default: what the shape says]"
)
@click.option(
    "--standard-secret-file",
    type=READABLE,
    help="Secret (whsec_…) of a sender with Standard Webhooks, for standard-*.",
)
@click.option("--insecure", is_flag=True, help="Accept any certificate (self-signed).")
@click.option("--ca", type=READABLE, help="CA certificate to trust.")
@json_option
def command(url: str | None, list_shapes: bool, as_json: bool, **options: Any) -> None:
    """Send deliveries to URL, correctly signed (or wrongly, by shape); one JSON object a result, always.

    Exits 0 when every answer is the expected one, 69 when no answer came at all, else 1.
    """
    from webhook_api.shapes import SHAPES

    if list_shapes and as_json:
        echo_lines(
            {
                "shape": shape.name,
                "expect": shape.expect,
                "also": shape.also,
                "needs": shape.needs,
                "about": shape.about,
            }
            for shape in SHAPES.values()
        )
        return
    if list_shapes:
        for shape in SHAPES.values():
            click.echo(f"{shape.name:22}{shape.expect:5}  {shape.about}")
        return
    if not url or not url.startswith(("http://", "https://")):
        raise click.UsageError(
            "give the URL to send to, such as https://127.0.0.1/api/v1/avatar/status_update"
        )
    sys.exit(_send(url, options))


def _send(url: str, options: dict[str, Any]) -> int:
    from webhook_api import sender, shapes

    http = sender.http_pool(options["concurrency"], insecure=options["insecure"], ca=options["ca"])
    plan = sender.Plan(
        url=url,
        shape=_shape(options),
        credentials=shapes.Credentials(
            key=read_key(options["key_file"]) if options["key_file"] else None,
            account_id=options["user_id"],
            secret=read_text(options["secret_file"]) if options["secret_file"] else None,
            standard_secret=_standard_secret(options["standard_secret_file"]),
        ),
        media=options["media"] or shapes.MEDIA,
        request_id=options["request_id"],
        count=options["count"],
        concurrency=options["concurrency"],
        expect=options["expect"],
    )
    as_expected, answered = True, False
    try:
        for result in sender.send_all(plan, http):
            click.echo(result.as_json())
            as_expected &= result.as_expected
            answered |= result.http_status is not None
    except shapes.ShapeError as error:
        raise click.UsageError(str(error)) from error
    if as_expected:
        return EX_OK
    return EX_FAILED if answered else EX_UNAVAILABLE


def _standard_secret(path: Path | None) -> bytes | None:
    """The first line of a sender's file: its other lines are older or newer secrets."""
    if path is None:
        return None
    from webhook_api.auth.standard import MalformedKey, read_secret

    try:
        return read_secret((read_text(path).split() or [""])[0])
    except MalformedKey as error:
        fail(f"{path}: {error}")


def _shape(options: dict[str, Any]) -> Any:
    from webhook_api.shapes import SHAPES, custom

    if options["body_file"]:
        return custom(options["body_file"].read_bytes(), manual=options["manual"])
    if options["shape_name"] not in SHAPES:
        raise click.BadParameter(f"choose one of {', '.join(SHAPES)}", param_hint="--shape")
    return SHAPES[options["shape_name"]]
