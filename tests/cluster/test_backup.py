"""A backup while deliveries come in, brought back into another stack and compared: row by row, object by object."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
import requests
from minio import Minio

from tests.support.sites import PlaybookResult, Site

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]
PASSPHRASE = "correct horse battery staple"
PATH = "/api/v1/avatar/status_update"
STREAM = "aisha:webhook:events"
BUCKET = "aisha-files"
#: What a worker does not move any more: a delivery as it came, and effects that are done.
TABLES = {
    "webhook.deliveries": "select id, source, request_id, dedup_key, status, training_type_hint, account_id, body, "
    "body_sha256, headers, edge_request_id, probe, attempts, first_seen_at, last_seen_at "
    "from webhook.deliveries where id <= {through}",
    "webhook.delivery_variants": "select * from webhook.delivery_variants where delivery_id <= {through}",
    "webhook.effects": "select * from webhook.effects where state = 'done' and delivery_id <= {through}",
    "webhook.audit": "select * from webhook.audit",
    "public.users": "select * from users",
    "public.avatars": "select * from avatars where fal_request_id like 'early-%'",
}


def standing(name: str, number: int, directory: Path, backups: Path) -> Site:
    base = 20000 + 100 * number
    ports = {
        "backends_postgres_port": base + 32,
        "backends_redis_port": base + 79,
        "backends_s3_port": base + 90,
    }
    directory.mkdir(exist_ok=True)
    patience = {"rollout_health_timeout": 300, "verify_health_timeout": 300, "verify_probe_timeout": 120}
    return Site(name, directory, number, {**ports, **patience, "backup_dir": str(backups)})


@dataclass
class Place:
    """Two sites, a directory of backups, and a passphrase in a file."""

    first: Site
    second: Site
    backups: Path
    passphrase: Path
    accepted: list[tuple[float, str]] = field(default_factory=list)

    def backup(self, *arguments: str) -> PlaybookResult:
        return self.first.playbook(
            "playbooks/backup.yml", "-e", f"backup_passphrase_file={self.passphrase}", *arguments
        )

    def restore(self, site: Site, source: Path | str, *arguments: str) -> PlaybookResult:
        given = ("-e", f"restore_from={source}", "-e", f"backup_passphrase_file={self.passphrase}")
        return site.playbook("playbooks/restore.yml", *given, *arguments, timeout=1800)

    def newest(self) -> Path:
        return max(self.backups.glob(f"{self.first.name}-*"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("backup")
    passphrase = home / "passphrase"
    passphrase.write_text(f"{PASSPHRASE}\n")
    first = standing("wht-backup", 15, home / "first", home / "backups")
    second = standing("wht-restore", 35, home / "second", home / "backups-2")
    keep = bool(os.environ.get("WHT_KEEP"))
    try:
        if not (keep and first.home.exists()):
            first.site().must_pass()
        yield Place(first, second, home / "backups", passphrase)
    finally:
        for site in () if keep else (first, second):
            site.teardown()


def sql(site: Site, query: str) -> str:
    command = ["docker", "exec", f"{site.name}-postgres", "psql", "-U", "postgres", "-XqAt", "-d", "aisha"]
    return subprocess.run([*command, "-c", query], capture_output=True, text=True, check=True).stdout.strip()


def table_digests(site: Site, through: int) -> dict[str, str]:
    """Number and digest of the rows of each table, as far as the deliveries up to an id go."""
    digest = "select count(*) || ' ' || coalesce(md5(string_agg(md5(t::text), '' order by md5(t::text))), '-') from ({}) t"
    return {name: sql(site, digest.format(rows.format(through=through))) for name, rows in TABLES.items()}


def objects(site: Site) -> dict[str, tuple[str, str, str | None]]:
    """Digest, type and recorded digest of every object."""
    client = Minio(
        f"127.0.0.1:{site.variables['backends_s3_port']}",
        access_key=site.secret("minio_access_key"),
        secret_key=site.secret("minio_secret_key"),
        secure=False,
        region="us-east-1",
    )
    found = {}
    for entry in client.list_objects(BUCKET, recursive=True):
        answer: Any = client.get_object(BUCKET, str(entry.object_name))
        headers = {name.lower(): value for name, value in answer.headers.items()}
        found[str(entry.object_name)] = (
            hashlib.sha256(answer.read()).hexdigest(),
            headers["content-type"],
            headers.get("x-amz-meta-sha256"),
        )
        answer.close()
        answer.release_conn()
    return found


def stream(site: Site) -> dict[str, dict[str, str]]:
    client = redis.Redis(
        port=site.variables["backends_redis_port"],
        password=site.secret("redis_password"),
        decode_responses=True,
    )
    with client:
        found: Any = client.xrange(STREAM)
        return dict(found)


def deliver(place: Place, session: requests.Session, request_id: str, status: str = "completed") -> None:
    site = place.first
    deadline = time.monotonic() + 180
    while True:
        answer = session.post(
            f"http://127.0.0.1:{site.settings['site_http_port']}{PATH}",
            json={"status": status, "request_id": request_id},
            headers={"X-Webhook-Secret": site.secret("fal_webhook_secret")},
            timeout=30,
        )
        if answer.status_code == 200:
            break
        # As fal does: what was refused for want of time is sent again.
        assert answer.status_code in (502, 503, 504), answer.text
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.5)
    place.accepted.append((time.time(), request_id))


def session() -> requests.Session:
    made = requests.Session()
    made.trust_env = False
    return made


def settled(site: Site) -> None:
    """Until no delivery is on its way; parked ones stay."""
    deadline = time.monotonic() + 180
    while (
        sql(site, "select count(*) from webhook.deliveries where state in ('pending', 'leased', 'retry')")
        != "0"
    ):
        assert time.monotonic() < deadline, "the worker does not come to an end"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def made(place: Place) -> Path:
    """A backup that was made while deliveries came in; the second of two, of which one is kept."""
    first = session()
    early = [f"early-{number}-{time.time_ns()}" for number in range(30)]
    sql(place.first, "insert into users (telegram_id) values (1) on conflict do nothing")
    sql(
        place.first,
        "insert into avatars (user_id, training_type, status, fal_request_id) select (select id from users limit 1), "
        f"'style', 'training', unnest(string_to_array('{','.join(early)}', ','))",
    )
    for request_id in early:
        deliver(place, first, request_id, "in_progress")
    settled(place.first)
    place.backup("-e", "backup_keep=1", "-e", "backup_images=false").must_pass()
    old = place.newest()
    stop = threading.Event()

    def go_on() -> None:
        mine = session()
        while not stop.is_set():
            deliver(place, mine, f"late-{time.time_ns()}")
            time.sleep(0.05)

    sender = threading.Thread(target=go_on)
    sender.start()
    try:
        time.sleep(1.0)
        result = place.backup("-e", "backup_keep=1").must_pass()
    finally:
        stop.set()
        sender.join()
    assert not old.exists(), "the oldest beyond backup_keep stays"
    print(result.output[-1500:])
    return place.newest()


def test_nobody_else_may_read_it_and_no_secret_is_in_clear(place: Place, made: Path) -> None:
    assert made.stat().st_mode & 0o777 == 0o700
    assert place.backups.stat().st_mode & 0o777 == 0o700
    sums = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=made, check=False)
    assert sums.returncode == 0
    secrets = [
        path.read_bytes().strip()
        for path in (place.first.home / "secrets").rglob("*")
        if path.is_file() and not path.name.endswith(".json")
    ]
    secrets.append((place.first.home / "ssl" / "privkey.pem").read_bytes().splitlines()[1])
    assert len(secrets) > 10
    for path in made.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path
        if path.name != "images.tar":
            content = path.read_bytes()
            assert not [secret for secret in secrets if secret in content], f"a secret stands in {path.name}"
    assert (made / "secrets.vault").read_text().startswith("$ANSIBLE_VAULT;")


def refused(result: PlaybookResult, *words: str) -> None:
    assert result.code != 0
    assert result.recap["changed"] == 0, result.output[-3000:]
    said = " ".join(result.output.split())
    for word in words:
        assert word in said, result.output[-3000:]


def test_refusals_come_before_anything_is_touched(place: Place, made: Path, tmp_path: Path) -> None:
    refused(place.restore(place.first, made), "stands on localhost already", "restore_over=true")
    wrong = tmp_path / "wrong"
    wrong.write_text("not the passphrase\n")
    refused(
        place.restore(place.second, made, "-e", f"backup_passphrase_file={wrong}"),
        "the passphrase does not open",
    )
    copy = tmp_path / made.name
    shutil.copytree(made, copy)
    dump = (copy / "database.dump").read_bytes()
    (copy / "database.dump").write_bytes(dump[: len(dump) // 2])
    refused(place.restore(place.second, copy), "it was cut off")
    (copy / "database.dump").write_bytes(dump[:-1] + bytes([dump[-1] ^ 1]))
    refused(place.restore(place.second, copy), "its checksum differs")
    (copy / "database.dump").write_bytes(dump)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["database"]["schema"] = 9999
    before = hashlib.sha256((copy / "manifest.json").read_bytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    refused(place.restore(place.second, copy), "is not what SHA256SUMS says")
    sums = (copy / "SHA256SUMS").read_text()
    after = hashlib.sha256((copy / "manifest.json").read_bytes()).hexdigest()
    (copy / "SHA256SUMS").write_text(sums.replace(before, after))
    refused(place.restore(place.second, copy), "schema 9999")
    (copy / "SHA256SUMS").unlink()
    refused(place.restore(place.second, copy), "is no complete backup")
    refused(place.restore(place.second, "/nowhere"), "There is no backup")
    assert not place.second.home.exists()
    refused(place.first.playbook("playbooks/backup.yml"), "needs a passphrase")


def test_no_room_is_told_before(place: Place) -> None:
    """A backup's place of one megabyte."""
    small = place.backups.parent / "small"
    small.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=True)
    try:
        result = place.backup("-e", f"backup_dir={small}")
        assert result.code != 0
        assert "MB free" in " ".join(result.output.split())
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_second_stack_has_all_that_the_first_had(place: Place, made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    place.restore(place.second, made).must_pass()
    started = time.mktime(time.strptime(manifest["started"], "%Y-%m-%dT%H:%M:%SZ")) - time.timezone
    # Seconds of two clocks' resolution lie between.
    before = {request for at, request in place.accepted if at < started}
    assert len(before) >= 30
    there = set(sql(place.second, "select request_id from webhook.deliveries").split())
    assert before <= there, "what was accepted before the backup began is missing"
    settled(place.first)
    settled(place.second)
    through = int(sql(place.first, "select max(id) from webhook.deliveries where request_id like 'early-%'"))
    digests = table_digests(place.first, through)
    assert table_digests(place.second, through) == digests
    assert not digests["webhook.effects"].startswith("0 ")
    first, second = objects(place.first), objects(place.second)
    missing = {key for key in first if key not in second and not key.startswith("deliveries/segments/")}
    archived = set(
        sql(
            place.second,
            f"select distinct detail ->> 'key' from webhook.effects where name = 'raw_archive' and delivery_id <= {through}",
        ).split()
    )
    assert archived - {""} <= set(second), "the database names an object that is not there"
    assert all(second[key] == first[key] for key in set(first) & set(second))
    assert not {key for key in missing if "early-" in key}
    entries, others = stream(place.first), stream(place.second)
    early = {key: value for key, value in entries.items() if value["request_id"].startswith("early-")}
    assert early
    assert {key: others.get(key) for key in early} == early
    for name in ("fal_webhook_secret", "postgres_password", "minio_secret_key", "fal_dev_key"):
        assert place.second.secret(name) == place.first.secret(name)
    assert (place.second.home / "ssl" / "privkey.pem").read_bytes() == (
        place.first.home / "ssl" / "privkey.pem"
    ).read_bytes()


def test_over_a_standing_stack_the_newer_goes(place: Place, made: Path) -> None:
    deliver(place, session(), "after-the-backup")
    settled(place.first)
    answer = {"restore_over": True, "restore_confirmed": True}
    place.restore(place.first, made, "-e", json.dumps(answer)).must_pass()
    assert (
        sql(place.first, "select count(*) from webhook.deliveries where request_id = 'after-the-backup'")
        == "0"
    )
    assert (
        int(sql(place.first, "select count(*) from webhook.deliveries where request_id like 'early-%'")) >= 30
    )
    assert sql(place.first, "select count(*) from pg_database where datname like 'aisha_%'") == "0"
    deliver(place, session(), "after-the-restore")
    records = (place.first.home / "releases").iterdir()
    assert list(records)
