"""What a sender and an operator rely on at the edge: real nginx before two real upstreams, on this machine's engine.

Run by molecule's verify (`molecule test -s edge`); pytest alone does not collect it: it needs the scenario's containers.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import requests
import urllib3

pytestmark = pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")

NGINX = "mol-edge-nginx"
UPSTREAMS = ("mol-edge-api-1", "mol-edge-api-2")
HTTP, HTTPS, HTTPS_ALT = 18180, 18143, 18144
LIMIT = 1048576
# As in molecule.yml.
PER_ADDRESS = 160
DELIVERY = "/api/v1/avatar/status_update"
STATE = Path("/opt/mol-edge/state")
MOUNTED = '{{range .Mounts}}{{if eq .Destination "/etc/nginx/site"}}{{.Source}}{{end}}{{end}}'
SIGNED = {"X-Fal-Webhook-Signature": "00" * 64, "Content-Type": "application/json"}


def docker(*arguments: str) -> str:
    run = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"docker {' '.join(arguments)}: {run.stderr}"
    return run.stdout + run.stderr


def wait_for(what: str, probe: Callable[[], Any], seconds: float = 20) -> Any:
    """The first truthy answer of `probe`; an AssertionError that names `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)
    return answer


def ask(path: str, port: int = HTTP, method: str = "POST", **options: Any) -> requests.Response:
    scheme = "http" if port == HTTP else "https"
    headers = {**SIGNED, **options.pop("headers", {})}
    address = f"{scheme}://127.0.0.1:{port}{path}"
    return requests.request(method, address, headers=headers, verify=False, timeout=20, **options)


def log_line(request_id: str) -> dict[str, Any]:
    """The access log's line of a request."""

    def probe() -> dict[str, Any] | None:
        for line in docker("logs", "--tail", "200", NGINX).splitlines():
            if request_id in line:
                return json.loads(line)
        return None

    return wait_for(f"log line of {request_id}", probe)


def connects(number: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((f"172.31.80.1{number}", 8000)) == 0


@contextmanager
def down(number: int) -> Iterator[None]:
    """An upstream that is gone for the time of a block."""
    docker("kill", UPSTREAMS[number - 1])
    wait_for("the upstream is gone", lambda: not connects(number))
    try:
        yield
    finally:
        docker("start", UPSTREAMS[number - 1])
        wait_for("the upstream is back", lambda: connects(number))


@pytest.fixture(scope="module", autouse=True)
def _ready() -> None:
    urllib3.disable_warnings()
    for number in (1, 2):
        wait_for(f"upstream {number}", lambda number=number: connects(number))

    def answers() -> bool:
        try:
            return ask("/health", method="GET").status_code == 200
        except requests.ConnectionError:
            return False

    wait_for("nginx", answers)


@pytest.fixture(scope="module", autouse=True)
def silent_client(_ready: None) -> Iterator[Future[float]]:
    """A client that stops in the middle of its body when the tests begin; after how many seconds it was let go."""

    def wait_until_let_go() -> float:
        with socket.create_connection(("127.0.0.1", HTTP), timeout=60) as connection:
            connection.sendall(
                f"POST {DELIVERY} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nonly this".encode()
            )
            started = time.monotonic()
            with suppress(ConnectionResetError):
                assert connection.recv(1) in (b"", b"H")
            return time.monotonic() - started

    with ThreadPoolExecutor(1) as senders:
        yield senders.submit(wait_until_let_go)


def assert_edge_error(answer: requests.Response, status: int, reason: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error", "message", "request_id"}
    assert body["error"] == reason
    assert body["request_id"] == answer.headers["X-Request-Id"]
    assert log_line(body["request_id"])["status"] == str(status)


# -- switches, and the control socket -------------------------------------------------------------------------------


def control(path: str) -> str:
    """What nginx answers on its own socket."""
    run = subprocess.run(
        ["docker", "exec", NGINX, "curl", "-s", "--unix-socket", "/tmp/edge.sock", f"http://edge{path}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return run.stdout


@contextmanager
def switched(*names: str) -> Iterator[None]:
    """Switch files that are there for the time of a block."""
    files = [STATE / name for name in names]
    for file in files:
        file.touch(mode=0o644)
    try:
        yield
    finally:
        for file in files:
            file.unlink()


def instances_asked(number: int = 6) -> set[str]:
    return {ask(DELIVERY, data=b"x").json()["instance"] for _ in range(number)}


def test_the_control_socket_names_this_edge_and_its_switches() -> None:
    edge = control("/edge_alive")
    assert edge == docker("inspect", "--format", MOUNTED, NGINX).strip().rpartition("/")[2]
    everything_on = {"edge": edge, "draining": False, "instances": {"api-1": "up", "api-2": "up"}}
    assert json.loads(control("/edge_state")) == everything_on
    with switched("api-2.down", f"{edge}.draining", "another-edge.draining"):
        found = json.loads(control("/edge_state"))
    assert found == {"edge": edge, "draining": True, "instances": {"api-1": "up", "api-2": "down"}}
    assert "Waiting:" in control("/edge_connections")


@pytest.mark.parametrize("number", [1, 2])
def test_the_control_socket_asks_one_instance_and_no_other(number: int) -> None:
    with switched(f"api-{number}.down"):
        answers = [json.loads(control(f"/instance/api-{number}/health")) for _ in range(2)]
    assert [(answer["instance"], answer["path"]) for answer in answers] == [(str(number), "/health")] * 2


def test_nobody_reaches_the_control_socket_from_outside() -> None:
    for path in ("/edge_state", "/edge_connections", "/instance/api-1/health"):
        assert ask(path, method="GET", headers={"Host": "edge"}).status_code == 404
    assert ask("/edge_alive", method="GET", headers={"Host": "edge"}).content == b""


@pytest.mark.parametrize(
    ("files", "asked"),
    [
        (["api-1.down"], {"2"}),
        (["api-2.down"], {"1"}),
        (["api-1.down", "api-2.down"], {"1", "2"}),
        (["api-3.down", "api-1.down.tmp", "other.draining"], {"1", "2"}),
    ],
)
def test_an_instance_that_is_switched_off_gets_no_delivery(files: list[str], asked: set[str]) -> None:
    with switched(*files):
        assert instances_asked() == asked
    assert instances_asked() == {"1", "2"}


def test_a_switch_that_a_crash_left_behind_loses_no_delivery() -> None:
    with switched("api-1.down"), down(2):
        assert instances_asked(3) == {"1"}, "the last one that answers is asked"


def test_the_only_instance_in_use_is_asked_once_more_before_one_that_is_being_replaced() -> None:
    """One broken connection to the instance that serves alone is no 502 while the other one is gone."""
    with switched("api-2.down"), down(2):
        answers = [ask("/api/v1/avatar/stumble", data=b"payload") for _ in range(3)]
    assert [(answer.status_code, answer.json()["instance"]) for answer in answers] == [(200, "1")] * 3
    tried = log_line(answers[0].headers["X-Request-Id"])["upstream_addr"].split(", ")
    assert tried == ["172.31.80.11:8000"] * 2


@pytest.mark.parametrize("port", [HTTP, HTTPS])
def test_while_nginx_drains_every_answer_closes_its_connection(port: int) -> None:
    asked: list[tuple[str, str, int]] = [
        ("POST", DELIVERY, 200),
        ("GET", "/health", 200),
        ("GET", "/edge_alive", 204),
        ("GET", "/nginx_status", 200),
        ("GET", "/nothing-here", 404),
        ("GET", "/_error", 404),
        ("GET", "/_error_494", 404),
        ("GET", "/_drain", 404),
    ]
    with requests.Session() as session:
        scheme = "http" if port == HTTP else "https"

        def answers() -> list[tuple[int, str]]:
            found = []
            for method, path, _ in asked:
                body = b"x" * 2000 if method == "POST" else None
                address = f"{scheme}://127.0.0.1:{port}{path}"
                answer = session.request(method, address, data=body, headers=SIGNED, timeout=10, verify=False)
                found.append((answer.status_code, answer.headers["Connection"]))
            return found

        assert answers() == [(status, "keep-alive") for *_, status in asked]
        with switched(f"{control('/edge_alive')}.draining"):
            assert answers() == [(status, "close") for *_, status in asked]
        assert answers() == [(status, "keep-alive") for *_, status in asked]


# -- errors ---------------------------------------------------------------------------------------------------------


def test_unknown_address_is_a_json_404_and_never_reaches_an_instance() -> None:
    answer = ask("/wp-login.php", method="GET")
    assert_edge_error(answer, 404, "not_found")
    assert log_line(answer.headers["X-Request-Id"])["upstream_addr"] == ""


@pytest.mark.parametrize("port", [HTTP, HTTPS, HTTPS_ALT])
def test_a_body_at_the_limit_passes_and_one_byte_more_does_not(port: int) -> None:
    fits = ask(DELIVERY, port, data=b"a" * LIMIT)
    assert (fits.status_code, fits.json()["length"]) == (200, LIMIT)
    assert_edge_error(ask(DELIVERY, port, data=b"a" * (LIMIT + 1)), 413, "body_too_large")


def test_a_chunked_body_over_the_limit_is_refused_too() -> None:
    assert_edge_error(
        ask(DELIVERY, data=(b"a" * 65536 for _ in range(LIMIT // 65536 + 1))), 413, "body_too_large"
    )


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX-Long: " + b"a" * 70000 + b"\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", 505),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    ],
)
def test_what_is_not_http_is_answered_in_json(raw: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", HTTP), timeout=5) as connection:
        connection.sendall(raw)
        head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert set(json.loads(body)) == {"error", "message", "request_id"}


def test_plain_http_on_an_https_port_is_answered_in_json() -> None:
    answer = requests.get(f"http://127.0.0.1:{HTTPS}/health", timeout=5)
    assert (answer.status_code, answer.json()["error"]) == (400, "plain_http_on_https_port")


@pytest.mark.parametrize(("last", "status"), [("refused", 401), ("broken", 500), ("down", 503)])
def test_the_applications_own_errors_pass_through_untouched(last: str, status: int) -> None:
    answer = ask(f"/api/v1/avatar/{last}", data=b"x")
    assert (answer.status_code, answer.json()["error"]) == (status, "from_the_app")
    assert "," not in log_line(answer.headers["X-Request-Id"])["upstream_addr"], "it was asked once"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_which_methods_are_allowed_is_the_applications_business(method: str) -> None:
    assert ask(DELIVERY, method=method).json()["method"] == method


# -- what an instance gets, and what comes back ---------------------------------------------------------------------


def test_signed_headers_body_and_query_pass_unchanged() -> None:
    sent = {
        "X-Fal-Webhook-Request-Id": "764cabcf-b745-4b3e-ae38-1200304cf45b",
        "X-Fal-Webhook-User-Id": "aisha-dev",
        "X-Fal-Webhook-Timestamp": "1760000000",
        "X-Webhook-Secret": "S3cret/with+signs=",
    }
    body = os.urandom(70_001)
    answer = ask(f"{DELIVERY}?training_type=portrait", headers=sent, data=body).json()
    assert answer["path"] == f"{DELIVERY}?training_type=portrait"
    assert answer["length"] == len(body)
    for name, value in {**SIGNED, **sent}.items():
        assert answer["headers"][name.lower()] == value


def test_what_a_client_claims_about_itself_is_not_passed_on() -> None:
    lies = {
        "X-Forwarded-For": "192.0.2.66",
        "X-Real-IP": "192.0.2.66",
        "Forwarded": "for=192.0.2.66",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "evil.example",
        "X-Request-Id": "mine",
        "X_Webhook_Secret": "underscores",
    }
    seen = ask(DELIVERY, headers=lies, data=b"x").json()["headers"]
    assert seen["x-forwarded-for"] == seen["x-real-ip"] == "127.0.0.1"
    assert seen["x-forwarded-proto"] == "http"
    assert not {"forwarded", "x-forwarded-host", "x_webhook_secret"} & set(seen)
    assert "192.0.2.66" not in json.dumps(seen)


def test_one_request_id_at_client_instance_and_log() -> None:
    answer = ask(DELIVERY, headers={"X-Request-Id": "mine"}, data=b"x")
    request_id = answer.headers["X-Request-Id"]
    assert len(request_id) == 32
    assert "," not in request_id
    assert answer.json()["headers"]["x-request-id"] == request_id
    assert log_line(request_id)["request_id"] == request_id


def test_nothing_is_cached_and_the_version_is_not_told() -> None:
    answer = ask(DELIVERY, data=b"x")
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Server"] == "nginx"
    numbers = {ask(DELIVERY, data=b"same").json()["instance"] for _ in range(6)}
    assert numbers == {"1", "2"}, "both instances get deliveries"


def test_hsts_is_for_https_alone() -> None:
    assert "Strict-Transport-Security" not in ask("/health", HTTP, "GET").headers
    assert ask("/health", HTTPS, "GET").headers["Strict-Transport-Security"].startswith("max-age=")


# -- the log --------------------------------------------------------------------------------------------------------


def test_the_log_has_neither_query_nor_secret_nor_body() -> None:
    headers = {
        "X-Webhook-Secret": "hush-secret",
        "Authorization": "Bearer hush-token",
        "Referer": "http://x/?hush-referer=1",
    }
    ids = [
        ask(f"{path}?key=hush-query", headers=headers, data=b"hush-body").headers["X-Request-Id"]
        for path in (DELIVERY, "/nothing-here")
    ]
    ids.append(ask(f"{DELIVERY}?key=hush-query", data=b"hush" * LIMIT).headers["X-Request-Id"])
    lines = [log_line(request_id) for request_id in ids]
    assert [line["path"] for line in lines] == [DELIVERY, "/nothing-here", DELIVERY]
    assert {line["method"] for line in lines} == {"POST"}
    assert "hush" not in docker("logs", NGINX)


def test_a_hostile_name_cannot_break_a_log_line() -> None:
    request_id = ask(
        "/health", method="GET", headers={"User-Agent": '","status":"200","x":"\t\u00e9'}
    ).headers["X-Request-Id"]
    line = log_line(request_id)
    assert line["path"] == "/health"
    assert line["user_agent"].startswith('","status":"200"')


# -- TLS ------------------------------------------------------------------------------------------------------------


def handshake(low: ssl.TLSVersion, high: ssl.TLSVersion, alpn: list[str]) -> tuple[str | None, str | None]:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version, context.maximum_version = low, high
    context.set_alpn_protocols(alpn)
    with (
        socket.create_connection(("127.0.0.1", HTTPS_ALT), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        return secure.version(), secure.selected_alpn_protocol()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_tls_is_refused_and_new_tls_is_spoken() -> None:
    with pytest.raises(ssl.SSLError):
        handshake(ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ["http/1.1"])
    assert handshake(ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2, ["http/1.1"]) == ("TLSv1.2", "http/1.1")
    assert handshake(ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_3, ["h2", "http/1.1"]) == ("TLSv1.3", "h2")


def test_http_2_carries_a_delivery() -> None:
    told = docker(
        "exec", NGINX, "curl", "-sk", "--http2", "-X", "POST", "--data-binary", "hello", "-w", "\n%{http_version}",
        "-H", f"X-Fal-Webhook-Signature: {'00' * 64}", f"https://127.0.0.1:{HTTPS_ALT}{DELIVERY}",
    )  # fmt: skip
    body, _, version = told.rpartition("\n")
    assert (version, json.loads(body)["length"]) == ("2", 5)


def test_the_certificate_is_for_this_host_and_its_key_is_for_nginx_alone() -> None:
    pem = ssl.get_server_certificate(("127.0.0.1", HTTPS))
    context = ssl.create_default_context(cadata=pem)
    for name in ("localhost", "127.0.0.1"):
        with (
            socket.create_connection(("127.0.0.1", HTTPS), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=name) as secure,
        ):
            assert secure.version() == "TLSv1.3"
    stat = os.stat("/opt/mol-edge/ssl/privkey.pem")
    assert (stat.st_uid, stat.st_mode & 0o777) == (10002, 0o400)


# -- instances that fail --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
def test_a_dead_instance_costs_no_delivery(number: int) -> None:
    with down(number):
        answers = [ask(DELIVERY, data=b"x") for _ in range(8)]
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["instance"] for answer in answers} == {str(3 - number)}
    assert max(answer.elapsed.total_seconds() for answer in answers) < 5


def test_a_post_that_an_instance_dropped_is_sent_to_the_other_one() -> None:
    answers = [ask("/api/v1/avatar/drop", data=b"payload") for _ in range(6)]
    assert {
        (answer.status_code, answer.json()["instance"], answer.json()["length"]) for answer in answers
    } == {(200, "2", 7)}
    tried = [log_line(answer.headers["X-Request-Id"])["upstream_addr"] for answer in answers]
    assert any("," in addresses for addresses in tried), "the first instance was asked and dropped it"


def test_a_silent_instance_costs_no_delivery_and_the_answer_comes_in_time() -> None:
    with ThreadPoolExecutor(2) as senders:
        answers = list(senders.map(lambda _: ask("/api/v1/avatar/silent", data=b"x"), range(2)))
    assert {(answer.status_code, answer.json()["instance"]) for answer in answers} == {(200, "2")}
    assert max(answer.elapsed.total_seconds() for answer in answers) < 14


def test_without_any_instance_the_answer_says_so_at_once() -> None:
    with down(1), down(2):
        answer = ask(DELIVERY, data=b"x")
        assert answer.elapsed.total_seconds() < 5
        assert answer.status_code in (502, 504)
        assert answer.json()["error"] in ("no_instance", "instance_timeout")
    wait_for("deliveries pass again", lambda: ask(DELIVERY, data=b"x").status_code == 200)


def test_both_instances_replaced_in_turn_cost_nothing_afterwards() -> None:
    """With nginx's default (max_fails=1, fail_timeout=10s) both would now count as dead for ten seconds."""
    for number in (1, 2):
        with down(number):
            assert ask(DELIVERY, data=b"x").status_code == 200
    assert [ask(DELIVERY, data=b"x").status_code for _ in range(4)] == [200] * 4


# -- limits and local pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [SIGNED, {"X-Webhook-Secret": "S3cret/with+sign"}])
def test_deliveries_with_credentials_are_never_limited(headers: dict[str, str]) -> None:
    """Three times the burst, from eight senders at once: faster than anything without credentials may be."""

    def deliver(_: int) -> int:
        address = f"http://127.0.0.1:{HTTP}{DELIVERY}"
        return requests.post(address, data=b"x", headers=headers, timeout=10).status_code

    with ThreadPoolExecutor(8) as senders:
        assert list(senders.map(deliver, range(600))) == [200] * 600


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Fal-Webhook-Signature": "0"},
        {"X-Fal-Webhook-Signature": "00" * 65},
        {"X-Fal-Webhook-Signature": "zz" * 64},
        {"X-Webhook-Secret": "fifteen-letters"},
    ],
)
def test_garbage_without_plausible_credentials_is_limited_and_does_not_limit_others(
    headers: dict[str, str],
) -> None:
    """More than the burst at once, from eight senders, until one of them is told so."""
    deadline = time.monotonic() + 60

    def garbage(_: int) -> int:
        answer = requests.post(f"http://127.0.0.1:{HTTP}{DELIVERY}", data=b"x", headers=headers, timeout=10)
        if answer.status_code == 429:
            assert answer.json()["error"] == "too_many_requests"
        return answer.status_code

    with ThreadPoolExecutor(8) as senders:
        seen: set[int] = set()
        while 429 not in seen:
            assert time.monotonic() < deadline, "nothing was limited"
            seen |= set(senders.map(garbage, range(400)))
    assert seen <= {200, 429}
    assert ask(DELIVERY, data=b"x").status_code == 200


KEPT_BACK = 50


@contextmanager
def slow_senders(number: int, length: int = LIMIT) -> Iterator[None]:
    """Connections with forged credentials (no limit of rate) that send their bodies but for the last few bytes."""
    forged = f"X-Fal-Webhook-Signature: {'00' * 64}\r\n"
    head = f"POST {DELIVERY} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n{forged}\r\n".encode()
    stop = threading.Event()
    senders: list[socket.socket] = []

    def trickle() -> None:
        # Those that began first must not be given up for silent before the last one has begun.
        for _ in range(KEPT_BACK - 2):
            if stop.wait(2):
                return
            for sender in list(senders):
                with suppress(OSError):
                    sender.send(b"a")

    with ExitStack() as stack:
        trickling = threading.Thread(target=trickle)
        trickling.start()
        stack.callback(trickling.join)
        stack.callback(stop.set)
        for _ in range(number):
            sender = stack.enter_context(socket.create_connection(("127.0.0.1", HTTP), timeout=10))
            sender.sendall(head + b"a" * (length - KEPT_BACK))
            senders.append(sender)
        yield


def received_bytes() -> int:
    """Bytes of the bodies that nginx has on its disk: its open files there, which have no names."""
    script = (
        "find /proc/[0-9]*/fd -lname '/var/cache/nginx-body/*' -exec stat -L -c %s {} + 2>/dev/null; true"
    )
    return sum(int(size) for size in docker("exec", NGINX, "sh", "-c", script).split())


def test_slow_senders_take_no_room_from_deliveries() -> None:
    """More bytes are on their way than nginx has memory (96 MB), let alone tmpfs (16 MB)."""
    with slow_senders(120):
        # What is not yet a buffer full is still in memory.
        wait_for("the bodies are on the disk", lambda: received_bytes() > 115 * LIMIT, 60)
        answers = [ask(DELIVERY, data=b"a" * LIMIT) for _ in range(3)]
    assert [(answer.status_code, answer.json()["length"]) for answer in answers] == [(200, LIMIT)] * 3
    wait_for("nothing of them stays", lambda: received_bytes() == 0)
    state = docker("inspect", "--format", "{{.State.OOMKilled}} {{.RestartCount}}", NGINX)
    assert state.split() == ["false", "0"]
    assert docker("exec", NGINX, "find", "/var/cache/nginx-body", "-type", "f") == ""


def test_many_large_deliveries_at_once_all_arrive() -> None:
    with ThreadPoolExecutor(40) as senders:
        answers = list(senders.map(lambda _: ask(DELIVERY, data=b"a" * LIMIT), range(80)))
    assert {(answer.status_code, answer.json()["length"]) for answer in answers} == {(200, LIMIT)}


def assert_come_again(answer: requests.Response) -> None:
    assert (answer.status_code, answer.json()["error"]) == (503, "unavailable")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Retry-After"] == "5"
    assert answer.json()["request_id"] == answer.headers["X-Request-Id"]


def test_one_address_has_only_so_many_requests_in_progress() -> None:
    with ExitStack() as senders:
        senders.enter_context(slow_senders(PER_ADDRESS, length=100))

        def refused() -> list[requests.Response]:
            answer = ask(DELIVERY, data=b"x")
            if answer.status_code == 503:
                return [answer]
            # Others of this address may have had places when the senders came, and have left them.
            senders.enter_context(slow_senders(1, length=100))
            return []

        (answer,) = wait_for("the one above the limit is told to come again", refused)
        assert_come_again(answer)
        assert log_line(answer.headers["X-Request-Id"])["upstream_addr"] == ""
        assert ask("/edge_alive", method="GET").status_code == 204, "the container stays healthy"
    wait_for("deliveries pass again", lambda: ask(DELIVERY, data=b"x").status_code == 200)


def test_a_full_disk_tells_the_sender_to_come_again() -> None:
    """A second nginx, whose place for bodies has room for a quarter of one."""
    with stranger("--tmpfs=/var/cache/nginx-body:uid=10002,gid=10002,size=256k") as port:
        address = f"http://127.0.0.1:{port}{DELIVERY}"
        answer = requests.post(address, data=b"a" * LIMIT, headers=SIGNED, timeout=10)
        assert_come_again(answer)
        assert requests.post(address, data=b"a" * 20_000, headers=SIGNED, timeout=10).status_code == 200


def test_the_applications_own_503_has_only_its_own_headers() -> None:
    assert "Retry-After" not in ask("/api/v1/avatar/down", data=b"x").headers


@pytest.mark.parametrize(
    "path", ["/api/v1/avatar", "/api/v1/webhook", "/api/v1//avatar", "/api/v1/avatar?a=b"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_path_is_answered_with_a_redirect(path: str, method: str) -> None:
    """fal takes a 3xx for a final refusal, and a redirect would repeat the Host header."""
    answer = ask(path, method=method, headers={"Host": "evil.example"}, allow_redirects=False)
    assert_edge_error(answer, 404, "not_found")
    assert "Location" not in answer.headers
    assert "evil.example" not in answer.text


@pytest.mark.parametrize("draining", [False, True])
@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("/api/v1/avatar//status_update", DELIVERY),
        ("//api/v1/avatar/./status_update", DELIVERY),
        ("/api/v1/x/../avatar/status%5Fupdate", DELIVERY),
        ("/api/v1/avatar/status_update", DELIVERY),
        # What would mean something else when it is not escaped again: ? # % and a line's end.
        (
            "/api/v1/avatar/a%20b%3Fc%25d%23e%2Ff%0D%0Ag%C3%A9",
            "/api/v1/avatar/a%20b%3Fc%25d%23e/f%0D%0Ag%C3%A9",
        ),
        ("/api/v1/avatar/%2e%2e/avatar/x;y=1&z", "/api/v1/avatar/x;y=1&z"),
        ("/api/v1/avatar/%2500", "/api/v1/avatar/%2500"),
        ("/api/v1/webhook//status", "/api/v1/webhook/status"),
        ("/health", "/health"),
        ("//", "/"),
    ],
)
@pytest.mark.parametrize("query", ["", "?training_type=a%2Fb&c=%3F?//../", "?", "?a=%0D%0AHost:%20x"])
def test_an_instance_gets_the_path_as_nginx_understood_it(
    path: str, seen: str, query: str, draining: bool
) -> None:
    """With `//` in it the application would answer with a redirect. The query passes as it came."""
    with switched(*([f"{control('/edge_alive')}.draining"] if draining else [])):
        connection = HTTPConnection("127.0.0.1", HTTP, timeout=10)
        with closing(connection):
            connection.request("POST", f"{path}{query}", b"x", SIGNED)
            answer = connection.getresponse()
            found = json.loads(answer.read())
        assert found["path"] == seen + (query if query != "?" else "")
        assert (found["length"], answer.headers["Connection"]) == (1, "close" if draining else "keep-alive")


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/api/v1/webhook/status"])
def test_only_deliveries_have_bodies(path: str) -> None:
    assert_edge_error(ask(path, data=b"a" * 1025), 413, "body_too_large")


def test_a_silent_client_is_let_go_and_does_not_hold_an_instance(silent_client: Future[float]) -> None:
    """Its body's end never came, while all the tests above went on."""
    assert silent_client.result(timeout=30) < 25


LOCAL_PAGES = ("/nginx_status", "/metrics", "/api/v1/webhook/status")


@pytest.mark.parametrize("path", LOCAL_PAGES)
def test_local_pages_answer_the_local_network(path: str) -> None:
    assert ask(path, method="GET").status_code == 200


@pytest.mark.parametrize(
    "path", [*LOCAL_PAGES, "/api/v1/webhook//status", "/api/v1/avatar/..%2fwebhook/status", "/x/../metrics"]
)
def test_local_pages_are_refused_to_everyone_else(path: str, elsewhere: int) -> None:
    """A second nginx from the same image and configuration, to which 127.0.0.1 is not local."""
    raw = f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Forwarded-For: 10.0.0.1\r\n\r\n"
    with socket.create_connection(("127.0.0.1", elsewhere), timeout=5) as connection:
        connection.sendall(raw.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 403 "), head
    assert json.loads(body)["error"] == "forbidden"


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[int]:
    with stranger() as port:
        yield port


@contextmanager
def stranger(bodies: str = "--volume=/var/cache/nginx-body") -> Iterator[int]:
    """Nginx whose local networks hold no address of this machine; its port. `bodies`: docker's option for them."""
    port = 18182
    source = docker("inspect", "--format", MOUNTED, NGINX)
    script = (
        "cp -r /given /tmp/site && cd /tmp/site && "
        "printf 'allow 192.0.2.0/24;\\ndeny all;\\n' > local_networks.conf && "
        f"sed -i -e 's#/etc/nginx/site#/tmp/site#' -e 's/{HTTP}/{port}/; s/{HTTPS}/18145/; s/{HTTPS_ALT}/18146/' "
        "nginx.conf && "
        "exec nginx -e stderr -c /tmp/site/nginx.conf -g 'daemon off;'"
    )
    docker(
        "run", "--detach", "--name", "mol-edge-stranger", "--network", "host", "--read-only", "--tmpfs", "/tmp:mode=1777",
        bodies, "--volume", f"{source.strip()}:/given:ro", "--volume", "/opt/mol-edge/ssl:/etc/nginx/ssl:ro",
        "mol-edge-nginx:latest", "sh", "-c", script,
    )  # fmt: skip

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for("the second nginx", listens)
        yield port
    finally:
        docker("rm", "--force", "--volumes", "mol-edge-stranger")


# -- last, because it ends what the others hold open


def test_a_killed_nginx_comes_back_with_its_control_socket() -> None:
    docker("kill", NGINX)
    docker("start", NGINX)
    wait_for("nginx", lambda: control("/edge_alive"))
    assert ask(DELIVERY, data=b"x").status_code == 200
