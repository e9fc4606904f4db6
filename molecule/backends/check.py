"""What a user relies on in the embedded backends: logins, refusals, rights, hardening, ports, data that stays.

Arguments: the site's name and directory. CHECK=mark leaves a mark in every backend first; CHECK=marks wants to find it.
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import redis
from minio import Minio

NAME, DIRECTORY = sys.argv[1], Path(sys.argv[2])
MODE = os.environ.get("CHECK", "")
HOST = "127.0.0.1"
POSTGRES, REDIS, S3 = 25332, 25379, 25390
#: Two parts of a multipart upload, and a piece; the same bytes in every run.
OBJECT = random.Random(1).randbytes(11_000_000)
#: What the service's role must not do in the bot's tables, and how it is told so.
FORBIDDEN = {
    "DELETE FROM avatars": "permission denied",
    "INSERT INTO users (telegram_id) VALUES (43)": "permission denied",
    "CREATE TABLE public.mine (id int)": "permission denied",
    "ALTER ROLE aisha PASSWORD 'x'": "permission denied",
    "DROP TABLE avatars": "must be owner",
}
UIDS = {"registry": 10014, "postgres": 10011, "redis": 10012, "s3": 10013}


def secret(name: str) -> str:
    """A secret, as its reader has it."""
    return (DIRECTORY / "secrets" / name).read_text().strip()


def connect(user: str, password: str) -> psycopg.Connection[Any]:
    """A session in the service's database."""
    return psycopg.connect(
        host=HOST,
        port=POSTGRES,
        user=user,
        password=password,
        dbname="aisha",
        connect_timeout=5,
        autocommit=True,
    )


def refused(what: str, action: Any, expected: str) -> None:
    """The action must fail, and say so in these words."""
    try:
        action()
    except Exception as error:
        message = str(error)
    else:
        message = "it was accepted"
    assert expected in message, f"{what}: {message}"


def postgres() -> None:
    """Logins, checksums, durability, tables and the rights on them."""
    bot, webhook = secret("postgres/postgres_bot_password"), secret("postgres/postgres_webhook_password")
    refused("a wrong password", lambda: connect("aisha_webhook", "wrong"), "password authentication failed")
    refused(
        "another role's password", lambda: connect("aisha_webhook", bot), "password authentication failed"
    )
    with connect("postgres", secret("postgres/postgres_password")) as admin:
        for setting, wanted in {
            "data_checksums": "on",
            "fsync": "on",
            "full_page_writes": "on",
            "synchronous_commit": "on",
            "password_encryption": "scram-sha-256",
            "TimeZone": "Asia/Almaty",
            "server_encoding": "UTF8",
        }.items():
            (found,) = admin.execute(f"SHOW {setting}").fetchone() or ("",)
            assert found == wanted, f"{setting} is {found}"
        rows = admin.execute(
            "SELECT rolname FROM pg_authid WHERE rolpassword NOT LIKE 'SCRAM-SHA-256$%'"
        ).fetchall()
        assert not rows, f"weak password digests of {rows}"
    with connect("aisha", bot) as session:
        session.execute("INSERT INTO users (telegram_id) VALUES (42) ON CONFLICT DO NOTHING")
        session.execute(
            "INSERT INTO avatars (user_id, name, fal_request_id) SELECT id, 'check', 'check-1' FROM users "
            "WHERE NOT EXISTS (SELECT FROM avatars WHERE fal_request_id = 'check-1')"
        )
    with connect("aisha_webhook", webhook) as session:
        session.execute("UPDATE avatars SET status = 'completed' WHERE fal_request_id = 'check-1'")
        session.execute("CREATE TABLE IF NOT EXISTS webhook.marks (mark text PRIMARY KEY)")
        for statement, words in FORBIDDEN.items():
            refused(statement, partial(session.execute, statement), words)
        if MODE == "mark":
            session.execute("INSERT INTO webhook.marks VALUES ('here') ON CONFLICT DO NOTHING")
        if MODE == "marks":
            assert session.execute("SELECT mark FROM webhook.marks").fetchall() == [("here",)], (
                "the row is gone"
            )


def cache() -> None:
    """Login, policies and durability of Redis."""
    refused("no password", lambda: redis.Redis(port=REDIS, protocol=2).ping(), "Authentication required")
    refused(
        "a wrong password",
        lambda: redis.Redis(port=REDIS, protocol=2, password="x").ping(),
        "invalid username-password",
    )
    with redis.Redis(port=REDIS, password=secret("redis/redis_password"), decode_responses=True) as client:
        settings: dict[str, str] = client.config_get("*")  # type: ignore[assignment]
        wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "save": ""}
        assert {key: settings[key] for key in wanted} == wanted
        assert int(settings["maxmemory"]) == 320 * 1024 * 1024
        if MODE == "mark":
            client.delete("check:stream")
            client.xadd("check:stream", {"mark": "here"})
        if MODE == "marks":
            assert [fields for _, fields in client.xrange("check:stream")] == [{"mark": "here"}], (
                "the entry is gone"
            )  # type: ignore[union-attr]


def object_store() -> None:
    """Keys, the bucket, multipart uploads and downloads byte for byte."""
    access, key = secret("s3/minio_access_key"), secret("s3/minio_secret_key")
    refused(
        "a wrong key",
        lambda: Minio(f"{HOST}:{S3}", access, "x" * 40, secure=False).list_buckets(),
        "SignatureDoesNotMatch",
    )
    refused("no key", lambda: Minio(f"{HOST}:{S3}", secure=False).list_buckets(), "400")
    client = Minio(f"{HOST}:{S3}", access, key, secure=False)
    assert [bucket.name for bucket in client.list_buckets()] == ["aisha-files"]
    if MODE != "marks":
        client.put_object("aisha-files", "check/one.bin", io.BytesIO(OBJECT), -1, part_size=5 * 1024 * 1024)
    answer = client.get_object("aisha-files", "check/one.bin")
    assert answer.read() == OBJECT, "the object is not what was put"
    answer.close()
    client.put_object("aisha-files", "check/two.bin", io.BytesIO(b"two"), 3)
    assert {found.object_name for found in client.list_objects("aisha-files", recursive=True)} == {
        "check/one.bin",
        "check/two.bin",
    }
    client.remove_object("aisha-files", "check/two.bin")


def hardening(service: str) -> None:
    """How the container runs, as the engine sees it."""
    answer = subprocess.run(
        ["docker", "inspect", f"{NAME}-{service}"], check=True, capture_output=True, text=True
    )
    (found,) = json.loads(answer.stdout)
    host, config = found["HostConfig"], found["Config"]
    assert config["User"] == f"{UIDS[service]}:{UIDS[service]}"
    assert host["ReadonlyRootfs"], service
    assert host["CapDrop"] == ["ALL"], service
    assert not host["CapAdd"], service
    assert not host["Privileged"], service
    assert "no-new-privileges:true" in host["SecurityOpt"], service
    assert host["Memory"] > 0, service
    assert host["PidsLimit"] > 0, service
    assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-file": "3", "max-size": "10m"}}, service
    assert host["RestartPolicy"]["Name"] == "unless-stopped", service
    bindings = [entry for entries in host["PortBindings"].values() for entry in entries]
    assert bindings, service
    assert all(entry["HostIp"] == "127.0.0.1" for entry in bindings), (
        f"{service} is published beyond loopback: {bindings}"
    )
    health = config["Healthcheck"]
    assert health["StartInterval"] == 500_000_000, service
    assert health["StartPeriod"] > 0, service
    assert found["State"]["Health"]["Status"] == "healthy", service
    (volume,) = [mount for mount in found["Mounts"] if mount["Type"] == "volume"]
    assert volume["Name"] == f"{NAME}-{service}", service
    processes = subprocess.run(
        ["docker", "top", f"{NAME}-{service}", "-o", "pid,uid"], check=True, capture_output=True, text=True
    ).stdout.split()[3::2]
    assert set(processes) == {str(UIDS[service])}, f"{service} has processes of {processes}"


if __name__ == "__main__":
    postgres()
    cache()
    object_store()
    for each in UIDS:
        hardening(each)
