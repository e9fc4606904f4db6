"""The monitoring's files: every alarm has a runbook and a test, every metric exists, nothing listens on a public address."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from webhook_api.errors import HTTP_STATUS

from tests.support.monitoring import DASHBOARD, TESTS, dashboard_queries, rules, texts
from tests.support.sites import REPO

FOREIGN = {"up", "ALERTS", "process_resident_memory_bytes", "process_cpu_seconds_total"}
SECRETS = {
    "monitoring_alert_webhook_url": "https://alarms.example/hunter2",
    "monitoring_alert_telegram_bot_token": "123:hunter2",
    "monitoring_alert_telegram_chat_id": -100200,
}


def alarms(**variables: Any) -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(rules(**variables))["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def known_metrics() -> set[str]:
    """Names of all metrics that the service defines, with the endings that Prometheus' format gives them."""
    source = "\n".join(path.read_text() for path in (REPO / "webhook" / "webhook_api").rglob("*.py"))
    kinds = {
        "Counter": ("_total",),
        "_counter": ("_total",),
        "Gauge": ("",),
        "_gauge": ("",),
        "GaugeMetricFamily": ("",),
        "Histogram": ("_bucket", "_sum", "_count"),
    }
    return {
        name + ending
        for kind, name in re.findall(r'\b(\w+)\(\s*"(webhook_\w+)"', source)
        for ending in kinds.get(kind, ())
    }


def metrics_in(query: str) -> set[str]:
    """Names of the metrics in an expression: what stands before a selector, outside texts and label lists."""
    text = re.sub(r'"[^"]*"', '""', query)
    text = re.sub(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", text)
    text = re.sub(r"\{[^}]*\}", "", re.sub(r"\[[^\]]*\]", "", text))
    return set(re.findall(r"\b(?:webhook_\w+|up|ALERTS|process_\w+)\b", text))


def test_every_alarm_says_what_it_is_and_what_to_do() -> None:
    headings = re.findall(r"^## (\w+)$", (REPO / "docs" / "runbooks.md").read_text(), re.MULTILINE)
    names = {rule["alert"] for rule in alarms()}
    assert len(names) >= 15
    for rule in alarms():
        assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]
        assert rule["for"], rule["alert"]
        notes = rule["annotations"]
        assert set(notes) == {"summary", "description", "runbook_url"}, rule["alert"]
        assert notes["runbook_url"] == f"docs/runbooks.md#{rule['alert'].lower()}"
    assert names - set(headings) == set(), "an alarm without a runbook"
    assert set(headings) - names == set(), "a runbook without an alarm"


def test_every_alarm_has_a_test_of_its_own() -> None:
    assert {path.stem for path in TESTS.glob("*.yml")} == {rule["alert"] for rule in alarms()}


def test_every_alarm_is_provoked_for_real_somewhere() -> None:
    provoked = set(
        re.findall(r'"(Webhook\w+)"', (REPO / "tests" / "cluster" / "test_monitoring.py").read_text())
    )
    assert provoked == {rule["alert"] for rule in alarms()}


def test_every_metric_of_an_alarm_exists() -> None:
    known = known_metrics()
    assert len(known) > 60
    for rule in alarms():
        used = metrics_in(rule["expr"])
        assert used, rule["alert"]
        assert used - known - FOREIGN == set(), rule["alert"]


def test_refusals_of_ours_and_of_senders_are_told_apart() -> None:
    ours = {reason for reason, status in HTTP_STATUS.items() if status in (500, 503)}
    by_name = {rule["alert"]: rule["expr"] for rule in alarms()}
    for name, operator in (("WebhookIntakeFailing", "=~"), ("WebhookRejectsRising", "!~")):
        (listed,) = set(re.findall(rf'reason{operator}"([^"]*)"', by_name[name]))
        assert set(listed.split("|")) == ours, name


def test_thresholds_are_the_inventorys() -> None:
    by_name = {
        rule["alert"]: rule
        for rule in alarms(
            monitoring_for_urgent="3s",
            monitoring_oldest_delivery_seconds=77,
            monitoring_no_delivery_hours=0,
            monitoring_runbooks="https://wiki.example/runbooks",
        )
    }
    assert by_name["WebhookDeliveriesTooOld"]["expr"].endswith("> 77")
    assert by_name["WebhookDeadLetters"]["for"] == "3s"
    assert by_name["WebhookDeadLetters"]["annotations"]["runbook_url"].startswith(
        "https://wiki.example/runbooks#"
    )
    # Never: no clock is ever so far from its beginning.
    assert by_name["WebhookNoDeliveries"]["expr"].endswith("> 1000000000000")


def test_nobody_outside_reaches_it_and_no_secret_stands_in_a_file() -> None:
    files = texts(**SECRETS)
    assert "hunter2" not in "".join(files.values())
    compose = yaml.safe_load(files["docker-compose.yml"])
    for service in compose["services"].values():
        listening = [word for word in service["command"] if "listen-address" in word]
        assert all(re.search(r"=(?:127\.0\.0\.1:\d+)?$", word) for word in listening)
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "ports" not in service
    assert compose["services"]["alertmanager"]["secrets"] == ["alert_webhook_url", "alert_telegram_bot_token"]


@pytest.mark.parametrize("given", [{}, SECRETS])
def test_alarms_are_told_where_the_inventory_says(given: dict[str, Any]) -> None:
    (receiver,) = yaml.safe_load(texts(**given)["alertmanager/alertmanager.yml"])["receivers"]
    kinds = {"webhook_configs", "telegram_configs"} if given else set()
    assert set(receiver) == {"name"} | kinds


def test_instances_and_worker_are_asked_where_they_are() -> None:
    text = texts(site_api_ports=[9001, 9002, 9003], site_subnet="10.9.8.0/24")["prometheus/prometheus.yml"]
    jobs = {job["job_name"]: job["static_configs"] for job in yaml.safe_load(text)["scrape_configs"]}
    assert [(entry["targets"], entry["labels"]["instance"]) for entry in jobs["webhook-api"]] == [
        (["127.0.0.1:9001"], "api-1"),
        (["127.0.0.1:9002"], "api-2"),
        (["127.0.0.1:9003"], "api-3"),
    ]
    assert jobs["webhook-worker"][0]["targets"] == ["10.9.8.21:9108"]


def test_every_metric_of_the_dashboard_exists() -> None:
    known = known_metrics()
    assert json.loads(DASHBOARD.read_text())["uid"]
    for query in dashboard_queries():
        used = metrics_in(query)
        assert used, query
        assert used - known - FOREIGN == set(), query
