"""The bill of materials of an image: its Debian and Python packages, as a CycloneDX document.

Pure: text in, document out. What is in an image is taken from what the image itself keeps: dpkg's status file and the
METADATA of each installed Python distribution. The same image gives the same document, byte for byte.

Contracts: CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/), package URLs (https://github.com/package-url/purl-spec),
Debian policy 7.1 (relationships), PyPA core metadata 2.4. The tests hold documents against CycloneDX's own schema.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

SPEC_VERSION = "1.6"
MEDIA_TYPE = "application/vnd.cyclonedx+json"
#: Between the files that READ writes.
SEPARATOR = "\0"
#: Prints, in any Debian image: os-release, dpkg's status, and the head of each METADATA that no Debian package brought
#: (those are in dist-packages). Changes nothing, and needs no tool but the essential ones.
#: What an unprivileged user can't enter holds no package of anybody's.
READ = (
    "set -e; cat /etc/os-release; printf '\\0'; cat /var/lib/dpkg/status; "
    "find / -xdev -path '*/site-packages/*.dist-info/METADATA' "
    '-exec sh -c \'for file; do printf "\\0"; sed /^$/q "$file"; done\' sh {} + 2>/dev/null || true'
)
_NAMESPACE = uuid.UUID("8f9a3f0a-6f6e-5f0c-9d5b-2d1c8a3b7e10")
_STATUS_FIELDS = re.compile(
    r"^(Package|Version|Architecture|Status|Source|Maintainer|Depends|Pre-Depends|Provides): (.*(?:\n[ \t].*)*)$",
    re.MULTILINE,
)
_DEBIAN_NAME = re.compile(r"^[a-z0-9][a-z0-9+.-]*")
_SOURCE = re.compile(r"^(\S+)(?: \(([^)]+)\))?$")
_PYTHON_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*")
_OS_FIELD = re.compile(r'^([A-Z_]+)="?([^"\n]*)"?$', re.MULTILINE)


class SbomError(Exception):
    """There is no bill of materials, or it can't be made.

    `reason`: not_debian, unreadable, missing, malformed. `str()` gives fault and remedy.
    """

    def __init__(self, reason: str, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}. {remedy}" if remedy else message)
        self.reason = reason


@dataclass(frozen=True)
class Package:
    """One installed package. `needs`: names of the packages of its own kind that it depends on, installed or not."""

    kind: str
    name: str
    version: str
    purl: str
    supplier: str = ""
    licence: str = ""
    needs: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()

    @property
    def ref(self) -> str:
        """What the document calls it inside."""
        return self.purl


@dataclass(frozen=True)
class Subject:
    """The image that a document is about. `created` is the time of its build, RFC 3339 in UTC."""

    repository: str
    tag: str
    digest: str
    created: str
    labels: Mapping[str, str]


def os_release(text: str) -> dict[str, str]:
    """The fields of an os-release file."""
    return dict(_OS_FIELD.findall(text))


def purl(kind: str, path: str, version: str, qualifiers: Mapping[str, str] | None = None) -> str:
    """A package URL. Qualifiers are sorted, as the specification wants."""
    tail = f"?{urlencode(sorted((qualifiers or {}).items()), quote_via=quote)}" if qualifiers else ""
    return f"pkg:{kind}/{quote(path, safe='/')}@{quote(version, safe='')}{tail}"


def debian_packages(status: str, system: Mapping[str, str]) -> list[Package]:
    """What dpkg's status file says is installed, by name. The source package is named: Debian's advisories go by it."""
    vendor = system.get("ID", "debian")
    distribution = f"{vendor}-{system['VERSION_ID']}" if system.get("VERSION_ID") else vendor
    found = []
    for paragraph in status.split("\n\n"):
        fields = dict(_STATUS_FIELDS.findall(paragraph))
        if not fields.get("Status", "").endswith(" installed"):
            continue
        name, version = fields["Package"], fields["Version"]
        qualifiers = {"arch": fields["Architecture"], "distro": distribution}
        if source := _SOURCE.match(fields.get("Source", "")):
            qualifiers["upstream"] = f"{source[1]}@{source[2]}" if source[2] else source[1]
        relations = ", ".join(fields[key] for key in ("Pre-Depends", "Depends") if key in fields)
        found.append(
            Package(
                kind="deb",
                name=name,
                version=version,
                purl=purl("deb", f"{vendor}/{name}", version, qualifiers),
                supplier=fields.get("Maintainer", ""),
                needs=tuple(_relation_names(relations)),
                provides=tuple(_relation_names(fields.get("Provides", ""))),
            )
        )
    return sorted(found, key=lambda package: package.name)


def _relation_names(text: str) -> Iterable[str]:
    """The names in a relationship field; alternatives each count, as far as they are installed."""
    for word in re.split(r"[,|]", text):
        if match := _DEBIAN_NAME.match(word.strip()):
            yield match[0]


def python_name(name: str) -> str:
    """A distribution's name as indexes and package URLs write it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def python_package(metadata: str) -> Package | None:
    """The distribution that a METADATA file describes; None when it names none."""
    fields: dict[str, list[str]] = {}
    for line in metadata.splitlines():
        key, colon, value = line.partition(": ")
        if colon and not key.startswith((" ", "\t")):
            fields.setdefault(key, []).append(value.strip())
    try:
        name, version = python_name(fields["Name"][0]), fields["Version"][0]
    except (KeyError, IndexError):
        return None
    return Package(
        kind="pypi",
        name=name,
        version=version,
        purl=purl("pypi", name, version),
        licence=_licence(fields),
        needs=tuple(_requirements(fields.get("Requires-Dist", []))),
    )


def _licence(fields: Mapping[str, Sequence[str]]) -> str:
    """The licence as far as it is one line; whole texts, which some put there, say nothing to a program."""
    for key in ("License-Expression", "License"):
        for value in fields.get(key, []):
            if value and value != "UNKNOWN" and len(value) <= 100:
                return value
    names = [v.rpartition(" :: ")[2] for v in fields.get("Classifier", []) if v.startswith("License :: ")]
    return names[0] if names else ""


def _requirements(lines: Iterable[str]) -> Iterable[str]:
    """The names that a distribution needs without any extra being asked for."""
    for line in lines:
        match = _PYTHON_NAME.match(line)
        if match and not re.search(r"\bextra\s*==", line):
            yield python_name(match[0])


def packages_of(output: str) -> tuple[dict[str, str], list[Package]]:
    """System and packages from what READ printed."""
    system_text, _, rest = output.partition(SEPARATOR)
    status, *metadata = rest.split(SEPARATOR)
    system = os_release(system_text)
    debian = debian_packages(status, system)
    if not debian:
        raise SbomError(
            "not_debian", "dpkg's status file names no installed package", "Images stand on Debian"
        )
    python = [package for text in metadata if (package := python_package(text)) is not None]
    unique = {package.ref: package for package in [*debian, *sorted(python, key=lambda p: p.name)]}
    return system, list(unique.values())


def _component(package: Package) -> dict[str, Any]:
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": package.ref,
        "name": package.name,
        "version": package.version,
        "purl": package.purl,
    }
    if package.supplier:
        component["supplier"] = {"name": package.supplier}
    if package.licence:
        component["licenses"] = [{"license": {"name": package.licence}}]
    return component


def _dependencies(packages: Sequence[Package], root: str) -> list[dict[str, Any]]:
    """Who needs whom among what is installed; the image itself has all that nobody else needs."""
    # Of several that provide a name the first stands for it; a package that really has the name goes before all of them.
    provided = {(p.kind, name): p.ref for p in reversed(packages) for name in p.provides}
    by_name = provided | {(p.kind, p.name): p.ref for p in packages}
    edges = {
        p.ref: sorted({by_name[p.kind, n] for n in p.needs if (p.kind, n) in by_name} - {p.ref})
        for p in packages
    }
    needed = {ref for refs in edges.values() for ref in refs}
    top = sorted(ref for ref in edges if ref not in needed)
    return [{"ref": ref, "dependsOn": refs} for ref, refs in [(root, top), *sorted(edges.items())]]


def document(subject: Subject, system: Mapping[str, str], packages: Sequence[Package]) -> dict[str, Any]:
    """The CycloneDX document. Its serial number and its time are the image's, so that it never differs from itself."""
    root = purl(
        "oci",
        subject.repository.rpartition("/")[2],
        subject.digest,
        {"repository_url": subject.repository, "tag": subject.tag},
    )
    distribution = {
        "type": "operating-system",
        "bom-ref": "operating-system",
        "name": system.get("ID", "debian"),
        "version": system.get("DEBIAN_VERSION_FULL") or system.get("VERSION_ID") or "unknown",
        "description": system.get("PRETTY_NAME", ""),
    }
    properties = [{"name": name, "value": value} for name, value in sorted(subject.labels.items())]
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, subject.digest)}",
        "version": 1,
        "metadata": {
            "timestamp": subject.created,
            "lifecycles": [{"phase": "build"}],
            "component": {
                "type": "container",
                "bom-ref": root,
                "name": subject.repository,
                "version": subject.tag,
                "purl": root,
                "hashes": [{"alg": "SHA-256", "content": subject.digest.removeprefix("sha256:")}],
                "properties": properties,
            },
        },
        "components": [distribution, *(_component(package) for package in packages)],
        "dependencies": _dependencies(packages, root),
    }


def encode(sbom: Mapping[str, Any]) -> bytes:
    """The bytes of a document: the same document gives the same bytes."""
    return (json.dumps(sbom, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def decode(content: bytes) -> dict[str, Any]:
    """A document from its bytes; `SbomError` (malformed) for anything but CycloneDX."""
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("bomFormat") != "CycloneDX":
        raise SbomError(
            "malformed", "What is attached to the image is no CycloneDX document", "Push the image again"
        )
    return found


def summary(sbom: Mapping[str, Any]) -> list[str]:
    """One line a package, for people: kind, name, version, licence."""
    lines = []
    for component in sbom.get("components", []):
        kind = str(component.get("purl", "")).removeprefix("pkg:").partition("/")[0] or "system"
        licences = [entry["license"]["name"] for entry in component.get("licenses", [])]
        words = [f"{kind:6}", f"{component['name']:34}", f"{component.get('version', ''):32}", *licences]
        lines.append(" ".join(words).rstrip())
    return lines
