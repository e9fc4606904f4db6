"""A probe as it is asked for by parameters: addresses, signature, delivery, and following it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible.module_utils.probe import (
    REMOVE_SECONDS,
    Address,
    Check,
    ProbeError,
    Prober,
    make_delivery,
    read_secret,
)

#: Parameters of a probe, as module `webhook_probe` has them, and `rollout` takes them.
PROBE_ARGUMENTS: dict[str, dict[str, Any]] = {
    "urls": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "url": {"type": "str", "required": True},
            "validate_certs": {"type": "bool"},
            "version": {"type": "str"},
            "release": {"type": "str"},
        },
    },
    "accept": {"type": "list", "elements": "str", "default": ["healthy"]},
    "release": {"type": "str"},
    "delivery_url": {"type": "str"},
    "validate_certs": {"type": "bool", "default": True},
    "ca": {"type": "path"},
    "key_file": {"type": "path", "no_log": False},
    "account_id": {"type": "str", "default": "probe"},
    "secret_file": {"type": "path", "no_log": False},
    "container": {"type": "str"},
    "trace_command": {"type": "list", "elements": "str", "default": ["webhook-api", "trace"]},
    "timeout": {"type": "float", "default": 30.0},
    "health_wait": {"type": "float", "default": 10.0},
    "request_timeout": {"type": "float", "default": 15.0},
    "remove": {"type": "bool", "default": True},
    "log_containers": {"type": "list", "elements": "str", "default": []},
    "log_lines": {"type": "int", "default": 20},
}


def verify(params: Mapping[str, Any], validate: bool | None = None) -> bool | str:
    """How certificates are checked, in the terms of `requests`."""
    if not (params["validate_certs"] if validate is None else validate):
        return False
    return params["ca"] or True


def addresses(params: Mapping[str, Any]) -> list[Address]:
    """The health addresses; what one leaves out, the module's own parameters say."""
    return [
        Address(
            entry["url"],
            verify(params, entry["validate_certs"]),
            tuple(params["accept"]),
            entry["version"] or None,
            entry["release"] or params["release"] or None,
        )
        for entry in params["urls"]
    ]


def credentials(params: Mapping[str, Any]) -> dict[str, str]:
    """What the delivery is signed with."""
    if params["key_file"]:
        return {"seed_hex": read_secret(params["key_file"], "key file"), "user_id": params["account_id"]}
    if params["secret_file"]:
        return {"secret": read_secret(params["secret_file"], "secret file")}
    raise ProbeError("bad_parameters", "a delivery needs key_file or secret_file", "Give one of them")


def send_and_follow(params: Mapping[str, Any], prober: Prober, request_id: str, wall: float) -> list[Check]:
    """Send the delivery, follow it, and take it away again whatever came of it."""
    body, headers = make_delivery(request_id, wall, **credentials(params))
    checks = [prober.deliver(Address(params["delivery_url"], verify(params)), body, headers)]
    where = (params["container"], params["trace_command"], request_id)
    if checks[0].ok:
        return [*checks, *prober.prove(*where, params["timeout"], params["remove"])]
    # Also after an answer that never came: the delivery may have been stored all the same.
    if params["remove"] and not checks[0].detail.startswith("HTTP 4"):
        checks.append(prober.remove(*where, REMOVE_SECONDS))
    return checks
