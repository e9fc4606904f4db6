"""Settings of the service: read once, from the environment and from secret files.

Every setting ``NAME`` may come from a file instead, named by ``NAME_FILE`` (a Compose secret below /run/secrets),
so that no secret has to stand in an environment. An empty value counts as not set. All faults are found in one
pass and reported in one :class:`ConfigError`, whose exit code is 78 (EX_CONFIG of sysexits.h).
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from webhook_api import sources
from webhook_api.config_console import ConsoleSettings, read_console
from webhook_api.config_upkeep import (
    ReconcileSettings,
    RetentionSettings,
    read_reconcile,
    read_retention,
)
from webhook_api.sources import Sender

if TYPE_CHECKING:
    from webhook_api.outbound import Place

EX_CONFIG: Final = 78
FAL_JWKS_URL: Final = "https://rest.fal.ai/.well-known/jwks.json"
FAL_MEDIA_HOSTS: Final = ("v3.fal.media", "v3b.fal.media", "fal.media")
LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
ENVIRONMENTS_STRICT: Final = frozenset({"production", "prod"})
SECRET_MIN_LENGTH: Final = 16
TELEGRAM_EVENTS: Final = frozenset({"completed", "failed", "cancelled", "given_up"})
SECRET_FILE_MAX_BYTES: Final = 65536


class ConfigError(Exception):
    """The settings cannot be used. ``faults`` names each of them; ``reason`` and ``exit_code`` are fixed."""

    reason = "configuration"
    exit_code = EX_CONFIG

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        lines = "\n".join(f"  - {fault}" for fault in faults)
        super().__init__(f"The configuration cannot be used ({len(faults)} fault(s)):\n{lines}")


class Need(Enum):
    """What a command needs of its settings. A command is refused only for the settings that it uses."""

    DATABASE = "database"
    REDIS = "redis"
    OBJECT_STORE = "object store"
    VERIFIER = "verifier"
    OUTBOUND = "outbound"
    """Servers that deliveries are handed on to: the worker alone calls them, and holds their secrets."""
    ARCHIVE = "archive"
    """The object store's keys where they are given: the console reads files with them, and does without."""


NEEDS_SERVE: Final = frozenset(Need) - {Need.OUTBOUND, Need.ARCHIVE}
NEEDS_BACKENDS: Final = frozenset({Need.DATABASE, Need.REDIS, Need.OBJECT_STORE})
NEEDS_WORKER: Final = NEEDS_BACKENDS | {Need.OUTBOUND}
NEEDS_MIGRATE: Final = frozenset({Need.DATABASE})
NEEDS_CONSOLE: Final = frozenset({Need.DATABASE, Need.ARCHIVE})


@dataclass(frozen=True, slots=True)
class ForwardSettings:
    """Where deliveries are handed on to. ``keys`` sign them, all of them while a secret is replaced."""

    place: Place
    keys: tuple[bytes, ...] = field(repr=False)
    timeout_seconds: int


@dataclass(frozen=True, slots=True)
class TelegramSettings:
    """The bot and the chat that hear of trainings. ``notify``: of :data:`~webhook_api.config.TELEGRAM_EVENTS`."""

    place: Place
    token: str = field(repr=False)
    chat_id: str
    notify: frozenset[str]


@dataclass(frozen=True, slots=True)
class NoticeSettings:
    """Who hears of dead letters and stuck deliveries: a webhook at ``place``, Telegram's chat, or both."""

    place: Place | None
    keys: tuple[bytes, ...] = field(repr=False)
    telegram: bool
    stuck_seconds: int
    settle_seconds: int
    every_seconds: int


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings, checked. Secrets are left out of ``repr``. Durations are seconds, sizes are bytes."""

    # Where the service keeps and sends things
    database_url: str = field(repr=False)
    """A libpq connection string with the password in it."""
    redis_url: str = field(repr=False)
    redis_password: str | None = field(repr=False)
    """Given apart from the URL; ``None`` when the URL holds it or none is needed."""
    minio_endpoint: str
    """``host:port`` of the S3 server, without a scheme."""
    minio_access_key: str = field(repr=False)
    minio_secret_key: str = field(repr=False)
    minio_bucket: str
    minio_secure: bool

    # Who may deliver
    fal_webhook_secret: str | None = field(repr=False)
    fal_api_key: str | None = field(repr=False)
    fal_jwks_url: str | None
    """Exactly one of ``fal_jwks_url`` and ``fal_jwks_file`` is set."""
    fal_jwks_file: Path | None
    fal_jwks_cache_file: Path | None
    """Where fetched keys are kept over a restart; ``None``: only in memory."""
    fal_account_ids: frozenset[str]
    """Accepted ``X-Fal-Webhook-User-Id``. Empty: the first one that proves itself is learned."""

    # The process
    host: str
    port: int
    log_level: str
    environment: str
    instance_id: str
    timezone: str
    version: str
    release: str
    body_limit_bytes: int
    threads: int
    workers: int

    # The worker
    worker_concurrency: int
    event_max_attempts: int
    lease_seconds: int
    archive_allowed_hosts: frozenset[str]
    archive_allow_http_hosts: frozenset[str]
    """``host:port`` that may be read over plain http. For tests; empty in production."""
    redis_stream: str
    redis_stream_maxlen: int
    minio_region: str = "us-east-1"
    archive_max_bytes: int = 2 * 1024**3
    """Largest media file that is archived."""
    archive_max_seconds: int = 900
    """Longest download of one media file."""
    parked_max_seconds: int = 7 * 86_400
    """How long a delivery waits for its avatar before it becomes a dead letter."""
    worker_stop_seconds: int = 8
    """What a stopping worker gives its attempts to finish; below Docker's 10 s between SIGTERM and SIGKILL."""
    worker_batch_size: int = 128
    """Most deliveries that a worker handles together."""
    worker_metrics_port: int = 9108
    """Where a worker shows its metrics; 0: nowhere."""
    reconcile: ReconcileSettings = field(default_factory=ReconcileSettings)
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    fal_webhook_secret_previous: str | None = field(default=None, repr=False)
    """Accepted as well while callers are given a new ``fal_webhook_secret``; ``None``: no more."""
    fal_account_file: Path | None = None
    """Where a learned account outlives a restart; ``None``: only in memory."""
    sources: tuple[Sender, ...] = ()
    """Further senders. Their keys are only read where deliveries are verified."""
    spool_dir: Path | None = None
    """Where deliveries are kept while the database is away; ``None``: nowhere, they are refused then."""
    spool_max_bytes: int = 1024**3
    """Most that the spools of all processes may hold together."""
    spool_reserve_bytes: int = 256 * 1024**2
    """What the spool leaves free on its disk."""
    forward: ForwardSettings | None = None
    """``None``: deliveries are not handed on (or the command has no need of it)."""
    otlp_endpoint: str | None = None
    """Where traces go; ``None``: nothing is traced."""
    otlp_headers: Mapping[str, str] | None = field(default=None, repr=False)
    telegram: TelegramSettings | None = None
    """``None``: no messages (or the command has no need of it)."""
    notices: NoticeSettings | None = None
    """``None``: nobody hears of incidents (or the command has no need of it)."""
    edge_tls_address: tuple[str, int] | None = None
    """Where the worker reads the edge's certificate; ``None``: nowhere."""
    console: ConsoleSettings = field(default_factory=ConsoleSettings)

    @property
    def production(self) -> bool:
        """Whether the strict rules of a production environment hold."""
        return self.environment.lower() in ENVIRONMENTS_STRICT

    @property
    def learning_accounts(self) -> bool:
        """Whether the first fal account that proves itself is taken for our own."""
        return not self.fal_account_ids


class _Reader:
    """Reads named values out of an environment and collects what is wrong with them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.faults: list[str] = []

    def text(self, name: str, default: str = "") -> str:
        """Value of ``name``, or of the file that ``name_FILE`` names, or the default."""
        plain = self._environ.get(name, "").strip()
        path = self._environ.get(f"{name}_FILE", "").strip()
        if plain and path:
            self.faults.append(f"{name} and {name}_FILE are both set: keep one of them")
            return plain
        if path:
            return self._file(name, path)
        return plain or default

    def plain(self, name: str, default: str = "") -> str:
        """Value of ``name`` from the environment alone (for names that end in _FILE themselves)."""
        return self._environ.get(name, "").strip() or default

    def has_file(self, name: str) -> bool:
        """Whether ``name`` comes from a file."""
        return bool(self._environ.get(f"{name}_FILE", "").strip())

    def _file(self, name: str, path: str) -> str:
        try:
            with open(path, "rb") as stream:
                raw = stream.read(SECRET_FILE_MAX_BYTES + 1)
        except OSError as error:
            self.faults.append(f"{name}_FILE: {path} cannot be read ({error.strerror or error})")
            return ""
        if len(raw) > SECRET_FILE_MAX_BYTES:
            self.faults.append(f"{name}_FILE: {path} is larger than {SECRET_FILE_MAX_BYTES} bytes")
            return ""
        try:
            value = raw.decode("utf-8").strip()
        except UnicodeDecodeError:
            self.faults.append(f"{name}_FILE: {path} is not UTF-8 text")
            return ""
        if not value:
            self.faults.append(f"{name}_FILE: {path} is empty")
        return value

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """Whole decimal number between ``low`` and ``high``."""
        value = self.text(name)
        if not value:
            return default
        if not re.fullmatch(r"[0-9]{1,12}", value) or not low <= int(value) <= high:
            self.faults.append(f"{name} is {value!r}: give a whole number from {low} to {high}")
            return default
        return int(value)

    def boolean(self, name: str, default: bool) -> bool:
        """true/false, yes/no, on/off, 1/0 in any case."""
        value = self.text(name).lower()
        if value in {"", "true", "yes", "on", "1", "false", "no", "off", "0"}:
            return default if not value else value in {"true", "yes", "on", "1"}
        self.faults.append(f"{name} is {value!r}: give true or false")
        return default

    def names(self, name: str, default: tuple[str, ...] = ()) -> frozenset[str]:
        """Comma-separated list as a set."""
        items = [item.strip() for item in self.text(name).split(",")]
        return frozenset(item for item in items if item) or frozenset(default)


def load_settings(environ: Mapping[str, str] | None = None, needs: frozenset[Need] = NEEDS_SERVE) -> Settings:
    """Read and check all settings.

    ``needs`` says which of them must be there. Raises :class:`ConfigError` with every fault.
    """
    reader = _Reader(os.environ if environ is None else environ)
    settings = _read(reader, needs)
    if reader.faults:
        raise ConfigError(reader.faults)
    return settings


def _read(reader: _Reader, needs: frozenset[Need]) -> Settings:
    minio_endpoint, minio_secure = _minio(reader, needs)
    jwks_url, jwks_file = _jwks(reader)
    cache = reader.plain("FAL_JWKS_CACHE_FILE")
    redis_url, redis_password = _redis(reader, needs)
    api_key = reader.text("FAL_API_KEY") or None
    return Settings(
        database_url=_database(reader, needs),
        redis_url=redis_url,
        redis_password=redis_password,
        minio_endpoint=minio_endpoint,
        minio_access_key=_store_key(reader, "MINIO_ACCESS_KEY", needs),
        minio_secret_key=_store_key(reader, "MINIO_SECRET_KEY", needs),
        minio_bucket=_bucket(reader),
        minio_secure=minio_secure,
        fal_webhook_secret=_secret(reader, "FAL_WEBHOOK_SECRET") if Need.VERIFIER in needs else None,
        fal_webhook_secret_previous=_previous(reader) if Need.VERIFIER in needs else None,
        fal_api_key=api_key,
        fal_jwks_url=jwks_url,
        fal_jwks_file=jwks_file,
        fal_jwks_cache_file=Path(cache) if cache else None,
        fal_account_ids=_accounts(reader, needs),
        host=reader.text("HOST", "0.0.0.0"),  # noqa: S104  (a container's own address space)
        port=reader.integer("PORT", 8000, 1, 65535),
        log_level=_log_level(reader),
        environment=reader.text("ENVIRONMENT", "production"),
        instance_id=reader.text("INSTANCE_ID", socket.gethostname()),
        timezone=reader.text("TZ", "UTC"),
        version=reader.text("WEBHOOK_VERSION", "development"),
        release=reader.text("WEBHOOK_RELEASE", "none"),
        body_limit_bytes=reader.integer("WEBHOOK_BODY_LIMIT_BYTES", 10 * 1024 * 1024, 1024, 1024**3),
        threads=reader.integer("WEBHOOK_THREADS", 16, 1, 256),
        workers=reader.integer("WEBHOOK_WORKERS", 1, 1, 32),
        worker_concurrency=reader.integer("WORKER_CONCURRENCY", 4, 1, 64),
        event_max_attempts=reader.integer("EVENT_MAX_ATTEMPTS", 12, 1, 1000),
        lease_seconds=reader.integer("LEASE_SECONDS", 60, 5, 3600),
        archive_allowed_hosts=_hosts(reader, "ARCHIVE_ALLOWED_HOSTS", FAL_MEDIA_HOSTS),
        archive_allow_http_hosts=_host_ports(reader, "ARCHIVE_ALLOW_HTTP_HOSTS"),
        redis_stream=_stream(reader),
        redis_stream_maxlen=reader.integer("REDIS_STREAM_MAXLEN", 100_000, 1, 10**9),
        minio_region=reader.text("MINIO_REGION", "us-east-1"),
        archive_max_bytes=reader.integer("ARCHIVE_MAX_BYTES", 2 * 1024**3, 1, 64 * 1024**3),
        archive_max_seconds=reader.integer("ARCHIVE_MAX_SECONDS", 900, 1, 86_400),
        parked_max_seconds=reader.integer("PARKED_MAX_SECONDS", 7 * 86_400, 1, 366 * 86_400),
        worker_stop_seconds=reader.integer("WORKER_STOP_SECONDS", 8, 1, 3600),
        worker_batch_size=reader.integer("WORKER_BATCH_SIZE", 128, 1, 1000),
        worker_metrics_port=reader.integer("WORKER_METRICS_PORT", 9108, 0, 65535),
        reconcile=read_reconcile(reader, api_key),
        retention=read_retention(reader),
        console=read_console(reader),
        fal_account_file=_account_file(reader, cache),
        sources=_sources(reader, needs),
        spool_dir=_spool_dir(reader),
        spool_max_bytes=reader.integer("SPOOL_MAX_BYTES", 1024**3, 1024**2, 10**12 - 1),
        spool_reserve_bytes=reader.integer("SPOOL_RESERVE_BYTES", 256 * 1024**2, 0, 10**12 - 1),
        forward=_forward(reader) if Need.OUTBOUND in needs else None,
        otlp_endpoint=_otlp(reader),
        otlp_headers=_otlp_headers(reader),
        telegram=_telegram(reader) if Need.OUTBOUND in needs else None,
        notices=_notices(reader) if Need.OUTBOUND in needs else None,
        edge_tls_address=_edge_address(reader),
    )


def _required(reader: _Reader, name: str, needed: bool) -> str:
    before = len(reader.faults)
    value = reader.text(name)
    if needed and not value and len(reader.faults) == before:
        reader.faults.append(f"{name} is not set (nor {name}_FILE)")
    return value


def _store_key(reader: _Reader, name: str, needs: frozenset[Need]) -> str:
    if not needs & {Need.OBJECT_STORE, Need.ARCHIVE}:
        return ""
    return _required(reader, name, Need.OBJECT_STORE in needs)


def _database(reader: _Reader, needs: frozenset[Need]) -> str:
    url = _required(reader, "DATABASE_URL", Need.DATABASE in needs)
    password = reader.text("DATABASE_PASSWORD")
    if not url:
        return ""
    # The service that this one replaces wrote SQLAlchemy's driver into the scheme.
    url = re.sub(r"^(postgres|postgresql)\+[a-z0-9_]+://", "postgresql://", url)
    try:
        parts = conninfo_to_dict(url)
    except psycopg.Error:
        # The parser's own message may quote the string, and the string may hold a password.
        reader.faults.append("DATABASE_URL is not a PostgreSQL URL such as postgresql://user@host:5432/name")
        return ""
    if not parts.get("dbname"):
        reader.faults.append("DATABASE_URL names no database: end it with /name")
    if not parts.get("host"):
        reader.faults.append("DATABASE_URL names no host")
    if password and parts.get("password"):
        reader.faults.append("DATABASE_URL holds a password and DATABASE_PASSWORD gives another: keep one")
    return make_conninfo(url, password=password) if password else url


def _redis(reader: _Reader, needs: frozenset[Need]) -> tuple[str, str | None]:
    url = _required(reader, "REDIS_URL", Need.REDIS in needs)
    password = (reader.text("REDIS_PASSWORD") or None) if Need.REDIS in needs else None
    if not url:
        return "", password
    try:
        parts = urlsplit(url)
        valid = parts.scheme in {"redis", "rediss", "unix"} and bool(parts.hostname or parts.path)
        in_url = parts.password
        _ = parts.port
    except ValueError:
        valid, in_url = False, None
    if not valid:
        reader.faults.append("REDIS_URL is not a Redis URL such as redis://host:6379/0")
    if password and in_url:
        reader.faults.append("REDIS_URL holds a password and REDIS_PASSWORD gives another: keep one")
    return url, password


def _minio(reader: _Reader, needs: frozenset[Need]) -> tuple[str, bool]:
    endpoint = _required(reader, "MINIO_ENDPOINT", Need.OBJECT_STORE in needs)
    secure = reader.boolean("MINIO_SECURE", False)
    scheme, separator, rest = endpoint.partition("://")
    if separator:
        if scheme not in {"http", "https"}:
            reader.faults.append(f"MINIO_ENDPOINT has the scheme {scheme!r}: give host:port")
        if scheme == "https" and not secure and reader.plain("MINIO_SECURE"):
            reader.faults.append("MINIO_ENDPOINT is https and MINIO_SECURE is false: they contradict")
        secure = secure or scheme == "https"
        endpoint = rest.rstrip("/")
    if endpoint and not re.fullmatch(r"(?:[A-Za-z0-9._-]+|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?", endpoint):
        reader.faults.append("MINIO_ENDPOINT is not host:port, such as minio.example.net:9000")
    return endpoint, secure


def _spool_dir(reader: _Reader) -> Path | None:
    path = reader.plain("SPOOL_DIR")
    if path and not path.startswith("/"):
        reader.faults.append(f"SPOOL_DIR is {path!r}: give an absolute path")
    return Path(path) if path else None


def _bucket(reader: _Reader) -> str:
    bucket = reader.text("MINIO_BUCKET_NAME", "aisha-files")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
        reader.faults.append(f"MINIO_BUCKET_NAME is {bucket!r}: S3 allows 3 to 63 of a-z, 0-9, '.' and '-'")
    return bucket


def _jwks(reader: _Reader) -> tuple[str | None, Path | None]:
    url, path = reader.plain("FAL_JWKS_URL"), reader.plain("FAL_JWKS_FILE")
    if url and path:
        reader.faults.append("FAL_JWKS_URL and FAL_JWKS_FILE are both set: keep one of them")
    if path:
        if not os.access(path, os.R_OK):
            reader.faults.append(f"FAL_JWKS_FILE: {path} cannot be read")
        return None, Path(path)
    url = url or FAL_JWKS_URL
    parts = urlsplit(url)
    strict = reader.plain("ENVIRONMENT", "production").lower() in ENVIRONMENTS_STRICT
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        reader.faults.append(f"FAL_JWKS_URL is {url!r}: give an https address")
    elif parts.scheme == "http" and strict:
        reader.faults.append(
            "FAL_JWKS_URL is plain http: anyone on the way could give keys of their own; use https"
        )
    return url, None


def _secret(reader: _Reader, name: str) -> str | None:
    secret = reader.text(name)
    if not secret:
        return None
    if len(secret) < SECRET_MIN_LENGTH:
        reader.faults.append(
            f"{name} has {len(secret)} characters: give at least {SECRET_MIN_LENGTH} random ones"
        )
    if not re.fullmatch(r"[\x21-\x7e]+", secret):
        reader.faults.append(f"{name} must be printable ASCII without spaces (it is sent in a header)")
    return secret


def _previous(reader: _Reader) -> str | None:
    secret = _secret(reader, "FAL_WEBHOOK_SECRET_PREVIOUS")
    if secret and not (reader.plain("FAL_WEBHOOK_SECRET") or reader.has_file("FAL_WEBHOOK_SECRET")):
        reader.faults.append(
            "FAL_WEBHOOK_SECRET_PREVIOUS is set, but FAL_WEBHOOK_SECRET is not: set both while it is replaced"
        )
    return secret


def _accounts(reader: _Reader, needs: frozenset[Need]) -> frozenset[str]:
    accounts = reader.names("FAL_ACCOUNT_IDS")
    mode = reader.text("FAL_ACCOUNT_MODE", "pin")
    strict = reader.plain("ENVIRONMENT", "production").lower() in ENVIRONMENTS_STRICT
    if mode not in {"pin", "learn"}:
        reader.faults.append(f"FAL_ACCOUNT_MODE is {mode!r}: give pin or learn")
    if Need.VERIFIER in needs and strict and not accounts and mode != "learn":
        reader.faults.append(
            "FAL_ACCOUNT_IDS is empty: every fal customer could deliver here. Give your account's id, or set "
            "FAL_ACCOUNT_MODE=learn until the first verified delivery has shown it (log event fal_account_learned)"
        )
    return accounts


def _account_file(reader: _Reader, jwks_cache: str) -> Path | None:
    path = reader.plain("FAL_ACCOUNT_FILE")
    if path:
        return Path(path)
    return Path(jwks_cache).parent / "fal-account.json" if jwks_cache else None


def _sources(reader: _Reader, needs: frozenset[Need]) -> tuple[Sender, ...]:
    table = reader.text("WEBHOOK_SOURCES")
    if not table:
        return ()
    in_file = reader.has_file("WEBHOOK_SOURCES")
    senders, faults = sources.read(table, with_keys=Need.VERIFIER in needs, plain_secrets=in_file)
    reader.faults.extend(faults)
    return senders


def _log_level(reader: _Reader) -> str:
    level = reader.text("LOG_LEVEL", "INFO").upper()
    if level not in LOG_LEVELS:
        reader.faults.append(f"LOG_LEVEL is {level!r}: give one of {', '.join(LOG_LEVELS)}")
        return "INFO"
    return level


def _hosts(reader: _Reader, name: str, default: tuple[str, ...]) -> frozenset[str]:
    hosts = frozenset(_host_entry(host) for host in reader.names(name, default))
    for host in sorted(hosts):
        plain, slash, path = host.partition("/")
        good = re.fullmatch(r"[a-z0-9.-]+", plain) or _is_address(plain)
        if not good or (slash and not re.fullmatch(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*/)+", path)):
            reader.faults.append(
                f"{name}: {host!r} is not an exact host name (no wildcards, no scheme, no port), nor host/path/"
            )
    return hosts


def _host_entry(text: str) -> str:
    host, slash, path = text.partition("/")
    return f"{host.lower()}{slash}{path}"


def _host_ports(reader: _Reader, name: str) -> frozenset[str]:
    entries = frozenset(entry.lower() for entry in reader.names(name))
    for entry in sorted(entries):
        if not re.fullmatch(r"(?:[a-z0-9.-]+|\[[0-9a-f:]+\]):[0-9]{1,5}", entry):
            reader.faults.append(f"{name}: {entry!r} is not host:port")
    return entries


def _edge_address(reader: _Reader) -> tuple[str, int] | None:
    value = reader.text("EDGE_TLS_ADDRESS")
    if not value:
        return None
    if not (found := re.fullmatch(r"([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]):([0-9]{1,5})", value)):
        reader.faults.append(f"EDGE_TLS_ADDRESS is {value!r}: give host:port")
        return None
    return found[1].strip("[]"), int(found[2])


def _place(reader: _Reader, name: str, url: str) -> Place | None:
    from webhook_api.outbound import read_place

    try:
        return read_place(url, _host_ports(reader, "OUTBOUND_ALLOW_PRIVATE_HOSTS"))
    except ValueError as error:
        # Without the address: it may hold a token.
        reader.faults.append(f"{name} cannot be used: {error}")
        return None


def _forward(reader: _Reader) -> ForwardSettings | None:
    url, secrets = reader.text("FORWARD_URL"), reader.text("FORWARD_SECRET").split()
    seconds = reader.integer("FORWARD_TIMEOUT_SECONDS", 10, 1, 60)
    if not url:
        return None
    if not secrets:
        reader.faults.append(
            "FORWARD_SECRET is not set (nor FORWARD_SECRET_FILE): what is forwarded is signed"
        )
    keys = _signing_keys(reader, secrets)
    place = _place(reader, "FORWARD_URL", url)
    return ForwardSettings(place, keys, seconds) if place else None


def _signing_keys(reader: _Reader, secrets: list[str]) -> tuple[bytes, ...]:
    from webhook_api.auth.standard import read_secret

    keys: list[bytes] = []
    for secret in secrets:
        try:
            keys.append(read_secret(secret))
        except ValueError as error:
            reader.faults.append(f"FORWARD_SECRET cannot be used: {error}")
    return tuple(keys)


def _notices(reader: _Reader) -> NoticeSettings | None:
    url, telegram = reader.text("NOTICE_URL"), reader.boolean("NOTICE_TELEGRAM", False)
    stuck = reader.integer("NOTICE_STUCK_SECONDS", 900, 1, 30 * 86_400)
    settle = reader.integer("NOTICE_SETTLE_SECONDS", 60, 0, 86_400)
    every = reader.integer("NOTICE_EVERY_SECONDS", 30, 1, 3600)
    if not url and not telegram:
        return None
    secrets = reader.text("FORWARD_SECRET").split()
    if url and not secrets:
        reader.faults.append(
            "NOTICE_URL is set and FORWARD_SECRET is not (nor FORWARD_SECRET_FILE): notices are signed"
        )
    if telegram and not reader.text("TELEGRAM_CHAT_ID"):
        reader.faults.append("NOTICE_TELEGRAM is set and TELEGRAM_CHAT_ID is not: give bot and chat")
    place = _place(reader, "NOTICE_URL", url) if url else None
    keys = _signing_keys(reader, secrets) if url else ()
    return NoticeSettings(place, keys, telegram, stuck, settle, every)


def _otlp(reader: _Reader) -> str | None:
    """The collector's full address. Only the names of OpenTelemetry's own specification are read."""
    url = reader.text("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    base = reader.text("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not url and base:
        url = f"{base.rstrip('/')}/v1/traces"
    if url and not re.fullmatch(r"https?://[^\s/@]+(?:/[^\s]*)?", url):
        reader.faults.append(
            "OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) is not an http(s) address such as "
            "http://collector:4318; a login goes into OTEL_EXPORTER_OTLP_HEADERS"
        )
        return None
    return url or None


def _otlp_headers(reader: _Reader) -> Mapping[str, str] | None:
    text = reader.text("OTEL_EXPORTER_OTLP_HEADERS")
    if not text:
        return None
    pairs = [entry.partition("=") for entry in text.split(",") if entry.strip()]
    if not all(re.fullmatch(r"[A-Za-z0-9-]+", name.strip()) and mark for name, mark, _ in pairs):
        reader.faults.append("OTEL_EXPORTER_OTLP_HEADERS is not a list of name=value with commas between")
    return {name.strip().lower(): unquote(value.strip()) for name, _, value in pairs}


def _telegram(reader: _Reader) -> TelegramSettings | None:
    token, chat_id = reader.text("TELEGRAM_BOT_TOKEN"), reader.text("TELEGRAM_CHAT_ID")
    notify = reader.names("TELEGRAM_NOTIFY", ("completed", "failed", "cancelled", "given_up"))
    if not token and not chat_id:
        return None
    if not token:
        reader.faults.append(
            "TELEGRAM_CHAT_ID is set and TELEGRAM_BOT_TOKEN is not (nor TELEGRAM_BOT_TOKEN_FILE)"
        )
    elif not re.fullmatch(r"[0-9]{3,20}:[A-Za-z0-9_-]{20,100}", token):
        reader.faults.append(
            "TELEGRAM_BOT_TOKEN does not have the form of a token of @BotFather (digits:letters)"
        )
    if not re.fullmatch(r"-?[0-9]{1,20}|@[A-Za-z0-9_]{4,32}", chat_id):
        reader.faults.append("TELEGRAM_CHAT_ID is neither a number nor a channel's @name")
    if unknown := notify - TELEGRAM_EVENTS:
        reader.faults.append(
            f"TELEGRAM_NOTIFY: {', '.join(sorted(unknown))} not known; give some of {', '.join(sorted(TELEGRAM_EVENTS))}"
        )
    place = _place(reader, "TELEGRAM_API_URL", reader.text("TELEGRAM_API_URL", "https://api.telegram.org"))
    return TelegramSettings(place, token, chat_id, notify) if place else None


def _stream(reader: _Reader) -> str:
    stream = reader.text("REDIS_STREAM", "aisha:webhook:events")
    if not re.fullmatch(r"[\x21-\x7e]{1,200}", stream):
        reader.faults.append("REDIS_STREAM must be 1 to 200 printable ASCII characters without spaces")
    return stream


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
