"""What a build gets from the machine that builds: its pip indexes, its proxies and a login for the push.

All of it may hold passwords. So it goes to files (mode 0600, in a directory of mode 0700) that are build secrets or a
Docker configuration for one run, or to the command's environment by name; never to argv, a layer or a log.
"""

from __future__ import annotations

import base64
import configparser
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

#: pip option -> whether its value is a list of addresses, one address, or anything.
_PIP_OPTIONS = {"index-url": "url", "extra-index-url": "urls", "trusted-host": "words", "proxy": "url"}
_PIP_SECTIONS = ("global", "install")
#: Proxy variables that BuildKit knows without an ARG, and leaves out of images and caches.
PROXY_VARIABLES = (
    "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"
)  # fmt: skip


def pip_config_files(environ: Mapping[str, str], home: Path) -> list[Path]:
    """The configuration files that pip reads on this machine, the strongest last.

    Source: https://pip.pypa.io/en/stable/topics/configuration/
    """
    chosen = environ.get("PIP_CONFIG_FILE", "")
    if chosen == os.devnull:
        return []
    system = [Path(d) / "pip/pip.conf" for d in environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":") if d]
    user = [home / ".pip/pip.conf", Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip/pip.conf"]
    return [*system, Path("/etc/pip.conf"), *user, *([Path(chosen)] if chosen else [])]


def pip_configuration(texts: Sequence[str], environ: Mapping[str, str]) -> str:
    """A pip.conf for a build: where this machine's pip gets packages from, as far as a build can reach it too.

    Only http and https addresses, trusted hosts and a proxy; paths and `file:` addresses mean nothing in a build.

    :param texts: the texts of pip's configuration files, the strongest last.
    :param environ: the environment, which is stronger than files.
    :returns: the text of the file; empty when pip has nothing of its own to go by.
    """
    values: dict[str, str] = {}
    for text in texts:
        parser = configparser.RawConfigParser(strict=False)
        try:
            parser.read_string(text)
        except configparser.Error:
            continue  # pip itself will say so when it is used on the host
        for section in _PIP_SECTIONS:
            if parser.has_section(section):
                values.update(parser.items(section))
    for option in _PIP_OPTIONS:
        if value := environ.get(f"PIP_{option.upper().replace('-', '_')}"):
            values[option] = value
    lines = []
    for option, kind in _PIP_OPTIONS.items():
        words = [w for w in values.get(option, "").split() if kind == "words" or _is_http(w)]
        if words:
            lines.append(f"{option} = {' '.join(words if kind != 'url' else words[:1])}")
    return "\n".join(["[global]", *lines, ""]) if lines else ""


def _is_http(address: str) -> bool:
    parts = urlsplit(address)
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def host_pip_configuration(environ: Mapping[str, str] | None = None, home: Path | None = None) -> str:
    """`pip_configuration` of this machine and user."""
    environ = os.environ if environ is None else environ
    texts = []
    for path in pip_config_files(environ, home or Path(os.path.expanduser("~"))):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue  # not there, or not for this user
    return pip_configuration(texts, environ)


def proxy_arguments(environ: Mapping[str, str]) -> list[str]:
    """`--build-arg NAME` for each proxy variable that is set. Without a value, so that docker reads the environment."""
    return [word for name in PROXY_VARIABLES if environ.get(name) for word in ("--build-arg", name)]


def write_private(path: Path, text: str) -> Path:
    """Write a file that nobody else can read, not even while it is written."""
    with os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as stream:
        stream.write(text)
    return path


def login_configuration(registry: str, username: str, password: str, existing: str = "") -> str:
    """The text of a Docker config.json with one login, and the proxies of the existing one."""
    try:
        kept: Any = json.loads(existing) if existing else {}
    except ValueError:
        kept = {}
    auth = base64.b64encode(f"{username}:{password}".encode()).decode()
    document = {"auths": {registry: {"auth": auth}}}
    if isinstance(kept, dict) and "proxies" in kept:
        document["proxies"] = kept["proxies"]
    return json.dumps(document)


def make_login_directory(directory: Path, registry: str, username: str, password: str) -> dict[str, str]:
    """Make `directory` a DOCKER_CONFIG with this login; return the variables that make docker use it.

    The user's own plugins stay in reach; the system's are found without help.
    """
    directory.mkdir(mode=0o700)
    usual = Path(os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker"))
    existing = usual / "config.json"
    text = existing.read_text(encoding="utf-8") if existing.is_file() else ""
    write_private(directory / "config.json", login_configuration(registry, username, password, text))
    if (usual / "cli-plugins").is_dir():
        (directory / "cli-plugins").symlink_to((usual / "cli-plugins").resolve())
    return {"DOCKER_CONFIG": str(directory)}
