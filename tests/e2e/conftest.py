"""One site for all end-to-end tests: made by site.yml under a name of its own, with a media host beside it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest
import redis
import requests
from minio import Minio
from nacl.signing import SigningKey
from psycopg.rows import dict_row

from tests.support.apiservice import BUSY
from tests.support.sites import Site

HERE = Path(__file__).parent
ACCOUNT = "aisha-dev"
MEDIA = "media:8099"
MEDIA_FILES = Path("/srv/media")
NUMBER = 1
PORTS = {"backends_postgres_port": 20132, "backends_redis_port": 20179, "backends_s3_port": 20190}
STREAM = "aisha:webhook:events"
BUCKET = "aisha-files"
PATH = "/api/v1/avatar/status_update"

Answer = TypeVar("Answer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test's time includes that of the site that all of them use."""
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1800))


def docker(*arguments: str) -> str:
    """Output of a docker command; raises with its error output."""
    run = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"docker {' '.join(arguments)}: {run.stderr}"
    return run.stdout.strip()


def wait_for(what: str, probe: Callable[[], Answer], seconds: float = 60) -> Answer:
    """The first truthy answer of `probe`; AssertionError that names `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return answer


def busy(answer: requests.Response) -> bool:
    """Whether the service did as it should, on a machine that is too busy for its deadlines."""
    return answer.status_code == 503 and answer.json()["error"] in BUSY


@dataclass
class Stack:
    """A standing site, seen from outside: what fal, the bot and an operator can do with it."""

    site: Site
    media_files: Path
    session: requests.Session = field(default_factory=requests.Session)

    def url(self, path: str = PATH, port: str = "site_https_alt_port") -> str:
        """Address of a path through nginx."""
        scheme = "http" if port == "site_http_port" else "https"
        return f"{scheme}://localhost:{self.site.settings[port]}{path}"

    def signed(
        self, body: bytes, request_id: str, *, key: SigningKey | None = None, at: float | None = None
    ) -> dict[str, str]:
        """The headers of a delivery as fal sends them (fal's contract: request id, user id, time, hash of the raw body)."""
        stamp = str(int(at if at is not None else time.time()))
        message = "\n".join([request_id, ACCOUNT, stamp, hashlib.sha256(body).hexdigest()]).encode()
        key = key or SigningKey(bytes.fromhex(self.site.secret("fal_dev_key")))
        return {
            "Content-Type": "application/json",
            "X-Fal-Webhook-Request-Id": request_id,
            "X-Fal-Webhook-User-Id": ACCOUNT,
            "X-Fal-Webhook-Timestamp": stamp,
            "X-Fal-Webhook-Signature": key.sign(message).signature.hex(),
        }

    def deliver(self, payload: dict[str, Any], **options: Any) -> requests.Response:
        """Send a signed delivery through nginx, as fal does: again after a 503 that a busy machine explains."""
        body = json.dumps(payload).encode()
        deadline = time.monotonic() + 60
        while True:
            headers = self.signed(body, payload["request_id"], **options)
            answer = self.session.post(self.url(), data=body, headers=headers, verify=False, timeout=20)
            if not busy(answer) or time.monotonic() > deadline:
                return answer
            time.sleep(0.2)

    def query(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """Rows of a query in the bot's database, as its superuser."""
        password = self.site.secret("postgres_password")
        address = f"postgresql://postgres:{password}@127.0.0.1:{PORTS['backends_postgres_port']}/aisha"
        with psycopg.connect(address, row_factory=dict_row, autocommit=True) as connection:
            cursor = connection.execute(sql, values)
            return cursor.fetchall() if cursor.description else []

    def delivery_rows(self, request_id: str) -> list[dict[str, Any]]:
        """Inbox rows of a request id."""
        return self.query("SELECT * FROM webhook.deliveries WHERE request_id = %s ORDER BY id", request_id)

    def done(self, request_id: str, seconds: float = 60) -> dict[str, Any]:
        """The one inbox row of a request id, once it is done."""

        def probe() -> dict[str, Any] | None:
            rows = self.delivery_rows(request_id)
            return rows[0] if rows and rows[0]["state"] == "done" else None

        return wait_for(
            f"delivery {request_id} done, last seen {self.delivery_rows(request_id)}", probe, seconds
        )

    def add_avatar(self, training_type: str = "portrait") -> str:
        """A user and an avatar in training, as the bot leaves them; returns the request id that fal gave."""
        request_id, user = str(uuid.uuid4()), str(uuid.uuid4())
        self.query("INSERT INTO users (id, telegram_id) VALUES (%s, %s)", user, uuid.UUID(user).int % 10**12)
        self.query(
            "INSERT INTO avatars (id, user_id, name, training_type, status, fal_request_id, training_progress)"
            " VALUES (%s, %s, 'test', %s, 'training', %s, 0)",
            str(uuid.uuid4()), user, training_type, request_id,
        )  # fmt: skip
        return request_id

    def avatar(self, request_id: str) -> dict[str, Any]:
        """The avatar of a request id."""
        (row,) = self.query("SELECT * FROM avatars WHERE fal_request_id = %s", request_id)
        return row

    def stream_entries(self, request_id: str) -> list[dict[str, str]]:
        """Entries of the bot's stream that speak of a request id."""
        client = redis.Redis(
            port=PORTS["backends_redis_port"],
            password=self.site.secret("redis_password"),
            decode_responses=True,
        )
        with client:
            return [entry for _, entry in client.xrange(STREAM) if entry.get("request_id") == request_id]

    def objects(self, request_id: str) -> dict[str, bytes]:
        """Objects of the bucket whose key names a request id, with their bytes."""
        client = Minio(
            f"127.0.0.1:{PORTS['backends_s3_port']}",
            access_key=self.site.secret("minio_access_key"),
            secret_key=self.site.secret("minio_secret_key"),
            secure=False,
        )
        found = {}
        for prefix in ("webhooks/", "deliveries/"):
            for item in client.list_objects(BUCKET, prefix=prefix, recursive=True):
                if request_id in item.object_name:
                    answer = client.get_object(BUCKET, item.object_name)
                    found[item.object_name] = answer.read()
                    answer.close()
        return found

    def portrait(self, request_id: str) -> tuple[dict[str, Any], dict[str, bytes]]:
        """A portrait training's result with two artifacts on the media host, and the artifacts' bytes by file name."""
        files = {
            f"{request_id}-lora.safetensors": hashlib.shake_256(request_id.encode()).digest(3_000_001),
            f"{request_id}-config.json": json.dumps({"request": request_id}).encode(),
        }
        for name, data in files.items():
            (self.media_files / name).write_bytes(data)
        lora, config = files
        document = {
            "request_id": request_id,
            "gateway_request_id": request_id,
            "status": "OK",
            "payload": {
                "diffusers_lora_file": self._file(lora, len(files[lora])),
                "config_file": self._file(config, len(files[config])),
            },
        }
        return document, files

    @staticmethod
    def _file(name: str, size: int) -> dict[str, Any]:
        kind = "application/octet-stream"
        return {"url": f"http://{MEDIA}/{name}", "content_type": kind, "file_name": name, "file_size": size}


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The site, up; its media host; and both gone afterwards."""
    # A replaced nginx waits for its idle clients no longer than it keeps them.
    variables = {**PORTS, "stack_archive_allow_http_hosts": [MEDIA], "edge_keepalive_seconds": 5}
    site = Site("wht-e2e", tmp_path_factory.mktemp("wht-e2e"), NUMBER, variables)
    media = tmp_path_factory.mktemp("media")
    media.chmod(0o755)
    try:
        result = site.site()
        result.must_pass()
        image = docker("inspect", "--format", "{{.Config.Image}}", f"{site.name}-api-1")
        docker(
            "run", "--detach", "--name", f"{site.name}-media", "--network", site.settings["site_network"],
            "--network-alias", MEDIA.split(":")[0], "--volume", f"{media}:{MEDIA_FILES}:ro",
            "--entrypoint", "python3", image, "-m", "http.server", MEDIA.split(":")[1], "--directory", str(MEDIA_FILES),
        )  # fmt: skip
        yield Stack(site, media)
    finally:
        subprocess.run(["docker", "rm", "--force", f"{site.name}-media"], capture_output=True, check=False)
        site.teardown()
