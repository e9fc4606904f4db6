"""Guide and doctor are one: each entry has its check, each check its entry."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible.module_utils.host_doctor import (
    CHECKS,
    STATUS_KINDS,
    Doctor,
    Finding,
    Site,
    from_service,
    from_status,
    lines,
    read_guide,
    with_guide,
)
from ansible.module_utils.host_observation import Host
from ansible.module_utils.preflight import Engine
from webhook_api.doctor import standard_checks

REPO = Path(__file__).resolve().parents[3]
GUIDE = read_guide((REPO / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))


def checked() -> set[str]:
    """Everything that the doctor can name."""
    service = {f"service-{name.replace(' ', '-')}" for name, _ in standard_checks()}
    return set(CHECKS) | {f"site-{kind}" for kind in STATUS_KINDS} | service


def test_each_entry_has_its_check_and_each_check_its_entry() -> None:
    assert set(GUIDE) == checked()


@pytest.mark.parametrize("identity", GUIDE)
def test_each_entry_is_whole(identity: str) -> None:
    entry = GUIDE[identity]
    for text in (entry.symptom, entry.doctor, entry.cause, entry.remedy):
        assert len(text) > 8, entry


def test_kinds_of_the_status_are_known() -> None:
    """What module site_status may name, as its own description says."""
    import re

    from ansible.module_utils.site_status import Finding as StatusFinding

    said = re.search(r"`kind`: ([^.]+)\.", StatusFinding.__doc__ or "")
    assert said
    kinds = {kind.strip() for kind in said.group(1).replace("\n", " ").split(",")}
    # Whether the engine answers is a check of the host's own.
    assert kinds - {"engine"} == set(STATUS_KINDS)


def test_what_a_rotation_has_kept_is_no_secret_that_is_empty_or_open(tmp_path: Path) -> None:
    kept = tmp_path / "secrets/.before"
    kept.mkdir(parents=True, mode=0o700)
    (kept / "was-not-there").touch(mode=0o400)
    (kept / "keys.txt").write_text("public")
    doctor = Doctor(Site("wht", tmp_path, "wht-nginx"))
    assert [f.what for f in doctor.examine(["secret-open"]) if f.verdict in ("fail", "warn")] == []
    kept.chmod(0o755)
    (found,) = doctor.examine(["secret-open"])
    assert (found.verdict, found.what) == ("fail", f"{kept} may be entered by others (mode 0755)")


def test_cause_and_remedy_come_from_the_guide() -> None:
    shown = with_guide(
        [Finding("disk-full", "fail", "/: 3 MB are free"), Finding("engine-old", "ok", "26")], GUIDE
    )
    assert shown[0]["remedy"] == GUIDE["disk-full"].remedy
    assert "remedy" not in shown[1]
    told = list(lines(shown, all_of_them=False))
    assert told[0] == "FAIL  disk-full: /: 3 MB are free"
    assert GUIDE["disk-full"].cause in told[1]
    assert told[-1] == "1 ok, 1 fail"


@pytest.mark.parametrize(("permitted", "verdict"), [(False, "skip"), (True, "fail")])
def test_a_busy_engine_that_was_not_asked_is_no_engine_without_compose(
    tmp_path: Path, permitted: bool, verdict: str
) -> None:
    class Busy(Host):
        def engine(self) -> Engine:
            return Engine(installed=True, permitted=permitted, version="26.1.5", running=permitted)

    (finding,) = Doctor(Site("x", tmp_path, "x-nginx"), host=Busy(use_sudo=False)).examine(["engine-old"])
    assert finding.verdict == verdict


def test_other_doctors_are_heard() -> None:
    status = [
        {"kind": "lock", "name": "d-1", "what": "is over", "verdict": "warn"},
        {"kind": "engine", "name": "e", "what": "x", "verdict": "warn"},
        {"kind": "health", "name": "api-1", "what": "is running, starting", "verdict": "warn"},
        {"kind": "certificate", "name": "c", "what": "ended", "verdict": "fail"},
    ]
    assert from_status(status) == [
        Finding("site-lock", "warn", "d-1: is over"),
        Finding("site-health", "warn", "api-1: is running, starting"),
        Finding("site-certificate", "fail", "c: ended"),
    ]
    said = '{"findings": [{"check": "object store", "verdict": "fail", "message": "away", "remedy": "start it"}]}'
    assert from_service(said) == [Finding("service-object-store", "fail", "away -> start it")]
    assert from_service("OCI runtime exec failed")[0].verdict == "fail"
