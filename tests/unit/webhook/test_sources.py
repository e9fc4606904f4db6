"""The table of senders: what it takes, and what keeps the service from starting."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from webhook_api import sources
from webhook_api.config import NEEDS_WORKER, ConfigError, load_settings

from tests.support.falfake import new_key

SECRET = "whsec_" + base64.b64encode(bytes(range(24))).decode()
OTHER = "whsec_" + base64.b64encode(bytes(range(1, 25))).decode()
PUBLIC = "whpk_" + base64.b64encode(bytes(new_key().verify_key)).decode()


def read(table: Any, **options: Any) -> tuple[tuple[sources.Sender, ...], list[str]]:
    text = table if isinstance(table, str) else json.dumps(table)
    return sources.read(text, **{"with_keys": True, "plain_secrets": False, **options})


def sender(**changes: Any) -> dict[str, Any]:
    return {"scheme": "standard", "shape": "replicate", "public_keys": [PUBLIC], **changes}


def test_a_sender(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n{OTHER}\n")
    (found,), faults = read({"replicate": sender(secrets=[{"file": str(tmp_path / "secret")}])})
    assert faults == []
    assert (found.name, found.scheme, found.shape) == ("replicate", "standard", "replicate")
    assert (len(found.secrets), len(found.public_keys)) == (2, 1)
    assert base64.b64encode(found.secrets[0]).decode() not in repr(found)
    assert str(found.secrets[0]) not in repr(found)


def test_a_worker_reads_the_shapes_and_no_secret() -> None:
    (found,), faults = read({"replicate": sender(secrets=[{"file": "/nowhere"}])}, with_keys=False)
    assert faults == []
    assert (found.name, found.shape, found.secrets, found.public_keys) == ("replicate", "replicate", (), ())


@pytest.mark.parametrize(
    ("table", "part"),
    [
        ("", "not JSON"), ("{", "not JSON"), ("[" * 100_000, "not JSON"), ([], "not an object"), ("7", "not an object"),
        ('{"a": {}, "a": {}}', "twice"),
        ({"fal": sender()}, "service's own"), ({"manual": sender()}, "service's own"),
        ({"reconcile": sender()}, "service's own"),
        ({"Replicate": sender()}, "a name is"), ({"": sender()}, "a name is"), ({"a" * 33: sender()}, "a name is"),
        ({"a/b": sender()}, "a name is"),
        ({"r": 7}, "give an object"),
        ({"r": sender(scheme="hmac")}, "the scheme 'hmac' is unknown"), ({"r": sender(scheme=None)}, "the scheme None"),
        ({"r": sender(scheme=["standard"])}, "is unknown"),
        ({"r": sender(shape="svix")}, "the shape 'svix' is unknown"),
        ({"r": {"scheme": "standard", "public_keys": [PUBLIC]}}, "the shape None"),
        ({"r": sender(algorithm="none")}, "unknown field 'algorithm'"),
        ({"r": sender(public_keys=[])}, "nothing could be verified"), ({"r": sender(public_keys=PUBLIC)}, "not a list"),
        ({"r": sender(public_keys=["whpk_x"])}, "base64 of 32 bytes"), ({"r": sender(public_keys=[7])}, "a key is"),
        ({"r": sender(public_keys=[PUBLIC] * 9)}, "more than 8"),
        ({"r": sender(secrets=[SECRET])}, "stands in the environment"),
        ({"r": sender(secrets=[{"file": "/nowhere"}])}, "/nowhere cannot be read"),
        ({"r": sender(secrets=[{"env": "X"}])}, "a key is"),
    ],
)  # fmt: skip
def test_what_keeps_the_service_from_starting(table: Any, part: str) -> None:
    found, faults = read(table)
    assert found == ()
    assert len(faults) == 1
    assert part in faults[0]
    assert "WEBHOOK_SOURCES" in faults[0]
    assert SECRET[6:] not in faults[0]


def test_a_secret_file_is_never_quoted(tmp_path: Path) -> None:
    for content in ("", "not-a-secret-at-all", "whsec_short", b"\xff\xfe".decode("latin-1")):
        (tmp_path / "secret").write_text(content, encoding="latin-1")
        _, (fault,) = read({"r": sender(secrets=[{"file": str(tmp_path / "secret")}])})
        assert "not-a-secret" not in fault
        assert "short" not in fault


def settings(**changes: str) -> Any:
    base = {
        "DATABASE_URL": "postgresql://u@h:5432/d", "REDIS_URL": "redis://h", "MINIO_ENDPOINT": "h:9000",
        "MINIO_ACCESS_KEY": "a", "MINIO_SECRET_KEY": "b", "FAL_ACCOUNT_IDS": "x",
    }  # fmt: skip
    return base | changes


def test_the_setting_and_its_file(tmp_path: Path) -> None:
    assert load_settings(settings()).sources == ()
    table = json.dumps({"replicate": sender()})
    assert [entry.name for entry in load_settings(settings(WEBHOOK_SOURCES=table)).sources] == ["replicate"]
    # A table that is itself a secret file may hold secrets.
    (tmp_path / "table").write_text(json.dumps({"replicate": sender(secrets=[SECRET])}))
    (found,) = load_settings(settings(WEBHOOK_SOURCES_FILE=str(tmp_path / "table"))).sources
    assert len(found.secrets) == 1


def test_an_unknown_scheme_refuses_to_start_also_the_worker() -> None:
    table = json.dumps({"replicate": sender(scheme="svix-old")})
    for needs in ({}, {"needs": NEEDS_WORKER}):
        with pytest.raises(ConfigError, match="the scheme 'svix-old' is unknown") as caught:
            load_settings(settings(WEBHOOK_SOURCES=table), **needs)
        assert caught.value.exit_code == 78


def test_the_learned_account_stands_beside_the_keys(tmp_path: Path) -> None:
    assert load_settings(settings()).fal_account_file is None
    beside = load_settings(settings(FAL_JWKS_CACHE_FILE="/var/lib/webhook/fal-jwks.json"))
    assert beside.fal_account_file == Path("/var/lib/webhook/fal-account.json")
    assert load_settings(settings(FAL_ACCOUNT_FILE="/x/y")).fal_account_file == Path("/x/y")
