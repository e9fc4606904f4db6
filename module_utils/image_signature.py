"""Signatures of images, in cosign's format, with a key of the site: made, stored beside the image, verified.

A signature covers a small document that names the image by its digest. It is kept where `cosign` looks for it (the tag
`sha256-<64 hex>.sig` of the same repository), so `cosign verify --key` reads what is signed here, and what `cosign
sign --key` signed is accepted here. The cryptography is openssl's (ECDSA P-256 with SHA-256): it is on every Debian and
Ubuntu host, because ca-certificates needs it; cosign is not. No transparency log: no outside service knows of it.

Contract: https://github.com/sigstore/cosign/blob/main/specs/SIGNATURE_SPEC.md
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible.module_utils.docker_cli import find_program
from ansible.module_utils.image_referrers import MANIFEST, Registry, descriptor, encode
from ansible.module_utils.whole_files import write_file

CONFIG = "application/vnd.oci.image.config.v1+json"
SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json"
ANNOTATION = "dev.cosignproject.cosign/signature"
SBOM_ANNOTATION = "org.aisha.sbom"
PAYLOAD_TYPE = "cosign container image signature"
OPENSSL_TIMEOUT = 30.0
_REFERENCE = re.compile(r"^(?P<registry>[^/]+)/(?P<repository>[^@:]+)@(?P<digest>sha256:[0-9a-f]{64})$")
_PUBLIC = re.compile(r"-----BEGIN PUBLIC KEY-----\s+([A-Za-z0-9+/=\s]+?)-----END PUBLIC KEY-----")


class SignatureError(Exception):
    """An image is not signed as it has to be, or can't be signed.

    `reason`: unsigned, wrong_key, other_image, malformed, bad_key, no_key, no_tool. `str()` gives fault and remedy.
    """

    def __init__(self, reason: str, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}. {remedy}" if remedy else message)
        self.reason = reason


@dataclass(frozen=True)
class Reference:
    """An image by its digest, as it is pinned in a release."""

    registry: str
    repository: str
    digest: str

    @classmethod
    def parse(cls, text: str) -> Reference:
        """From ``registry/repository@sha256:…``; anything else can't be verified and is refused."""
        match = _REFERENCE.match(text)
        if not match:
            raise SignatureError(
                "malformed",
                f"{text!r} names no image by its digest",
                "Only what is pinned by digest can be verified",
            )
        return cls(**match.groupdict())

    @property
    def name(self) -> str:
        """Registry and repository, as signatures name them."""
        return f"{self.registry}/{self.repository}"

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}"


@dataclass(frozen=True)
class Signature:
    """One signature: the document that was signed, as it was, and the signature itself."""

    payload: bytes
    value: bytes


def payload_of(reference: Reference, annotations: Mapping[str, str] | None = None) -> bytes:
    """The document that a signature covers. No time in it: the same image gives the same document.

    :param annotations: what else is signed with it (`cosign sign -a`).
    """
    critical = {
        "identity": {"docker-reference": reference.name},
        "image": {"docker-manifest-digest": reference.digest},
        "type": PAYLOAD_TYPE,
    }
    document: bytes = encode({"critical": critical, "optional": dict(annotations or {}) or None})
    return document


def key_id(public_key: str) -> str:
    """A short name of a public key for messages: the start of the SHA-256 of its DER form."""
    match = _PUBLIC.search(public_key)
    try:
        der = base64.b64decode(re.sub(r"\s", "", match[1]), validate=True) if match else b""
    except binascii.Error:
        der = b""
    if not der:
        raise SignatureError(
            "bad_key", "What is given as public key is none", "It begins with -----BEGIN PUBLIC KEY-----"
        )
    return hashlib.sha256(der).hexdigest()[:12]


# -- openssl ----------------------------------------------------------------------------------------------------------


def _openssl(arguments: Sequence[str], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    program = find_program("openssl")
    if program is None:
        raise SignatureError("no_tool", "There is no openssl on this host", "Install the package openssl")
    try:
        return subprocess.run(
            [program, *arguments], input=stdin, capture_output=True, timeout=OPENSSL_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SignatureError("no_tool", f"openssl could not be run: {error}") from error


def public_key_of(key: Path) -> str:
    """The public key (PEM) of a private key's file."""
    done = _openssl(["pkey", "-in", str(key), "-passin", "pass:", "-pubout"])
    if done.returncode != 0:
        raise SignatureError(
            "bad_key",
            f"{key} is no private key that openssl can read",
            "It has to be an EC key (P-256) in PEM form without a passphrase: "
            "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256",
        )
    return done.stdout.decode()


def sign(payload: bytes, key: Path) -> bytes:
    """The signature of a document."""
    done = _openssl(["dgst", "-sha256", "-sign", str(key), "-passin", "pass:"], payload)
    if done.returncode != 0 or not done.stdout:
        raise SignatureError("bad_key", f"openssl does not sign with {key}", "It has to be an EC key (P-256)")
    return done.stdout


def is_signed(signature: Signature, public_key: str) -> bool:
    """Whether a signature is by the holder of the private key, over this very document."""
    with tempfile.TemporaryDirectory(prefix="image-signature-") as name:
        place = Path(name)
        (place / "key.pem").write_text(public_key)
        (place / "signature").write_bytes(signature.value)
        files = ["-verify", str(place / "key.pem"), "-signature", str(place / "signature")]
        return _openssl(["dgst", "-sha256", *files], signature.payload).returncode == 0


# -- verification -----------------------------------------------------------------------------------------------------


def verify(reference: Reference, signatures: Iterable[Signature], public_key: str) -> Signature:
    """The signature that proves an image; `SignatureError` when none of them does."""
    name = key_id(public_key)
    found = list(signatures)
    if not found:
        raise SignatureError(
            "unsigned",
            f"{reference} is not signed",
            "It was not built by this site's builder, or before signatures were on: run site.yml with --tags images",
        )
    ours = [signature for signature in found if is_signed(signature, public_key)]
    if not ours:
        raise SignatureError(
            "wrong_key",
            f"{reference} is signed, but not with the site's key {name}",
            "Somebody else signed it, or the key was changed: run site.yml with --tags images, which signs anew",
        )
    for signature in ours:
        if _is_about(signature.payload, reference):
            return signature
    raise SignatureError(
        "other_image",
        f"The signature beside {reference} is of the site's key {name}, but of another image",
        "Somebody put it there: find out who writes to the registry, and run site.yml with --tags images",
    )


def signed_sbom(signature: Signature) -> str:
    """The digest of the bill of materials that a signature covers; empty when it covers none."""
    try:
        return str((json.loads(signature.payload).get("optional") or {}).get(SBOM_ANNOTATION, ""))
    except (ValueError, AttributeError):
        return ""


def _is_about(payload: bytes, reference: Reference) -> bool:
    """Whether a signed document names this image. The registry may have several names, the repository has one."""
    try:
        critical = json.loads(payload)["critical"]
        named = critical["identity"]["docker-reference"].partition("@")[0]
        repository = named.partition("/")[2].partition(":")[0]
        return bool(
            critical["type"] == PAYLOAD_TYPE
            and critical["image"]["docker-manifest-digest"] == reference.digest
            and repository == reference.repository
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


# -- in the registry --------------------------------------------------------------------------------------------------


def tag_of(digest: str) -> str:
    """The tag under which the signatures of a digest are kept."""
    return f"{digest.replace(':', '-')}.sig"


def stored(registry: Registry, reference: Reference) -> list[Signature]:
    """The signatures that the registry has of an image."""
    if registry.find_digest(reference.repository, tag_of(reference.digest)) is None:
        return []
    content, _ = registry.stored_manifest(reference.repository, tag_of(reference.digest))
    return [
        Signature(registry.blob(reference.repository, digest), value) for digest, value in _layers(content)
    ]


def _layers(manifest: bytes) -> Iterable[tuple[str, bytes]]:
    """Digest of the document and signature, of each layer that is one."""
    try:
        layers = json.loads(manifest)["layers"]
        entries = [(str(layer["digest"]), str(layer["annotations"][ANNOTATION])) for layer in layers]
        return [(digest, base64.b64decode(value, validate=True)) for digest, value in entries]
    except (ValueError, KeyError, TypeError):
        return []


def store(registry: Registry, reference: Reference, signatures: Sequence[Signature]) -> None:
    """Put signatures beside an image, in place of those that stood there."""
    layers = []
    for signature in signatures:
        registry.put_blob(reference.repository, signature.payload)
        value = base64.b64encode(signature.value).decode()
        layers.append({**descriptor(signature.payload, SIMPLE_SIGNING), "annotations": {ANNOTATION: value}})
    config = encode(_config([str(layer["digest"]) for layer in layers]))
    registry.put_blob(reference.repository, config)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor(config, CONFIG),
        "layers": layers,
    }
    registry.put_manifest(reference.repository, tag_of(reference.digest), encode(manifest), MANIFEST)


def _config(payload_digests: Sequence[str]) -> Mapping[str, Any]:
    """The configuration that cosign writes for what is an image in form only."""
    never = "0001-01-01T00:00:00Z"
    return {
        "architecture": "",
        "config": {},
        "created": never,
        "history": [{"created": never}] * len(payload_digests),
        "os": "",
        "rootfs": {"type": "layers", "diff_ids": list(payload_digests)},
    }


class Signer:
    """The site's key at work on what it built itself.

    :param key: path of the private key (EC P-256, PEM), readable only for the builder.
    """

    def __init__(self, registry: Registry, address: str, key: Path) -> None:
        self._registry = registry
        self._address = address
        self._key = key
        self.public_key = public_key_of(key)

    def is_ours(self, repository: str, digest: str) -> bool:
        """Whether what the registry has under a digest is signed with the key of now."""
        reference = Reference(self._address, repository, digest)
        try:
            verify(reference, stored(self._registry, reference), self.public_key)
        except SignatureError:
            return False
        return True

    def sign(self, repository: str, digest: str, sbom: str = "") -> None:
        """Sign what was pushed, unless it is signed, and prove that the registry has the signature.

        :param sbom: digest of its bill of materials, which the signature covers as well.
        """
        reference = Reference(self._address, repository, digest)
        payload = payload_of(reference, {SBOM_ANNOTATION: sbom} if sbom else None)
        known = stored(self._registry, reference)
        ours = [signature for signature in known if is_signed(signature, self.public_key)]
        if any(signature.payload == payload for signature in ours):
            return
        # Signatures of other keys stay: somebody else may go by them.
        others = [signature for signature in known if signature not in ours]
        store(self._registry, reference, [*others, Signature(payload, sign(payload, self._key))])
        verify(reference, stored(self._registry, reference), self.public_key)


# -- on a host --------------------------------------------------------------------------------------------------------


class KeptSignatures:
    """Signatures that a host keeps, so that a release can be verified again without a registry. They prove themselves."""

    def __init__(self, directory: Path, *, writable: bool = True) -> None:
        self._directory = directory
        self._writable = writable

    def _path(self, digest: str) -> Path:
        return self._directory / f"{digest.removeprefix('sha256:')}.json"

    def read(self, digest: str) -> list[Signature]:
        """What is kept for a digest; nothing when there is nothing usable."""
        try:
            kept = json.loads(self._path(digest).read_text())
            return [
                Signature(*(base64.b64decode(kept[key], validate=True) for key in ("payload", "signature")))
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def write(self, digest: str, signature: Signature) -> None:
        """Keep a signature, where this host may be written to (not in check mode)."""
        if not self._writable:
            return
        self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        values = {"payload": signature.payload, "signature": signature.value}
        text = json.dumps({key: base64.b64encode(value).decode() for key, value in values.items()})
        write_file(self._path(digest), text, mode=0o444)


def prove(reference: Reference, public_key: str, kept: KeptSignatures, registry: Registry | None) -> str:
    """Prove an image before it runs; return where its signature was found: `host` or `registry`.

    :param registry: None where a host has none; then only what it kept counts.
    """
    try:
        verify(reference, kept.read(reference.digest), public_key)
        return "host"
    except SignatureError:
        if registry is None:
            raise
    kept.write(reference.digest, verify(reference, stored(registry, reference), public_key))
    return "registry"
