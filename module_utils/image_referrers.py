"""Documents that belong to an image in a registry, found by the image's digest (OCI 1.1 referrers).

A document is an artifact: a manifest of its own with the image as its `subject`. docker-registry 2.8 has no referrers
API, so the list of an image's artifacts is kept as an index under the tag `sha256-<64 hex of the image>`, as the
specification has it for such registries; registries with the API read the `subject` and list it themselves.

Contract: OCI Image 1.1 (artifact guidelines) and OCI Distribution 1.1 (referrers tag schema).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ansible.module_utils.registry_api import RegistryError

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
EMPTY_CONTENT = b"{}"


class Registry(Protocol):
    """What is needed of a registry; `registry_api.RegistryClient` has it."""

    def find_digest(self, repository: str, reference: str) -> str | None: ...  # noqa: D102

    def stored_manifest(self, repository: str, reference: str) -> tuple[bytes, str]: ...  # noqa: D102

    def put_manifest(self, repository: str, reference: str, content: bytes, media_type: str) -> str: ...  # noqa: D102

    def blob(self, repository: str, digest: str) -> bytes: ...  # noqa: D102

    def put_blob(self, repository: str, content: bytes) -> str: ...  # noqa: D102


def tag_of(digest: str) -> str:
    """The tag under which an image's artifacts are listed."""
    return digest.replace(":", "-")


def encode(manifest: Mapping[str, Any]) -> bytes:
    """A manifest's bytes: the same manifest gives the same digest."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def artifact(subject: Mapping[str, Any], kind: str, layer: Mapping[str, Any], created: str) -> dict[str, Any]:
    """The manifest of a document of media type `kind` that belongs to `subject` (a descriptor)."""
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": kind,
        "config": descriptor(EMPTY_CONTENT, EMPTY),
        "layers": [dict(layer)],
        "subject": dict(subject),
        "annotations": {"org.opencontainers.image.created": created},
    }


def descriptor(content: bytes, media_type: str) -> dict[str, Any]:
    """What names some bytes: media type, digest, size."""
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return {"mediaType": media_type, "digest": digest, "size": len(content)}


def with_artifact(index: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The list of an image's artifacts with one more; another of the same kind makes room for it."""
    others = [e for e in listed(index) if e.get("artifactType") != entry["artifactType"]]
    return {"schemaVersion": 2, "mediaType": INDEX, "manifests": [*others, dict(entry)]}


def listed(index: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The entries of a list of artifacts."""
    entries = index.get("manifests")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def find(registry: Registry, repository: str, digest: str, kind: str) -> str | None:
    """The digest of the artifact of media type `kind` that belongs to an image; None when there is none."""
    for entry in listed(_index(registry, repository, digest)):
        if entry.get("artifactType") == kind:
            return str(entry.get("digest", "")) or None
    return None


def read(registry: Registry, repository: str, artifact_digest: str) -> bytes:
    """The document of an artifact."""
    content, _ = registry.stored_manifest(repository, artifact_digest)
    try:
        (layer,) = json.loads(content)["layers"]
        blob = str(layer["digest"])
    except (ValueError, KeyError, TypeError) as error:
        raise RegistryError(
            "unexpected_answer", f"{repository}@{artifact_digest} is not an artifact with one document"
        ) from error
    return registry.blob(repository, blob)


def attach(registry: Registry, repository: str, digest: str, kind: str, content: bytes, created: str) -> str:
    """Put a document beside an image, in place of an older one of its kind; return its artifact's digest."""
    image, media_type = registry.stored_manifest(repository, digest)
    subject = {"mediaType": media_type, "digest": digest, "size": len(image)}
    registry.put_blob(repository, EMPTY_CONTENT)
    registry.put_blob(repository, content)
    manifest = encode(artifact(subject, kind, descriptor(content, kind), created))
    entry = {**descriptor(manifest, MANIFEST), "artifactType": kind}
    registry.put_manifest(repository, str(entry["digest"]), manifest, MANIFEST)
    index = encode(with_artifact(_index(registry, repository, digest), entry))
    registry.put_manifest(repository, tag_of(digest), index, INDEX)
    return str(entry["digest"])


def _index(registry: Registry, repository: str, digest: str) -> dict[str, Any]:
    if registry.find_digest(repository, tag_of(digest)) is None:
        return {}
    content, _ = registry.stored_manifest(repository, tag_of(digest))
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
