"""What the operators' guides show is typed, page by page, on a bare host with a site of its own.

docs/WEBHOOK_DEPLOYMENT.md is typed in tests/fresh, docs/operations.md and docs/air-gapped.md in test_bundle.py,
docs/production.md in test_site.py. What can't be typed here is listed with the reason, and has to be on its page.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.testhost import testhost
from tests.support.typed_commands import Typist, typed_blocks

REPO = Path(__file__).resolve().parents[2]
HOST = "wht-guides-host"
INVENTORY = "inventory/local/group_vars/all.yml"
pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]

OTHER_SITE = "the vault and the servers of another inventory: test_site.py"
LEFT_OUT = {
    "docs/updating.md": {
        "git pull": "the clone is of one commit, on no branch",
        "scripts/lock.sh --upgrade-package urllib3": "changes the project",
        "make audit": "needs the data of a service that is not in reach",
        "make test": "make test-fresh types it",
    },
    "docs/troubleshooting.md": {
        'make doctor ARGS="-i inventory/production --ask-vault-pass"': OTHER_SITE,
    },
    "docs/releases.md": {
        'make status ARGS="-i inventory/production -e status_format=json"': OTHER_SITE,
        "#!/bin/sh": "a hook: test_releases.py",
        "# Tells a chat what was deployed.": "a hook",
        "jq -r": "a hook",
    },
    "docs/rollout.md": {
        "cat /opt/aisha-webhook/run/deployment.json": "no run is at work",
    },
    "docs/rotation.md": {
        'make vault ARGS="--inventory inventory/mysite --renew fal_webhook_secret"': OTHER_SITE,
    },
    "docs/backup.md": {
        'make restore ARGS="-e restore_from=/var/backups': "into an empty place: test_backup.py",
    },
    "docs/console.md": {
        "webhook-api accounts password maria": "asks for the password on a terminal: tests/integration/webhook",
    },
    "docs/fal-setup.md": {
        "curl --head https://aibots.kz": "somebody else's host",
        "make vault": OTHER_SITE,
        'make verify ARGS="-i inventory/mysite': OTHER_SITE,
        "curl -f -X POST https://aibots.kz": "somebody else's host",
    },
    "docs/supply-chain.md": {
        "make vault": OTHER_SITE,
        "cosign verify": "test_supply.py",
    },
    "docs/tls.md": {
        "docker exec aisha-webhook-acme": "test_acme.py",
        "docker logs aisha-webhook-acme": "test_acme.py",
    },
}


def typed(page: str, **instead: str) -> list[str]:
    """What is typed of a page, a block as one script; `instead` has what stands for a placeholder of the page."""
    left = dict.fromkeys(LEFT_OUT.get(page, {}), 0)
    scripts = []
    for block in typed_blocks(page):
        kept = []
        for line in block:
            reasons = [start for start in left if line.startswith(start)]
            for start in reasons:
                left[start] += 1
            if not reasons:
                kept.append(line)
        if kept:
            scripts.append("\n".join(kept))
    assert not [start for start, seen in left.items() if not seen], f"{page} does not show these any more"
    for old, new in instead.items():
        assert any(old in script for script in scripts), f"{page} does not show {old}"
        scripts = [script.replace(old, new) for script in scripts]
    return scripts


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Typist]:
    """A bare Debian with the project cloned and its stack up, as the README says."""
    bundle = tmp_path_factory.mktemp("source") / "source.bundle"
    subprocess.run(
        ["git", "bundle", "create", str(bundle), "HEAD"], cwd=REPO, check=True, capture_output=True
    )
    bundle.parent.chmod(0o755)
    packages = (*testhost.PACKAGES, "curl", "openssl")
    image = testhost.build("trixie", packages, tag="trixie-guides")
    try:
        testhost.up(HOST, "trixie", (f"{bundle}:/source.bundle:ro",), image)
        root = Typist(HOST, "root")
        root.type("git clone /source.bundle aisha-webhook")
        root.folder = "~/aisha-webhook"
        root.type("make up")
        yield root
    finally:
        testhost.down(HOST)


def type_page(host: Typist, page: str, **instead: str) -> list[str]:
    """Type a page; what each block printed."""
    return [host.type(f"set -e\n{script}") for script in typed(page, **instead)]


def test_rolling_back(host: Typist) -> None:
    host.type("make up ARGS='-e stack_log_level=DEBUG'")
    host.type('make status ARGS="-e status_file=/tmp/status.json"')
    releases = json.loads(host.type("cat /tmp/status.json"))["localhost"]["releases"]
    assert len(releases) > 1
    current = next(release["id"] for release in releases if release["current"])
    said = type_page(host, "docs/rolling-back.md", **{"r-0123456789ab": current})
    assert "failed=0" in said[0]


def test_updating_and_looking(host: Typist) -> None:
    for page in ("docs/updating.md", "docs/troubleshooting.md", "docs/rollout.md", "docs/releases.md"):
        type_page(host, page)
    assert json.loads(host.type("cat /tmp/status.json"))


def test_secrets_and_certificates(host: Typist) -> None:
    host.type("rm /opt/aisha-webhook/secrets/fal_webhook_secret")
    type_page(host, "docs/rotation.md")
    said = type_page(host, "docs/tls.md")
    assert "notAfter" in said[-1]
    host.type("make verify")


def test_nginx_by_hand(host: Typist) -> None:
    """The one of before ends, the new one has its name, and nothing is left for the next run to do."""
    first, *rest = typed("docs/edge.md")
    assert '"healthy"' in host.type(f"set -e\n{first}")
    for script in rest:
        host.type(f"set -e\ncd /opt/aisha-webhook/current\n{script}")
    assert "changed=0" in host.type("make up")


def test_deliveries_of_every_shape(host: Typist) -> None:
    type_page(host, "docs/fal-setup.md")


def test_supply_chain(host: Typist) -> None:
    type_page(host, "docs/supply-chain.md")


def test_monitoring_and_console(host: Typist) -> None:
    host.type(f"printf 'monitoring: true\\nstack_console: true\\n' >>{INVENTORY}")
    type_page(host, "docs/monitoring.md")
    host.type("curl -f -s http://127.0.0.1:9090/-/ready && curl -f -s http://127.0.0.1:9093/-/ready")
    host.type("make up")
    in_container = "docker exec -i aisha-webhook-api-1 webhook-api"
    token = ""
    for script in typed("docs/console.md"):
        for line in script.splitlines():
            line = line.replace("docker exec -it", "echo a-long-enough-passphrase | docker exec -i")
            line = (
                line.replace("--as NAME", "--as maria").replace("wct_…", token).replace("curl ", "curl -f ")
            )
            said = host.type(
                line.replace("webhook-api", in_container, 1) if line.startswith("webhook-api") else line
            )
            token = next((word for word in said.split() if word.startswith("wct_")), token)


def test_backup_and_restore(host: Typist) -> None:
    confirmed = "restore_over=true -e restore_confirmed=true"
    said = type_page(host, "docs/backup.md", **{"restore_over=true": confirmed})
    assert "failed=0" in said[-1]
    host.type("make verify")
