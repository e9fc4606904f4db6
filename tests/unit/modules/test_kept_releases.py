"""What can be gone back to: which release is meant, and what stands against it."""

from __future__ import annotations

import pytest
from ansible.module_utils.deploy_lock import DeployLock
from ansible.module_utils.deploy_record import DeployRecords
from ansible.module_utils.kept_releases import KeptError, KeptReleases, secret_files
from ansible.module_utils.release import ReleaseStore, WantedFile, plan_release

IMAGES = {
    "webhook-api": "r/webhook-api@sha256:" + "1" * 64,
    "nginx-webhook": "r/nginx-webhook@sha256:" + "2" * 64,
}
ROLLOUT = {
    "webhook_release": "s-1", "project": "p", "edge": "e1", "edge_path": "/e", "certificate_directory": "/c",
    "ports": {"http": 80, "https": [443]},
    "services": [{"name": "api-1", "kind": "api", "container": "p-api-1", "image": "i", "port": 8001},
                 {"name": "nginx", "kind": "edge", "container": "p-nginx", "image": "i"}],
}  # fmt: skip


@pytest.fixture
def site(tmp_path):
    """Three releases: the third is the current one, the second served before."""
    store, ids = ReleaseStore(str(tmp_path)), []
    (tmp_path / "secrets/api").mkdir(parents=True)
    (tmp_path / "secrets/api/key").touch()
    for text in ("one", "two", "three"):
        compose = f"# {text}\nsecrets:\n  api_key:\n    file: {tmp_path}/secrets/api/key\n"
        plan = plan_release([WantedFile("@release@/docker-compose.webhook.prod.yml", compose)], IMAGES)
        store.write(plan, {"webhook_release": f"s-{text}", "rollout": ROLLOUT}, 5, activate=True)
        ids.append(plan.id)
    return tmp_path, ids


def kept_of(root, here=True):
    kept = KeptReleases(root, lambda image: here)
    kept.read()
    return kept


def test_previous_is_the_one_that_served_before(site):
    root, ids = site
    kept = kept_of(root)
    assert kept.choose("previous").id == ids[1]
    assert kept.choose(ids[0]).id == ids[0]
    assert [entry.shown()["possible"] for entry in kept.found] == [False, True, True]


def test_an_unknown_release_is_answered_with_those_that_there_are(site):
    root, ids = site
    with pytest.raises(KeptError) as error:
        kept_of(root).choose("r-000000000000")
    assert error.value.reason == "no_release"
    assert all(identity in str(error.value) for identity in ids)
    assert "sha256:111111111111" in str(error.value)


def test_a_refusal_names_the_run_that_is_at_work(site):
    """A first deployment that still goes on has nothing to go back to, and is not "nothing"."""
    root, _ = site
    lock = DeployLock(root)
    with pytest.raises(KeptError) as before:
        kept_of(root).choose("r-000000000000")
    assert "at work" not in str(before.value)
    lock.acquire("d-20261123T040000-1a2b3c", "maria@controller")
    with pytest.raises(KeptError, match=r"at work: maria@controller .*run d-20261123T040000-1a2b3c"):
        kept_of(root).choose("r-000000000000")


def test_the_current_one_is_refused(site):
    root, ids = site
    with pytest.raises(KeptError) as error:
        kept_of(root).choose(ids[2])
    assert error.value.reason == "current"


def test_where_nothing_served_before_it_is_said(tmp_path):
    with pytest.raises(KeptError, match="none") as error:
        kept_of(tmp_path).choose("previous")
    assert error.value.reason == "no_release"


def test_a_secret_that_is_gone_is_named(site):
    root, ids = site
    (root / "secrets/api/key").unlink()
    with pytest.raises(KeptError, match="secrets/api/key, which is gone") as error:
        kept_of(root).choose("previous")
    assert error.value.reason == "secret_missing"
    assert secret_files(root / "releases" / ids[0] / "docker-compose.webhook.prod.yml") == [
        f"{root}/secrets/api/key"
    ]


def test_a_damaged_one_is_refused_and_listed_as_such(site):
    root, ids = site
    (root / "releases" / ids[1] / "docker-compose.webhook.prod.yml").write_text("by hand")
    kept = kept_of(root)
    with pytest.raises(KeptError, match="changed by hand") as error:
        kept.choose("previous")
    assert error.value.reason == "damaged"
    assert "NOT POSSIBLE" in kept.found[1].line()


def test_one_that_does_not_say_how_it_is_rolled_out_is_refused(site):
    root, _ = site
    plan = plan_release([WantedFile("@release@/docker-compose.webhook.prod.yml", "old")], IMAGES)
    ReleaseStore(str(root)).write(plan, {"webhook_release": "s-old"}, 5, activate=False)
    with pytest.raises(KeptError) as error:
        kept_of(root).choose(plan.id)
    assert error.value.reason == "bad_release"


def test_missing_images_are_told_and_no_obstacle(site):
    kept = kept_of(site[0], here=False)
    assert set(kept.choose("previous").missing_images) == set(IMAGES.values())
    assert "images are pulled first" in kept.found[0].line()


def test_it_is_told_when_each_last_served(site):
    root, ids = site
    DeployRecords(root).append({"id": "d-1", "host": "h", "kind": "deploy", "started": "2026-11-23T04:00:00Z",
                                "ended": "2026-11-23T04:01:00Z", "result": "done", "to": ids[1]})  # fmt: skip
    assert [entry.deployed for entry in kept_of(root).found] == ["", "2026-11-23T04:01:00Z", ""]
