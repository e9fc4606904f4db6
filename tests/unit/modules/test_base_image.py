"""The base image: when it is made anew, what it is known by, and where Debian comes from."""

from __future__ import annotations

import io
import json
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import base_image
from ansible.module_utils.base_image import (
    BaseImage,
    BaseImageError,
    BaseImages,
    BaseSpec,
    Target,
    content_identity,
    debian_sites,
    image_name,
    labels,
    mmdebstrap_command,
    parse_targets,
    proxy_environment,
    pull_dockerfile,
    read_member,
    registry_host,
    resolve_site,
    source_lines,
    status_packages,
    unfit_reason,
)
from ansible.module_utils.docker_cli import Docker, DockerError, Result

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
MANIFEST = ["bash 5.2 amd64", "libc6 2.41 amd64"]
RECORDED_TARGETS = """http://mirror.example/debian|bookworm|Debian|Debian
http://mirror.example/debian|bookworm-updates|Debian|Debian
http://security.example/debian-security|bookworm-security|Debian|Debian-Security
https://third.example/apt|stable|Third|Third
"""
RECORDED_STATUS = """Package: bash
Essential: yes
Status: install ok installed
Architecture: amd64
Version: 5.2.37-2
Description: GNU Bourne Again SHell
 Status: not a field

Package: removed
Status: deinstall ok config-files
Architecture: all
Version: 1

Package: base-files
Status: install ok installed
Architecture: amd64
Version: 13.8
"""


def image_of(spec: BaseSpec, **changes: Any) -> BaseImage:
    values: dict[str, Any] = {
        "name": "aisha-base:trixie-0123456789ab",
        "image_id": "sha256:1",
        "digest": "sha256:" + "0" * 64,
        "method": "bootstrap",
        "suite": spec.suite,
        "source": "mmdebstrap",
        "packages": tuple(spec.packages),
        "refreshed": NOW - timedelta(days=1),
        "size": 100,
    }
    return BaseImage(**(values | changes))


# -- when it is made anew


@pytest.mark.parametrize(
    ("wish", "image", "reason"),
    [
        ({}, {}, ""),
        ({"suite": "forky"}, {"suite": "trixie"}, "suite trixie is not forky"),
        ({"packages": ("a", "b")}, {"packages": ("a",)}, "list of packages"),
        ({"packages": ("a", "b")}, {"packages": ("b", "a")}, ""),
        ({"method": "pull"}, {"method": "bootstrap"}, "made by bootstrap"),
        ({"method": "auto"}, {"method": "pull"}, ""),
        ({"method": "auto"}, {"method": "bootstrap"}, ""),
        (
            {"pull_image": "mine/debian:1"},
            {"method": "pull", "source": "debian:trixie-slim"},
            "pulled from debian",
        ),
        ({"pull_image": "mine/debian:1"}, {"method": "bootstrap"}, ""),
        ({"refresh_days": 7}, {"refreshed": NOW - timedelta(days=6, hours=23)}, ""),
        ({"refresh_days": 7}, {"refreshed": NOW - timedelta(days=7)}, "7 days old"),
        ({"refresh_days": 0}, {"refreshed": NOW - timedelta(days=4000)}, ""),
    ],
)
def test_an_image_is_kept_unless_suite_packages_method_or_age_say_otherwise(
    wish: dict, image: dict, reason: str
) -> None:
    spec = BaseSpec(**wish)
    assert reason in unfit_reason(spec, image_of(spec, **image), NOW)
    assert bool(reason) == bool(unfit_reason(spec, image_of(spec, **image), NOW))


# -- what it is known by


def test_a_refresh_that_brings_nothing_new_keeps_the_identity() -> None:
    one = content_identity("trixie", ["b", "a"], MANIFEST)
    assert one == content_identity("trixie", ["a", "b"], reversed(MANIFEST))


@pytest.mark.parametrize(
    ("suite", "packages", "manifest"),
    [
        ("forky", ["a"], MANIFEST),
        ("trixie", ["a", "b"], MANIFEST),
        ("trixie", ["a"], ["bash 5.2-1+deb13u1 amd64", MANIFEST[1]]),
        ("trixie", ["a"], [line.replace("amd64", "arm64") for line in MANIFEST]),
        ("trixie", ["a"], MANIFEST[:1]),
    ],
)
def test_anything_new_is_another_identity(suite: str, packages: list[str], manifest: list[str]) -> None:
    assert content_identity(suite, packages, manifest) != content_identity("trixie", ["a"], MANIFEST)


def test_the_name_says_suite_and_digest() -> None:
    assert image_name(BaseSpec(), "sha256:0123456789abcdef") == "aisha-base:trixie-0123456789ab"


def test_the_manifest_holds_what_is_installed_and_nothing_else() -> None:
    assert status_packages(RECORDED_STATUS) == ["base-files 13.8 amd64", "bash 5.2.37-2 amd64"]


def test_an_image_is_read_back_from_its_labels() -> None:
    spec = BaseSpec(packages=("ca-certificates", "tzdata"))
    marks = labels(spec, "sha256:" + "a" * 64, "bootstrap", "mmdebstrap", NOW)
    inspected = {
        "Id": "sha256:1",
        "Size": 5,
        "RepoTags": ["aisha-base:trixie-aaaaaaaaaaaa"],
        "Config": {"Labels": marks},
    }
    image = BaseImage.from_inspect(inspected, "aisha-base")
    assert image is not None
    assert unfit_reason(spec, image, NOW) == ""
    assert (image.refreshed, image.digest) == (NOW, "sha256:" + "a" * 64)


@pytest.mark.parametrize(
    "change",
    [
        {"RepoTags": ["another-base:trixie-aaaaaaaaaaaa"]},
        {"RepoTags": []},
        {"Config": {"Labels": {"org.aisha.base.digest": "sha256:1"}}},
        {"Config": {"Labels": None}},
    ],
)
def test_another_image_is_not_taken_for_ours(change: dict) -> None:
    marks = labels(BaseSpec(), "sha256:1", "bootstrap", "mmdebstrap", NOW)
    inspected = {"Id": "1", "RepoTags": ["aisha-base:trixie-1"], "Config": {"Labels": marks}} | change
    assert BaseImage.from_inspect(inspected, "aisha-base") is None


# -- where Debian comes from


def nothing(path: str) -> str:
    raise FileNotFoundError(path)


def test_the_hosts_own_mirrors_are_used_for_another_suite() -> None:
    main, security = debian_sites(parse_targets(RECORDED_TARGETS), nothing)
    assert source_lines("trixie", main, security) == [
        "deb http://mirror.example/debian trixie main",
        "deb http://mirror.example/debian trixie-updates main",
        "deb http://security.example/debian-security trixie-security main",
    ]


def test_a_host_without_downloaded_lists_is_understood_by_its_layout() -> None:
    output = "http://m.example/debian|trixie|$(ORIGIN)|$(LABEL)\nhttp://m.example/debian-security|trixie-security||\n"
    assert debian_sites(parse_targets(output), nothing) == (
        "http://m.example/debian",
        "http://m.example/debian-security",
    )


def test_ubuntus_mirrors_are_none_of_debian() -> None:
    targets = [Target("http://archive.example/ubuntu", "noble", "Ubuntu", "Ubuntu")]
    assert debian_sites(targets, nothing) == ("", "")


def test_no_security_mirror_means_no_security_line() -> None:
    assert source_lines("trixie", "http://m.example/debian", "") == [
        "deb http://m.example/debian trixie main",
        "deb http://m.example/debian trixie-updates main",
    ]


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("http://m.example/debian/", "http://m.example/debian"),
        ("https://m.example/debian", "https://m.example/debian"),
        ("file:///srv/mirror", ""),
        ("cdrom://disc", ""),
        ("mirror+file:/etc/apt/mirrors/debian.list", "https://cloud.example/debian"),
    ],
)
def test_sites_are_resolved_to_addresses(site: str, expected: str) -> None:
    assert resolve_site(site, lambda path: "# list\nhttps://cloud.example/debian priority:1\n") == expected


def test_apts_proxies_are_handed_on_unless_the_environment_has_its_own() -> None:
    dump = 'Acquire::http::Proxy "http://p.example:3142";\nAcquire::https::Proxy "DIRECT";\n'
    assert proxy_environment(dump, {}) == {"http_proxy": "http://p.example:3142"}
    assert proxy_environment(dump, {"http_proxy": "http://mine.example"}) == {}


def test_the_bootstrap_command() -> None:
    command = mmdebstrap_command(
        "/usr/bin/mmdebstrap", BaseSpec(packages=("b", "a")), ["deb x"], Path("/t.tar")
    )
    assert command[:3] == ["/usr/bin/mmdebstrap", "--variant=minbase", "--include=a,b"]
    assert command[-4:] == ["--format=tar", "trixie", "/t.tar", "deb x"]


@pytest.mark.parametrize("word", ["a;rm -rf /", "A b", "$(x)", "a\nRUN x", ""])
def test_words_that_are_no_package_names_are_refused(word: str) -> None:
    with pytest.raises(BaseImageError) as caught:
        BaseSpec(packages=(word,)).check()
    assert caught.value.reason == "invalid"


def test_the_pulled_image_gets_the_same_packages_and_environment() -> None:
    text = pull_dockerfile(BaseSpec(packages=("tzdata", "ca-certificates")))
    assert text.startswith("FROM debian:trixie-slim\n")
    assert "--no-install-recommends ca-certificates tzdata;" in text
    assert "ENV LANG=C.UTF-8" in text
    assert "syntax=" not in text


@pytest.mark.parametrize(
    ("image", "host"),
    [
        ("debian:trixie-slim", "registry-1.docker.io"),
        ("library/debian", "registry-1.docker.io"),
        ("mirror.example/debian:1", "mirror.example"),
        ("localhost/debian", "localhost"),
        ("mirror:5000/debian", "mirror:5000"),
    ],
)
def test_the_registry_of_an_image(image: str, host: str) -> None:
    assert registry_host(image) == host


def test_a_member_is_found_with_and_without_dot(tmp_path: Path) -> None:
    for name in ("./var/lib/dpkg/status", "var/lib/dpkg/status"):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        assert read_member(tmp_path / "a.tar", "var/lib/dpkg/status") == "abc"
    with pytest.raises(BaseImageError):
        read_member(tmp_path / "a.tar", "nothing")


# -- what has to happen


class Engine:
    """An engine that has these images, or that does not answer."""

    def __init__(self, *images: BaseImage, fault: str = "") -> None:
        self.images = images
        self.fault = fault
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **options: Any) -> Result:
        self.commands.append(command[1:])
        if self.fault:
            return Result(1, "", self.fault)
        if command[1:3] == ["image", "ls"]:
            return Result(0, "".join(f"{image.name}\n" for image in self.images), "")
        if command[1:3] == ["image", "inspect"]:
            return Result(0, json.dumps([self._inspect(image) for image in self.images]), "")
        if command[1] == "pull":
            return Result(1, "", "toomanyrequests: You have reached your pull rate limit")
        raise AssertionError(command)

    @staticmethod
    def _inspect(image: BaseImage) -> dict[str, Any]:
        spec = BaseSpec(suite=image.suite, packages=image.packages)
        marks = labels(spec, image.digest, image.method, image.source, image.refreshed)
        return {"Id": image.image_id, "Size": 1, "RepoTags": [image.name], "Config": {"Labels": marks}}


def images_of(spec: BaseSpec, engine: Engine, reachable: bool | None = None) -> BaseImages:
    def ask(host: str) -> bool:
        assert reachable is not None, f"{host} was asked although nothing has to be made"
        return reachable

    return BaseImages(spec, Docker(engine, "docker"), NOW, reachable=ask)


@pytest.mark.parametrize("method", ["bootstrap", "pull"])
def test_a_fresh_image_means_that_no_public_registry_is_asked(method: str) -> None:
    spec = BaseSpec()
    plan = images_of(spec, Engine(image_of(spec, method=method))).plan()
    assert plan.action == "none"


@pytest.mark.parametrize(("reachable", "action"), [(True, "pull"), (False, "bootstrap")])
def test_auto_pulls_where_a_public_registry_answers(reachable: bool, action: str) -> None:
    assert images_of(BaseSpec(), Engine(), reachable).plan().action == action


def test_a_stale_image_is_named_with_its_age() -> None:
    spec = BaseSpec(method="bootstrap")
    plan = images_of(spec, Engine(image_of(spec, refreshed=NOW - timedelta(days=30)))).plan()
    assert plan.action == "bootstrap"
    assert "30 days old" in plan.why


def test_the_freshest_image_that_fits_is_taken() -> None:
    spec = BaseSpec()
    newer = image_of(spec, name="aisha-base:trixie-newer", refreshed=NOW)
    other = image_of(spec, name="aisha-base:forky-x", suite="forky", refreshed=NOW + timedelta(hours=1))
    plan = images_of(spec, Engine(image_of(spec), other, newer)).plan()
    assert plan.image is not None
    assert plan.image.name == "aisha-base:trixie-newer"


def test_a_missing_tool_is_told_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_image, "find_program", lambda name: None)
    assert images_of(BaseSpec(method="bootstrap"), Engine()).plan().missing_tools == ("mmdebstrap",)
    with pytest.raises(BaseImageError, match="apt-get install mmdebstrap") as caught:
        images_of(BaseSpec(method="bootstrap"), Engine()).make("bootstrap")
    assert caught.value.reason == "no_tool"


def test_an_engine_that_does_not_stand_is_no_fault_in_check_mode() -> None:
    stopped = "Cannot connect to the Docker daemon"
    # reachable=None: asking a public registry would need an engine as well, and fails the test.
    assert images_of(BaseSpec(), Engine(fault=stopped)).plan(lenient=True).action == "bootstrap"
    assert images_of(BaseSpec(method="pull"), Engine(fault=stopped)).plan(lenient=True).action == "pull"
    with pytest.raises(DockerError):
        images_of(BaseSpec(), Engine(fault=stopped)).plan()


def test_a_host_that_is_not_debian_is_told_to_name_a_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    ubuntu = Result(0, "http://archive.example/ubuntu|noble|Ubuntu|Ubuntu\n", "")
    monkeypatch.setattr(base_image, "run", lambda *a, **k: ubuntu)
    with pytest.raises(BaseImageError, match="base_image_mirror") as caught:
        images_of(BaseSpec(), Engine()).sources()
    assert caught.value.reason == "no_mirror"


def test_a_given_mirror_comes_before_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_image, "run", lambda *a, **k: pytest.fail("the host was asked"))
    spec = BaseSpec(mirror="http://m.example/debian/", security_mirror="http://s.example/x")
    assert images_of(spec, Engine()).sources() == source_lines(
        "trixie", "http://m.example/debian", "http://s.example/x"
    )


def test_a_mirror_without_security_updates_is_warned_of() -> None:
    images = images_of(BaseSpec(mirror="http://m.example/debian"), Engine())
    images.sources()
    assert "security" in images.warnings[0]


def test_a_pull_that_is_refused_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_image, "find_program", lambda name: None)
    with pytest.raises(BaseImageError, match="pull rate limit") as caught:
        images_of(BaseSpec(), Engine(), True).make_by("pull")
    assert caught.value.reason == "pull_failed"


def test_auto_bootstraps_where_pulling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_of(BaseSpec(), Engine(), True)
    monkeypatch.setattr(base_image, "find_program", lambda name: f"/usr/bin/{name}")
    made = image_of(BaseSpec())
    monkeypatch.setattr(images, "_bootstrap", lambda directory: made)
    assert images.make_by("pull") is made
    assert "Bootstrapped instead" in images.warnings[0]


def test_the_method_pull_never_bootstraps(monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_of(BaseSpec(method="pull"), Engine())
    monkeypatch.setattr(base_image, "find_program", lambda name: f"/usr/bin/{name}")
    with pytest.raises(BaseImageError):
        images.make_by("pull")


def test_a_public_registry_that_does_not_answer_is_given_up_soon() -> None:
    import socket
    import time

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        assert not base_image.answers(f"http://127.0.0.1:{silent.getsockname()[1]}/v2/", 0.5)
        assert time.monotonic() - started < 30
