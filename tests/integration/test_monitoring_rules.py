"""The alarms in Debian's own promtool: every rule is read, fires, and clears; a rule that cannot fire is found out."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import docker
import pytest

from tests.support.images import tags_of
from tests.support.monitoring import DASHBOARD, ROLE, TESTS, dashboard_queries, rules, texts

pytestmark = pytest.mark.engine
ALARMS = sorted(path.stem for path in TESTS.glob("*.yml"))


def built(name: str) -> str:
    """The role's image of Prometheus or Alertmanager, on the newest base image."""
    engine = docker.from_env()
    bases = tags_of(engine, "aisha-base")
    engine.close()
    assert bases, "no base image: run `make up` once"
    tag = f"test-monitoring-{name}:latest"
    context = str(ROLE / "files" / name)
    command = ["docker", "build", "-q", "--build-arg", f"BASE={bases[0]}", "-t", tag, context]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return tag


@pytest.fixture(scope="session")
def prometheus_image() -> str:
    return built("prometheus")


@pytest.fixture(scope="session")
def alertmanager_image() -> str:
    return built("alertmanager")


def run(image: str, directory: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """A program of an image, over the files of a directory and without any network."""
    command = ["docker", "run", "--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp"]
    command += ["--volume", f"{directory}:/etc/site:ro", "--workdir", "/etc/site", "--entrypoint", argv[0]]
    return subprocess.run([*command, image, *argv[1:]], capture_output=True, text=True, check=False)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory with all that the role writes for Prometheus, and the tests of the rules."""
    tmp_path.chmod(0o755)
    for path in TESTS.glob("*.yml"):
        shutil.copy(path, tmp_path / path.name)
    found = texts()
    (tmp_path / "prometheus.yml").write_text(found["prometheus/prometheus.yml"])
    (tmp_path / "rules.yml").write_text(found["prometheus/rules.yml"])
    return tmp_path


def test_prometheus_reads_configuration_and_rules(prometheus_image: str, site: Path) -> None:
    done = run(
        prometheus_image, site, "promtool", "check", "config", "--lint=all", "--lint-fatal", "prometheus.yml"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(re.findall(r"- alert:", rules()))
    assert f"{count} rules found" in done.stdout


def test_every_alarm_fires_and_clears(prometheus_image: str, site: Path) -> None:
    done = run(prometheus_image, site, "promtool", "test", "rules", *(f"{name}.yml" for name in ALARMS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("SUCCESS") == len(ALARMS)


def test_a_rule_that_never_fires_fails_its_test(prometheus_image: str, site: Path) -> None:
    """Each alarm's own test is red without its rule; the others' stay green."""
    text = (site / "rules.yml").read_text()
    for name in ALARMS:
        (site / "rules.yml").write_text(
            re.sub(rf"- alert: {name}$", f"- alert: Not{name}", text, flags=re.MULTILINE)
        )
        done = run(prometheus_image, site, "promtool", "test", "rules", f"{name}.yml")
        assert done.returncode != 0, name


@pytest.mark.parametrize(
    "receivers",
    [
        {},
        {"monitoring_alert_webhook_url": "https://alarms.example/x"},
        {"monitoring_alert_telegram_bot_token": "1:x", "monitoring_alert_telegram_chat_id": -100},
    ],
)
def test_alertmanager_reads_its_configuration(
    alertmanager_image: str, tmp_path: Path, receivers: dict[str, object]
) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "alertmanager.yml").write_text(texts(**receivers)["alertmanager/alertmanager.yml"])
    done = run(alertmanager_image, tmp_path, "amtool", "check-config", "alertmanager.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboards_queries_are_promql(prometheus_image: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    queries = dashboard_queries()
    assert len(queries) > 10, DASHBOARD
    lines = ["groups:", "  - name: dashboard", "    rules:"]
    for number, query in enumerate(queries):
        lines += [f"      - record: dashboard:query{number}", f"        expr: {query!r}"]
    (tmp_path / "queries.yml").write_text("\n".join(lines) + "\n")
    done = run(prometheus_image, tmp_path, "promtool", "check", "rules", "queries.yml")
    assert done.returncode == 0, done.stdout + done.stderr
