"""The Debian base image that everything else is built on: pulled, or bootstrapped from the host's own mirror.

Its name ends in a digest of its content (suite, packages and their versions), and so does its label. A refresh that
brings nothing new keeps both, and nothing that stands on it is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ansible.module_utils.build_environment import proxy_arguments
from ansible.module_utils.docker_cli import Docker, DockerError, find_program, labels_of, last_lines, run

LABEL = "org.aisha.base"
DIGEST_LABEL = f"{LABEL}.digest"
DOCKER_HUB = "registry-1.docker.io"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
}
#: What a container never reads. As in Debian's own slim images, licences stay.
LEFT_OUT = ("/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*", "/usr/share/info/*")
KEPT = ("/usr/share/locale/locale.alias", "/usr/share/doc/*/copyright")
_WORD = re.compile(r"[a-z0-9][a-z0-9.+-]*")


class BaseImageError(Exception):
    """The base image can't be made.

    `reason`: invalid, no_mirror, no_tool, pull_failed, bootstrap_failed, or that of a `DockerError`. `str()` gives
    fault and remedy.
    """

    def __init__(self, reason: str, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}. {remedy}" if remedy else message)
        self.reason = reason


@dataclass(frozen=True)
class BaseSpec:
    """The base image as a user asks for it. `refresh_days` 0 means never; `mirrors` in place of the host's own."""

    name: str = "aisha-base"
    method: str = "auto"
    suite: str = "trixie"
    packages: tuple[str, ...] = ("ca-certificates",)
    refresh_days: int = 7
    pull_image: str = ""
    mirror: str = ""
    security_mirror: str = ""

    @property
    def source(self) -> str:
        """The public image to pull."""
        return self.pull_image or f"debian:{self.suite}-slim"

    def check(self) -> None:
        """Raise for a suite or package name that apt would not know; these words go into a Dockerfile."""
        wrong = [word for word in (self.suite, *self.packages) if not _WORD.fullmatch(word)]
        if wrong:
            raise BaseImageError(
                "invalid", f"Not the name of a suite or package: {', '.join(wrong)}", "Correct it"
            )


@dataclass(frozen=True)
class BaseImage:
    """A base image that stands in the engine."""

    name: str
    image_id: str
    digest: str
    method: str
    suite: str
    source: str
    packages: tuple[str, ...]
    refreshed: datetime
    size: int

    @classmethod
    def from_inspect(cls, image: Mapping[str, Any], repository: str) -> BaseImage | None:
        """From what `docker image inspect` says; None when it is no base image of ours under this name."""
        labels = labels_of(image)
        names = [tag for tag in image.get("RepoTags") or [] if tag.rpartition(":")[0] == repository]
        try:
            refreshed = datetime.strptime(labels[f"{LABEL}.refreshed"], TIME_FORMAT).replace(tzinfo=UTC)
            return cls(
                name=sorted(names)[0],
                image_id=str(image["Id"]),
                digest=labels[DIGEST_LABEL],
                method=labels[f"{LABEL}.method"],
                suite=labels[f"{LABEL}.suite"],
                source=labels.get(f"{LABEL}.source", ""),
                packages=tuple(labels[f"{LABEL}.packages"].split()),
                refreshed=refreshed,
                size=int(image.get("Size", 0)),
            )
        except (KeyError, ValueError, IndexError):
            return None


def content_identity(suite: str, packages: Iterable[str], manifest: Iterable[str]) -> str:
    """The digest of a base image's content. `manifest`: one line `package version architecture` for each package."""
    lines = [f"suite {suite}", f"packages {' '.join(sorted(packages))}", *sorted(manifest)]
    return f"sha256:{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"


def image_name(spec: BaseSpec, digest: str) -> str:
    """The image's name, e.g. ``aisha-base:trixie-0123456789ab``."""
    return f"{spec.name}:{spec.suite}-{digest.removeprefix('sha256:')[:12]}"


def unfit_reason(spec: BaseSpec, image: BaseImage, now: datetime) -> str:
    """Why an image is not what is asked for any more; empty when it is."""
    if image.suite != spec.suite:
        return f"suite {image.suite} is not {spec.suite}"
    if sorted(image.packages) != sorted(spec.packages):
        return "the list of packages differs"
    if spec.method != "auto" and image.method != spec.method:
        return f"it was made by {image.method}, not by {spec.method}"
    if image.method == "pull" and spec.pull_image and image.source != spec.pull_image:
        return f"it was pulled from {image.source}, not from {spec.pull_image}"
    age = now - image.refreshed
    if spec.refresh_days and age >= timedelta(days=spec.refresh_days):
        return f"it is {age.days} days old"
    return ""


def status_packages(text: str) -> list[str]:
    """The manifest lines of a dpkg status file: package, version and architecture of all that is installed."""
    lines = []
    for paragraph in text.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Architecture|Status): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            lines.append(f"{fields['Package']} {fields['Version']} {fields['Architecture']}")
    return sorted(lines)


# -- where Debian comes from ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One index that the host's apt is configured for (a line of `apt-get indextargets`)."""

    site: str
    release: str
    origin: str
    label: str


TARGET_FORMAT = "$(SITE)|$(RELEASE)|$(ORIGIN)|$(LABEL)"


def parse_targets(output: str) -> list[Target]:
    """The targets in `apt-get indextargets --format TARGET_FORMAT` (an unset field keeps its placeholder)."""
    targets = []
    for line in output.splitlines():
        fields = ["" if value.startswith("$(") else value for value in line.split("|")]
        if len(fields) == 4 and fields[0]:
            targets.append(Target(*fields))
    return targets


def resolve_site(site: str, read: Callable[[str], str]) -> str:
    """An apt site as an http(s) address; the first of the list for `mirror+file:` (cloud images); '' for others."""
    if site.startswith("mirror+file:"):
        path = "/" + site.removeprefix("mirror+file:").lstrip("/")
        words = [
            line.split()[0] for line in read(path).splitlines() if line.strip() and not line.startswith("#")
        ]
        site = words[0] if words else ""
    return site.rstrip("/") if urlsplit(site).scheme in ("http", "https") else ""


def debian_sites(targets: Sequence[Target], read: Callable[[str], str]) -> tuple[str, str]:
    """The host's own mirrors of Debian and of its security updates; empty where the host has none."""
    main = security = ""
    for target in targets:
        # Without downloaded lists apt knows neither origin nor label; then the layout of the archive must do.
        debian = target.origin == "Debian" or (not target.origin and "/debian" in target.site)
        is_security = target.label == "Debian-Security" or target.release.endswith("-security")
        if not debian:
            continue
        site = resolve_site(target.site, read)
        if is_security:
            security = security or site
        else:
            main = main or site
    return main, security


def source_lines(suite: str, main: str, security: str) -> list[str]:
    """The apt sources of the image: the suite, its updates and its security updates."""
    lines = [f"deb {main} {suite} main"]
    if suite not in ("sid", "unstable"):
        lines.append(f"deb {main} {suite}-updates main")
        if security:
            lines.append(f"deb {security} {suite}-security main")
    return lines


def mmdebstrap_command(program: str, spec: BaseSpec, sources: Sequence[str], target: Path) -> list[str]:
    """The arguments that bootstrap the suite into a tar file."""
    command = [program, "--variant=minbase", f"--include={','.join(sorted(spec.packages))}"]
    command += ["--aptopt=APT::Install-Recommends false"]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
    command += [f"--dpkgopt=path-include={pattern}" for pattern in KEPT]
    return [*command, "--format=tar", spec.suite, str(target), *sources]


def proxy_environment(apt_config: str, environ: Mapping[str, str]) -> dict[str, str]:
    """http_proxy and https_proxy as apt is configured on the host, which mmdebstrap's own apt does not read."""
    found = dict(re.findall(r'^Acquire::(http|https)::Proxy "([^"]+)";$', apt_config, re.MULTILINE))
    wanted = {f"{scheme}_proxy": value for scheme, value in found.items() if value != "DIRECT"}
    return {name: value for name, value in wanted.items() if not environ.get(name)}


# -- a public registry ------------------------------------------------------------------------------------------------


def registry_host(image: str) -> str:
    """The host that an image name would be pulled from."""
    first, slash, _rest = image.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else DOCKER_HUB


def answers(url: str, timeout: float) -> bool:
    """Whether anything answers at an address, be it with an error; through the proxies of the environment."""
    try:
        with urllib.request.urlopen(url, timeout=timeout):  # noqa: S310  (the scheme is ours)
            return True
    except urllib.error.HTTPError:
        return True  # 401 is what a registry says to a stranger
    except (OSError, ValueError):
        return False


def public_registry_answers(docker: Docker, host: str, timeout: float) -> bool:
    """Whether the engine has a chance to pull from `host`: it or, for Docker Hub, a mirror of the engine's answers."""
    mirrors: list[str] = []
    if host == DOCKER_HUB:
        info = docker.attempt("info", "--format", "{{json .RegistryConfig.Mirrors}}")
        mirrors = json.loads(info.out or "null") or [] if info.code == 0 else []
    addresses = [*(mirror.rstrip("/") for mirror in mirrors), f"https://{host}"]
    return any(answers(f"{address}/v2/", timeout) for address in addresses)


def pull_dockerfile(spec: BaseSpec) -> str:
    """The Dockerfile that adds the packages to the pulled image."""
    packages = " ".join(sorted(spec.packages))
    lines = [f"FROM {spec.source}"]
    if packages:
        lines.append(
            "RUN --mount=type=secret,id=ca,target=/run/secrets/ca set -eu; export DEBIAN_FRONTEND=noninteractive; "
            "if [ -s /run/secrets/ca ]; then set -- -o Acquire::https::CAInfo=/run/secrets/ca; fi; "
            f'apt-get "$@" -q update; apt-get "$@" -qy install --no-install-recommends {packages}; '
            "rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log"
        )
    lines += [f"ENV {name}={value}" for name, value in ENVIRONMENT.items()]
    return "\n".join([*lines, ""])


def labels(spec: BaseSpec, digest: str, method: str, source: str, now: datetime) -> dict[str, str]:
    """What the image says of itself."""
    time = now.astimezone(UTC).strftime(TIME_FORMAT)
    return {
        DIGEST_LABEL: digest,
        f"{LABEL}.method": method,
        f"{LABEL}.suite": spec.suite,
        f"{LABEL}.source": source,
        f"{LABEL}.packages": " ".join(sorted(spec.packages)),
        f"{LABEL}.refreshed": time,
        "org.opencontainers.image.created": time,
        "org.opencontainers.image.title": f"Debian {spec.suite}, minimal",
    }


@dataclass(frozen=True)
class Plan:
    """What has to happen: `action` none, pull or bootstrap; `why`; the image that stands, if any."""

    action: str
    why: str
    image: BaseImage | None
    missing_tools: tuple[str, ...] = ()


class BaseImages:
    """Finds, judges and makes the base image of one engine.

    :param reachable: whether a registry (its host) answers; asked only when an image is to be made.
    :param now: the time that ages are reckoned from.
    """

    def __init__(
        self,
        spec: BaseSpec,
        docker: Docker,
        now: datetime,
        *,
        reachable: Callable[[str], bool],
        timeout: float = 900.0,
        ca_bundle: Path = Path("/etc/ssl/certs/ca-certificates.crt"),
        log: Callable[[str], object] = str,
    ) -> None:
        spec.check()
        self.spec = spec
        self.warnings: list[str] = []
        self._docker = docker
        self._now = now
        self._reachable = reachable
        self._timeout = timeout
        self._ca_bundle = ca_bundle
        self._log = log

    def standing(self) -> list[BaseImage]:
        """The base images of this name, the latest first."""
        names = self._docker.call(
            "image", "ls", "--filter", f"label={DIGEST_LABEL}", "--format", "{{.Repository}}:{{.Tag}}", self.spec.name,
            action="list the base images",
        ).split()  # fmt: skip
        found = self._docker.images([name for name in names if not name.endswith(":<none>")])
        images = [BaseImage.from_inspect(image, self.spec.name) for image in found.values()]
        return sorted((i for i in images if i), key=lambda i: (i.refreshed, i.name), reverse=True)

    def plan(self, *, lenient: bool = False) -> Plan:
        """What has to happen. Changes nothing; asks the public registry only when something has to be made.

        :param lenient: in check mode an engine that does not stand yet is no fault.
        """
        try:
            standing = self.standing()
        except DockerError as error:
            if not (lenient and error.reason in ("no_client", "unreachable")):
                raise
            # Without an engine nobody can ask a public registry either; what is certain is that an image will be made.
            method = "pull" if self.spec.method == "pull" else "bootstrap"
            return Plan(method, "there is no engine yet", None)
        reasons = []
        for image in standing:
            unfit = unfit_reason(self.spec, image, self._now)
            if not unfit:
                return Plan("none", "it is what is asked for", image)
            reasons.append(f"{image.name}: {unfit}")
        method = self._method()
        missing = ("mmdebstrap",) if method == "bootstrap" and not find_program("mmdebstrap") else ()
        return Plan(method, "; ".join(reasons) or "there is none", standing[0] if standing else None, missing)

    def _method(self) -> str:
        if self.spec.method != "auto":
            return self.spec.method
        return "pull" if self._reachable(registry_host(self.spec.source)) else "bootstrap"

    def make_by(self, action: str) -> BaseImage:
        """Make the image as planned. Where the method is auto and pulling fails, bootstrap it if that is possible."""
        try:
            return self.make(action)
        except (BaseImageError, DockerError) as error:
            if self.spec.method != "auto" or action != "pull" or not find_program("mmdebstrap"):
                raise
            self.warnings.append(f"{error} Bootstrapped instead.")
        return self.make("bootstrap")

    def make(self, method: str) -> BaseImage:
        """Make the image by `pull` or `bootstrap` and return it.

        When it has the content of one that stands, that one's layers stay and only its time is renewed.
        """
        # Not /tmp, which may be memory: the archive has 100 MB and more.
        with tempfile.TemporaryDirectory(prefix="base-image-", dir="/var/tmp") as name:
            directory = Path(name)
            return self._bootstrap(directory) if method == "bootstrap" else self._pull()

    def _finish(
        self, digest: str, method: str, source: str, fresh: Callable[[str, dict[str, str]], None]
    ) -> BaseImage:
        name = image_name(self.spec, digest)
        marks = labels(self.spec, digest, method, source, self._now)
        same = next(
            (image for image in self.standing() if image.digest == digest and image.name == name), None
        )
        if same:
            self._log(f"{name}: nothing new; its time is renewed")
            self._relabel(name, name, marks)
        else:
            fresh(name, marks)
        found = self._docker.images([name]).get(name)
        image = BaseImage.from_inspect(found, self.spec.name) if found else None
        if image is None:
            raise BaseImageError("failed", f"{name} was made, but the engine does not have it", "Run again")
        return image

    def _relabel(self, name: str, origin: str, marks: Mapping[str, str]) -> None:
        self._docker_build(f"FROM {origin}\n", name, marks, timeout=120)

    def _docker_build(self, dockerfile: str, name: str, marks: Mapping[str, str], timeout: float) -> None:
        command = [
            "buildx",
            "build",
            "--builder",
            "default",
            "--load",
            "--provenance=false",
            "--progress=plain",
        ]
        command += ["--tag", name, *proxy_arguments(os.environ)]
        command += [word for key, value in marks.items() for word in ("--label", f"{key}={value}")]
        if self._ca_bundle.is_file():
            command += ["--secret", f"id=ca,src={self._ca_bundle}"]
        result = self._docker.attempt(*command, "-", stdin=dockerfile, timeout=timeout)
        if result.code != 0:
            raise BaseImageError("pull_failed", f"{name} was not built:\n{last_lines(result.err, 30)}")

    def _pull(self) -> BaseImage:
        self._log(f"pulling {self.spec.source}")
        result = self._docker.attempt("pull", "--quiet", self.spec.source, timeout=self._timeout)
        if result.code != 0:
            raise BaseImageError(
                "pull_failed",
                f"{self.spec.source} could not be pulled: {last_lines(result.err, 3)}",
                "Check name, login and network of the public registry, or use the method bootstrap",
            )
        step = f"{self.spec.name}:{self.spec.suite}-pulled"
        self._docker_build(pull_dockerfile(self.spec), step, {}, self._timeout)
        try:
            manifest = self._docker.call(
                "run", "--rm", "--network=none", "--entrypoint=dpkg-query", step,
                "--show", "--showformat=${Package} ${Version} ${Architecture}\\n",
                action="list the packages of the pulled image",
            ).split("\n")  # fmt: skip
            digest = content_identity(
                self.spec.suite, self.spec.packages, [line for line in manifest if line]
            )
            return self._finish(
                digest, "pull", self.spec.source, lambda name, marks: self._relabel(name, step, marks)
            )
        finally:
            self._docker.attempt("image", "rm", step)

    def sources(self) -> list[str]:
        """The apt sources to bootstrap from: the given mirror, or the host's own."""
        main, security = self.spec.mirror.rstrip("/"), self.spec.security_mirror.rstrip("/")
        if not main:
            targets = run(["apt-get", "indextargets", "--format", TARGET_FORMAT, "Created-By: Packages"])
            main, host_security = debian_sites(
                parse_targets(targets.out), lambda path: Path(path).read_text()
            )
            security = security or host_security
        if not main:
            raise BaseImageError(
                "no_mirror",
                f"This host's apt has no http(s) mirror of Debian to bootstrap {self.spec.suite} from",
                "Set base_image_mirror (and base_image_security_mirror) to a Debian mirror, "
                "or base_image_method to pull",
            )
        if not security:
            self.warnings.append(
                "The host has no mirror of Debian's security updates, so the base image goes without."
            )
        return source_lines(self.spec.suite, main, security)

    def _bootstrap(self, directory: Path) -> BaseImage:
        program = find_program("mmdebstrap")
        if program is None:
            raise BaseImageError(
                "no_tool",
                "mmdebstrap is not installed",
                "apt-get install mmdebstrap (role base_image does so)",
            )
        sources = self.sources()
        self._log(f"bootstrapping {self.spec.suite}")
        archive = directory / "root.tar"
        apt = run(["apt-config", "dump"])
        result = run(
            mmdebstrap_command(program, self.spec, sources, archive),
            timeout=self._timeout,
            env=proxy_environment(apt.out, os.environ),
        )
        if result.code != 0:
            raise BaseImageError(
                "bootstrap_failed",
                f"mmdebstrap could not make {self.spec.suite} (code {result.code}):\n{last_lines(result.err, 20)}\n"
                "Check that the host's mirror answers (apt-get update) and has this suite; "
                "base_image_mirror names another",
            )
        manifest = status_packages(read_member(archive, "var/lib/dpkg/status"))
        digest = content_identity(self.spec.suite, self.spec.packages, manifest)
        return self._finish(
            digest, "bootstrap", "mmdebstrap", lambda name, marks: self._import(archive, name, marks)
        )

    def _import(self, archive: Path, name: str, marks: Mapping[str, str]) -> None:
        changes = [f"ENV {key}={value}" for key, value in ENVIRONMENT.items()]
        changes += [f'LABEL {key}="{value}"' for key, value in marks.items()]
        changes += ['CMD ["/bin/bash"]']
        options = [word for change in changes for word in ("--change", change)]
        self._docker.call("import", *options, str(archive), name, action=f"import {name}", timeout=300)


def read_member(archive: Path, path: str) -> str:
    """The text of one file in a tar archive, with or without a leading `./`."""
    with tarfile.open(archive, "r|") as tar:
        for member in tar:
            if member.name.removeprefix("./") == path:
                stream = tar.extractfile(member)
                return stream.read().decode("utf-8") if stream else ""
    raise BaseImageError(
        "bootstrap_failed", f"There is no {path} in what mmdebstrap made", "Check its version"
    )
