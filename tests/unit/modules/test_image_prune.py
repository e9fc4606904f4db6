"""Which images go: never one that is needed, never one that somebody has named, never one of the newest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from ansible.module_utils.docker_cli import Docker, Result
from ansible.module_utils.image_prune import (
    CONTENT_LABEL,
    CREATED_LABEL,
    EngineImage,
    EnginePrune,
    PruneError,
    RegistryImage,
    RegistryPrune,
    attached_to,
    digests_in,
    engine_plan,
    names_in,
    needed_references,
    registry_plan,
)
from ansible.module_utils.registry_api import RegistryError

REPO = Path(__file__).resolve().parents[3]


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def tag(number: int) -> str:
    return f"c-{number:016x}"


def image(number: int, *tags: str) -> RegistryImage:
    return RegistryImage(digest(number), (*tags, tag(number)), f"2026-01-{number:02}T00:00:00Z")


def gone(images: list[RegistryImage]) -> list[int]:
    return [int(found.digest[7:], 16) for found in images]


def test_the_newest_stay_and_the_oldest_go_first() -> None:
    assert gone(registry_plan([image(3), image(1), image(4), image(2)], (), 2)) == [1, 2]


def test_what_a_release_needs_stays_however_old() -> None:
    images = [image(number) for number in range(1, 7)]
    assert gone(registry_plan(images, {digest(1), digest(3)}, 2)) == [2, 4]


@pytest.mark.parametrize("name", ["latest", "staging", "v1.2.3"])
def test_what_bears_another_tag_stays(name: str) -> None:
    assert gone(registry_plan([image(1, name), image(2), image(3)], (), 1)) == [2]


def test_an_image_of_unknown_age_goes_first() -> None:
    unknown = RegistryImage(digest(9), (tag(9),), "")
    assert gone(registry_plan([image(1), unknown], (), 1)) == [9]


def test_digests_are_found_in_references() -> None:
    references = [f"127.0.0.1:5000/webhook-api@{digest(1)}", digest(2), "127.0.0.1:5000/webhook-api:latest"]
    assert digests_in(references) == {digest(1), digest(2)}


def test_signatures_belong_to_their_image_only() -> None:
    bare = digest(1)[7:]
    tags = [f"sha256-{bare}.sig", f"sha256-{bare}", f"sha256-{digest(2)[7:]}.sig", tag(1)]
    assert attached_to(tags, digest(1)) == [f"sha256-{bare}", f"sha256-{bare}.sig"]


class Shelf:
    """A registry in memory: repository, tag, digest; labels by digest."""

    def __init__(self, **repositories: dict[str, str]) -> None:
        self.repositories = {name.replace("_", "-"): tags for name, tags in repositories.items()}
        self.unlabelled: set[str] = set()
        self.refuses: set[str] = set()
        self.indexes: dict[str, list[str]] = {}
        self.deleted: list[str] = []

    def tags(self, repository: str) -> list[str]:
        return list(self.repositories.get(repository, {}))

    def find_digest(self, repository: str, reference: str) -> str | None:
        return self.repositories[repository].get(reference)

    def labels(self, repository: str, reference: str) -> dict[str, str]:
        created = {CREATED_LABEL: f"2026-01-{int(reference[7:], 16):02}T00:00:00Z"}
        return created if reference in self.unlabelled else created | {CONTENT_LABEL: "x"}

    def manifest(self, repository: str, reference: str) -> dict:
        return {"manifests": [{"digest": digest} for digest in self.indexes.get(reference, [])]}

    def delete_manifest(self, repository: str, digest: str) -> bool:
        self.deleted.append(digest)
        if repository in self.refuses:
            raise RegistryError("deletion_disabled", "cannot delete")
        tags = self.repositories[repository]
        self.repositories[repository] = {name: found for name, found in tags.items() if found != digest}
        return True


def test_a_signature_goes_with_its_image() -> None:
    signature = f"sha256-{digest(1)[7:]}.sig"
    shelf = Shelf(api={tag(1): digest(1), tag(2): digest(2), signature: digest(30)})
    outcome = RegistryPrune(shelf, [], 1, check=False).run(["api"])
    assert shelf.tags("api") == [tag(2)]
    assert outcome.removed == [f"api:{signature}", f"api:{tag(1)}"]
    assert (outcome.kept, outcome.faults) == (1, [])


def test_an_index_of_attached_artifacts_goes_with_what_it_lists() -> None:
    shelf = Shelf(api={tag(1): digest(1), tag(2): digest(2), f"sha256-{digest(1)[7:]}": digest(30)})
    shelf.indexes = {digest(30): [digest(31), digest(32)]}
    RegistryPrune(shelf, [], 1, check=False).run(["api"])
    assert shelf.deleted == [digest(31), digest(32), digest(30), digest(1)]


def test_an_image_that_this_project_did_not_build_stays() -> None:
    shelf = Shelf(api={tag(1): digest(1), tag(2): digest(2), tag(3): digest(3)})
    shelf.unlabelled = {digest(1)}
    RegistryPrune(shelf, [], 1, check=False).run(["api"])
    assert shelf.tags("api") == [tag(1), tag(3)]


def test_other_repositories_are_not_looked_at() -> None:
    shelf = Shelf(api={tag(1): digest(1), tag(2): digest(2)}, bot={tag(1): digest(1), tag(2): digest(2)})
    RegistryPrune(shelf, [], 1, check=False).run(["api"])
    assert shelf.tags("bot") == [tag(1), tag(2)]


def test_check_mode_says_it_and_does_nothing() -> None:
    shelf = Shelf(api={tag(1): digest(1), tag(2): digest(2)})
    outcome = RegistryPrune(shelf, [], 1, check=True).run(["api"])
    assert outcome.removed == [f"api:{tag(1)}"]
    assert shelf.tags("api") == [tag(1), tag(2)]


def test_a_refusal_is_a_fault_and_the_next_repository_is_pruned() -> None:
    two = {tag(1): digest(1), tag(2): digest(2)}
    shelf = Shelf(api=dict(two), nginx=dict(two))
    shelf.refuses = {"api"}
    outcome = RegistryPrune(shelf, [], 1, check=False).run(["api", "nginx"])
    assert outcome.removed == [f"nginx:{tag(1)}"]
    assert outcome.faults == ["api: cannot delete"]


# -- the engine -------------------------------------------------------------------------------------------------------


def stored(number: int, *names: str) -> EngineImage:
    return EngineImage(f"id-{number}", names or (f"r:5000/api:{tag(number)}",), f"2026-01-{number:02}")


def test_an_engine_keeps_what_is_needed_and_the_newest_of_the_rest() -> None:
    images = [stored(number) for number in range(1, 6)]
    assert [found.id for found in engine_plan(images, {"id-1", "id-5"}, 1)] == ["id-2", "id-3"]


def test_names_are_those_of_the_repository_and_of_no_longer_one() -> None:
    image = {
        "RepoTags": ["r:5000/api:c-1", "r:5000/api-two:c-1", "api:latest"],
        "RepoDigests": [f"r:5000/api@{digest(1)}", f"other/api@{digest(1)}"],
    }
    assert names_in(image, "r:5000/api") == ("r:5000/api:c-1", f"r:5000/api@{digest(1)}")


def site(path: Path, name: str, *images: str) -> Path:
    for number, reference in enumerate(images):
        release = path / name / "releases" / f"r-{number:012x}"
        release.mkdir(parents=True)
        (release / "release.json").write_text(json.dumps({"images": {"api": reference}}))
    (path / name).mkdir(exist_ok=True)
    return path / name


def test_releases_of_this_site_and_of_those_beside_it_are_needed(tmp_path: Path) -> None:
    here = site(tmp_path, "one", "r/api@a", "r/api@b")
    site(tmp_path, "two", "r/api@c")
    assert needed_references(here) == ["r/api@a", "r/api@b", "r/api@c"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"images": null}', '{"images": ["x"]}'])
def test_a_release_that_does_not_say_what_it_needs_stops_all(tmp_path: Path, text: str) -> None:
    here = site(tmp_path, "one", "r/api@a")
    next(here.glob("releases/*/release.json")).write_text(text)
    with pytest.raises(PruneError) as caught:
        needed_references(here)
    assert caught.value.reason == "damaged_release"


def engine_of(images: dict[str, dict], in_use: str = "", refusal: str = "") -> tuple[Docker, list[list[str]]]:
    """A docker command over images in memory, and the removals that it was asked for."""
    removals: list[list[str]] = []

    def runner(command: list[str], **_: object) -> Result:
        arguments = command[1:]
        if arguments[0] == "ps":
            return Result(0, "container-1\n" if in_use else "", "")
        if arguments[0] == "inspect":
            return Result(1, f"{in_use}\n", "Error: No such container: gone")
        if arguments[:2] == ["image", "ls"]:
            return Result(0, "\n".join(images), "")
        if arguments[:2] == ["image", "inspect"]:
            found = [
                image
                for name, image in images.items()
                if name in arguments or set(image["RepoDigests"]) & set(arguments)
            ]
            return Result(0, json.dumps(found), "")
        removals.append(arguments[2:])
        return Result(1 if refusal else 0, "", refusal)

    return Docker(runner, "docker"), removals


def described(number: int, *tags: str) -> dict:
    return {
        "Id": f"sha256:{number}",
        "RepoTags": [f"r:5000/api:{name}" for name in tags],
        "RepoDigests": [f"r:5000/api@{digest(number)}"],
        "Created": f"2026-01-{number:02}",
    }


IMAGES = {f"sha256:{number}": described(number, tag(number)) for number in range(1, 6)}


def test_what_a_release_or_a_container_needs_is_not_touched() -> None:
    docker, removals = engine_of(IMAGES, in_use="sha256:2")
    outcome = EnginePrune(docker, [f"r:5000/api@{digest(1)}"], 1, check=False).run(["r:5000/api"])
    assert [names[0] for names in removals] == [f"r:5000/api:{tag(3)}", f"r:5000/api:{tag(4)}"]
    assert outcome.faults == []


def test_of_a_repository_that_is_used_no_more_only_what_is_needed_stays() -> None:
    docker, removals = engine_of(IMAGES, in_use="sha256:2")
    needed = [f"r:5000/api@{digest(1)}"]
    EnginePrune(docker, needed, 3, check=False, retired=["r:5000/api"]).run(["r:5000/api"])
    assert [names[0] for names in removals] == [f"r:5000/api:{tag(number)}" for number in (3, 4, 5)]


def test_the_acme_clients_images_are_pruned_whether_it_is_on_or_off() -> None:
    role = yaml.safe_load((REPO / "roles" / "prune" / "vars" / "main.yml").read_text())
    assert role["__prune_repositories"] == "{{ [site_image_api, site_image_nginx, site_image_acme] }}"
    (host, _, registry) = yaml.safe_load((REPO / "roles" / "prune" / "tasks" / "prune.yml").read_text())
    assert host["image_prune"]["retired"] == "{{ __prune_retired }}"
    # Other sites may share the registry.
    assert "retired" not in registry["image_prune"]


def test_what_somebody_has_named_stays_in_the_engine() -> None:
    images = {**IMAGES, "sha256:1": described(1, tag(1), "latest")}
    docker, removals = engine_of(images)
    EnginePrune(docker, [], 1, check=False).run(["r:5000/api"])
    assert f"r:5000/api:{tag(1)}" not in {name for names in removals for name in names}


def test_nothing_is_forced_and_a_refusal_is_a_fault() -> None:
    docker, removals = engine_of(
        IMAGES, refusal="Error response from daemon: conflict: in use by container x"
    )
    outcome = EnginePrune(docker, [], 4, check=False).run(["r:5000/api"])
    assert len(removals) == 1
    assert not [name for name in removals[0] if name.startswith("-")]
    assert "conflict" in outcome.faults[0]
    assert outcome.removed == []


def test_a_digest_that_went_with_its_tag_is_no_fault() -> None:
    docker, _ = engine_of(IMAGES, refusal="Error response from daemon: No such image: r:5000/api@sha256:1")
    outcome = EnginePrune(docker, [], 4, check=False).run(["r:5000/api"])
    assert outcome.faults == []
    assert len(outcome.removed) == 2
