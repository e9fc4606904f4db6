"""Secrets as files, one reader each: given, generated once, or derived from another.

A file is replaced as a whole (a new file, then a rename), so a reader sees the old secret or the new one. A secret that
was generated stays what it is until its file is removed. What changed is told by versions: keyed digests that say
whether two secrets are equal and nothing about what they are.

While a release serves, what is replaced may be kept for it (`kept_secrets`), until module rollout has proven the new one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import string
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible.module_utils.docker_cli import find_program
from ansible.module_utils.kept_secrets import KeptSecrets
from ansible.module_utils.whole_files import give_file, read_file, write_file

VERSION_KEY = ".version-key"
VERSION_LENGTH = 12
#: Stand-in for a secret that check mode would generate: the right form, and worthless.
PLACEHOLDERS = {
    "password": "would-be-generated",
    "hex": "0" * 64,
    "ed25519": "0" * 63 + "1",
    "p256": "would-be-generated",
}
_ALPHABET = string.ascii_letters + string.digits  # goes into URLs and shells as it is
_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$")
_SEED = re.compile(r"[0-9a-f]{64}")
_DEFAULT_LENGTH = {"password": 32, "hex": 64, "ed25519": 64}
_SHORTEST = 16
#: What may be derived and read by everyone.
PUBLIC = ("jwks",)
#: What a secret that is no longer wanted begins with. What follows is random, and known to nobody.
RETIRED = "retired-"
#: What is done to a file when its secret becomes another one.
ROTATIONS = ("generate", "create", "replace", "retire")


class SecretError(Exception):
    """Secrets are not as they have to be.

    `reason`: invalid, missing, malformed, unreadable, unwritable. `str()` names every fault and its remedy, no secret.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class SecretSpec:
    """One secret file. A given value wins; else what stands; else it is generated, or derived from another file.

    `keep`: what is replaced while a release serves is kept for it. `retire`: without a value it is no longer wanted.
    """

    name: str
    value: str = field(default="", repr=False)
    generate: str = ""
    length: int = 0
    derive: str = ""
    derive_from: str = ""
    owner: int = 0
    group: int = 0
    mode: int = 0o400
    keep: bool = False
    retire: bool = False

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> SecretSpec:
        """From module parameters. An empty value counts as none."""
        generate, derive = params.get("generate") or {}, params.get("derive") or {}
        kind = generate.get("kind") or ""
        owner = int(params.get("owner") or 0)
        group = params.get("group")
        return cls(
            name=params["name"],
            value=params.get("value") or "",
            generate=kind,
            length=int(generate.get("length") or _DEFAULT_LENGTH.get(kind, 0)),
            derive=derive.get("kind") or "",
            derive_from=derive.get("from") or "",
            owner=owner,
            group=owner if group is None else int(group),
            mode=int(str(params.get("mode") or ("0444" if derive.get("kind") in PUBLIC else "0400")), 8),
            keep=bool(params.get("keep")),
            retire=bool(params.get("retire")),
        )


@dataclass
class Secret:
    """One secret between what stands and what will: `actions` says what has to be done to its file."""

    spec: SecretSpec
    value: str = field(default="", repr=False)
    present: bool = False
    actions: list[str] = field(default_factory=list)
    placeholder: bool = False
    #: It is no longer wanted: nobody is told of it.
    retired: bool = False
    #: The file of before, which was kept, is what is wanted again.
    returns: bool = False


# -- values -----------------------------------------------------------------------------------------------------------


def generate(kind: str, length: int) -> str:
    """A fresh secret from the system's random source; `length` in characters (keys have a length of their own)."""
    if kind == "ed25519":
        return secrets.token_hex(32)
    if kind == "p256":
        return _p256_key()
    if kind == "hex":
        return secrets.token_hex((length + 1) // 2)[:length]
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def _p256_key() -> str:
    """A private key on the curve P-256, as PKCS #8 in PEM form, made by openssl."""
    command = [find_program("openssl") or "openssl", "genpkey", "-algorithm", "EC"]
    command += ["-pkeyopt", "ec_paramgen_curve:P-256", "-pkeyopt", "ec_param_enc:named_curve"]
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise SecretError(
            "malformed", "openssl made no key on this host. Install the package openssl"
        ) from error
    return made.stdout


_P = 2**255 - 19
_D = -121665 * pow(121666, -1, _P) % _P
_BASE = (
    15112221349535400772501151409588531511454012693041857206046113283949847762202,
    46316835694926478169428394003475163141307993866256225615783033603165251855960,
)
_Point = tuple[int, int, int, int]


def _add(one: _Point, two: _Point) -> _Point:
    a = (one[1] - one[0]) * (two[1] - two[0]) % _P
    b = (one[1] + one[0]) * (two[1] + two[0]) % _P
    c = 2 * one[3] * two[3] * _D % _P
    d = 2 * one[2] * two[2] % _P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P


def ed25519_public_key(seed: bytes) -> bytes:
    """The 32-byte public key of a 32-byte private key (RFC 8032, section 5.1.5).

    In plain Python, because a target host need not have a cryptography package. Its running time depends on the key:
    it is meant for a development key, once a run, on the host that holds the key anyway.
    """
    if len(seed) != 32:
        raise ValueError("an Ed25519 private key has 32 bytes")
    scalar = int.from_bytes(hashlib.sha512(seed).digest()[:32], "little")
    scalar = (scalar & ((1 << 254) - 8)) | (1 << 254)
    result: _Point = (0, 1, 1, 0)
    power: _Point = (_BASE[0], _BASE[1], 1, _BASE[0] * _BASE[1] % _P)
    while scalar:
        if scalar & 1:
            result = _add(result, power)
        power = _add(power, power)
        scalar >>= 1
    inverse = pow(result[2], -1, _P)
    x, y = result[0] * inverse % _P, result[1] * inverse % _P
    return (y | ((x & 1) << 255)).to_bytes(32, "little")


def jwks(seed_hex: str) -> str:
    """The JSON Web Key Set (RFC 8037) with the public key of an Ed25519 seed, as fal publishes its own."""
    public = ed25519_public_key(bytes.fromhex(seed_hex))
    x = base64.urlsafe_b64encode(public).rstrip(b"=").decode()
    kid = hashlib.sha256(public).hexdigest()[:16]
    key = {"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": kid, "x": x}
    return json.dumps({"keys": [key]}, indent=2)


def derived(kind: str, value: str) -> str:
    """What is computed from another secret: the same for another reader (copy), or its public counterpart (jwks)."""
    return jwks(value) if kind == "jwks" else value


def version(key: bytes, values: Mapping[str, str]) -> str:
    """The version of named values: 12 hexadecimal digits, the same for the same values and key only."""
    document = json.dumps(sorted(values.items())).encode()
    return hmac.new(key, document, hashlib.sha256).hexdigest()[:VERSION_LENGTH]


# -- faults in what is asked for --------------------------------------------------------------------------------------


def spec_faults(specs: Sequence[SecretSpec]) -> list[str]:
    """What is wrong with the parameters themselves, one sentence each."""
    faults = []
    names = [spec.name for spec in specs]
    for spec in specs:
        if not _NAME.fullmatch(spec.name):
            faults.append(
                f"{spec.name!r} is not the name of a secret: letters, digits, . _ - and / between parts"
            )
        if names.count(spec.name) > 1:
            faults.append(f"{spec.name} is named twice")
        if any(other.startswith(f"{spec.name}/") for other in names):
            faults.append(f"{spec.name} can't be a file and the directory of another secret")
        if spec.generate in ("password", "hex") and spec.length < _SHORTEST:
            faults.append(
                f"{spec.name}: a generated secret has at least {_SHORTEST} characters, not {spec.length}"
            )
        if spec.derive and not any(s.name == spec.derive_from and not s.derive for s in specs):
            faults.append(
                f"{spec.name} is derived from {spec.derive_from or 'nothing'}, which is not in the list"
            )
        if spec.derive and (spec.value or spec.generate):
            faults.append(f"{spec.name} is derived: it takes no value and is not generated")
        if spec.retire and (spec.generate or spec.derive):
            faults.append(f"{spec.name} can't be retired: it is generated or derived, and always wanted")
        if spec.mode & 0o022 or (spec.mode & 0o007 and spec.derive not in PUBLIC):
            faults.append(f"{spec.name}: mode {spec.mode:04o} would let others read or write a secret")
    return sorted(set(faults))


class SecretFiles:
    """The secrets below one directory: what stands, what has to be done, and doing it.

    `release`: the one that serves with what stands, for which is kept what is replaced; empty for none.
    """

    def __init__(
        self, path: Path, specs: Sequence[SecretSpec], directory_mode: int = 0o711, release: str = ""
    ) -> None:
        self.path = path
        self._release = release
        self._kept = KeptSecrets(path)
        self.secrets = [Secret(spec) for spec in specs]
        self._directory_mode = directory_mode
        self._key = b""
        self._key_present = False
        self._directories: list[Path] = []

    def plan(self) -> bool:
        """Read what stands and decide what has to be done; return whether anything has. Changes nothing."""
        faults = spec_faults([secret.spec for secret in self.secrets])
        if faults:
            raise SecretError("invalid", self._message("The list of secrets is wrong", faults))
        try:
            self._plan_key()
            self._plan_directories()
            faults = [fault for secret in self._derived_last() if (fault := self._plan(secret))]
        except (OSError, UnicodeDecodeError) as error:
            raise SecretError(
                "unreadable", f"The secrets in {self.path} can't be read: {error}. Run with become: true"
            ) from error
        if faults:
            raise SecretError("missing", self._message("Secrets are missing or unusable", faults))
        return bool(self._directories) or not self._key_present or any(s.actions for s in self.secrets)

    @staticmethod
    def _message(headline: str, faults: Sequence[str]) -> str:
        return "\n".join([f"{headline}:", *(f"- {fault}" for fault in faults)])

    def _derived_last(self) -> list[Secret]:
        return sorted(self.secrets, key=lambda secret: bool(secret.spec.derive))

    def _plan_key(self) -> None:
        found = read_file(self.path / VERSION_KEY)
        self._key_present = found is not None and bool(_SEED.fullmatch(found[0].strip()))
        self._key = (
            bytes.fromhex(found[0].strip()) if found and self._key_present else secrets.token_bytes(32)
        )

    def _plan_directories(self) -> None:
        """Note the directories that are missing or open to more than passing through."""
        parents = {(self.path / s.spec.name).parent for s in self.secrets}
        between = {p for parent in parents for p in (parent, *parent.parents) if p.is_relative_to(self.path)}
        for directory in sorted({self.path, *between}):
            try:
                status = os.lstat(directory)
            except FileNotFoundError:
                self._directories.append(directory)
                continue
            if not stat.S_ISDIR(status.st_mode):
                raise OSError(f"{directory} is not a directory")
            if stat.S_IMODE(status.st_mode) != self._directory_mode or status.st_uid != os.geteuid():
                self._directories.append(directory)

    def _plan(self, secret: Secret) -> str:
        """Decide one secret's value and actions; return what is wrong with it, or nothing."""
        spec = secret.spec
        found = read_file(self.path / spec.name)
        old = found[0] if found else ""
        secret.present = bool(old)
        if spec.derive:
            source = next(s for s in self.secrets if s.spec.name == spec.derive_from)
            if spec.derive == "jwks" and not _SEED.fullmatch(source.value):
                return f"{spec.name}: {spec.derive_from} is no Ed25519 seed (64 hexadecimal digits)"
            secret.value, secret.placeholder = derived(spec.derive, source.value), source.placeholder
        elif spec.value:
            secret.value = spec.value
        elif spec.retire:
            secret.retired = True
            secret.value = old if old.startswith(RETIRED) else ""
        elif old:
            secret.value = old.removesuffix("\n")  # from an editor's hand
        elif spec.generate:
            secret.value, secret.placeholder = PLACEHOLDERS[spec.generate], True
        else:
            return f"{spec.name} has no value, no file {self.path / spec.name} stands, and it is not to be generated"
        if spec.generate == "ed25519" and not _SEED.fullmatch(secret.value):
            return f"{spec.name} is no Ed25519 seed (64 hexadecimal digits): give another, or remove its file"
        if spec.generate == "p256" and not secret.placeholder and "PRIVATE KEY-----" not in secret.value:
            return f"{spec.name} is no private key in PEM form: give another, or remove its file"
        secret.actions = self._actions(secret, old, found[1] if found else None)
        secret.returns = self._keeps(secret) and self._is_kept(secret)
        return ""

    def _keeps(self, secret: Secret) -> bool:
        """Whether what is done to a file is kept."""
        return bool(self._release and secret.spec.keep and set(secret.actions) & set(ROTATIONS))

    def _is_kept(self, secret: Secret) -> bool:
        """Whether the kept file is just what is wanted: its value, its reader, its mode."""
        if secret.placeholder or secret.retired or self._kept.release() != self._release:
            return False
        found = read_file(self._kept.kept(secret.spec.name))
        if found is None or found[0].removesuffix("\n") != secret.value.removesuffix("\n"):
            return False
        owner, spec = found[1], secret.spec
        return (owner.st_uid, owner.st_gid, stat.S_IMODE(owner.st_mode)) == (
            spec.owner,
            spec.group,
            spec.mode,
        )

    @staticmethod
    def _actions(secret: Secret, old: str, status: os.stat_result | None) -> list[str]:
        spec = secret.spec
        if secret.retired and (status is None or not secret.value):
            return ["retire"] if secret.present else []
        if status is None or not secret.present:
            return ["generate" if spec.generate and not spec.value else "create"]
        actions = []
        if old.removesuffix("\n") != secret.value.removesuffix("\n"):
            actions.append("replace")
        if (status.st_uid, status.st_gid) != (spec.owner, spec.group):
            actions.append("owner")
        if stat.S_IMODE(status.st_mode) != spec.mode:
            actions.append("mode")
        return actions

    def apply(self) -> None:
        """Do what was planned: directories, the key, then one file after the other."""
        try:
            for directory in self._directories:
                directory.mkdir(parents=True, exist_ok=True)
                directory.chmod(self._directory_mode)
                if os.lstat(directory).st_uid != os.geteuid():
                    os.chown(directory, os.geteuid(), os.getegid())
            if not self._key_present:
                write_file(
                    self.path / VERSION_KEY,
                    self._key.hex(),
                    owner=os.geteuid(),
                    group=os.getegid(),
                    mode=0o400,
                )
            for secret in self._derived_last():
                self._apply(secret)
        except OSError as error:
            raise SecretError(
                "unwritable", f"The secrets in {self.path} can't be written: {error}. Run with become: true"
            ) from error

    def _apply(self, secret: Secret) -> None:
        spec = secret.spec
        if "generate" in secret.actions:
            secret.value, secret.placeholder = generate(spec.generate, spec.length), False
        elif spec.derive:
            source = next(s for s in self.secrets if s.spec.name == spec.derive_from)
            secret.value, secret.placeholder = derived(spec.derive, source.value), False
        elif "retire" in secret.actions:
            secret.value = RETIRED + secrets.token_hex(24)
        if secret.returns:
            self._kept.put_back_one(spec.name)
            return
        if self._keeps(secret):
            self._kept.keep(spec.name, self._release)
        given = {"owner": spec.owner, "group": spec.group, "mode": spec.mode}
        if secret.actions and set(secret.actions) <= {"owner", "mode"}:
            give_file(self.path / spec.name, **given)
        elif secret.actions:
            write_file(self.path / spec.name, secret.value, **given)

    # -- what is told

    def values(self) -> dict[str, str]:
        """The secrets themselves by name, without retired ones. For no_log eyes only."""
        return {secret.spec.name: secret.value for secret in self.secrets if not secret.retired}

    def version(self) -> str:
        """One version of all of them; it changes when any does."""
        return version(self._key, self.values())

    def versions(self) -> dict[str, str]:
        """The version of each, by name."""
        return {name: version(self._key, {name: value}) for name, value in self.values().items()}

    def placeholders(self) -> list[str]:
        """The names of those whose value is only a stand-in (check mode)."""
        return sorted(secret.spec.name for secret in self.secrets if secret.placeholder)

    def actions(self) -> dict[str, list[str]]:
        """What is to be done to each file that is not as it has to be."""
        return {secret.spec.name: list(secret.actions) for secret in self.secrets if secret.actions}

    def kept(self) -> list[str]:
        """The names of those whose file of before is kept (in check mode: would be)."""
        if not self._release:
            return []
        names = set(self._kept.names()) if self._kept.release() == self._release else set()
        names |= {secret.spec.name for secret in self.secrets if self._keeps(secret)}
        return sorted(names - {secret.spec.name for secret in self.secrets if secret.returns})

    def diff(self) -> dict[str, str]:
        """Before and after, in words: never a value."""
        before, after = [], []
        for secret in sorted(self.secrets, key=lambda s: s.spec.name):
            if secret.actions:
                before.append(f"{secret.spec.name}: {'present' if secret.present else 'absent'}")
                after.append(f"{secret.spec.name}: present ({', '.join(secret.actions)})")
        for directory in self._directories:
            after.append(f"{directory}/: mode {self._directory_mode:04o}")
        return {
            "before": "".join(f"{line}\n" for line in before),
            "after": "".join(f"{line}\n" for line in after),
        }
