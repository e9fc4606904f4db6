"""Settings: every fault at once, secrets from files, and nothing secret shown."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict
from webhook_api.config import (
    NEEDS_BACKENDS,
    NEEDS_MIGRATE,
    NEEDS_SERVE,
    NEEDS_WORKER,
    ConfigError,
    Need,
    load_settings,
)
from webhook_api.doctor.local import settings_in_force

GOOD = {
    "DATABASE_URL": "postgresql://aisha_webhook:pw@postgres:5432/aisha",
    "REDIS_URL": "redis://redis:6379/0",
    "MINIO_ENDPOINT": "s3:9000",
    "MINIO_ACCESS_KEY": "access",
    "MINIO_SECRET_KEY": "s3-secret-key",
    "FAL_WEBHOOK_SECRET": "0123456789abcdef",
    "FAL_ACCOUNT_IDS": "acct-1, acct-2",
}


def faults(**changes: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings({**GOOD, **changes})
    assert caught.value.exit_code == 78
    return "\n".join(caught.value.faults)


def test_a_good_environment_needs_nothing_more() -> None:
    settings = load_settings(GOOD)
    assert settings.fal_account_ids == {"acct-1", "acct-2"}
    assert settings.production
    assert settings.fal_jwks_url == "https://rest.fal.ai/.well-known/jwks.json"
    assert settings.port == 8000
    assert settings.minio_bucket == "aisha-files"
    assert settings.redis_stream == "aisha:webhook:events"
    assert settings.body_limit_bytes == 10485760
    assert "v3b.fal.media" in settings.archive_allowed_hosts


def test_all_faults_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({"PORT": "eighty", "LOG_LEVEL": "loud", "MINIO_SECURE": "perhaps"})
    text = str(caught.value)
    for name in ("DATABASE_URL", "REDIS_URL", "MINIO_ENDPOINT", "MINIO_ACCESS_KEY", "MINIO_SECRET_KEY",
                 "FAL_ACCOUNT_IDS", "PORT", "LOG_LEVEL", "MINIO_SECURE"):  # fmt: skip
        assert name in text
    assert len(caught.value.faults) == 9


def test_migrating_asks_only_for_the_database() -> None:
    assert load_settings({"DATABASE_URL": GOOD["DATABASE_URL"]}, NEEDS_MIGRATE).redis_url == ""


def test_every_name_may_come_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a-secret-of-a-file\n")
    password = tmp_path / "password"
    password.write_text("p@ss/word with ' odd\n")
    environ = {**GOOD, "FAL_WEBHOOK_SECRET": "", "FAL_WEBHOOK_SECRET_FILE": str(secret),
               "DATABASE_URL": "postgresql://aisha_webhook@postgres:5432/aisha",
               "DATABASE_PASSWORD_FILE": str(password), "REDIS_PASSWORD_FILE": str(secret)}  # fmt: skip
    settings = load_settings(environ)
    assert settings.fal_webhook_secret == "a-secret-of-a-file"
    assert settings.redis_password == "a-secret-of-a-file"
    assert conninfo_to_dict(settings.database_url)["password"] == "p@ss/word with ' odd"


def test_the_secret_of_before_is_held_to_the_same_rules(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the-secret-of-before\n")
    assert load_settings(GOOD).fal_webhook_secret_previous is None
    settings = load_settings({**GOOD, "FAL_WEBHOOK_SECRET_PREVIOUS_FILE": str(secret)})
    assert settings.fal_webhook_secret_previous == "the-secret-of-before"
    assert "the-secret-of-before" not in repr(settings)
    assert "FAL_WEBHOOK_SECRET_PREVIOUS has 5 characters" in faults(FAL_WEBHOOK_SECRET_PREVIOUS="short")
    spaced = faults(FAL_WEBHOOK_SECRET_PREVIOUS="has spaces in it, so no header")
    assert spaced.startswith("FAL_WEBHOOK_SECRET_PREVIOUS must be printable ASCII")
    alone = faults(FAL_WEBHOOK_SECRET="", FAL_WEBHOOK_SECRET_PREVIOUS="the-secret-of-before")
    assert "FAL_WEBHOOK_SECRET_PREVIOUS is set, but FAL_WEBHOOK_SECRET is not" in alone
    once = faults(
        FAL_WEBHOOK_SECRET="", FAL_WEBHOOK_SECRET_FILE="/none", FAL_WEBHOOK_SECRET_PREVIOUS="the-one-before"
    )
    assert once.count("/none") == 1
    assert load_settings({**GOOD, "FAL_WEBHOOK_SECRET_PREVIOUS": "short"}, NEEDS_WORKER)


def test_the_doctor_reminds_of_a_secret_that_is_being_replaced() -> None:
    def told(**changes: str) -> str:
        return " ".join(
            f"{found.verdict}: {found.message}"
            for found in settings_in_force(load_settings({**GOOD, **changes}))
        )

    assert "PREVIOUS" not in told()
    assert "warn: FAL_WEBHOOK_SECRET_PREVIOUS is set" in told(
        FAL_WEBHOOK_SECRET_PREVIOUS="the-secret-of-before"
    )


def test_a_secret_file_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    assert "cannot be read" in faults(FAL_WEBHOOK_SECRET="", FAL_WEBHOOK_SECRET_FILE=str(tmp_path / "none"))
    assert "is empty" in faults(FAL_WEBHOOK_SECRET="", FAL_WEBHOOK_SECRET_FILE=str(empty))
    assert "both set" in faults(FAL_WEBHOOK_SECRET_FILE=str(empty))


def test_no_secret_is_shown() -> None:
    shown = repr(load_settings(GOOD))
    for secret in ("pw@", "s3-secret-key", "0123456789abcdef"):
        assert secret not in shown
    assert "hunter2" not in faults(DATABASE_URL="postgres://u:hunter2@[bad/aisha")


def test_production_refuses_to_accept_every_fal_customer() -> None:
    assert "FAL_ACCOUNT_IDS" in faults(FAL_ACCOUNT_IDS="")
    assert load_settings({**GOOD, "FAL_ACCOUNT_IDS": "", "FAL_ACCOUNT_MODE": "learn"}).learning_accounts
    assert load_settings({**GOOD, "FAL_ACCOUNT_IDS": "", "ENVIRONMENT": "local"}).learning_accounts


def test_production_refuses_keys_over_plain_http() -> None:
    assert "plain http" in faults(FAL_JWKS_URL="http://keys.test/jwks.json")
    assert load_settings({**GOOD, "FAL_JWKS_URL": "http://keys.test/j", "ENVIRONMENT": "test"}).fal_jwks_url


def test_the_former_services_database_url_works() -> None:
    settings = load_settings({**GOOD, "DATABASE_URL": "postgresql+asyncpg://u:p@h:5432/d"})
    assert conninfo_to_dict(settings.database_url)["dbname"] == "d"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "mysql://u@h/d"),
        ("DATABASE_URL", "postgresql://u@h"),
        ("REDIS_URL", "http://redis"),
        ("MINIO_ENDPOINT", "ftp://s3:9000"),
        ("MINIO_BUCKET_NAME", "No_Bucket"),
        ("FAL_WEBHOOK_SECRET", "short"),
        ("FAL_WEBHOOK_SECRET", "has spaces in it, so no header"),
        ("PORT", "70000"),
        ("PORT", "+80"),
        ("ARCHIVE_ALLOWED_HOSTS", "*.fal.media"),
        ("ARCHIVE_ALLOWED_HOSTS", "https://v3.fal.media"),
        ("ARCHIVE_ALLOWED_HOSTS", "storage.googleapis.com/falserverless"),
        ("ARCHIVE_ALLOWED_HOSTS", "storage.googleapis.com/../"),
        ("ARCHIVE_ALLOW_HTTP_HOSTS", "media.test"),
        ("REDIS_STREAM", "two words"),
        ("FAL_ACCOUNT_MODE", "guess"),
    ],
)
def test_a_bad_value_is_named(name: str, value: str) -> None:
    assert name in faults(**{name: value})


FORWARD = {
    "FORWARD_URL": "https://example.net/in",
    "FORWARD_SECRET": f"whsec_{b64encode(bytes(24)).decode()}",
}
TELEGRAM = {"TELEGRAM_BOT_TOKEN": "12345:AAbbccddeeffgghhiijjkk-_", "TELEGRAM_CHAT_ID": "-1001"}


def test_nothing_is_handed_on_unless_it_is_asked_for() -> None:
    settings = load_settings(GOOD, NEEDS_WORKER)
    assert (settings.forward, settings.telegram) == (None, None)


def test_the_api_reads_no_secret_of_the_worker() -> None:
    missing = {
        "FORWARD_URL": "https://example.net/",
        "FORWARD_SECRET_FILE": "/run/secrets/only-for-the-worker",
    }
    assert load_settings({**GOOD, **missing}, NEEDS_SERVE).forward is None


@pytest.mark.parametrize(
    ("needs", "unread"),
    [
        (NEEDS_WORKER, ("FAL_WEBHOOK_SECRET",)),
        (NEEDS_BACKENDS, ("FAL_WEBHOOK_SECRET", "FORWARD_SECRET", "TELEGRAM_BOT_TOKEN")),
        (
            NEEDS_MIGRATE,
            (
                "FAL_WEBHOOK_SECRET",
                "FORWARD_SECRET",
                "REDIS_PASSWORD",
                "MINIO_ACCESS_KEY",
                "MINIO_SECRET_KEY",
            ),
        ),
    ],
    ids=["worker", "trace", "migrate"],
)
def test_a_secret_that_is_not_needed_is_not_read(needs: frozenset[Need], unread: tuple[str, ...]) -> None:
    """So a container need not even hold it."""
    environ = {**GOOD, **FORWARD, **TELEGRAM}
    for name in unread:
        environ.pop(name, None)
        environ[f"{name}_FILE"] = "/run/secrets/not-here"
    load_settings(environ, needs)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(environ, frozenset(Need))


def test_where_deliveries_are_handed_on_to() -> None:
    both = f"{FORWARD['FORWARD_SECRET']} whsec_{b64encode(bytes(32)).decode()}"
    settings = load_settings({**GOOD, **FORWARD, **TELEGRAM, "FORWARD_SECRET": both}, NEEDS_WORKER)
    assert settings.forward is not None
    assert (settings.forward.place.host, settings.forward.place.port) == ("example.net", 443)
    assert settings.forward.keys == (bytes(24), bytes(32))
    assert settings.telegram is not None
    assert settings.telegram.place.host == "api.telegram.org"
    assert TELEGRAM["TELEGRAM_BOT_TOKEN"] not in repr(settings)
    assert "example.net/in" not in repr(settings)


def test_a_private_server_has_to_be_named_exactly() -> None:
    inside = {**GOOD, **FORWARD, "FORWARD_URL": "http://hooks.internal:8080/in?a=b"}
    with pytest.raises(ConfigError, match="plain http needs"):
        load_settings(inside, NEEDS_WORKER)
    for listed in ("hooks.internal:80", "internal:8080", "other:8080"):
        with pytest.raises(ConfigError):
            load_settings({**inside, "OUTBOUND_ALLOW_PRIVATE_HOSTS": listed}, NEEDS_WORKER)
    settings = load_settings({**inside, "OUTBOUND_ALLOW_PRIVATE_HOSTS": "hooks.internal:8080"}, NEEDS_WORKER)
    assert settings.forward is not None
    assert settings.forward.place.listed
    assert settings.forward.place.path == "/in?a=b"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FORWARD_URL", "ftp://example.net/"),
        ("FORWARD_URL", "https://user:hunter2@example.net/"),
        ("FORWARD_URL", "https://example.net/#part"),
        ("FORWARD_URL", "https://example.net:port/"),
        ("FORWARD_URL", "https:///in"),
        ("FORWARD_SECRET", "hunter2"),
        ("FORWARD_SECRET", "whsec_hunter2"),
        ("FORWARD_SECRET", ""),
        ("FORWARD_TIMEOUT_SECONDS", "0"),
        ("TELEGRAM_BOT_TOKEN", "hunter2"),
        ("TELEGRAM_BOT_TOKEN", "12345:AAbbccddeeffgghhiijjkk/../hunter2"),
        ("TELEGRAM_BOT_TOKEN", ""),
        ("TELEGRAM_CHAT_ID", "my chat"),
        ("TELEGRAM_NOTIFY", "completed,everything"),
        ("TELEGRAM_API_URL", "http://api.telegram.test"),
        ("OUTBOUND_ALLOW_PRIVATE_HOSTS", "*"),
    ],
)
def test_a_bad_value_of_what_is_handed_on_is_named_and_not_shown(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({**GOOD, **FORWARD, **TELEGRAM, name: value}, NEEDS_WORKER)
    assert name in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_the_spool_is_off_without_a_directory_and_bounded_with_one() -> None:
    assert load_settings(GOOD).spool_dir is None
    loaded = load_settings({**GOOD, "SPOOL_DIR": "/var/lib/webhook/spool", "SPOOL_MAX_BYTES": "2097152"})
    assert (str(loaded.spool_dir), loaded.spool_max_bytes) == ("/var/lib/webhook/spool", 2_097_152)
    assert loaded.spool_reserve_bytes == 256 * 1024 * 1024
    with pytest.raises(ConfigError) as caught:
        load_settings({**GOOD, "SPOOL_DIR": "spool", "SPOOL_MAX_BYTES": "1", "SPOOL_RESERVE_BYTES": "-1"})
    assert [fault.split()[0] for fault in caught.value.faults] == [
        "SPOOL_DIR", "SPOOL_MAX_BYTES", "SPOOL_RESERVE_BYTES",
    ]  # fmt: skip
