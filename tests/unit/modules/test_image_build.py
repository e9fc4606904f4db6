"""Images by content: what is built, pushed and tagged when, and what counts as proof."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.docker_cli import Docker, Result
from ansible.module_utils.image_build import (
    BASE_LABEL,
    CONTENT_LABEL,
    ContentImages,
    Image,
    ImageError,
    ImageSpec,
    Settings,
    base_identity,
    build_command,
    effective_args,
    image_labels,
    pushed_digest,
)
from ansible.module_utils.registry_api import RegistryError

REGISTRY = "r.example:5000"
BASE = {
    "Id": "sha256:base-id",
    "RepoTags": ["base:1"],
    "Size": 100,
    "Config": {"Labels": {BASE_LABEL: "sha256:b1"}},
}
RECORDED_PUSH = """The push refers to repository [127.0.0.1:5000/webhook-api]
5f70bf18a086: Pushed
c-0123456789abcdef: digest: sha256:{} size: 1572
"""
DIGEST = "sha256:" + "d" * 64


class Engine:
    """An engine with images, which notes what it is told to do."""

    def __init__(self, *images: dict[str, Any]) -> None:
        self.images = list(images)
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.build = Result(0, "", "")
        self.digest = DIGEST

    def __call__(self, command: list[str], **options: Any) -> Result:
        arguments = command[1:]
        self.commands.append(arguments)
        self.environments.append(dict(options.get("env") or {}))
        if arguments[:2] == ["image", "inspect"]:
            found = [i for i in self.images if set(i["RepoTags"]) & set(arguments[2:])]
            return Result(0 if found else 1, json.dumps(found), "" if found else "No such image")
        if arguments[:2] == ["buildx", "build"]:
            return self._build(arguments)
        if arguments[0] == "push":
            return Result(0, RECORDED_PUSH.format(self.digest.removeprefix("sha256:")), "")
        return Result(0, "", "")

    def _build(self, arguments: list[str]) -> Result:
        if self.build.code == 0:
            tags = [arguments[n + 1] for n, word in enumerate(arguments) if word == "--tag"]
            labels = dict(
                arguments[n + 1].split("=", 1) for n, word in enumerate(arguments) if word == "--label"
            )
            self.images.append(
                {"Id": "sha256:new", "RepoTags": tags, "Size": 150, "Config": {"Labels": labels}}
            )
        return self.build

    def did(self, word: str) -> list[list[str]]:
        return [c for c in self.commands if c[0] == word and c[:2] != ["buildx", "version"]]


class FakeRegistry:
    """A registry with tags, by name and tag; `labels` are those of any image in it."""

    def __init__(self, tags: dict[tuple[str, str], str] | None = None, content: str = "") -> None:
        self.tags = dict(tags or {})
        self.content = content
        self.error: RegistryError | None = None
        self.after_push: str | None = DIGEST

    def find_digest(self, repository: str, reference: str) -> str | None:
        if self.error:
            raise self.error
        return self.tags.get((repository, reference))

    def manifest_digest(self, repository: str, reference: str) -> str:
        if self.after_push is None:
            raise RegistryError("not_found", "it is not there")
        return self.after_push

    def labels(self, repository: str, reference: str) -> dict[str, str]:
        return {CONTENT_LABEL: self.content} if self.content else {}

    def add_tag(self, repository: str, digest: str, tag: str) -> None:
        self.tags[(repository, tag)] = digest


@pytest.fixture
def spec(tmp_path: Path) -> ImageSpec:
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text("ARG BASE\nFROM ${BASE}\n")
    (context / "app.py").write_text("print(1)\n")
    return ImageSpec(
        "webhook-api", context, context / "Dockerfile", base="base:1", args={"WEBHOOK_VERSION": "@tag@"}
    )


def work_of(
    spec: ImageSpec,
    engine: Engine,
    registry: FakeRegistry | None = None,
    tmp_path: Path | None = None,
    **settings: Any,
) -> ContentImages:
    settings.setdefault("registry", REGISTRY if registry else "")
    if tmp_path:
        (tmp_path / "ca.crt").write_text("CA")
        settings.setdefault("ca_bundle", tmp_path / "ca.crt")
    return ContentImages([spec], Settings(**settings), Docker(engine, "docker"), registry)


def content_of(spec: ImageSpec) -> str:
    work = work_of(spec, Engine(BASE))
    work.resolve()
    return work.images[0].content


def standing(spec: ImageSpec, repository: str, *tags: str) -> dict[str, Any]:
    content = content_of(spec)
    names = [f"{repository}:{tag}" for tag in (f"c-{content[:16]}", *tags)]
    return {
        "Id": "sha256:old",
        "RepoTags": names,
        "Size": 140,
        "Config": {"Labels": {CONTENT_LABEL: content}},
    }


# -- what an image is known by


def test_a_bases_identity_is_its_content_and_not_its_name_or_id() -> None:
    assert base_identity(BASE) == "sha256:b1"
    assert base_identity({**BASE, "Id": "sha256:imported-again", "RepoTags": ["other:2"]}) == "sha256:b1"


def test_an_image_built_here_is_known_by_its_own_digest_not_by_its_bases() -> None:
    image = {"Id": "x", "Config": {"Labels": {BASE_LABEL: "sha256:inherited", CONTENT_LABEL: "own"}}}
    assert base_identity(image) == "own"


def test_a_base_without_label_is_known_by_its_id() -> None:
    assert base_identity({"Id": "sha256:1", "Config": {"Labels": None}}) == "sha256:1"


def test_the_base_images_content_enters_the_tag(spec: ImageSpec) -> None:
    other = {**BASE, "Config": {"Labels": {BASE_LABEL: "sha256:b2"}}}
    work = work_of(spec, Engine(other))
    work.resolve()
    assert work.images[0].content != content_of(spec)


# -- the build command


def command_of(spec: ImageSpec, **settings: Any) -> list[str]:
    image = Image(spec, REGISTRY, content="f" * 64)
    return build_command(
        image,
        Settings(registry=REGISTRY, ca_bundle=Path("/ca.crt"), **settings),
        context=Path("/stage/context"),
        dockerfile=Path("/stage/Dockerfile"),
        pip=Path("/stage/pip.conf"),
        created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        environ={"HTTPS_PROXY": "http://user:word@proxy"},
    )


def test_the_build_command(spec: ImageSpec) -> None:
    assert command_of(spec, revision="abc") == [
        "buildx", "build", "--builder", "default", "--load", "--provenance=false", "--progress=plain",
        "--file", "/stage/Dockerfile",
        "--tag", "r.example:5000/webhook-api:c-ffffffffffffffff", "--tag", "r.example:5000/webhook-api:latest",
        "--build-arg", "BASE=base:1", "--build-arg", "WEBHOOK_VERSION=c-ffffffffffffffff",
        "--build-arg", "HTTPS_PROXY",
        "--label", f"org.aisha.content.digest={'f' * 64}",
        "--label", "org.opencontainers.image.created=2026-01-02T03:04:05Z",
        "--label", "org.opencontainers.image.revision=abc",
        "--label", "org.opencontainers.image.title=webhook-api",
        "--label", "org.opencontainers.image.version=c-ffffffffffffffff",
        "--secret", "id=ca,src=/ca.crt", "--secret", "id=pip,src=/stage/pip.conf",
        "/stage/context",
    ]  # fmt: skip


def test_no_password_stands_in_the_command(spec: ImageSpec) -> None:
    command = command_of(spec, username="deploy", password="hush-hush")
    assert "hush-hush" not in " ".join(command)
    assert "word" not in " ".join(command)
    assert "hush-hush" not in repr(Settings(password="hush-hush"))


def test_latest_and_target_are_asked_for_only_when_wanted(spec: ImageSpec) -> None:
    assert not any(word.endswith(":latest") for word in command_of(spec, latest=False))
    targeted = ImageSpec(**{**spec.__dict__, "target": "builder"})
    assert command_of(targeted)[command_of(targeted).index("--target") + 1] == "builder"


def test_args_may_name_another_base(spec: ImageSpec) -> None:
    image = Image(ImageSpec(**{**spec.__dict__, "args": {"BASE": "mine:1"}}), "", content="f" * 64)
    assert effective_args(image) == {"BASE": "mine:1"}


def test_own_labels_cannot_forge_the_content(spec: ImageSpec) -> None:
    image = Image(ImageSpec(**{**spec.__dict__, "labels": {CONTENT_LABEL: "forged"}}), "", content="f" * 64)
    assert image_labels(image, Settings(), datetime.now(UTC))[CONTENT_LABEL] == "f" * 64


@pytest.mark.parametrize(
    ("output", "digest"),
    [
        (RECORDED_PUSH.format("a" * 64), "sha256:" + "a" * 64),
        ("denied: requested access to the resource is denied\n", ""),
        ("", ""),
    ],
)
def test_the_pushed_digest_is_read_from_the_end_of_the_output(output: str, digest: str) -> None:
    assert pushed_digest(output) == digest


# -- what is done when


def test_what_stands_nowhere_is_built_pushed_and_proven(spec: ImageSpec, tmp_path: Path) -> None:
    engine, registry = Engine(BASE), FakeRegistry()
    work = work_of(spec, engine, registry, tmp_path)
    work.resolve()
    assert work.apply() is True
    report = work.images[0].report()
    assert (report["built"], report["pushed"], report["digest"]) == (True, True, DIGEST)
    assert report["ref"] == f"{REGISTRY}/webhook-api@{DIGEST}"
    assert (report["size"], report["size_over_base"]) == (150, 50)
    assert registry.tags[("webhook-api", "latest")] == DIGEST
    assert [c[1] for c in engine.did("push")] == [f"{REGISTRY}/webhook-api:{report['tag']}"]


def test_what_the_registry_has_is_neither_built_nor_pushed(spec: ImageSpec) -> None:
    content = content_of(spec)
    tag = f"c-{content[:16]}"
    registry = FakeRegistry({("webhook-api", tag): DIGEST, ("webhook-api", "latest"): DIGEST}, content)
    engine = Engine(BASE)
    work = work_of(spec, engine, registry)
    work.resolve()
    assert work.predict() is False
    assert work.apply() is False
    assert work.images[0].report()["ref"] == f"{REGISTRY}/webhook-api@{DIGEST}"
    assert not engine.did("buildx")
    assert not engine.did("push")


def test_another_image_under_our_tag_is_a_fault(spec: ImageSpec) -> None:
    content = content_of(spec)
    registry = FakeRegistry({("webhook-api", f"c-{content[:16]}"): DIGEST}, content="something else")
    with pytest.raises(ImageError, match="Somebody pushed another image") as caught:
        work_of(spec, Engine(BASE), registry).resolve()
    assert caught.value.reason == "tag_occupied"


def test_what_the_engine_has_is_only_pushed(spec: ImageSpec, tmp_path: Path) -> None:
    engine = Engine(BASE, standing(spec, f"{REGISTRY}/webhook-api", "latest"))
    work = work_of(spec, engine, FakeRegistry(), tmp_path)
    work.resolve()
    assert work.apply() is True
    report = work.images[0].report()
    assert (report["built"], report["pushed"]) == (False, True)
    assert not engine.did("buildx")


def test_a_tag_that_was_set_by_hand_is_no_build_of_ours(spec: ImageSpec) -> None:
    image = standing(spec, "webhook-api", "latest")
    image["Config"]["Labels"] = {}
    work = work_of(spec, Engine(BASE, image), state="built")
    work.resolve()
    assert work.predict() is True
    assert work.images[0].built


def test_latest_follows_back_to_older_content_without_a_build(spec: ImageSpec) -> None:
    content = content_of(spec)
    tag = f"c-{content[:16]}"
    registry = FakeRegistry(
        {("webhook-api", tag): DIGEST, ("webhook-api", "latest"): "sha256:" + "e" * 64}, content
    )
    engine = Engine(BASE)
    work = work_of(spec, engine, registry)
    work.resolve()
    assert work.apply() is True
    assert registry.tags[("webhook-api", "latest")] == DIGEST
    assert work.images[0].report()["tagged"]
    assert not engine.did("push")


def test_a_registry_that_has_something_else_after_the_push_is_no_proof(
    spec: ImageSpec, tmp_path: Path
) -> None:
    registry = FakeRegistry()
    registry.after_push = "sha256:" + "e" * 64
    work = work_of(spec, Engine(BASE), registry, tmp_path)
    work.resolve()
    with pytest.raises(ImageError, match="the registry has sha256:eee") as caught:
        work.apply()
    assert caught.value.reason == "not_proven"
    assert work.images[0].digest == ""


def test_a_push_that_the_registry_knows_nothing_of_is_no_proof(spec: ImageSpec, tmp_path: Path) -> None:
    registry = FakeRegistry()
    registry.after_push = None
    work = work_of(spec, Engine(BASE), registry, tmp_path)
    work.resolve()
    with pytest.raises(ImageError, match="not there") as caught:
        work.apply()
    assert caught.value.reason == "not_found"


def test_a_failed_build_shows_its_last_lines_and_pushes_nothing(spec: ImageSpec, tmp_path: Path) -> None:
    engine = Engine(BASE)
    engine.build = Result(1, "".join(f"line {n}\n" for n in range(100)), "")
    work = work_of(spec, engine, FakeRegistry(), tmp_path)
    work.resolve()
    with pytest.raises(ImageError) as caught:
        work.apply()
    assert caught.value.reason == "build_failed"
    assert "line 99" in str(caught.value)
    assert "line 60" in str(caught.value)
    assert "line 59" not in str(caught.value)
    assert "nothing was pushed" in str(caught.value)
    assert not engine.did("push")


def test_one_failure_does_not_stop_the_others(spec: ImageSpec, tmp_path: Path) -> None:
    broken = ImageSpec("nginx-webhook", spec.context, spec.dockerfile, base="base:1")

    class OneFails(Engine):
        def _build(self, arguments: list[str]) -> Result:
            if any("nginx-webhook" in word for word in arguments):
                return Result(1, "boom", "")
            return super()._build(arguments)

    engine, registry = OneFails(BASE), FakeRegistry()
    (tmp_path / "ca.crt").write_text("CA")
    settings = Settings(registry=REGISTRY, ca_bundle=tmp_path / "ca.crt")
    work = ContentImages([spec, broken], settings, Docker(engine, "docker"), registry)
    work.resolve()
    with pytest.raises(ImageError, match="nginx-webhook was not built"):
        work.apply()
    assert work.images[0].pushed


def test_images_are_built_side_by_side(spec: ImageSpec, tmp_path: Path) -> None:
    """Each build waits until the other one has begun: one after the other would never end."""
    meeting = threading.Barrier(2, timeout=20)

    class Meets(Engine):
        def _build(self, arguments: list[str]) -> Result:
            meeting.wait()
            return super()._build(arguments)

    other = ImageSpec("nginx-webhook", spec.context, spec.dockerfile, base="base:1")
    (tmp_path / "ca.crt").write_text("CA")
    settings = Settings(ca_bundle=tmp_path / "ca.crt", state="built")
    work = ContentImages([spec, other], settings, Docker(Meets(BASE), "docker"), None)
    work.resolve()
    assert work.apply() is True
    assert all(image.built for image in work.images)


def test_the_login_goes_to_a_private_configuration_and_is_gone_afterwards(
    spec: ImageSpec, tmp_path: Path
) -> None:
    engine = Engine(BASE)
    seen: list[str] = []

    def runner(command: list[str], **options: Any) -> Result:
        if command[1] == "push":
            seen.append(Path(options["env"]["DOCKER_CONFIG"], "config.json").read_text())
        return engine(command, **options)

    (tmp_path / "ca.crt").write_text("CA")
    settings = Settings(registry=REGISTRY, username="me", password="hush", ca_bundle=tmp_path / "ca.crt")
    work = ContentImages([spec], settings, Docker(runner, "docker"), FakeRegistry())
    work.resolve()
    work.apply()
    assert REGISTRY in seen[0]
    directory = next(e["DOCKER_CONFIG"] for e in engine.environments if "DOCKER_CONFIG" in e)
    assert not Path(directory).exists()
    assert "hush" not in json.dumps(engine.commands)


def test_without_a_registry_the_engines_image_is_the_result(spec: ImageSpec, tmp_path: Path) -> None:
    work = work_of(spec, Engine(BASE), None, tmp_path)
    work.resolve()
    assert work.apply() is True
    report = work.images[0].report()
    assert report["ref"] == f"webhook-api:{report['tag']}"
    assert report["digest"] == report["image_id"] == "sha256:new"
    assert not report["pushed"]


# -- what is missing


def test_a_missing_base_names_the_role_that_makes_it(spec: ImageSpec) -> None:
    with pytest.raises(ImageError, match="Role base_image") as caught:
        work_of(spec, Engine()).resolve()
    assert caught.value.reason == "no_base"


def test_in_check_mode_nothing_needs_to_stand_yet(spec: ImageSpec) -> None:
    registry = FakeRegistry()
    registry.error = RegistryError("unreachable", "no registry answers")

    def no_engine(command: list[str], **options: Any) -> Result:
        return Result(1, "", "Cannot connect to the Docker daemon")

    work = ContentImages([spec], Settings(registry=REGISTRY), Docker(no_engine, "docker"), registry)
    work.resolve(lenient=True)
    assert work.predict() is True
    report = work.images[0].report()
    assert (report["built"], report["pushed"], report["tag_known"], report["digest"]) == (
        True,
        True,
        False,
        "",
    )
    assert "not asked" in work.warnings[0]


@pytest.mark.parametrize("reason", ["unauthorized", "tls", "plain_http_refused"])
def test_a_registry_that_refuses_is_a_fault_even_in_check_mode(spec: ImageSpec, reason: str) -> None:
    registry = FakeRegistry()
    registry.error = RegistryError(reason, "refused")
    with pytest.raises(ImageError) as caught:
        work_of(spec, Engine(BASE), registry).resolve(lenient=True)
    assert caught.value.reason == reason


def test_a_silent_registry_is_a_fault_when_something_is_to_be_pushed(spec: ImageSpec) -> None:
    registry = FakeRegistry()
    registry.error = RegistryError("unreachable", "no registry answers")
    with pytest.raises(ImageError):
        work_of(spec, Engine(BASE), registry).resolve()
    work_of(spec, Engine(BASE), registry, state="built").resolve()


def test_no_ca_bundle_is_told_before_anything_is_built(spec: ImageSpec, tmp_path: Path) -> None:
    engine = Engine(BASE)
    work = work_of(spec, engine, None, ca_bundle=tmp_path / "nothing")
    work.resolve()
    with pytest.raises(ImageError, match="Install ca-certificates") as caught:
        work.apply()
    assert caught.value.reason == "no_ca"
    assert not engine.did("buildx")


def test_resolved_changes_nothing(spec: ImageSpec) -> None:
    work = work_of(spec, Engine(BASE), FakeRegistry(), state="resolved")
    work.resolve()
    assert work.predict() is False
    assert work.apply() is False
