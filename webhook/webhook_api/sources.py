"""Further senders by configuration: WEBHOOK_SOURCES is a table of names, schemes, keys and shapes.

``{"replicate": {"scheme": "standard", "shape": "replicate", "secrets": [{"file": "/run/secrets/…"}], "public_keys":
["whpk_…"]}}``. ``fal`` and ``manual`` are built in. What is unknown in here keeps the service from starting: a sender
that is verified in another way than its operator thinks would be worse than none.

Every command reads its settings, and with them this table, while only the intake verifies: what verifying takes is
imported where it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from nacl.signing import VerifyKey

    from webhook_api.auth.standard import StandardVerifier

SCHEMES: Final = frozenset({"standard"})
BUILT_IN: Final = frozenset({"fal", "manual"})
RESERVED: Final = frozenset({"reconcile"})
"""Sources that only this service itself writes."""
MAX_SENDERS: Final = 64
MAX_KEYS: Final = 8
"""Secrets or public keys of one sender: each costs time for every delivery."""
NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")
Key = TypeVar("Key", bytes, "VerifyKey")
_FIELDS: Final = frozenset({"scheme", "shape", "secrets", "public_keys"})


@dataclass(frozen=True, slots=True)
class Sender:
    """One configured source."""

    name: str
    scheme: str
    shape: str
    secrets: tuple[bytes, ...] = field(default=(), repr=False)
    public_keys: tuple[VerifyKey, ...] = ()

    def verifier(self) -> StandardVerifier:
        """Return what verifies its deliveries."""
        from webhook_api.auth.standard import StandardVerifier

        return StandardVerifier(
            self.name, secrets=self.secrets, public_keys=self.public_keys, shape=self.shape
        )


def read(
    text: str, *, with_keys: bool, plain_secrets: bool, file: Callable[[str], str] | None = None
) -> tuple[tuple[Sender, ...], list[str]]:
    """Read the table: the senders, and what is wrong with it.

    Without ``with_keys`` (a worker, say) no secret is read. ``plain_secrets``: the table itself is a secret file.
    """
    reader = _Table(with_keys, plain_secrets, file or _file)
    return reader.senders(text), reader.faults


class _Unusable(ValueError):
    """A part of the table. The message never quotes a secret."""


class _Table:
    def __init__(self, with_keys: bool, plain_secrets: bool, file: Callable[[str], str]) -> None:
        self._with_keys = with_keys
        self._plain_secrets = plain_secrets
        self._file = file
        self.faults: list[str] = []

    def senders(self, text: str) -> tuple[Sender, ...]:
        try:
            table = json.loads(text, object_pairs_hook=_object)
        except _Unusable as error:
            self.faults.append(f"WEBHOOK_SOURCES: {error}")
            return ()
        except (ValueError, RecursionError):
            self.faults.append("WEBHOOK_SOURCES is not JSON")
            return ()
        if not isinstance(table, dict) or len(table) > MAX_SENDERS:
            self.faults.append(f"WEBHOOK_SOURCES is not an object of at most {MAX_SENDERS} senders by name")
            return ()
        found = []
        for name, entry in table.items():
            try:
                found.append(self._sender(name, entry))
            except _Unusable as error:
                self.faults.append(f"WEBHOOK_SOURCES: {name!r:.50}: {error}")
        return tuple(found)

    def _sender(self, name: str, entry: Any) -> Sender:
        from webhook_api.bodies import SHAPES

        if not NAME.fullmatch(name):
            raise _Unusable("a name is 1 to 32 of a-z, 0-9, '-' and '_', a letter first")
        if name in BUILT_IN | RESERVED:
            raise _Unusable("this name is the service's own; take another")
        if not isinstance(entry, dict):
            raise _Unusable("give an object with scheme, shape and keys")
        if unknown := sorted(set(entry) - _FIELDS):
            raise _Unusable(f"unknown field {unknown[0]!r:.50}: there are {', '.join(sorted(_FIELDS))}")
        scheme = _one_of("scheme", entry.get("scheme"), SCHEMES)
        shape = _one_of("shape", entry.get("shape"), SHAPES)
        secrets, keys = _items(entry, "secrets"), _items(entry, "public_keys")
        if not secrets and not keys:
            raise _Unusable("it has neither secrets nor public_keys: nothing could be verified")
        if not self._with_keys:
            return Sender(name, scheme, shape)
        return Sender(name, scheme, shape, self._secrets(secrets), self._public_keys(keys))

    def _secrets(self, items: list[Any]) -> tuple[bytes, ...]:
        from webhook_api.auth.standard import read_secret

        texts: list[str] = []
        for item in items:
            if isinstance(item, str) and not self._plain_secrets:
                raise _Unusable('a secret stands in the environment: give {"file": "/run/secrets/…"} instead')
            texts += [item] if isinstance(item, str) else self._lines(item)
        return _bounded("secrets", [_parsed(read_secret, text) for text in texts])

    def _public_keys(self, items: list[Any]) -> tuple[VerifyKey, ...]:
        from webhook_api.auth.standard import read_public_key

        texts: list[str] = []
        for item in items:
            texts += [item] if isinstance(item, str) else self._lines(item)
        return _bounded("public_keys", [_parsed(read_public_key, text) for text in texts])

    def _lines(self, item: Any) -> list[str]:
        """A file holds one key a line, so that a rotation is one more line."""
        if not isinstance(item, dict) or set(item) != {"file"} or not isinstance(item["file"], str):
            raise _Unusable('a key is a text or {"file": path}')
        try:
            lines = self._file(item["file"]).split()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            raise _Unusable(f"{item['file']} cannot be read ({why})") from None
        if not lines:
            raise _Unusable(f"{item['file']} is empty")
        return lines


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Unusable("a name or field stands there twice")
    return found


def _one_of(field_name: str, value: Any, known: Iterable[str]) -> str:
    names = sorted(known)
    if not isinstance(value, str) or value not in names:
        raise _Unusable(f"the {field_name} {value!r:.50} is unknown: there is {', '.join(names)}")
    return value


def _items(entry: Mapping[str, Any], name: str) -> list[Any]:
    items = entry.get(name, [])
    if not isinstance(items, list):
        raise _Unusable(f"{name} is not a list")
    return items


def _bounded(name: str, found: list[Key]) -> tuple[Key, ...]:
    if len(found) > MAX_KEYS:
        raise _Unusable(f"{name}: more than {MAX_KEYS}")
    return tuple(found)


def _parsed(parse: Callable[[str], Key], text: str) -> Key:
    from webhook_api.auth.standard import MalformedKey

    try:
        return parse(text)
    except MalformedKey as error:
        raise _Unusable(str(error)) from None


def _file(path: str) -> str:
    return Path(path).read_text(encoding="ascii")
