"""A configuration of nginx that no client can reach: as role edge renders it, and in every form that must be refused."""

from __future__ import annotations

import re

import pytest
from ansible.module_utils.rollout.gates import SOCKET
from ansible.module_utils.rollout.private_listeners import PLAIN, TLS, UnknownForm, directives, private

from tests.support.templates import render

KNOWN = {"edge_ipv6_enabled": True, "edge_certificate_digest": "0f1e2d3c4b5a"}


def rendered(**variables):
    return render("edge", "nginx.conf.j2", **KNOWN | variables).replace("@edge@", "0a1b2c3d4e5f")


def listeners(text):
    """All that listens, found in another way than the code does."""
    return [line.split("#")[0].strip() for line in text.splitlines() if re.match(r"\s*listen\b", line)]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"edge_ipv6_enabled": False},
        {"site_https_alt_port": 443},
        {"site_http_port": 18080, "site_https_port": 18443, "site_https_alt_port": 18444},
        {"site_api_ports": [8001]},
        {"site_api_ports": [8000 + number for number in range(1, 13)]},
        {"site_acme_names": ["hook.example"]},
        {"edge_http2": False, "edge_hsts_seconds": 0, "edge_connections_per_address": 0},
        {"edge_trusted_proxies": ["192.0.2.7/32"]},
    ],
    ids=str,
)
def test_of_what_role_edge_renders_nothing_public_remains_and_nothing_else_changes(variables):
    text = rendered(**variables)
    made = private(text, SOCKET)
    assert made.sockets == ((PLAIN, False), (TLS, True))
    assert listeners(made.text) == [
        f"listen unix:{PLAIN} default_server;",
        f"listen unix:{TLS} ssl default_server;",
        f"listen unix:{SOCKET};",
    ]
    assert "reuseport" not in re.sub(r"#.*", "", made.text)
    without = [re.sub(r"\s*listen .*", "", each) for each in (text, made.text)]
    assert [line for line in without[0].split("\n") if line.strip()] == [
        line for line in without[1].split("\n") if line.strip()
    ]


def site(server="listen 80 reuseport;", http="", main="", control=f"listen unix:{SOCKET};"):
    return f"{main}\nevents {{}}\nhttp {{\n{http}\nserver {{ {server} }}\nserver {{ {control} }}\n}}\n"


@pytest.mark.parametrize(
    ("server", "left", "sockets"),
    [
        ("listen 80;", [f"unix:{PLAIN}"], [PLAIN]),
        ("listen 443 ssl;", [f"unix:{TLS} ssl"], [TLS]),
        ("listen 443 ssl http2;", [f"unix:{TLS} ssl http2"], [TLS]),
        ("listen [::]:80 ipv6only=on; listen 192.0.2.1:80;", [f"unix:{PLAIN}"], [PLAIN]),
        ("listen *:80 default_server reuseport backlog=4096;", [f"unix:{PLAIN} default_server"], [PLAIN]),
        ("listen\n  localhost:80\n;", [f"unix:{PLAIN}"], [PLAIN]),
        ('"listen" "80";', [f"unix:{PLAIN}"], [PLAIN]),
        ("listen 80; # listen 81;\n", [f"unix:{PLAIN}"], [PLAIN]),
        ("listen 80; return 200 'listen 81; }';", [f"unix:{PLAIN}"], [PLAIN]),
        ('listen 80; set $a "${b}1.\\"{"; return 200 a${b}c;', [f"unix:{PLAIN}"], [PLAIN]),
        (r"listen 80; set $a \;x; set ${b} c; location /\${ return 404; }", [f"unix:{PLAIN}"], [PLAIN]),
        ("listen 80; location / { include site/local.conf; }", [f"unix:{PLAIN}"], [PLAIN]),
        ("listen 80 deferred so_keepalive=on; listen 81 ssl bind;", [f"unix:{PLAIN}", f"unix:{TLS} ssl"], [PLAIN, TLS]),
        ("listen unix:/tmp/more.sock; listen 80;", ["unix:/tmp/more.sock", f"unix:{PLAIN}"], [PLAIN]),
    ],
)  # fmt: skip
def test_each_form_of_a_listener_becomes_a_socket(server, left, sockets):
    made = private(site(server), SOCKET)
    found = [" ".join(each.words[1:]) for each in directives(made.text) if each.name == "listen"]
    assert found == [*left, f"unix:{SOCKET}"]
    assert [path for path, _ in made.sockets] == sockets


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (site(control="listen unix:/tmp/other.sock;"), "no control socket"),
        (site(server="listen unix:/tmp/more.sock;"), "listens on no port"),
        (site(http="server { listen 81; }"), "more than one server listens"),
        (site(http="server { server_name a; }"), "server without a listen"),
        (site(main="stream { server { listen 81; } }"), "block stream"),
        (site(main="mail { }"), "block mail"),
        (site(main="include more.conf;"), "includes more.conf in block main"),
        (site(http="include conf.d/*.conf;"), "includes conf.d"),
        (site(server="listen 80; include more.conf;"), "in block server"),
        (site(server="listen 443 quic reuseport;"), r"not known here \(quic\)"),
        (site(server="listen 80 proxy_protocol;"), r"not known here \(proxy_protocol\)"),
        (site(server="listen;"), "listen without an address"),
        (site(http="listen 81;"), "does not stand in a server"),
        (site(server="listen 80; location / { listen 81; }"), "does not stand in a server"),
        (site(server="listen 80; listen unix:/var/cache/nginx-body/a.sock;"), "not a socket of its own"),
        (site(server="listen 80; listen unix:/tmp/../a.sock;"), "not a socket of its own"),
        (site(server=f"listen 80; listen unix:{PLAIN};"), "not a socket of its own"),
        (site(server='listen 80; return 200 "open;'), "cannot be read"),
        (site() + "}", "was not opened"),
        (site().rstrip().removesuffix("}"), "in the middle of a block"),
        ("http { ; }", "where none may be"),
        ("", "no control socket"),
    ],
)
def test_what_cannot_be_told_for_certain_is_refused(text, why):
    with pytest.raises(UnknownForm, match=why):
        private(text, SOCKET)
