"""The object store's outlet against a server that answers wrongly: what is an outage, what is one object's fault."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import urllib3
from minio import Minio
from webhook_api.outlets import ObjectStore
from webhook_api.states import EffectError, Failure


class Answers(ThreadingHTTPServer):
    """An S3 server with a bucket; a PUT of `bad` is answered as it is told to."""

    status = 200
    code: str | None = None
    bucket_status = 200
    others: int = 200
    cut = False
    asked: int = 0


class Handler(BaseHTTPRequestHandler):
    server: Answers
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("ETag", '"etag"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.answer(self.server.bucket_status)

    def do_PUT(self) -> None:
        self.server.asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        if not self.path.endswith("/bad"):
            self.answer(self.server.others)
        elif self.server.cut:
            self.close_connection = True
        elif self.server.code is None:
            self.answer(self.server.status, b"refused")
        else:
            xml = f"<Error><Code>{self.server.code}</Code><Message>no</Message></Error>"
            self.answer(self.server.status, xml.encode(), "application/xml")

    def do_DELETE(self) -> None:
        self.answer(204)


@pytest.fixture
def server() -> Iterator[Answers]:
    with Answers(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join(5)


def store(server: Answers) -> ObjectStore:
    """A store whose clock stands still: an open breaker stays open."""
    client = Minio(
        f"127.0.0.1:{server.server_port}",
        access_key="a",
        secret_key="b",
        secure=False,
        region="us-east-1",
        # As the worker's own client has it: the library's default tries for half a minute.
        http_client=urllib3.PoolManager(
            retries=urllib3.Retry(total=1, backoff_factor=0.02, status_forcelist=[500, 502, 503, 504])
        ),
    )
    return ObjectStore(client, "bucket", lambda: 100.0)


def refused(outlet: ObjectStore, key: str = "bad") -> EffectError:
    with pytest.raises(EffectError) as error:
        outlet.put(key, b"x", "text/plain", {})
    return error.value


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, None),
        (400, "KeyTooLongError"),
        (400, "XMinioInvalidObjectName"),
        (409, "XMinioParentIsObject"),
        (405, "MethodNotAllowed"),
        (413, None),
    ],
)
def test_a_refused_object_is_its_own_fault_and_hinders_nobody(
    server: Answers, status: int, code: str | None
) -> None:
    server.status, server.code = status, code
    outlet = store(server)
    for _ in range(3):
        error = refused(outlet)
        assert (error.kind, error.reason) == (Failure.THEIRS, "object_refused")
        assert (code or str(status)) in str(error)
        outlet.put("good", b"x", "text/plain", {})


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (403, "AccessDenied", "object_store_refused"),
        (403, "SignatureDoesNotMatch", "object_store_refused"),
        (403, None, "object_store_unavailable"),
        (400, "AuthorizationHeaderMalformed", "object_store_refused"),
        (404, "NoSuchBucket", "object_store_refused"),
        (408, "RequestTimeout", "object_store_refused"),
        (429, None, "object_store_unavailable"),
        (507, "XMinioStorageFull", "object_store_refused"),
    ],
)
def test_what_would_meet_every_object_is_an_outage(
    server: Answers, status: int, code: str | None, reason: str
) -> None:
    server.status, server.code = status, code
    outlet = store(server)
    error = refused(outlet)
    assert (error.kind, error.reason) == (Failure.OUTAGE, reason)
    asked = server.asked
    assert refused(outlet, "good").kind is Failure.OUTAGE
    assert server.asked == asked


@pytest.mark.parametrize(
    ("status", "code", "cut"),
    [
        (500, "InternalError", False),
        (500, None, False),
        (503, None, False),
        (501, None, False),
        (200, None, True),
    ],
)
def test_a_store_that_fails_for_one_object_alone_hinders_nobody(
    server: Answers, status: int, code: str | None, cut: bool
) -> None:
    """For ever, perhaps: it has a day's patience, and is no outage that is retried without end."""
    server.status, server.code, server.cut = status, code, cut
    outlet = store(server)
    for _ in range(2):
        error = refused(outlet)
        assert (error.kind, error.reason) == (Failure.UNREACHABLE, "object_failing")
        outlet.put("good", b"x", "text/plain", {})


@pytest.mark.parametrize("status", [500, 503, 403])
def test_a_store_that_fails_for_another_object_as_well_is_an_outage(server: Answers, status: int) -> None:
    server.cut, server.others = True, status
    outlet = store(server)
    outlet._bucket_seen = True
    error = refused(outlet)
    assert (error.kind, error.reason) == (Failure.OUTAGE, "object_store_unavailable")
    assert refused(outlet, "good").kind is Failure.OUTAGE, "the breaker is open"


@pytest.mark.parametrize("bucket_status", [400, 403, 404, 503])
def test_a_refusal_by_a_store_without_the_bucket_is_an_outage(server: Answers, bucket_status: int) -> None:
    """As a wrong address or a broken proxy would give: it says 400 to everything."""
    server.status = 400
    outlet = store(server)
    outlet.put("good", b"x", "text/plain", {})
    server.bucket_status = bucket_status
    assert refused(outlet).kind is Failure.OUTAGE


def test_a_store_that_is_away_is_an_outage(server: Answers) -> None:
    outlet = ObjectStore(
        Minio("127.0.0.1:9", access_key="a", secret_key="b", secure=False, region="us-east-1"),
        "bucket",
        lambda: 100.0,
    )
    # The library's own waits are long; that the connection is refused is found out at once.
    outlet._client._http.connection_pool_kw["retries"] = False
    error = refused(outlet)
    assert (error.kind, error.reason) == (Failure.OUTAGE, "object_store_unavailable")
