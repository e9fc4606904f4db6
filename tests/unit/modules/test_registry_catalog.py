"""The comparison of what is expected with what a registry says, and its patience."""

from __future__ import annotations

import pytest
from ansible.module_utils.registry_api import RegistryError
from ansible.module_utils.registry_catalog import (
    Contents,
    Expectation,
    failure_message,
    find_faults,
    patiently,
    read_contents,
)

DIGEST = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64


class FakeRegistry:
    base_url = "https://registry:5000"

    def __init__(self, images: dict[str, dict[str, str]]) -> None:
        self.images = images

    def ping(self) -> None:
        pass

    def catalog(self) -> list[str]:
        return list(self.images)

    def tags(self, repository: str) -> list[str]:
        return list(self.images.get(repository, {}))

    def find_digest(self, repository: str, reference: str) -> str | None:
        tags = self.images.get(repository, {})
        return tags.get(reference) or (reference if reference in tags.values() else None)


def faults_of(images, *expect, catalog=True) -> list[str]:
    contents = read_contents(FakeRegistry(images), expect, catalog=catalog, all_tags=False)
    return find_faults(expect, contents, catalog=catalog)


@pytest.mark.parametrize(
    "expectation",
    [
        Expectation("webhook-api"),
        Expectation("webhook-api", "latest"),
        Expectation("webhook-api", "latest", DIGEST),
        Expectation("webhook-api", None, DIGEST),
    ],
)
def test_what_is_there_has_no_fault(expectation):
    assert faults_of({"webhook-api": {"latest": DIGEST}}, expectation) == []


@pytest.mark.parametrize(
    ("images", "expectation", "words"),
    [
        (
            {"aisha/bot": {"1": DIGEST}},
            Expectation("webhook-api", "1"),
            ["no repository webhook-api", "aisha/bot"],
        ),
        ({"webhook-api": {"old": DIGEST}}, Expectation("webhook-api", "new"), ["no tag new", "old"]),
        (
            {"webhook-api": {"t": OTHER}},
            Expectation("webhook-api", "t", DIGEST),
            [OTHER, f"expected {DIGEST}"],
        ),
        ({"webhook-api": {"t": OTHER}}, Expectation("webhook-api", None, DIGEST), ["no such manifest"]),
        ({"webhook-api": {}}, Expectation("webhook-api"), ["no tag"]),
    ],
)
def test_what_is_not_there_is_named(images, expectation, words):
    (fault,) = faults_of(images, expectation)
    assert all(word in fault for word in words), fault


def test_a_tag_in_the_list_whose_manifest_is_gone():
    item = Expectation("a", "t")
    contents = Contents(["a"], {"a": ["t"]}, {"a:t": None})
    assert find_faults([item], contents, catalog=True) == ["a:t: there is no such manifest behind the tag"]


def test_all_faults_are_in_one_message_with_the_remedy():
    faults = faults_of({}, Expectation("a", "1"), Expectation("b", "2"))
    message = failure_message("https://registry:5000", faults)
    assert "lacks 2" in message
    assert "a:1" in message
    assert "b:2" in message
    assert "--tags build,push" in message


def test_without_a_catalogue_tags_and_digests_still_count():
    assert faults_of({"a": {"t": DIGEST}}, Expectation("a", "t", DIGEST), catalog=False) == []
    assert len(faults_of({}, Expectation("a", "t", DIGEST), catalog=False)) == 1


def test_tags_of_every_repository_on_request():
    registry = FakeRegistry({"a": {"1": DIGEST}, "b": {"2": DIGEST}})
    assert read_contents(registry, [], catalog=True, all_tags=True).tags == {"a": ["1"], "b": ["2"]}
    assert read_contents(registry, [], catalog=True, all_tags=False).tags == {}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("reason", "tries"), [("unreachable", 4), ("server_error", 4), ("unauthorized", 1), ("tls", 1)]
)
def test_only_faults_that_can_pass_are_waited_for(reason, tries):
    clock, calls = Clock(), []

    def work():
        calls.append(clock.now)
        raise RegistryError(reason, "no")

    with pytest.raises(RegistryError):
        patiently(work, 2.0, clock, clock.sleep)
    assert len(calls) == tries
    assert clock.now <= 2.0


def test_a_registry_that_comes_up_in_time():
    clock = Clock()

    def work():
        if clock.now < 1:
            raise RegistryError("unreachable", "no")
        return "there"

    assert patiently(work, 5.0, clock, clock.sleep) == "there"
