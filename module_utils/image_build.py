"""Images by content: what stands under which tag, what has to be built and pushed, and the proof that it arrived.

An image's tag is the digest of what it is made of (`content_digest`). A tag that the registry has is an image that
need not be built, on whichever machine it was built. After a push the registry is asked for the digest: what it
answers, and not what the push command printed, is what a release is pinned to.

Beside an image stands its bill of materials, and, where the site signs, a signature of both. With a signing key an image
that the registry has counts only when it is signed with that key: whoever may write to the registry could otherwise put
an image of theirs under a content tag, labels included.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from ansible.module_utils import image_referrers, sbom
from ansible.module_utils.build_environment import (
    host_pip_configuration,
    make_login_directory,
    proxy_arguments,
    write_private,
)
from ansible.module_utils.content_digest import (
    ContentError,
    Entry,
    content_digest,
    content_tag,
    read_context,
    stage,
)
from ansible.module_utils.docker_cli import Docker, DockerError, Result, labels_of, last_lines
from ansible.module_utils.image_signature import SignatureError, Signer
from ansible.module_utils.registry_api import RegistryError

CONTENT_LABEL = "org.aisha.content.digest"
BASE_LABEL = "org.aisha.base.digest"
CREATED_LABEL = "org.opencontainers.image.created"
FAILURE_LINES = 40
#: Seconds that reading an image's packages may take.
READ_TIMEOUT = 120.0
_PUSHED = re.compile(r"\bdigest: (sha256:[0-9a-f]{64})\b")


class ImageError(Exception):
    """An image can't be resolved, built or pushed.

    `reason`: no_base, no_builder, no_ca, build_failed, push_failed, not_proven, tag_occupied; or that of the
    `ContentError`, `DockerError`, `RegistryError`, `SbomError` or `SignatureError` beneath. `str()` gives fault and remedy.
    """

    def __init__(self, reason: str, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}. {remedy}" if remedy else message)
        self.reason = reason


class Registry(Protocol):
    """What is needed of a registry; `registry_api.RegistryClient` has it."""

    def find_digest(self, repository: str, reference: str) -> str | None: ...  # noqa: D102

    def manifest_digest(self, repository: str, reference: str) -> str: ...  # noqa: D102

    def labels(self, repository: str, reference: str) -> dict[str, str]: ...  # noqa: D102

    def add_tag(self, repository: str, digest: str, tag: str) -> None: ...  # noqa: D102

    def stored_manifest(self, repository: str, reference: str) -> tuple[bytes, str]: ...  # noqa: D102

    def put_manifest(self, repository: str, reference: str, content: bytes, media_type: str) -> str: ...  # noqa: D102

    def blob(self, repository: str, digest: str) -> bytes: ...  # noqa: D102

    def put_blob(self, repository: str, content: bytes) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class ImageSpec:
    """One image as a user asks for it. Paths are those of the machine that builds."""

    name: str
    context: Path
    dockerfile: Path
    base: str = ""
    target: str = ""
    args: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> ImageSpec:
        """From module parameters; the Dockerfile's path may be relative to the context."""
        context = Path(params["context"])
        return cls(
            name=params["name"],
            context=context,
            dockerfile=context / (params["dockerfile"] or "Dockerfile"),
            base=params["base"] or "",
            target=params["target"] or "",
            args={key: str(value) for key, value in (params["args"] or {}).items()},
            labels={key: str(value) for key, value in (params["labels"] or {}).items()},
        )


@dataclass(frozen=True)
class Settings:
    """What holds for all images of one run. `registry` is the address as images are named, empty for no registry.

    `sbom`: whether each image in the registry gets a bill of materials. `signer`: who signs what is pushed; None where the
    site does not sign.
    """

    state: str = "pushed"
    registry: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    latest: bool = True
    revision: str = ""
    ca_bundle: Path = Path("/etc/ssl/certs/ca-certificates.crt")
    build_timeout: float = 1800.0
    push_timeout: float = 600.0
    log_dir: Path | None = None
    sbom: bool = False
    signer: Signer | None = None


@dataclass
class Image:
    """One image between question and answer: what it is made of, where it stands, what was done."""

    spec: ImageSpec
    registry: str
    entries: list[Entry] = field(default_factory=list)
    dockerfile: str = ""
    content: str = ""
    base_known: bool = True
    base_size: int = 0
    image_id: str = ""
    size: int = 0
    in_engine: bool = False
    latest_in_engine: bool = False
    digest: str = ""
    latest_digest: str = ""
    built: bool = False
    pushed: bool = False
    tagged: bool = False
    sbom: str = ""
    described: bool = False
    signed: bool = False
    seconds: float = 0.0

    @property
    def tag(self) -> str:
        """The content tag."""
        return str(content_tag(self.content))

    @property
    def repository(self) -> str:
        """The name as the engine knows it, with the registry in front where there is one."""
        return f"{self.registry}/{self.spec.name}" if self.registry else self.spec.name

    @property
    def local(self) -> str:
        """Name and content tag as the engine knows them."""
        return f"{self.repository}:{self.tag}"

    @property
    def ref(self) -> str:
        """What to pin to: by digest once the registry has it, by content tag until then."""
        return f"{self.repository}@{self.digest}" if self.registry and self.digest else self.local

    def report(self) -> dict[str, Any]:
        """What the module returns for this image."""
        return {
            "name": self.spec.name,
            "tag": self.tag,
            "tag_known": self.base_known,
            "ref": self.ref,
            "digest": self.digest if self.registry else self.image_id,
            "content_digest": self.content,
            "image_id": self.image_id,
            "size": self.size,
            "size_over_base": max(self.size - self.base_size, 0) if self.size else 0,
            "in_engine": self.in_engine,
            "in_registry": bool(self.registry and self.digest),
            "built": self.built,
            "pushed": self.pushed,
            "tagged": self.tagged,
            "sbom": self.sbom,
            "described": self.described,
            "signed": self.signed,
            "seconds": round(self.seconds, 1),
        }


def base_identity(image: Mapping[str, Any]) -> str:
    """What a base image's content is known by: our own digest where it bears one, otherwise its id."""
    labels = labels_of(image)
    # An image that was built here inherits its base's label, so its own digest comes first.
    return labels.get(CONTENT_LABEL) or labels.get(BASE_LABEL) or str(image.get("Id", ""))


def effective_args(image: Image) -> dict[str, str]:
    """The build arguments as they are handed in: `BASE` is the base image, `@tag@` becomes the content tag."""
    args = {"BASE": image.spec.base} if image.spec.base else {}
    args.update({key: value.replace("@tag@", image.tag) for key, value in image.spec.args.items()})
    return args


def image_labels(image: Image, settings: Settings, created: datetime) -> dict[str, str]:
    """All labels of an image: those that were asked for, and the OCI annotations of this build."""
    labels = {
        **image.spec.labels,
        CONTENT_LABEL: image.content,
        "org.opencontainers.image.title": image.spec.name,
        "org.opencontainers.image.version": image.tag,
        CREATED_LABEL: created.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if settings.revision:
        labels["org.opencontainers.image.revision"] = settings.revision
    return labels


def build_command(
    image: Image,
    settings: Settings,
    *,
    context: Path,
    dockerfile: Path,
    pip: Path,
    created: datetime,
    environ: Mapping[str, str],
) -> list[str]:
    """The arguments of `docker` that build an image from its stage, under its content tag and `latest`."""
    # The engine's own BuildKit, whatever builder the user has chosen. No provenance: it would make an index of the
    # image where the engine keeps images in containerd's store, with another digest for each build.
    command = ["buildx", "build", "--builder", "default", "--load", "--provenance=false", "--progress=plain"]
    command += ["--file", str(dockerfile), "--tag", image.local]
    if settings.latest:
        command += ["--tag", f"{image.repository}:latest"]
    if image.spec.target:
        command += ["--target", image.spec.target]
    for key, value in sorted(effective_args(image).items()):
        command += ["--build-arg", f"{key}={value}"]
    command += proxy_arguments(environ)
    for key, value in sorted(image_labels(image, settings, created).items()):
        command += ["--label", f"{key}={value}"]
    command += ["--secret", f"id=ca,src={settings.ca_bundle}", "--secret", f"id=pip,src={pip}"]
    return [*command, str(context)]


def pushed_digest(output: str) -> str:
    """The manifest digest that `docker push` names at its end, or nothing."""
    found = _PUSHED.findall(output)
    return str(found[-1]) if found else ""


class ContentImages:
    """The images of one run: resolve them, say what is missing, make it so, and prove it.

    :param docker: the engine.
    :param registry: the registry; None where `settings.registry` is empty.
    :param log: gets one line at the start and the end of each piece of work.
    """

    def __init__(
        self,
        specs: Sequence[ImageSpec],
        settings: Settings,
        docker: Docker,
        registry: Registry | None,
        log: Callable[[str], object] = str,
    ) -> None:
        self.images = [Image(spec, settings.registry) for spec in specs]
        self.settings = settings
        self.warnings: list[str] = []
        self._docker = docker
        self._registry = registry
        self._log = log

    def resolve(self, *, lenient: bool = False) -> None:
        """Find out each image's tag and where it stands. Changes nothing.

        :param lenient: in check mode: what does not stand yet (engine, base image, registry) is no fault.
        """
        bases = self._engine_images([i.spec.base for i in self.images if i.spec.base], lenient)
        for image in self.images:
            self._digest(image, bases, lenient)
        found = self._engine_images(
            [n for i in self.images for n in (i.local, f"{i.repository}:latest")], lenient
        )
        for image in self.images:
            self._look_in_engine(image, found)
        if self._registry:
            for image in self.images:
                self._look_in_registry(image, lenient)

    def _engine_images(self, references: Sequence[str], lenient: bool) -> dict[str, dict[str, Any]]:
        try:
            found: dict[str, dict[str, Any]] = self._docker.images(references)
            return found
        except DockerError as error:
            if lenient and error.reason in ("no_client", "unreachable"):
                return {}
            raise ImageError(error.reason, str(error)) from error

    def _digest(self, image: Image, bases: Mapping[str, Mapping[str, Any]], lenient: bool) -> None:
        spec = image.spec
        base = bases.get(spec.base, {})
        image.base_known = bool(base) or not spec.base
        if not image.base_known and not lenient:
            raise ImageError(
                "no_base",
                f"The base image {spec.base} of {spec.name} is not in the engine",
                "Role base_image makes it: run with --tags images or base_image",
            )
        image.base_size = int(base.get("Size", 0))
        try:
            image.entries = read_context(spec.context, spec.dockerfile)
            image.dockerfile = spec.dockerfile.read_text(encoding="utf-8")
        except ContentError as error:
            raise ImageError(error.reason, f"{spec.name}: {error}") from error
        image.content = content_digest(
            image.entries,
            dockerfile=image.dockerfile,
            base=base_identity(base) if base else spec.base,
            target=spec.target,
            args=spec.args,
            labels=spec.labels,
        )

    def _look_in_engine(self, image: Image, found: Mapping[str, Mapping[str, Any]]) -> None:
        here = found.get(image.local, {})
        # A tag can be set by hand; the label comes only with the build.
        image.in_engine = bool(here) and labels_of(here).get(CONTENT_LABEL) == image.content
        if image.in_engine:
            image.image_id, image.size = str(here["Id"]), int(here.get("Size", 0))
            latest = found.get(f"{image.repository}:latest", {})
            image.latest_in_engine = latest.get("Id") == image.image_id

    def _look_in_registry(self, image: Image, lenient: bool) -> None:
        assert self._registry is not None  # noqa: S101  (for the type checker)
        try:
            image.digest = self._registry.find_digest(image.spec.name, image.tag) or ""
            if image.digest and self._counts(image):
                self._prove_content(image)
                self._look_beside(image)
            image.latest_digest = self._registry.find_digest(image.spec.name, "latest") or ""
        except RegistryError as error:
            if not (
                error.reason in ("unreachable", "timeout") and (lenient or self.settings.state == "built")
            ):
                raise ImageError(error.reason, str(error)) from error
            self.warnings.append(f"The registry was not asked for {image.spec.name}: {error}")

    def _counts(self, image: Image) -> bool:
        """Whether what the registry has under our content tag may be used. Where the site signs: only what it signed."""
        if self.settings.signer is None:
            return True
        image.signed = self.settings.signer.is_ours(image.spec.name, image.digest)
        if not image.signed:
            self._log(
                f"{image.spec.name}: {image.digest} is not signed with the site's key, and does not count"
            )
            image.digest = ""
        return image.signed

    def _look_beside(self, image: Image) -> None:
        """Find the image's bill of materials."""
        if self.settings.sbom and self._registry:
            image.sbom = (
                image_referrers.find(self._registry, image.spec.name, image.digest, sbom.MEDIA_TYPE) or ""
            )

    def _prove_content(self, image: Image) -> None:
        """Fail when the registry has another image under our content tag."""
        assert self._registry is not None  # noqa: S101
        content = self._registry.labels(image.spec.name, image.digest).get(CONTENT_LABEL, "")
        if content != image.content:
            raise ImageError(
                "tag_occupied",
                f"{image.local} in the registry is not what was built from this source "
                f"(its content digest is {content or 'missing'})",
                "Somebody pushed another image under this tag: delete the tag in the registry and run again",
            )

    def wants_build(self, image: Image) -> bool:
        """Whether an image has to be built: it stands nowhere."""
        return self.settings.state != "resolved" and not image.in_engine and not image.digest

    def wants_push(self, image: Image) -> bool:
        """Whether an image has to be pushed."""
        return self.settings.state == "pushed" and bool(image.registry) and not image.digest

    def wants_sbom(self, image: Image) -> bool:
        """Whether an image has to get its bill of materials."""
        wanted = self.settings.sbom and self.settings.state == "pushed" and bool(image.registry)
        return wanted and (self.wants_push(image) or not image.sbom)

    def wants_latest(self, image: Image) -> bool:
        """Whether `latest` has to be moved to an image, here or in the registry."""
        if not self.settings.latest or self.settings.state == "resolved":
            return False
        if self.settings.state == "pushed" and image.registry and image.latest_digest != image.digest:
            return True
        return image.in_engine and not image.latest_in_engine

    def predict(self) -> bool:
        """Mark what would be done, as check mode reports it; return whether anything would."""
        for image in self.images:
            image.tagged = self.wants_latest(image)
            image.described = self.wants_sbom(image)
            image.built, image.pushed = self.wants_build(image), self.wants_push(image)
        return any(i.built or i.pushed or i.tagged or i.described for i in self.images)

    def apply(self) -> bool:
        """Build and push what is missing, images side by side, and prove it; return whether anything was done.

        All images are tried. The `ImageError` names each one that failed.
        """
        checks = (self.wants_build, self.wants_push, self.wants_latest, self.wants_sbom)
        wanted = [image for image in self.images if any(check(image) for check in checks)]
        if not wanted:
            return False
        with (
            tempfile.TemporaryDirectory(prefix="content-images-") as name,
            ThreadPoolExecutor(len(wanted)) as pool,
        ):
            work = _Work(self, Path(name))
            failures = [e for e in pool.map(work.attempt, wanted) if e is not None]
        if failures:
            reason = failures[0].reason if len(failures) == 1 else "several"
            raise ImageError(reason, "\n".join(str(failure) for failure in failures))
        return True


class _Work:
    """The doing part of one run: builds and pushes with a private directory for stages and logins."""

    def __init__(self, parent: ContentImages, directory: Path) -> None:
        self._settings = parent.settings
        self._docker = parent._docker
        self._registry = parent._registry
        self._log = parent._log
        self._parent = parent
        self._directory = directory
        if any(parent.wants_build(image) for image in parent.images):
            self._require_builder()
        self._pip = write_private(directory / "pip.conf", host_pip_configuration())
        self._login: dict[str, str] = {}
        if self._settings.username:
            self._login = make_login_directory(
                directory / "docker",
                self._settings.registry,
                self._settings.username,
                self._settings.password,
            )

    def _require_builder(self) -> None:
        if not self._settings.ca_bundle.is_file():
            raise ImageError(
                "no_ca",
                f"There is no CA bundle {self._settings.ca_bundle} on the build host",
                "Install ca-certificates, or set ca_bundle",
            )
        result = self._docker.attempt("buildx", "version")
        if result.code != 0:
            raise ImageError(
                "no_builder", "docker has no buildx plugin", "Role engine installs it (--tags engine)"
            )

    def attempt(self, image: Image) -> ImageError | None:
        """Do all that one image wants; return the fault rather than raise it, so that the others go on."""
        started = time.monotonic()
        try:
            self._do(image)
        except ImageError as error:
            return error
        except (ContentError, DockerError, RegistryError, sbom.SbomError, SignatureError) as error:
            return ImageError(error.reason, f"{image.spec.name}: {error}")
        except OSError as error:
            return ImageError(
                "io", f"{image.spec.name}: {error}", "Look at the build host's disk and permissions"
            )
        finally:
            image.seconds = time.monotonic() - started
        return None

    def _do(self, image: Image) -> None:
        push, latest = self._parent.wants_push(image), self._parent.wants_latest(image)
        describe = self._parent.wants_sbom(image)
        if self._parent.wants_build(image):
            self._build(image)
        elif latest and image.in_engine:
            self._docker.call("tag", image.local, f"{image.repository}:latest", action=f"tag {image.local}")
            image.tagged = True
        if push:
            self._push(image)
        if describe:
            self._describe(image)
        if (push or image.described) and self._settings.signer:
            self._sign(image)
        if self._registry and self._settings.state == "pushed" and self._settings.latest:
            self._move_latest(image)

    def _build(self, image: Image) -> None:
        self._log(f"{image.spec.name}: building {image.tag}")
        place = self._directory / f"{image.spec.name.replace('/', '_')}-{image.tag}"
        (place / "context").mkdir(parents=True)
        stage(image.spec.context, image.entries, place / "context")
        (place / "Dockerfile").write_text(image.dockerfile, encoding="utf-8")
        command = build_command(
            image,
            self._settings,
            context=place / "context",
            dockerfile=place / "Dockerfile",
            pip=self._pip,
            created=datetime.now(UTC),
            environ=os.environ,
        )
        log = self._log_file(image, place)
        result = self._docker.attempt(*command, timeout=self._settings.build_timeout, log=log)
        if result.code != 0:
            raise self._build_failure(image, result, log)
        here = self._docker.images([image.local]).get(image.local)
        if here is None:
            raise ImageError("build_failed", f"{image.local} was built, but the engine does not have it")
        image.image_id, image.size, image.built, image.in_engine = (
            str(here["Id"]),
            int(here["Size"]),
            True,
            True,
        )
        self._log(f"{image.spec.name}: built {image.tag}")

    def _log_file(self, image: Image, place: Path) -> Path:
        if self._settings.log_dir is None:
            return place / "build.log"
        self._settings.log_dir.mkdir(parents=True, exist_ok=True)
        return self._settings.log_dir / f"build-{image.spec.name.replace('/', '_')}.log"

    def _build_failure(self, image: Image, result: Result, log: Path) -> ImageError:
        where = f" The whole log is {log} on the build host." if self._settings.log_dir else ""
        return ImageError(
            "build_failed",
            f"{image.spec.name} was not built (docker buildx build ended with code {result.code}). "
            f"Mend what its last lines name and run again: nothing was pushed, and what runs goes on.{where}\n"
            f"{last_lines(result.out, FAILURE_LINES)}",
        )

    def _push(self, image: Image) -> None:
        assert self._registry is not None  # noqa: S101
        self._log(f"{image.spec.name}: pushing {image.tag}")
        result = self._docker.attempt(
            "push", image.local, env=self._login, timeout=self._settings.push_timeout
        )
        if result.code != 0:
            raise ImageError(
                "push_failed",
                f"{image.local} was not pushed: {last_lines(result.err or result.out, 5)}",
                "Check that the registry answers, that the login is right, and that the engine trusts it "
                "(CA in /etc/docker/certs.d, or insecure-registries for plain http: role engine sets both)",
            )
        expected = pushed_digest(result.out)
        found = self._registry.manifest_digest(image.spec.name, image.tag)
        if found != expected:
            raise ImageError(
                "not_proven",
                f"{image.local} was pushed as {expected or 'an unknown digest'}, but the registry has {found}",
                "Another build host may be pushing the same content right now: run again",
            )
        image.digest, image.pushed = found, True
        self._log(f"{image.spec.name}: the registry has {image.tag} as {found}")

    def _describe(self, image: Image) -> None:
        """Put the bill of materials beside the image, unless one is there (the same layers were pushed before)."""
        assert self._registry is not None  # noqa: S101
        name, digest = image.spec.name, image.digest
        image.sbom = image_referrers.find(self._registry, name, digest, sbom.MEDIA_TYPE) or ""
        if image.sbom:
            return
        labels = self._registry.labels(name, digest)
        created = labels.get(CREATED_LABEL, "1970-01-01T00:00:00Z")
        subject = sbom.Subject(image.repository, image.tag, digest, created, labels)
        document = sbom.encode(sbom.document(subject, *sbom.packages_of(self._read_packages(image))))
        image.sbom = image_referrers.attach(self._registry, name, digest, sbom.MEDIA_TYPE, document, created)
        image.described = True
        self._log(f"{name}: the bill of materials of {image.tag} is {image.sbom}")

    def _read_packages(self, image: Image) -> str:
        """What the image says of its packages, from a container that can do nothing but read itself."""
        if not image.in_engine:
            action = f"pull {image.ref} to read its packages"
            self._docker.call(
                "pull",
                "--quiet",
                image.ref,
                action=action,
                env=self._login,
                timeout=self._settings.push_timeout,
            )
        command = ["run", "--rm", "--network=none", "--read-only", "--cap-drop=ALL", "--user=65534:65534"]
        command += ["--security-opt=no-new-privileges", "--entrypoint=/bin/sh"]
        reference = image.local if image.in_engine else image.ref
        output: str = self._docker.call(
            *command,
            reference,
            "-c",
            sbom.READ,
            action=f"read the packages of {reference}",
            timeout=READ_TIMEOUT,
        )
        return output

    def _sign(self, image: Image) -> None:
        """Sign the image, and with it its bill of materials. Only what this builder pushed, out of its own engine."""
        assert self._settings.signer is not None  # noqa: S101
        self._settings.signer.sign(image.spec.name, image.digest, image.sbom)
        image.signed = True
        self._log(f"{image.spec.name}: {image.digest} is signed")

    def _move_latest(self, image: Image) -> None:
        assert self._registry is not None  # noqa: S101
        if image.latest_digest != image.digest:
            self._registry.add_tag(image.spec.name, image.digest, "latest")
            image.latest_digest, image.tagged = image.digest, True
