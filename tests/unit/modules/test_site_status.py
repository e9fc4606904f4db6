"""The state of a site: each kind of drift and of leftovers is found, and what is right is not complained of."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta

import pytest
from ansible.module_utils import site_status
from ansible.module_utils.deploy_lock import DeployLock
from ansible.module_utils.deploy_record import DeployRecords
from ansible.module_utils.kept_secrets import KeptSecrets
from ansible.module_utils.release import ReleaseStore, WantedFile, plan_release
from ansible.module_utils.rollout.journal import only_one
from ansible.module_utils.site_status import Bounds, SiteStatus
from ansible.module_utils.site_status_text import lines
from test_certificate_dates import certificate

NOW = datetime(2026, 11, 23, 4, tzinfo=UTC)
IMAGES = {
    "webhook-api": "r/webhook-api@sha256:" + "1" * 64,
    "nginx-webhook": "r/nginx-webhook@sha256:" + "2" * 64,
}
CONF = "events {}\nhttp {\n  ssl_certificate /etc/nginx/ssl/fullchain.pem;\n}\n"


class Site:
    """A site on disk, an engine that says what it is told to, and instances that answer."""

    def __init__(self, root):
        self.root = root
        for name in ("ssl", "state", "run", "proc/7"):
            (root / name).mkdir(parents=True)
        (root / "proc/7/root").symlink_to("/")
        self.certificate = certificate(NOW - timedelta(days=1), NOW + timedelta(days=90))
        (root / "ssl/fullchain.pem").write_text(self.certificate)
        rollout = {
            "webhook_release": "s-1", "project": "p", "edge": "e1", "edge_path": f"{root}/edge/e1",
            "certificate_directory": f"{root}/ssl", "ports": {"http": 80, "https": [443]},
            "services": [
                {"name": "api-1", "kind": "api", "container": "p-api-1", "image": IMAGES["webhook-api"], "port": 8001,
                 "label": {"org.aisha.release": "s-1"}},
                {"name": "nginx", "kind": "edge", "container": "p-nginx", "image": IMAGES["nginx-webhook"],
                 "label": {"org.aisha.edge": "e1"}},
            ],
        }  # fmt: skip
        files = [
            WantedFile("@release@/docker-compose.webhook.prod.yml", "name: p\n"),
            WantedFile("edge/e1/nginx.conf", CONF),
        ]
        plan = plan_release(files, IMAGES)
        ReleaseStore(str(root)).write(plan, {"webhook_release": "s-1", "rollout": rollout}, 5, activate=True)
        self.release = root / "releases" / plan.id
        self.containers = [
            self.container("p-api-1", "api-1", IMAGES["webhook-api"], {"org.aisha.release": "s-1"}),
            self.container("p-nginx", "nginx", IMAGES["nginx-webhook"], {"org.aisha.edge": "e1"}),
        ]
        self.health = {
            "status": "healthy",
            "release": "s-1",
            "checks": {"database": {"ok": True}, "spool": {"ok": True, "rows": 0}},
        }
        self.served, self.planned, self.orphans, self.embedded = self.certificate, [], [], []

    def container(self, name, service, image, labels):
        shared = {"com.docker.compose.service": service, "com.docker.compose.oneoff": "False"}
        state = {
            "Status": "running",
            "Pid": 7,
            "StartedAt": "2026-11-23T03:00:00Z",
            "Health": {"Status": "healthy", "Log": []},
        }
        return {
            "Name": f"/{name}",
            "Config": {"Image": image, "Labels": shared | labels},
            "State": state,
            "RestartCount": 0,
            "Mounts": [],
        }

    def project_containers(self, project):
        return {"p": self.containers, "p-backends": self.embedded}.get(project, [])

    def info(self):
        return {"DockerRootDir": str(self.root)}

    def get(self, url, seconds):
        if self.health is None:
            raise OSError("refused")
        return (200, {"inbox": {"pending": 1}}) if url.endswith("/status") else (200, self.health)

    def plan(self, release):
        return self.planned, self.orphans

    def look(self, **bounds):
        limits = Bounds(**({"disk_free_mb": 0} | bounds))
        looking = SiteStatus(
            self.root, self, None, limits, self.get, lambda port: self.served, lambda: NOW, self.root / "proc"
        )
        return looking.look()

    def found(self, **bounds):
        return [(finding["kind"], finding["name"]) for finding in self.look(**bounds)["findings"]]


@pytest.fixture
def site(tmp_path, monkeypatch):
    made = Site(tmp_path)
    monkeypatch.setattr(site_status, "Project", lambda *_: made)
    return made


def test_what_is_right_is_not_complained_of(site):
    shown = site.look()
    assert (shown["findings"], shown["ok"]) == ([], True)
    assert shown["release"]["id"] == site.release.name
    assert shown["certificate"]["days_left"] == 90
    assert shown["instances"]["api-1"]["inbox"] == {"pending": 1}
    told = "\n".join(lines(shown))
    for part in (
        site.release.name,
        "p-api-1: running, healthy",
        "90 days left",
        "nobody deploys",
        "all is as the release says",
    ):
        assert part in told


def test_where_nothing_was_deployed_it_says_so(tmp_path):
    shown = SiteStatus(
        tmp_path, Site(tmp_path / "other"), None, Bounds(disk_free_mb=0), None, None, lambda: NOW
    ).look()
    assert [finding["kind"] for finding in shown["findings"]] == ["release"]
    assert "NOT AS IT SHOULD BE" in "\n".join(lines(shown))


def test_files_that_were_changed_added_or_removed_are_named(site):
    (site.release / "docker-compose.webhook.prod.yml").write_text("by hand")
    (site.root / "edge/e1/more.conf").touch()
    assert site.found() == [
        ("file", f"releases/{site.release.name}/docker-compose.webhook.prod.yml"),
        ("edge", "edge/e1/more.conf"),
    ]
    (site.root / "edge/e1/nginx.conf").unlink()
    assert ("file", "edge/e1/nginx.conf") in site.found()


def test_containers_that_are_missing_ill_or_of_another_release_are_named(site):
    site.containers[0]["State"]["Health"] = {"Status": "unhealthy", "Log": [{"Output": "exit 1"}]}
    site.containers[1]["Config"]["Labels"]["org.aisha.edge"] = "e0"
    shown = site.look()
    assert [finding["kind"] for finding in shown["findings"]] == ["health", "container"]
    assert "exit 1" in shown["findings"][0]["what"]
    site.containers = []
    assert [service["status"] for service in site.look()["services"]] == ["missing", "missing"]


def test_a_container_that_has_just_started_is_a_warning_and_no_fault(site):
    site.containers[0]["State"]["Health"] = {"Status": "starting", "Log": []}
    (finding,) = site.look()["findings"]
    assert (finding["kind"], finding["verdict"]) == ("health", "warn")
    site.containers[0]["State"] = {**site.containers[0]["State"], "Status": "exited"}
    assert site.look()["findings"][0]["verdict"] == "fail"


def test_embedded_backends_are_looked_at_as_well(site):
    site.embedded = [site.container("p-postgres", "postgres", "i", {})]
    assert site.look()["embedded"][0]["container"] == "p-postgres"
    site.embedded[0]["State"]["Status"] = "exited"
    assert site.found() == [("health", "p-postgres")]


def test_what_compose_would_change_and_what_belongs_to_nobody_is_named(site):
    class Entry:
        name, action, reason = "api-1", "replace", "its image is another one"

    site.planned, site.orphans = [Entry], [{"name": "p-old"}]
    assert site.found() == [("image", "api-1"), ("orphan", "p-old")]


def test_a_secret_that_was_replaced_since_a_container_started_is_named(site):
    inside, outside = site.root / "inside", site.root / "secrets-key"
    inside.touch()
    os.link(inside, outside)
    site.containers[0]["Mounts"] = [{"Type": "bind", "Source": str(outside), "Destination": str(inside)}]
    assert site.found() == []
    outside.unlink()
    outside.touch()
    assert site.found() == [], "it says the same"
    outside.write_text("another")
    assert site.found() == [("file", str(outside))]
    outside.unlink()
    assert site.found() == [("file", str(outside))]


def test_a_rotation_that_was_put_back_leaves_no_drift(site):
    """Containers that were not touched have the very file that stands again."""
    key, inside = site.root / "secrets/api/key", site.root / "inside"
    key.parent.mkdir(parents=True)
    key.write_text("old")
    os.link(key, inside)
    site.containers[0]["Mounts"] = [
        {"Type": "bind", "Source": str(key), "Destination": str(inside)},
    ]
    kept = KeptSecrets(site.root / "secrets")
    kept.keep("api/key", site.release.name)
    (site.root / "new").write_text("new")
    os.rename(site.root / "new", key)
    assert site.found() == [("file", str(key))], (
        "it says that the container has the old one, and nothing else"
    )
    kept.put_back()
    assert site.found() == []


def test_leftovers_of_a_run_that_died_are_named_and_those_of_one_at_work_are_not(site):
    (site.root / "state/api-1.down").touch()
    (site.root / "state/e1.draining").touch()
    site.containers.append(site.container("p-nginx-2", "nginx", "i", {}))
    DeployRecords(site.root).begin({"id": "d-20261123T030000-aaaaaa", "host": "h", "steps": []})
    lock = DeployLock(site.root)
    lock.acquire("d-20261123T030000-aaaaaa", "aida@laptop")
    assert site.found() == []
    lock.release("d-20261123T030000-aaaaaa")
    assert site.found() == [
        ("nginx", "p-nginx, p-nginx-2"),
        ("run", "d-20261123T030000-aaaaaa"),
        ("switch", "state/api-1.down"),
        ("switch", "state/e1.draining"),
    ]
    lock.acquire("d-20261123T030000-bbbbbb", "aida@laptop", lease=-1)
    assert ("lock", "d-20261123T030000-bbbbbb") in site.found()


def test_an_instance_that_is_ill_full_of_another_release_or_silent_is_named(site):
    site.health = {"status": "degraded", "release": "s-0",
                   "checks": {"redis": {"ok": False, "error": "refused"}, "spool": {"ok": True, "rows": 4}}}  # fmt: skip
    said = [finding["what"] for finding in site.look()["findings"]]
    assert ["redis: refused" in said[0], "s-0, not s-1" in said[1], "4 deliveries" in said[2]] == [True] * 3
    site.health = None
    assert site.found() == [("instance", "api-1")]


def test_a_certificate_that_ends_soon_or_is_not_the_one_that_is_served_is_named(site):
    assert [kind for kind, _ in site.found(certificate_days=91)] == ["certificate"]
    site.served = certificate(NOW - timedelta(days=1), NOW + timedelta(days=400))
    assert site.found() == [("certificate", "port 443")]
    (site.root / "ssl/fullchain.pem").write_text("nonsense")
    assert site.found() == [("certificate", f"{site.root}/ssl/fullchain.pem")]


@pytest.mark.parametrize(
    ("days", "verdict", "word"),
    [
        (22, None, ""),
        (20, "warn", "ends in"),
        (7, "warn", "ends in"),
        (6, "fail", "ends in"),
        (-1, "fail", "ended at"),
    ],
)
def test_a_certificate_is_alarmed_before_and_after_its_end(site, days, verdict, word):
    ends = NOW + timedelta(days=days, hours=1)
    site.served = certificate(NOW - timedelta(days=100), ends)
    (site.root / "ssl/fullchain.pem").write_text(site.served)
    found = site.look()["findings"]
    assert [(entry["kind"], entry["verdict"]) for entry in found] == (
        [("certificate", verdict)] if verdict else []
    )
    assert all(word in entry["what"] for entry in found)


def test_too_little_room_is_named(site):
    assert [kind for kind, _ in site.found(disk_free_mb=10**12)] == ["disk"]


def test_a_rollout_that_goes_on_after_its_run_was_ended_is_named_and_is_no_leftover(site):
    """Ctrl-C ends ansible-playbook; the module on the host is a process of its own."""
    (site.root / "state/api-1.down").touch()
    run = "d-20261123T030000-aaaaaa"
    DeployRecords(site.root).begin({"id": run, "host": "h", "steps": []})
    DeployLock(site.root).acquire(run, "aida@laptop", lease=-1)
    with only_one(site.root, 0):
        shown = site.look()
    assert [(f["kind"], f["name"]) for f in shown["findings"]] == [("lock", run)]
    assert f"still at work on this host (process {os.getpid()} since" in shown["findings"][0]["what"]
    assert ("switch", "state/api-1.down") in site.found()


def test_the_last_deployments_are_shown_the_newest_first(site):
    told = {
        "host": "h",
        "kind": "deploy",
        "result": "failed",
        "who": "aida",
        "started": "2026-11-23T04:00:00Z",
    }
    for number in range(7):
        record = told | {"id": f"d-{number}", "reason": "one\ntwo", "from": None, "to": "r-1"}
        DeployRecords(site.root).append(record)
    shown = site.look()
    assert [record["id"] for record in shown["deployments"]] == ["d-6", "d-5", "d-4", "d-3", "d-2"]
    assert "d-6 deploy by aida: failed (one two), nothing -> r-1" in "\n".join(lines(shown))
