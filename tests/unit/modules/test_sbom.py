"""Bills of materials: what is read from an image's own lists, and a document that CycloneDX's own schema accepts."""

from __future__ import annotations

import json

import pytest
from ansible.module_utils import sbom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

OS_RELEASE = (
    'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nID=debian\nVERSION_ID="13"\nDEBIAN_VERSION_FULL=13.1\n'
)
STATUS = """Package: libssl3t64
Status: install ok installed
Maintainer: Debian OpenSSL Team <pkg-openssl-devel@alioth-lists.debian.net>
Architecture: amd64
Source: openssl
Version: 3.5.1-1+deb13u1
Depends: libc6 (>= 2.38), libzstd1 (>= 1.5.5)
Description: Secure Sockets Layer toolkit
 Depends: nothing, this is a description

Package: libc6
Status: install ok installed
Architecture: amd64
Source: glibc (2.41-12)
Version: 2.41-12+b1
Provides: libc6-2.41
Depends: libgcc-s1

Package: tool
Status: install ok installed
Architecture: all
Version: 2:1.0~rc1-1
Pre-Depends: libc6-2.41
Depends: libssl3 | libssl3t64, missing-one

Package: gone
Status: deinstall ok config-files
Architecture: all
Version: 1
"""
FLASK = """Metadata-Version: 2.4
Name: Flask
Version: 3.1.2
License-Expression: BSD-3-Clause
Requires-Dist: werkzeug>=3.1.0
Requires-Dist: asgiref>=3.2 ; extra == 'async'
"""
WERKZEUG = "Metadata-Version: 2.1\nName: Werkzeug\nVersion: 3.1.9\nClassifier: License :: OSI Approved :: BSD License\n"
SUBJECT = sbom.Subject(
    "r.example:5000/webhook-api",
    "c-0123456789abcdef",
    "sha256:" + "a" * 64,
    "2026-11-23T00:00:00Z",
    {"x": "1"},
)


@pytest.fixture
def document() -> dict:
    return sbom.document(SUBJECT, *sbom.packages_of("\0".join([OS_RELEASE, STATUS, FLASK, WERKZEUG])))


def component(document: dict, name: str) -> dict:
    (found,) = [c for c in document["components"] if c["name"] == name]
    return found


def test_cyclonedx_own_schema_accepts_it(document) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(sbom.encode(document).decode()) is None
    wrong = document | {"serialNumber": "none"}
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(wrong)) is not None


def test_what_is_installed_is_listed_and_nothing_else(document) -> None:
    names = [c["name"] for c in document["components"]]
    assert names == ["debian", "libc6", "libssl3t64", "tool", "flask", "werkzeug"]


def test_package_urls_name_source_and_distribution(document) -> None:
    ssl = PackageURL.from_string(component(document, "libssl3t64")["purl"])
    assert (ssl.type, ssl.namespace, ssl.name, ssl.version) == (
        "deb",
        "debian",
        "libssl3t64",
        "3.5.1-1+deb13u1",
    )
    assert ssl.qualifiers == {"arch": "amd64", "distro": "debian-13", "upstream": "openssl"}
    libc = PackageURL.from_string(component(document, "libc6")["purl"])
    assert libc.qualifiers["upstream"] == "glibc@2.41-12"
    assert PackageURL.from_string(component(document, "tool")["purl"]).version == "2:1.0~rc1-1"
    assert component(document, "flask")["purl"] == "pkg:pypi/flask@3.1.2"


def test_licences_are_taken_from_where_packages_state_them(document) -> None:
    assert component(document, "flask")["licenses"] == [{"license": {"name": "BSD-3-Clause"}}]
    assert component(document, "werkzeug")["licenses"] == [{"license": {"name": "BSD License"}}]


def test_who_needs_whom(document) -> None:
    needs = {entry["ref"]: entry["dependsOn"] for entry in document["dependencies"]}
    ref = {c["name"]: c["bom-ref"] for c in document["components"]}
    assert needs[ref["tool"]] == sorted([ref["libc6"], ref["libssl3t64"]]), (
        "provided names and alternatives count"
    )
    assert needs[ref["flask"]] == [ref["werkzeug"]], "what only an extra needs does not count"
    root = document["metadata"]["component"]["bom-ref"]
    assert needs[root] == sorted([ref["tool"], ref["flask"]])


def test_the_same_image_gives_the_same_bytes(document) -> None:
    again = sbom.document(SUBJECT, *sbom.packages_of("\0".join([OS_RELEASE, STATUS, FLASK, WERKZEUG])))
    assert sbom.encode(again) == sbom.encode(document)
    assert sbom.decode(sbom.encode(document)) == document


def test_it_names_the_image_by_its_digest(document) -> None:
    image = document["metadata"]["component"]
    assert image["hashes"] == [{"alg": "SHA-256", "content": "a" * 64}]
    assert PackageURL.from_string(image["purl"]).version == SUBJECT.digest


def test_an_image_that_says_nothing_of_its_packages_is_a_fault() -> None:
    with pytest.raises(sbom.SbomError) as caught:
        sbom.packages_of(OS_RELEASE + "\0")
    assert caught.value.reason == "not_debian"


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"bomFormat": "SPDX"}'])
def test_what_is_no_bill_of_materials_is_refused(content: bytes) -> None:
    with pytest.raises(sbom.SbomError) as caught:
        sbom.decode(content)
    assert caught.value.reason == "malformed"


def test_the_list_for_people_has_a_line_each(document) -> None:
    lines = sbom.summary(document)
    assert len(lines) == 6
    assert "pypi   flask" in lines[4]
    assert lines[4].endswith("BSD-3-Clause")


def test_a_package_that_has_the_name_goes_before_those_that_only_provide_it() -> None:
    status = """Package: awk-user
Status: install ok installed
Architecture: all
Version: 1
Depends: awk, mawk

Package: mawk
Status: install ok installed
Architecture: all
Version: 1
Provides: awk

Package: original
Status: install ok installed
Architecture: all
Version: 1
Provides: awk, mawk
"""
    system = sbom.os_release(OS_RELEASE)
    packages = sbom.debian_packages(status, system)
    for order in (packages, packages[::-1]):
        refs = {package.name: package.ref for package in order}
        graph = {
            entry["ref"]: entry["dependsOn"]
            for entry in sbom.document(SUBJECT, system, order)["dependencies"]
        }
        assert refs["mawk"] in graph[refs["awk-user"]]
