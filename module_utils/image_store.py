"""Images by digest, outside a registry: an OCI image layout as a tar, written from a registry byte for byte.

`docker save` and `docker load` lose the digest of a manifest, and with it what a release is pinned to. So manifests and
blobs are copied as the registry has them. To bring them into an engine, a registry on loopback serves the tar while
the engine pulls from it, and checks each digest itself. To bring them into a registry, they are put there.

Contract: OCI Image Layout 1.1 and OCI Distribution 1.1.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tarfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlencode, urljoin

from ansible.module_utils.docker_cli import Docker, DockerError
from ansible.module_utils.registry_api import RegistryClient, RegistryError, answer_error, transport_error

with contextlib.suppress(ImportError):  # registry_api tells it
    import requests

BLOCK = 1024 * 1024
REPOSITORY = "org.aisha.repository"
TAG = "org.opencontainers.image.version"
_PINNED = re.compile(r"^(?P<registry>[^/]+)/(?P<repository>.+)@(?P<digest>sha256:[0-9a-f]{64})$")
_CALL = re.compile(r"^/v2/(?P<repository>.+)/(?P<kind>manifests|blobs)/(?P<digest>sha256:[0-9a-f]{64})$")
_LAYER_SUFFIXES = ("layer.v1.tar", "layer.v1.tar+gzip", "layer.v1.tar+zstd")


class ImageStoreError(Exception):
    """Images cannot be saved, read or loaded.

    `reason`: not_pinned, damaged, missing, port_taken, not_loaded, io, or that of a registry or the engine.
    """

    def __init__(self, reason: str, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}. {remedy}" if remedy else message)
        self.reason = reason


@dataclass(frozen=True)
class Pinned:
    """An image as a release names it."""

    registry: str
    repository: str
    digest: str

    @classmethod
    def parse(cls, reference: str) -> Pinned:
        """From `registry/repository@sha256:…`."""
        match = _PINNED.match(reference)
        if match is None:
            raise ImageStoreError(
                "not_pinned", f"{reference!r} is not pinned by digest", "Releases name registry/name@sha256:…"
            )
        return cls(**match.groupdict())

    def __str__(self) -> str:
        return f"{self.registry}/{self.repository}@{self.digest}"


class BlobRegistry(RegistryClient):  # type: ignore[misc]  # without the collection's own types
    """A registry whose blobs are read and written as streams."""

    def copy_blob(self, repository: str, digest: str, size: int, sink: Any) -> None:
        """Stream a blob of known size into `sink`, and prove its digest at the end."""
        action = f"read a layer of {repository}"
        url = f"{self.base_url}/v2/{self._repository(repository)}/blobs/{digest}"
        try:
            with self._session.get(
                url, auth=self._auth, verify=self._verify, timeout=self._timeout, stream=True
            ) as answer:
                if answer.status_code != 200:
                    raise answer_error(self.base_url, action, "GET", answer)
                found, count = hashlib.sha256(), 0
                for block in answer.iter_content(BLOCK):
                    found.update(block)
                    count += len(block)
                    sink.write(block)
        except (requests.RequestException, OSError) as error:
            raise transport_error(self.base_url, action, error) from error
        if count != size or f"sha256:{found.hexdigest()}" != digest:
            raise RegistryError("unexpected_answer", f"{self.base_url} gave other bytes than {digest}")

    def has_blob(self, repository: str, digest: str) -> bool:
        """Whether the registry has a blob in this repository."""
        url = f"{self.base_url}/v2/{self._repository(repository)}/blobs/{digest}"
        try:
            self._call("HEAD", url, f"look for a layer of {repository}")
        except RegistryError as error:
            if error.reason == "not_found":
                return False
            raise
        return True

    def send_blob(self, repository: str, digest: str, size: int, source: IO[bytes]) -> None:
        """Stream a blob into the registry, which proves its digest."""
        place = f"{self.base_url}/v2/{self._repository(repository)}/blobs/uploads/"
        action = f"put a layer into {repository}"
        started = self._call("POST", place, action)
        target = urljoin(place, started.headers.get("Location", ""))
        separator = "&" if "?" in target else "?"
        try:
            answer = self._session.put(
                f"{target}{separator}{urlencode({'digest': digest})}",
                data=_Sized(source, size),
                headers={"Content-Type": "application/octet-stream", "Content-Length": str(size)},
                auth=self._auth,
                verify=self._verify,
                timeout=(self._timeout[0], 300.0),
                allow_redirects=False,
            )
        except (requests.RequestException, OSError) as error:
            raise transport_error(self.base_url, action, error) from error
        if answer.status_code >= 300:
            raise answer_error(self.base_url, action, "PUT", answer)

    def manifest_bytes(self, repository: str, reference: str) -> tuple[bytes, str]:
        """A manifest as it stands, and its media type."""
        answer = self._manifest("GET", repository, reference)
        return answer.content, answer.headers.get("Content-Type", "").partition(";")[0]

    def send_manifest(self, repository: str, reference: str, body: bytes, media_type: str) -> None:
        """Put a manifest under a digest or a tag."""
        self._manifest("PUT", repository, reference, body=body, content_type=media_type)


class _Sized:
    """A stream with a length, so that requests does not send it in chunks."""

    def __init__(self, source: IO[bytes], size: int) -> None:
        self._source = source
        self._left = size
        self._size = size

    def __len__(self) -> int:
        return self._size

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes of what is left."""
        wanted = self._left if size < 0 else min(size, self._left)
        data = self._source.read(wanted)
        self._left -= len(data)
        return data


# -- saving ------------------------------------------------------------------------------------------------------------


def digest_of(content: bytes) -> str:
    """The digest by which content is known."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def children(manifest: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Descriptors of the manifests and of the blobs that a manifest or index names."""
    blobs = [entry for entry in [manifest.get("config"), *manifest.get("layers", [])] if entry]
    return list(manifest.get("manifests", [])), [entry for entry in blobs if not entry.get("urls")]


@dataclass
class _Document:
    repository: str
    digest: str
    body: bytes
    media_type: str


class Saver:
    """Writes images of a registry as an OCI layout; what two of them share is written once."""

    def __init__(self, tar: tarfile.TarFile, prefix: str = "") -> None:
        self._tar = tar
        self._prefix = prefix
        self._written: set[str] = set()
        self._index: list[dict[str, Any]] = []

    def save(self, registry: BlobRegistry, images: Iterable[Pinned]) -> None:
        """Write each image with all that it needs. Raises when a registry lacks one."""
        for image in images:
            documents = self._documents(registry, image.repository, image.digest)
            for document in documents:
                manifest = json.loads(document.body)
                for blob in children(manifest)[1]:
                    self._blob(registry, image.repository, blob)
                self._bytes(document.digest, document.body)
            self._note(registry, image, documents[-1])

    def _documents(self, registry: BlobRegistry, repository: str, digest: str) -> list[_Document]:
        """A manifest, behind the manifests that it names if it is an index."""
        body, media_type = registry.manifest_bytes(repository, digest)
        if digest_of(body) != digest:
            raise RegistryError("unexpected_answer", f"the registry gave another manifest than {digest}")
        inner = [
            document
            for entry in children(json.loads(body))[0]
            for document in self._documents(registry, repository, entry["digest"])
        ]
        return [*inner, _Document(repository, digest, body, media_type)]

    def _note(self, registry: BlobRegistry, image: Pinned, document: _Document) -> None:
        labels = registry.labels(image.repository, image.digest)
        self._index.append(
            {
                "mediaType": document.media_type,
                "digest": image.digest,
                "size": len(document.body),
                "annotations": {REPOSITORY: image.repository, TAG: labels.get(TAG, "")},
            }
        )

    def _blob(self, registry: BlobRegistry, repository: str, blob: dict[str, Any]) -> None:
        if blob["digest"] in self._written:
            return
        # The tar wants a source to read from, the registry a sink to write to: a pipe between them.
        with _piped(
            lambda sink: registry.copy_blob(repository, blob["digest"], blob["size"], sink)
        ) as source:
            self._add(f"blobs/{blob['digest'].replace(':', '/')}", blob["size"], source)
        self._written.add(blob["digest"])

    def _bytes(self, digest: str, content: bytes) -> None:
        if digest not in self._written:
            self._add(f"blobs/{digest.replace(':', '/')}", len(content), io.BytesIO(content))
            self._written.add(digest)

    def _add(self, name: str, size: int, source: IO[bytes]) -> None:
        member = tarfile.TarInfo(f"{self._prefix}{name}")
        member.size, member.mode = size, 0o644
        self._tar.addfile(member, source)

    def finish(self) -> list[dict[str, Any]]:
        """Write the index, last: a layout without one was cut off. Returns its entries."""
        index = {"schemaVersion": 2, "manifests": self._index}
        for name, text in (
            ("oci-layout", '{"imageLayoutVersion":"1.0.0"}'),
            ("index.json", json.dumps(index)),
        ):
            self._add(name, len(text), io.BytesIO(text.encode()))
        return self._index


@contextlib.contextmanager
def _piped(produce: Any) -> Iterator[IO[bytes]]:
    """A stream to read what `produce(sink)` writes, in a thread of its own; what it raises is raised here."""
    import os

    reading, writing = os.pipe()
    faults: list[BaseException] = []

    def run() -> None:
        with os.fdopen(writing, "wb") as sink:
            try:
                produce(sink)
            except BaseException as error:
                faults.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        with os.fdopen(reading, "rb") as source:
            yield source
    except (OSError, tarfile.TarError):
        thread.join(30)
        if faults and not isinstance(faults[0], BrokenPipeError):
            raise faults[0] from None
        raise
    thread.join(30)
    if faults:
        raise faults[0]


def image_bytes(registry: BlobRegistry, images: Iterable[Pinned]) -> int:
    """How many bytes a layout of these images takes."""
    sizes: dict[str, int] = {}

    def look(repository: str, digest: str) -> None:
        body, _ = registry.manifest_bytes(repository, digest)
        sizes[digest] = len(body)
        manifests, blobs = children(json.loads(body))
        sizes.update({blob["digest"]: int(blob["size"]) for blob in blobs})
        for entry in manifests:
            look(repository, entry["digest"])

    for image in images:
        look(image.repository, image.digest)
    return sum(sizes.values()) + 1024 * len(sizes)


# -- reading -----------------------------------------------------------------------------------------------------------


class Layout:
    """An OCI layout in a tar on the disk, perhaps below a prefix: where each blob lies, read in place."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        index: dict[str, Any] | None = None
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    name = member.name.removeprefix(prefix) if member.name.startswith(prefix) else ""
                    if name.startswith("blobs/sha256/"):
                        digest = f"sha256:{name.removeprefix('blobs/sha256/')}"
                        self._places[digest] = (member.offset_data, member.size)
                    elif name == "index.json":
                        index = json.loads((tar.extractfile(member) or io.BytesIO()).read())
        except (OSError, tarfile.TarError, ValueError) as error:
            raise ImageStoreError("damaged", f"{path} holds no images that can be read: {error}") from error
        if index is None:
            raise ImageStoreError("damaged", f"{path} was cut off: its index is missing", "Take another one")
        self.entries: list[dict[str, Any]] = index["manifests"]
        self.types: dict[str, str] = {entry["digest"]: entry["mediaType"] for entry in self.entries}
        for entry in self.entries:
            self.types |= {
                inner["digest"]: inner["mediaType"] for inner in children(self.manifest(entry["digest"]))[0]
            }

    def find(self, digest: str) -> tuple[int, int] | None:
        """Offset and size of a blob."""
        return self._places.get(digest)

    @contextlib.contextmanager
    def open(self, digest: str) -> Iterator[tuple[IO[bytes], int]]:
        """A stream at the beginning of a blob, and its size."""
        place = self.find(digest)
        if place is None:
            raise ImageStoreError("damaged", f"{self.path} lacks {digest}", "Take another one")
        with self.path.open("rb") as stream:
            stream.seek(place[0])
            yield stream, place[1]

    def bytes(self, digest: str) -> bytes:
        """A small blob, proven."""
        with self.open(digest) as (stream, size):
            content = stream.read(size)
        if digest_of(content) != digest:
            raise ImageStoreError("damaged", f"{digest} in {self.path} is not what its name says")
        return content

    def manifest(self, digest: str) -> dict[str, Any]:
        """A manifest or index."""
        found: dict[str, Any] = json.loads(self.bytes(digest))
        return found

    def repositories(self) -> dict[str, list[dict[str, Any]]]:
        """The index entries by repository."""
        found: dict[str, list[dict[str, Any]]] = {}
        for entry in self.entries:
            found.setdefault(entry["annotations"][REPOSITORY], []).append(entry)
        return found


def send(layout: Layout, registry: BlobRegistry, digests: Iterable[str] | None = None) -> list[str]:
    """Put the layout's images into a registry, under their digests and the tags that they bear. Returns what was new."""
    wanted = None if digests is None else set(digests)
    new = []
    for entry in layout.entries:
        repository, digest = entry["annotations"][REPOSITORY], entry["digest"]
        if wanted is not None and digest not in wanted:
            continue
        if registry.find_digest(repository, digest) is None:
            _send_one(layout, registry, repository, digest)
            new.append(f"{repository}@{digest}")
        tag = entry["annotations"].get(TAG)
        if tag and registry.find_digest(repository, tag) is None:
            registry.send_manifest(repository, tag, layout.bytes(digest), entry["mediaType"])
    return new


def _send_one(layout: Layout, registry: BlobRegistry, repository: str, digest: str) -> None:
    body = layout.bytes(digest)
    manifests, blobs = children(json.loads(body))
    for inner in manifests:
        _send_one(layout, registry, repository, inner["digest"])
    for blob in blobs:
        if not registry.has_blob(repository, blob["digest"]):
            with layout.open(blob["digest"]) as (stream, size):
                registry.send_blob(repository, blob["digest"], size, stream)
    registry.send_manifest(repository, digest, body, layout.types[digest])


# -- a registry for as long as the engine pulls -------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    layout: Layout

    def do_HEAD(self) -> None:
        """Answer without the content."""
        self._answer(with_body=False)

    def do_GET(self) -> None:
        """Answer with the content."""
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        if self.path.rstrip("/") == "/v2":
            self._head(200, 2, "application/json")
            if with_body:
                self.wfile.write(b"{}")
            return
        match = _CALL.match(self.path)
        place = self.layout.find(match["digest"]) if match else None
        if match is None or place is None:
            self._head(404, 0, "application/json")
            return
        kind = "application/octet-stream"
        if match["kind"] == "manifests":
            kind = self.layout.types.get(match["digest"], kind)
        self._head(200, place[1], kind, match["digest"])
        if with_body:
            with self.layout.open(match["digest"]) as (stream, left):
                while left and (block := stream.read(min(BLOCK, left))):
                    self.wfile.write(block)
                    left -= len(block)

    def _head(self, status: int, length: int, kind: str, digest: str = "") -> None:
        self.send_response(status)
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        if digest:
            self.send_header("Docker-Content-Digest", digest)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a module's output is its result."""


@contextlib.contextmanager
def served(layout: Layout, address: str) -> Iterator[str]:
    """A registry at `address` (host:port on loopback) that gives what the layout holds, and takes nothing."""
    host, _, port = address.rpartition(":")

    class Handler(_Handler):
        pass

    Handler.layout = layout
    try:
        server = ThreadingHTTPServer((host, int(port)), Handler)
    except OSError as error:
        raise ImageStoreError(
            "port_taken",
            f"{address} cannot be used to hand the images to the engine: {error.strerror}",
            "Free the port for this moment, or set bundle_address",
        ) from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield f"{host}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def missing_images(docker: Docker, references: Sequence[str]) -> list[str]:
    """Those references that the engine does not have under this very digest."""
    found = docker.images(references)
    return [reference for reference in references if reference not in found]


def load(docker: Docker, layout: Layout, references: Sequence[str], timeout: float) -> list[str]:
    """Bring images into the engine under `registry/repository@digest`, by a registry on loopback. Returns the new ones."""
    try:
        missing = missing_images(docker, references)
        by_registry: dict[str, list[str]] = {}
        for reference in missing:
            by_registry.setdefault(Pinned.parse(reference).registry, []).append(reference)
        for registry, wanted in by_registry.items():
            with served(layout, registry):
                for reference in wanted:
                    docker.call("pull", "--quiet", reference, action=f"load {reference}", timeout=timeout)
        still = missing_images(docker, references)
    except DockerError as error:
        raise ImageStoreError(error.reason, str(error)) from error
    if still:
        raise ImageStoreError(
            "not_loaded", f"The engine does not know {', '.join(still)} after it was loaded"
        )
    return missing
