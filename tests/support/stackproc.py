"""The whole service as processes: two API instances and two workers, between backends whose lines can be made bad.

Every process may be killed at any time and is started again with the same settings; all end with the stack.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import redis
import urllib3
from minio import Minio
from psycopg import sql
from psycopg.rows import dict_row
from webhook_api.auth.signing import public_jwks
from webhook_api.migrate import migrate

from tests.support.apiservice import PACKAGE, free_port
from tests.support.databases import with_database
from tests.support.falfake import ACCOUNT, SECRET, JwksServer, jwks_server, new_key
from tests.support.faultsite import FaultSite, wait_postgres
from tests.support.ledger import ARTIFACTS, Event, Ledger, Observed, Sender, compare, unsettled
from tests.support.mediahost import MediaHost, media_host
from tests.support.trouble import Trouble
from tests.support.workerlab import _MAIN as WORKER_MAIN

SETTLE_SECONDS = 90.0
"""How long everything accepted may take to be done once the backends are back, at least."""
SETTLE_EACH = 0.15
"""The same for each delivery: what has lost its worker more than once is handled alone."""
SAMPLE = 40
"""Archived media files whose content is read at a comparison."""

# Counts every change of an avatar, whoever makes it; the service's own role may not touch the counts.
_COUNT_UPDATES = """
create table public.avatar_changes (number bigint generated always as identity, request_id text, status text);
create function public.count_avatar_change() returns trigger language plpgsql security definer as $$
begin
    insert into public.avatar_changes (request_id, status) values (new.fal_request_id, new.status);
    return null;
end $$;
create trigger count_avatar_changes after update on public.avatars
    for each row execute function public.count_avatar_change();
"""
_SESSIONS = """
select application_name, state, wait_event_type, wait_event, now() - xact_start as since, left(query, 100) as query
from pg_stat_activity where datname = current_database() and state <> 'idle' and pid <> pg_backend_pid()
"""
_UNFINISHED = """
select id, request_id, state, tries, crashes, lease_owner, lease_until - now() as lease,
    next_attempt_at - now() as due, last_error
from webhook.deliveries where state not in ('done', 'dead') order by id limit 10
"""


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """Have the kernel end this process when the tests are killed themselves."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Process:
    """A process with all its children, in a group of its own."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self.environment = environment
        self.kills = 0
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it runs."""
        if self.alive:
            return
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self.environment, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=_die_with_parent,
            )  # fmt: skip

    @property
    def pid(self) -> int | None:
        """Of the process, when it was ever started."""
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL to the process and its children at once, as the engine's `kill` does."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        self.kills += 1

    def kill_child(self) -> None:
        """SIGKILL to a child alone, as the kernel does when memory is out: gunicorn starts another one."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for child in children[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
                self.kills += 1

    def stop(self, seconds: float = 20) -> None:
        """SIGTERM, and SIGKILL when it takes too long."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()


class Api(Process):
    """An API instance. Keeps its port over restarts."""

    def __init__(self, name: str, environment: dict[str, str], log: Path) -> None:
        self.port = free_port()
        super().__init__(
            name, [sys.executable, "-m", "webhook_api", "serve"], environment | {"PORT": str(self.port)}, log
        )

    @property
    def url(self) -> str:
        """Base address."""
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str = "/health") -> tuple[int, Any]:
        """Status and document; (0, {}) when it does not answer."""
        try:
            answer = urllib3.request("GET", self.url + path, timeout=5, retries=False)
        except urllib3.exceptions.HTTPError:
            return 0, {}
        try:
            return answer.status, answer.json()
        except ValueError:
            return answer.status, answer.data.decode()


class Stack:
    """A database, a stream, a bucket and the processes. `ledgers` is all that was ever sent to it."""

    def __init__(
        self,
        site: FaultSite,
        directory: Path,
        jwks: JwksServer,
        media: MediaHost,
        *,
        postgres_port: int = 0,
        apis: int = 2,
        workers: int = 2,
        seed: int = 0,
        settings: dict[str, str] | None = None,
    ) -> None:
        self.site = site
        self.directory = directory
        self.jwks = jwks
        self.media = media
        self.seed = seed
        self.key = new_key()
        self.set_keys(self.key)
        self.ledgers: list[Ledger] = []
        self._read: dict[tuple[str, str, int], bytes] = {}
        self.taken: list[dict[str, str]] = []
        """Stream entries that a test took out of Redis before it destroyed them."""
        self.name = uuid.uuid4().hex[:10]
        self.bucket, self.stream = f"faults-{self.name}", f"faults:{self.name}"
        self._superuser = site.superuser(port=postgres_port)
        self.postgres = Trouble("127.0.0.1", postgres_port or site.postgres.port, seed)
        self.redis = Trouble("127.0.0.1", site.redis.port, seed)
        self.s3 = Trouble("127.0.0.1", site.s3.port, seed)
        self.database_url = with_database(self._superuser, f"faults_{self.name}")
        self._make_database()
        self._minio = Minio(
            f"127.0.0.1:{site.s3.port}",
            access_key=site.secret("minio_access_key"),
            secret_key=site.secret("minio_secret_key"),
            secure=False,
            region="us-east-1",
            http_client=urllib3.PoolManager(maxsize=8, timeout=20),
        )
        self._minio.make_bucket(self.bucket)
        password = site.secret("redis_password")
        self.redis_client = redis.Redis(port=site.redis.port, password=password, decode_responses=True)
        self._files()
        self.media.files.update(_media_files(seed))
        shared = self._environment() | (settings or {})
        self.apis = [self._api(f"api-{n}", shared) for n in range(1, apis + 1)]
        self.workers = [self._worker(f"worker-{n}", shared) for n in range(1, workers + 1)]

    @property
    def processes(self) -> list[Process]:
        """All of them."""
        return [*self.apis, *self.workers]

    def start(self) -> None:
        """Start everything and wait until both instances take deliveries."""
        for process in self.processes:
            process.start()
        self.wait(self._ready, "every instance is ready")

    def _ready(self) -> bool:
        ended = [process.name for process in self.processes if not process.alive]
        assert not ended, f"{ended} ended at the start:\n{self.logs()}"
        return all(api.get()[0] == 200 for api in self.apis)

    def close(self) -> None:
        """End everything, and remove what is in the backends."""
        for process in self.processes:
            with contextlib.suppress(Exception):
                process.kill()
        for line in (self.postgres, self.redis, self.s3):
            line.close()
        with contextlib.suppress(Exception):
            for key in self.redis_client.scan_iter(f"*{self.stream}*"):
                self.redis_client.delete(key)
        self.redis_client.close()
        self._minio._http.clear()
        with (
            contextlib.suppress(psycopg.Error),
            psycopg.connect(self._superuser, autocommit=True) as connection,
        ):
            name = sql.Identifier(f"faults_{self.name}")
            connection.execute(sql.SQL("drop database if exists {} with (force)").format(name))

    def heal(self) -> None:
        """Good lines, known keys, every process running."""
        for line in (self.postgres, self.redis, self.s3):
            line.calm()
        self.jwks.status = 200
        self.jwks.hold.set()
        self.set_keys(self.key)
        for process in self.processes:
            process.start()
        self.wait(lambda: all(api.get()[0] == 200 for api in self.apis), "every instance takes deliveries")

    def set_keys(self, *keys: Any) -> None:
        """What the key server serves."""
        import json

        self.jwks.document = json.dumps(public_jwks(*keys)).encode()

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
        """First true value of a condition, with the ends of all logs in the failure."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}\n{self.logs()}"
            time.sleep(0.05)
        return value

    def logs(self, lines: int = 8) -> str:
        """The last complaints in each process's log."""
        shown = []
        for process in self.processes:
            text = process.log.read_text(errors="replace") if process.log.exists() else ""
            complaints = [line[:700] for line in text.splitlines() if '"level": "info"' not in line]
            shown.append(f"--- {process.name} ({process.log})\n" + "\n".join(complaints[-lines:]))
        with contextlib.suppress(psycopg.Error):
            shown += ["--- busy sessions", *(str(row) for row in self.rows(_SESSIONS))]
            shown += ["--- unfinished", *(str(row) for row in self.rows(_UNFINISHED))]
        return "\n".join(shown)

    def ledger(self, name: str) -> Ledger:
        """A ledger of this stack."""
        made = Ledger(f"{name}-{len(self.ledgers)}", self.media.url("").rstrip("/"), self.key, self.seed)
        self.ledgers.append(made)
        return made

    def sender(self, ledger: Ledger, **more: Any) -> Sender:
        """A sender to all instances."""
        return Sender(ledger, [api.url for api in self.apis], seed=self.seed, **more)

    def events(self, ledger: Ledger, count: int, kind: Any = None) -> list[Event]:
        """New events, each with the avatar that waits for it."""
        made = ledger.events(count, kind)
        self.avatars(made)
        return made

    def avatars(self, events: Iterable[Event]) -> None:
        """Make the avatars that wait for events."""
        rows = [(uuid.uuid4(), event.kind.avatar, event.request_id) for event in events if event.kind.avatar]
        with psycopg.connect(self.database_url) as connection, connection.cursor() as cursor:
            cursor.executemany(
                "insert into public.avatars (id, user_id, training_type, status, fal_request_id) "
                "values (%s, (select id from public.users limit 1), %s, 'training', %s)",
                rows,
            )

    @contextlib.contextmanager
    def load(self, name: str, count: int, rate: float = 60.0, **more: Any) -> Iterator[tuple[Ledger, Sender]]:
        """Send `count` deliveries; the block runs once some are accepted, and after it all have to be."""
        ledger = self.ledger(name)
        events = self.events(ledger, count)
        with self.sender(ledger, rate=rate, **more) as sender:
            sender.send(events)
            self.wait(lambda: ledger.accepted >= min(10, count), "deliveries are accepted")
            yield ledger, sender
            sender.wait(60 + 2 * count / rate)

    def rows(self, query: str, *parameters: Any) -> list[dict[str, Any]]:
        """Rows of a query, as the superuser."""
        with psycopg.connect(self.database_url, row_factory=dict_row, autocommit=True) as connection:
            return connection.execute(query.encode(), parameters).fetchall()

    def count(self) -> int:
        """Rows in the inbox."""
        return int(self.rows("select count(*) from webhook.deliveries")[0]["count"])

    def destroy_stream(self, *, everything: bool) -> int:
        """Take all entries out of Redis and destroy them, in one step; returns how many there were."""
        with self.redis_client.pipeline(transaction=True) as pipeline:
            pipeline.xrange(self.stream)
            if everything:
                pipeline.flushall()
            else:
                pipeline.delete(self.stream)
            entries, _ = pipeline.execute()
        self.taken += [fields for _, fields in entries]
        return len(entries)

    def observe(self) -> Observed:
        """Everything that stands behind the receiver."""
        seen = Observed(
            deliveries=self.rows(
                "select id, source, request_id, dedup_key, body_sha256, encode(sha256(body), 'hex') as real_sha256, "
                "state, aside, attempts, last_error from webhook.deliveries"
            ),
            variants=[
                (row["delivery_id"], row["body_sha256"])
                for row in self.rows("select delivery_id, body_sha256 from webhook.delivery_variants")
            ],
            entries=[*self.taken, *(fields for _, fields in self.redis_client.xrange(self.stream))],  # type: ignore[union-attr]
            files={name: self.media.files[f"/{name}"].content for name in ARTIFACTS},
        )
        for row in self.rows("select delivery_id, name, state, detail from webhook.effects"):
            seen.effects[row["delivery_id"]][row["name"]] = row
        for row in self.rows("select fal_request_id, status from public.avatars"):
            seen.avatars[row["fal_request_id"]] = row["status"]
        for row in self.rows("select request_id from public.avatar_changes"):
            seen.updates[row["request_id"]] += 1
        seen.contents = self._contents()
        return seen

    def _contents(self) -> dict[str, bytes]:
        """All archived deliveries and some files. What was read before and has not changed is not read again."""
        found = {
            str(entry.object_name): (str(entry.object_name), str(entry.etag), entry.size or 0)
            for entry in self._minio.list_objects(self.bucket, recursive=True)
            # The workers' own test of the store comes and goes.
            if not str(entry.object_name).endswith("/.canary")
        }
        files = sorted(name for name in found if not name.startswith("deliveries/"))
        skipped = set(files) - set(random.Random(self.seed).sample(files, min(SAMPLE, len(files))))
        contents = {}
        for name, version in found.items():
            if name not in skipped:
                if version not in self._read:
                    answer = self._minio.get_object(self.bucket, name)
                    self._read[version] = answer.read()
                    answer.close()
                    answer.release_conn()
                contents[name] = self._read[version]
        return contents

    def settle(self) -> None:
        """Wait until all that was accepted is done. Waiting for backoffs is cut short."""
        seconds = max(SETTLE_SECONDS, SETTLE_EACH * sum(len(ledger.entries) for ledger in self.ledgers))
        deadline = time.monotonic() + seconds
        wait_postgres(self.database_url)
        while left := self._unsettled():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"{len(left)} not settled after {seconds:.0f} s: {left[:20]}\n{self.logs()}"
                )
            self._hurry()
            time.sleep(0.3)

    def verify(self) -> Observed:
        """Nothing lost, nothing doubled, nothing forged: of all that was ever sent to this stack."""
        self.settle()
        seen = self.observe()
        faults = compare(self.ledgers, seen)
        if faults:
            for ledger in self.ledgers:
                ledger.write(self.directory / f"ledger-{ledger.name}.jsonl")
            (self.directory / "differences.txt").write_text("\n".join(faults))
            shown = "\n".join(faults[:40])
            raise AssertionError(f"{len(faults)} differences ({self.directory}):\n{shown}\n{self.logs()}")
        return seen

    def _unsettled(self) -> list[str]:
        rows = self.rows("select source, request_id, body_sha256, aside, state from webhook.deliveries")
        return unsettled(self.ledgers, Observed(deliveries=rows))

    def _hurry(self) -> None:
        self.rows(
            "with due as (update webhook.deliveries set next_attempt_at = now() "
            "where state in ('retry', 'parked') and next_attempt_at > now() + interval '1 s' returning 1) "
            "select pg_notify('webhook_deliveries', '') from due limit 1"
        )

    def _make_database(self) -> None:
        name = sql.Identifier(f"faults_{self.name}")
        with psycopg.connect(self._superuser, autocommit=True) as connection:
            # As the role makes it: the bot owns its tables, and the service may do what it is granted.
            connection.execute(sql.SQL("create database {} template aisha").format(name))
            connection.execute(
                sql.SQL("grant connect, create, temporary on database {} to aisha_webhook").format(name)
            )
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            connection.execute(_COUNT_UPDATES.encode())
            connection.execute("insert into public.users (telegram_id) values (1)")
            connection.execute("set role aisha_webhook")
            migrate(connection)

    def _files(self) -> None:
        secrets = self.directory / "secrets"
        secrets.mkdir(parents=True)
        for name in ("postgres_webhook_password", "redis_password", "minio_access_key", "minio_secret_key"):
            (secrets / name).write_text(self.site.secret(name))
        (secrets / "fal_webhook_secret").write_text(SECRET)
        (self.directory / "spool").mkdir()

    def _environment(self) -> dict[str, str]:
        secrets = self.directory / "secrets"
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(PACKAGE),
            "PYTHONDONTWRITEBYTECODE": "1",
            "DATABASE_URL": f"postgresql://aisha_webhook@{self.postgres.address}/faults_{self.name}",
            "DATABASE_PASSWORD_FILE": str(secrets / "postgres_webhook_password"),
            "REDIS_URL": f"redis://{self.redis.address}/0",
            "REDIS_PASSWORD_FILE": str(secrets / "redis_password"),
            "MINIO_ENDPOINT": self.s3.address,
            "MINIO_ACCESS_KEY_FILE": str(secrets / "minio_access_key"),
            "MINIO_SECRET_KEY_FILE": str(secrets / "minio_secret_key"),
            "MINIO_BUCKET_NAME": self.bucket,
            "REDIS_STREAM": self.stream,
            "ENVIRONMENT": "test",
        }

    def api_environment(self, name: str) -> dict[str, str]:
        """What an API instance has beyond what all have."""
        return {
            "HOST": "127.0.0.1",
            "INSTANCE_ID": name,
            "FAL_JWKS_URL": self.jwks.url,
            "FAL_JWKS_CACHE_FILE": str(self.directory / f"{name}-jwks.json"),
            "FAL_WEBHOOK_SECRET_FILE": str(self.directory / "secrets" / "fal_webhook_secret"),
            "FAL_ACCOUNT_IDS": ACCOUNT,
            "SPOOL_DIR": str(self.directory / "spool"),
        }

    def _api(self, name: str, shared: dict[str, str]) -> Api:
        return Api(name, shared | self.api_environment(name), self.directory / f"{name}.log")

    def extra_api(self, name: str, **changes: str) -> Api:
        """Another instance, of a test's own, with other settings. Ends with the stack; not among the senders' targets."""
        environment = self._environment() | self.api_environment(name) | changes
        return Api(name, environment, self.directory / f"{name}.log")

    def _worker(self, name: str, shared: dict[str, str]) -> Process:
        own = {
            "INSTANCE_ID": name,
            "ARCHIVE_ALLOW_HTTP_HOSTS": self.media.address,
            "LEASE_SECONDS": "5",
            "WORKER_METRICS_PORT": str(free_port()),
        }
        command = [sys.executable, "-c", WORKER_MAIN, str(self.directory / f"{name}.heartbeat")]
        return Process(name, command, shared | own, self.directory / f"{name}.log")


def _media_files(seed: int) -> dict[str, Any]:
    from tests.support.mediahost import File

    return {
        f"/{name}": File(random.Random(f"{seed}/{name}").randbytes(size))
        for name, size in zip(ARTIFACTS, (60_000, 2_000), strict=True)
    }


@contextlib.contextmanager
def running_stack(site: FaultSite, directory: Path, **more: Any) -> Iterator[Stack]:
    """A started stack for the length of a block."""
    directory.mkdir(parents=True, exist_ok=True)
    with jwks_server() as jwks, media_host() as media:
        stack = Stack(site, directory, jwks, media, **more)
        try:
            stack.start()
            yield stack
        finally:
            stack.close()
