"""Signatures with a real openssl, and a registry in memory: what counts, and what is refused for which reason."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
from ansible.module_utils import image_signature
from ansible.module_utils.image_signature import (
    KeptSignatures,
    Reference,
    Signature,
    SignatureError,
    Signer,
    key_id,
    payload_of,
    prove,
    public_key_of,
    signed_sbom,
    stored,
    tag_of,
    verify,
)
from ansible.module_utils.secret_files import generate

DIGEST, OTHER, SBOM = ("sha256:" + letter * 64 for letter in "abc")
ADDRESS = "r.example:5000"


class Memory:
    """A registry in memory, as far as signatures need one."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[bytes, str]] = {}

    def find_digest(self, repository: str, reference: str) -> str | None:
        return "sha256:" + "0" * 64 if reference in self.manifests else None

    def stored_manifest(self, repository: str, reference: str) -> tuple[bytes, str]:
        return self.manifests[reference]

    def put_manifest(self, repository: str, reference: str, content: bytes, media_type: str) -> str:
        self.manifests[reference] = (content, media_type)
        return f"sha256:{hashlib.sha256(content).hexdigest()}"

    def blob(self, repository: str, digest: str) -> bytes:
        return self.blobs[digest]

    def put_blob(self, repository: str, content: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.blobs[digest] = content
        return digest


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> list[Path]:
    """Two private keys, as role secrets generates them."""
    place = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        (place / name).write_text(generate("p256", 0))
    return [place / "ours", place / "theirs"]


@pytest.fixture
def registry() -> Memory:
    return Memory()


def reference(digest: str = DIGEST, repository: str = "webhook-api") -> Reference:
    return Reference(ADDRESS, repository, digest)


def reason_of(call) -> str:
    with pytest.raises(SignatureError) as caught:
        call()
    assert "Traceback" not in str(caught.value)
    return caught.value.reason


def test_a_generated_key_is_what_openssl_calls_p256(keys) -> None:
    shown = subprocess.run(
        ["openssl", "pkey", "-in", str(keys[0]), "-noout", "-text"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "NIST CURVE: P-256" in shown.stdout
    assert len(key_id(public_key_of(keys[0]))) == 12
    assert key_id(public_key_of(keys[0])) != key_id(public_key_of(keys[1]))


def test_what_is_signed_is_proven_and_signed_once(keys, registry) -> None:
    signer = Signer(registry, ADDRESS, keys[0])
    signer.sign("webhook-api", DIGEST, SBOM)
    before = dict(registry.manifests)
    signer.sign("webhook-api", DIGEST, SBOM)
    assert registry.manifests == before, "ECDSA signs differently each time; what stands is left alone"
    assert signer.is_ours("webhook-api", DIGEST)
    proof = verify(reference(), stored(registry, reference()), public_key_of(keys[0]))
    assert signed_sbom(proof) == SBOM


def test_an_unsigned_image_is_refused(keys, registry) -> None:
    assert (
        reason_of(lambda: verify(reference(), stored(registry, reference()), public_key_of(keys[0])))
        == "unsigned"
    )


def test_another_key_is_refused_and_signs_anew(keys, registry) -> None:
    Signer(registry, ADDRESS, keys[1]).sign("webhook-api", DIGEST)
    ours = Signer(registry, ADDRESS, keys[0])
    assert not ours.is_ours("webhook-api", DIGEST)
    assert (
        reason_of(lambda: verify(reference(), stored(registry, reference()), ours.public_key)) == "wrong_key"
    )
    ours.sign("webhook-api", DIGEST)
    assert ours.is_ours("webhook-api", DIGEST)
    assert Signer(registry, ADDRESS, keys[1]).is_ours("webhook-api", DIGEST), "theirs stays beside ours"
    ours.sign("webhook-api", DIGEST, SBOM)
    assert len(stored(registry, reference())) == 2, "ours takes the place of ours"


def test_a_signature_that_was_moved_to_another_image_is_refused(keys, registry) -> None:
    Signer(registry, ADDRESS, keys[0]).sign("webhook-api", DIGEST)
    registry.manifests[tag_of(OTHER)] = registry.manifests[tag_of(DIGEST)]
    moved = stored(registry, reference(OTHER))
    assert reason_of(lambda: verify(reference(OTHER), moved, public_key_of(keys[0]))) == "other_image"


def test_a_signature_counts_for_its_own_repository_alone(keys, registry) -> None:
    Signer(registry, ADDRESS, keys[0]).sign("nginx-webhook", DIGEST)
    found = stored(registry, reference())
    assert reason_of(lambda: verify(reference(), found, public_key_of(keys[0]))) == "other_image"


def test_the_registry_may_be_called_otherwise_on_a_host(keys, registry) -> None:
    Signer(registry, "127.0.0.1:5000", keys[0]).sign("webhook-api", DIGEST)
    verify(
        Reference("192.168.0.4:5000", "webhook-api", DIGEST),
        stored(registry, reference()),
        public_key_of(keys[0]),
    )


def test_a_changed_document_is_refused(keys) -> None:
    good = Signature(payload_of(reference()), image_signature.sign(payload_of(reference()), keys[0]))
    bad = Signature(good.payload.replace(b"aaaa", b"aaab", 1), good.value)
    assert reason_of(lambda: verify(reference(), [bad], public_key_of(keys[0]))) == "wrong_key"
    verify(reference(), [bad, good], public_key_of(keys[0]))


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{}",
        b'{"layers": [{}]}',
        b'{"layers": [{"digest": "x", "annotations": {"dev.cosignproject.cosign/signature": "?"}}]}',
    ],
)
def test_a_damaged_signature_manifest_is_no_signature(keys, registry, damage) -> None:
    registry.manifests[tag_of(DIGEST)] = (damage, "")
    assert (
        reason_of(lambda: verify(reference(), stored(registry, reference()), public_key_of(keys[0])))
        == "unsigned"
    )


def test_a_host_proves_a_known_image_without_a_registry(keys, registry, tmp_path) -> None:
    key, kept = public_key_of(keys[0]), KeptSignatures(tmp_path / "signatures")
    assert reason_of(lambda: prove(reference(), key, kept, None)) == "unsigned"
    Signer(registry, ADDRESS, keys[0]).sign("webhook-api", DIGEST)
    assert prove(reference(), key, kept, registry) == "registry"
    assert prove(reference(), key, kept, None) == "host"
    assert reason_of(lambda: prove(reference(), public_key_of(keys[1]), kept, None)) == "wrong_key"
    next((tmp_path / "signatures").iterdir()).write_text("{}")
    assert reason_of(lambda: prove(reference(), key, kept, None)) == "unsigned"


def test_check_mode_keeps_nothing(keys, registry, tmp_path) -> None:
    Signer(registry, ADDRESS, keys[0]).sign("webhook-api", DIGEST)
    kept = KeptSignatures(tmp_path / "signatures", writable=False)
    assert prove(reference(), public_key_of(keys[0]), kept, registry) == "registry"
    assert not (tmp_path / "signatures").exists()


@pytest.mark.parametrize(
    "text", ["webhook-api", "r:5000/webhook-api:latest", "r:5000/webhook-api@sha256:abc"]
)
def test_what_is_not_pinned_cannot_be_proven(text: str) -> None:
    assert reason_of(lambda: Reference.parse(text)) == "malformed"


def test_what_is_no_key_is_told(tmp_path, registry) -> None:
    (tmp_path / "key").write_text("none")
    assert reason_of(lambda: Signer(registry, ADDRESS, tmp_path / "key")) == "bad_key"
    assert reason_of(lambda: key_id("-----BEGIN PUBLIC KEY-----\n?\n-----END PUBLIC KEY-----")) == "bad_key"
