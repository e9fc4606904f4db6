"""nginx's configuration with every public listener turned into a socket that only its own container reaches. Pure.

Words, quotes, comments and blocks are told apart as nginx does it (ngx_conf_read_token in src/core/ngx_conf_file.c), so a
`listen` in a comment is none, and one in an odd place is not overlooked. What cannot be told for certain is refused: a
configuration that was understood by half might listen where clients are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PLAIN, TLS = "/tmp/public.sock", "/tmp/public-tls.sock"  # noqa: S108 - inside the container's own tmpfs
#: Options of `listen` that a Unix socket has as well, and those that only make sense for a port.
KEPT = ("ssl", "http2", "default_server")
DROPPED = re.compile(
    r"reuseport|bind|deferred|(backlog|rcvbuf|sndbuf|fastopen|setfib|accept_filter|ipv6only|so_keepalive)=\S+"
)
_TOKEN = re.compile(
    r"""(?P<blank>\s+|\#[^\n]*)
      | (?P<mark>[;{}])
      | (?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<word>(?:\\.|\$\{|[^\s;{}"'\\])(?:\\.|\$\{|[^\s;{\\])*)""",
    re.VERBOSE | re.DOTALL,
)


class UnknownForm(ValueError):
    """A configuration of which it is not certain where it would listen. `str()` says why."""


@dataclass(frozen=True)
class Private:
    """A configuration that listens on Unix sockets only, and the sockets that stand for public ports: path, whether TLS."""

    text: str
    sockets: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Directive:
    """A directive or the head of a block: its words, the blocks around it (name, place), and its place in the text."""

    words: tuple[str, ...]
    around: tuple[tuple[str, int], ...]
    start: int
    end: int
    opens: bool

    @property
    def name(self) -> str:
        """What it is called."""
        return self.words[0]

    @property
    def context(self) -> str:
        """Name of the innermost block around it; `main` outside of all."""
        return self.around[-1][0] if self.around else "main"


def private(text: str, control: str) -> Private:
    """`text` without a public listener. `control`: path of the socket over which nginx is asked, which it must have.

    `UnknownForm` where it cannot be told, or where there is nothing to make private.
    """
    found = list(directives(text))
    _refuse_what_may_listen_unseen(found)
    listeners = [directive for directive in found if directive.name == "listen"]
    public = [listener for listener in listeners if not _address(listener).startswith("unix:")]
    if control not in [_address(listener).removeprefix("unix:") for listener in listeners]:
        raise UnknownForm(f"it has no control socket ({control})")
    if not public:
        raise UnknownForm("it listens on no port")
    if len({listener.around for listener in public}) > 1:
        raise UnknownForm("more than one server listens on ports")
    made = _replaced(text, public)
    if any(not _address(left).startswith("unix:") for left in directives(made.text) if left.name == "listen"):
        raise UnknownForm("a listener is left over")
    return made


def directives(text: str) -> Iterator[Directive]:
    """Every directive of a configuration, in order."""
    around: list[tuple[str, int]] = []
    words: list[str] = []
    start = place = 0
    while place < len(text):
        token = _TOKEN.match(text, place)
        if token is None:
            raise UnknownForm(f"line {_line(text, place)} cannot be read")
        place = token.end()
        if token.lastgroup == "blank":
            continue
        if token.lastgroup != "mark":
            start = start if words else token.start()
            words.append(_bare(token[0]))
            continue
        if bool(words) is (token[0] == "}"):
            raise UnknownForm(f"line {_line(text, place)} has a {token[0]} where none may be")
        if token[0] == "}":
            if not around:
                raise UnknownForm(f"line {_line(text, place)} closes a block that was not opened")
            around.pop()
            continue
        yield Directive(tuple(words), tuple(around), start, place, token[0] == "{")
        if token[0] == "{":
            around.append((words[0], start))
        words = []
    if words or around:
        raise UnknownForm("it ends in the middle of a block")


def _refuse_what_may_listen_unseen(found: Sequence[Directive]) -> None:
    """Other protocols, files that are not looked into, servers without a `listen` (nginx then takes a port of its own)."""
    heard = {listener.around for listener in found if listener.name == "listen"}
    for directive in found:
        if not directive.around and directive.opens and directive.name not in ("events", "http"):
            raise UnknownForm(f"it has a block {directive.name}")
        if directive.name == "include" and directive.context in ("main", "http", "server"):
            raise UnknownForm(f"it includes {' '.join(directive.words[1:])} in block {directive.context}")
        if directive.name == "server" and directive.opens:
            if directive.context != "http":
                raise UnknownForm(f"it has a server in block {directive.context}")
            if (*directive.around, ("server", directive.start)) not in heard:
                raise UnknownForm("it has a server without a listen")
        if directive.name == "listen":
            _refuse_odd(directive)


def _refuse_odd(listener: Directive) -> None:
    address, options = _address(listener), listener.words[2:]
    said = " ".join(listener.words)
    if listener.context != "server" or listener.opens:
        raise UnknownForm(f"`{said}` does not stand in a server")
    if address.startswith("unix:"):
        # A socket in a volume would take the place of that of the nginx that serves.
        if not address.startswith("unix:/tmp/") or ".." in address or address[5:] in (PLAIN, TLS):
            raise UnknownForm(f"`{said}` is not a socket of its own")
        return
    unknown = [option for option in options if option not in KEPT and not DROPPED.fullmatch(option)]
    if unknown:
        raise UnknownForm(f"`{said}` has an option that is not known here ({unknown[0]})")


def _replaced(text: str, public: Sequence[Directive]) -> Private:
    """One socket for all that listens without TLS, and one for all that listens with it."""
    groups = {tls: [each for each in public if ("ssl" in each.words[2:]) is tls] for tls in (False, True)}
    instead, sockets = {}, []
    for tls, members in groups.items():
        if members:
            path = TLS if tls else PLAIN
            options = [option for option in KEPT if any(option in each.words[2:] for each in members)]
            instead[members[0].start] = " ".join(["listen", f"unix:{path}", *options]) + ";"
            sockets.append((path, tls))
    parts, place = [], 0
    for listener in public:
        parts += [text[place : listener.start], instead.get(listener.start, "")]
        place = listener.end
    return Private("".join([*parts, text[place:]]), tuple(sockets))


def _address(listener: Directive) -> str:
    if len(listener.words) < 2:
        raise UnknownForm("it has a listen without an address")
    return listener.words[1]


def _bare(word: str) -> str:
    """A word without its quotes and escapes: nginx takes a directive's name in quotes as well."""
    if word[0] in "\"'":
        word = word[1:-1]
    return re.sub(r"\\(.)", r"\1", word, flags=re.DOTALL)


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1
