"""nginx's configuration as text: what must be in it whatever the inventory says."""

from __future__ import annotations

import itertools
import re

import pytest
from ansible.errors import AnsibleError

from tests.support.templates import render, role_variables

KNOWN = {"edge_ipv6_enabled": True, "edge_certificate_digest": "0f1e2d3c4b5a"}
SOCKET = "unix:/tmp/edge.sock"


def listens(text: str) -> list[str]:
    return re.findall(r"^\s*listen (\S+)(?: .*)?;$", text, re.MULTILINE)


def test_an_undefined_variable_is_an_error() -> None:
    with pytest.raises(AnsibleError, match="edge_ipv6_enabled"):
        render("edge", "nginx.conf.j2", edge_certificate_digest="0f1e2d3c4b5a")


def test_it_listens_where_the_inventory_says() -> None:
    without = KNOWN | {"edge_ipv6_enabled": False}
    assert listens(render("edge", "nginx.conf.j2", site_http_port=18080, **without)) == [
        "18080",
        "443",
        "8443",
        SOCKET,
    ]
    assert listens(render("edge", "nginx.conf.j2", **KNOWN))[3:] == [
        "[::]:80",
        "[::]:443",
        "[::]:8443",
        SOCKET,
    ]


def test_one_https_port_is_listened_on_once() -> None:
    text = render("edge", "nginx.conf.j2", site_https_alt_port=443, **KNOWN | {"edge_ipv6_enabled": False})
    assert listens(text) == ["80", "443", SOCKET]


def test_every_listener_shares_its_port_with_a_successor() -> None:
    text = render("edge", "nginx.conf.j2", **KNOWN)
    lines = re.findall(r"^\s*listen (?!unix:).*$", text, re.MULTILINE)
    assert len(lines) == 6
    assert all(" reuseport " in line for line in lines)


def groups(text: str) -> dict[str, tuple[list[int], list[int]]]:
    """Upstreams by name: numbers of the instances that they ask, and of those that they ask when no other one answers."""
    found = {}
    for name, body in re.findall(r"upstream (\w+) {(.*?)}", text, re.DOTALL):
        servers = re.findall(r"server 10\.9\.8\.(\d+):8000 max_fails=0( backup)?;", body)
        first, last = (
            [int(n) - 10 for n, backup in servers if bool(backup) is wanted] for wanted in (False, True)
        )
        if len(set(first)) == 1:
            assert len(first) == 2, f"{name}: who serves alone is asked once more before it is given up"
        first = list(dict.fromkeys(first))
        found[name] = first, last
    return found


def chosen(text: str, down: list[int]) -> str:
    """The upstream that nginx's map gives for instances that are down: exact strings first, then patterns in order."""
    value = "".join(f"{number}." for number in down)
    table = text[text.index("map $edge_down") :].partition("}")[0]
    entries = re.findall(r'^ +"?(.*?)"? (\w+);$', table, re.MULTILINE)
    for key, name in entries:
        if key == value:
            return name
    for key, name in entries:
        if key.startswith("~") and re.search(key[1:], value):
            return name
    return dict(entries)["default"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 12])
def test_every_choice_of_instances_that_are_down_leaves_those_that_are_not(count: int) -> None:
    ports = [8000 + number for number in range(1, count + 1)]
    text = render("edge", "nginx.conf.j2", site_api_ports=ports, site_subnet="10.9.8.0/24", **KNOWN)
    known, everyone = groups(text), list(range(1, count + 1))
    assert known["instances"] == (everyone, [])
    for size in range(min(count, 4) + 1):
        for down in itertools.combinations(everyone, size):
            up = [number for number in everyone if number not in down]
            asked, last_resort = known[chosen(text, list(down))]
            assert sorted(asked + last_resort) == everyone, "while one of them answers, nothing is lost"
            if up:
                assert asked, down
                assert set(asked) <= set(up), down
            if size <= 1 or not up:
                assert asked == (up or everyone), down
    assert chosen(text, everyone) == "instances"


def test_every_instance_has_its_switch_and_its_health_behind_the_control_socket() -> None:
    text = render("edge", "nginx.conf.j2", site_api_ports=[1, 2, 3], site_subnet="10.9.8.0/24", **KNOWN)
    public, _, control = text.partition("listen unix:")
    for number in (1, 2, 3):
        assert f"if (-f /etc/nginx/state/api-{number}.down)" in public
        health = control[control.index(f"location = /instance/api-{number}/health ") :].partition("}")[0]
        assert f"proxy_pass http://10.9.8.{10 + number}:8000/health;" in health
    assert "if (-f /etc/nginx/state/@edge@.draining)" in public


def test_the_edge_is_named_by_its_certificate_too() -> None:
    assert "0f1e2d3c4b5a" in render("edge", "nginx.conf.j2", **KNOWN)


def test_the_worst_case_is_within_the_senders_limit() -> None:
    """fal gives an attempt 15 s: the last moment at which an instance is asked, its time to accept, its time to answer."""
    defaults = role_variables("edge", "defaults")
    next_instance, connect, read = (
        defaults["edge_next_instance_seconds"],
        defaults["edge_connect_timeout_ms"] / 1000,
        defaults["edge_read_timeout_seconds"],
    )
    assert next_instance + connect + read < 15
    assert connect + read < next_instance, "an instance that is silent leaves time to ask the other one"
    assert "non_idempotent" in render("edge", "nginx.conf.j2", **KNOWN)


def test_neither_query_nor_secret_header_is_logged() -> None:
    text = render("edge", "nginx.conf.j2", **KNOWN)
    log = text[text.index("    log_format") : text.index("access_log /dev/stdout")]
    for variable in (
        "$request_uri",
        "$args",
        "$query_string",
        "$request ",
        '$request"',
        "$http_x_",
        "$request_body",
        "$http_authorization",
        "$http_referer",
    ):
        assert variable not in log, variable
    assert re.search(r"^error_log stderr crit;$", text, re.MULTILINE)


def test_hsts_can_be_switched_off() -> None:
    assert 'on "max-age=31536000";' in render("edge", "nginx.conf.j2", **KNOWN)
    for zero in (0, "0"):  # `-e edge_hsts_seconds=0` gives text
        assert "max-age" not in render("edge", "nginx.conf.j2", edge_hsts_seconds=zero, **KNOWN)


def test_http_2_can_be_switched_off() -> None:
    assert "http2 on;" in render("edge", "nginx.conf.j2", **KNOWN)
    for no in (False, "false"):
        assert "http2 off;" in render("edge", "nginx.conf.j2", edge_http2=no, **KNOWN)


def test_bodies_lie_where_the_volume_is_and_not_in_memory() -> None:
    text = render("edge", "nginx.conf.j2", **KNOWN)
    assert "client_body_temp_path /var/cache/nginx-body/client;" in text
    connections = 2 * role_variables("edge", "defaults")["edge_worker_connections"]
    buffers = connections * role_variables("edge", "defaults")["edge_body_buffer_bytes"]
    assert buffers <= 256 * 2**20, "what two full workers hold in buffers is half of stack_nginx_memory"


def test_the_limit_of_an_address_can_be_switched_off() -> None:
    assert "limit_conn addresses 512;" in render("edge", "nginx.conf.j2", **KNOWN)
    for zero in (0, "0"):
        assert "limit_conn" not in render("edge", "nginx.conf.j2", edge_connections_per_address=zero, **KNOWN)


def test_a_plausible_secret_is_as_long_as_the_inventory_says() -> None:
    assert '"~^.{16,}$" "";' in render("edge", "nginx.conf.j2", **KNOWN)
    assert '"~^.{8,}$" "";' in render("edge", "nginx.conf.j2", edge_secret_min_length=8, **KNOWN)


def test_nothing_redirects() -> None:
    """nginx redirects to a proxied location's slash unless the path without it is a location of its own."""
    text = render("edge", "nginx.conf.j2", **KNOWN)
    slashed = re.findall(r"location (/\S+)/ {", text)
    assert slashed == ["/api/v1/sources", "/api/v1/avatar", "/api/v1/webhook"]
    for path in slashed:
        assert f"location = {path} {{ return 404; }}" in text
    assert "absolute_redirect off;" in text
    assert not re.search(r"return 3|redirect;|permanent;", text)


def test_an_instance_is_asked_for_the_path_as_nginx_understood_it() -> None:
    text = render("edge", "nginx.conf.j2", **KNOWN).partition("listen unix:")[0]
    proxied = re.findall(r"(.*)\n *proxy_pass (\S+);", text)
    assert len(proxied) == 7
    assert {(before.strip(), target) for before, target in proxied} == {
        ("rewrite ^ $uri break;", "http://$edge_instances")
    }


def test_what_nginx_fails_at_is_a_503() -> None:
    text = render("edge", "nginx.conf.j2", **KNOWN)
    assert "error_page 500 =503 /_error;" in text
    assert 500 not in role_variables("edge", "vars")["edge_errors"]


def test_forwarded_addresses_are_believed_only_from_named_proxies() -> None:
    assert "real_ip_header" not in render("edge", "nginx.conf.j2", **KNOWN)
    text = render("edge", "nginx.conf.j2", edge_trusted_proxies=["192.0.2.7/32"], **KNOWN)
    assert "set_real_ip_from 192.0.2.7/32;" in text


def test_local_networks_end_with_a_denial() -> None:
    text = render("edge", "local_networks.conf.j2", site_local_networks=["192.0.2.0/24"])
    rules = [line for line in text.splitlines() if not line.startswith("#")]
    assert rules == ["allow 192.0.2.0/24;", "deny all;"]


def test_without_acme_names_the_certificate_is_read_once_and_no_challenge_is_served() -> None:
    text = render("edge", "nginx.conf.j2", **KNOWN)
    assert "ssl_certificate /etc/nginx/ssl/fullchain.pem;" in text
    assert "acme" not in text


def test_with_acme_names_renewed_files_are_read_at_the_next_handshake() -> None:
    text = render("edge", "nginx.conf.j2", site_acme_names=["hook.example"], **KNOWN)
    assert "ssl_certificate $edge_certificates/fullchain.pem;" in text
    assert "ssl_certificate_key $edge_certificates/privkey.pem;" in text
    assert re.search(r"map \$server_port \$edge_certificates {\s+default /etc/nginx/ssl;\s+}", text)
    challenge = re.search(r"location \^~ /\.well-known/acme-challenge/ {(.*?)\n        }", text, re.DOTALL)
    assert challenge
    assert "root /etc/nginx/acme;" in challenge[1]
    assert "try_files $uri =404;" in challenge[1]


def test_the_console_is_reached_only_where_a_port_is_given() -> None:
    plain = render("edge", "nginx.conf.j2", **KNOWN)
    assert ".22:8000" not in plain
    text = render("edge", "nginx.conf.j2", edge_console_port=8444, site_subnet="10.9.8.0/24", **KNOWN)
    assert [found for found in listens(text) if "8444" in found] == ["8444", "[::]:8444"]
    server = text[text.index("listen 8444") :].partition("location / {")[0]
    assert "include /etc/nginx/site/local_networks.conf;" in server
    assert "proxy_set_header X-Real-IP $remote_addr;" in server
    assert "proxy_pass http://10.9.8.22:8000;" in text
    assert text.count("reuseport") == plain.count("reuseport") + 2
