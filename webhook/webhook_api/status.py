"""What operators ask: /, /health, /api/v1/webhook/status and /metrics."""

from __future__ import annotations

import threading
import time
from typing import Any, Final

from flask import Blueprint, Flask, Response, current_app, json, jsonify
from prometheus_client import generate_latest

from webhook_api import metrics
from webhook_api.services import Services

STATUS_TTL: Final = 2.0
"""Seconds for which the counts are kept, so that a dashboard cannot hurt the database."""

# Rows that are done are by far the most, and counting them would read the whole table: their number is the planner's.
# Each of the others is asked for by itself, as its partial index has it: one question for all of them reads the table.
_COUNTS: Final = """
select coalesce(jsonb_object_agg(state, n), '{}') as counts,
       (select greatest(reltuples, 0)::bigint from pg_class where oid = 'webhook.deliveries'::regclass) as total,
       (select extract(epoch from now() - least(
            (select min(first_seen_at) from webhook.deliveries where state = 'pending'),
            (select min(first_seen_at) from webhook.deliveries where state in ('retry', 'parked'))))::float8) as oldest,
       (select last_seen_at from webhook.deliveries order by id desc limit 1) as newest
from (select state, count(*) as n from webhook.deliveries where state = 'pending' group by state
      union all
      select state, count(*) from webhook.deliveries where state in ('retry', 'parked') group by state
      union all
      select state, count(*) from webhook.deliveries where state = 'leased' group by state
      union all
      select case when aside is null then 'dead' else 'aside' end, count(*) from webhook.deliveries
      where state = 'dead' and discarded_at is null group by 1) as counted
"""

blueprint = Blueprint("status", __name__)


class Counts:
    """The inbox's counts, asked at most once every STATUS_TTL seconds."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._lock = threading.Lock()
        self._value: dict[str, Any] = {}
        self._asked_at = float("-inf")

    def read(self) -> dict[str, Any]:
        """Return the counts. Raises DatabaseUnavailable."""
        with self._lock:
            if time.monotonic() - self._asked_at >= STATUS_TTL:
                self._value = self._ask()
                self._asked_at = time.monotonic()
            return self._value

    def _ask(self) -> dict[str, Any]:
        with self._services.database.borrow() as connection:
            row = connection.execute(_COUNTS).fetchone()
        nothing: tuple[dict[str, int], int, None, None] = ({}, 0, None, None)
        counts, total, oldest, newest = row or nothing
        return {
            "states": {
                state: counts.get(state, 0)
                for state in ("pending", "leased", "retry", "parked", "dead", "aside")
            },
            "total_estimated": total,
            "oldest_waiting_seconds": None if oldest is None else round(oldest, 1),
            "last_delivery_at": newest.isoformat() if newest else None,
        }


def init_app(app: Flask, services: Services) -> None:
    """Give the application its operators' pages."""
    app.extensions["services"] = services
    app.extensions["counts"] = Counts(services)
    app.register_blueprint(blueprint)


@blueprint.get("/")
def index() -> Response:
    """Say what answers here."""
    settings = _services().settings
    return jsonify(
        service="webhook-api",
        version=settings.version,
        instance=settings.instance_id,
        endpoints={
            "deliveries": "POST /api/v1/avatar/status_update",
            "test": "POST /api/v1/avatar/test_webhook",
            "health": "GET /health",
            "status": "GET /api/v1/webhook/status",
            "metrics": "GET /metrics",
            "openapi": "GET /api/v1/openapi.json",
        },
    )


@blueprint.get("/health")
def health() -> Response:
    """Say whether deliveries can be accepted here, and how each dependency is."""
    code, document = _services().health()
    return Response(json.dumps(document) + "\n", status=code, mimetype="application/json", headers=_NO_STORE)


@blueprint.get("/api/v1/webhook/status")
def webhook_status() -> Response:
    """Show the inbox. nginx gives this to the local network only."""
    services = _services()
    settings = services.settings
    response = jsonify(
        service="webhook-api",
        version=settings.version,
        release=settings.release,
        instance=settings.instance_id,
        environment=settings.environment,
        health=services.health()[1]["status"],
        accounts="learning" if settings.learning_accounts else "pinned",
        fal_account=services.accounts.status(),
        sources=["fal", "manual", *(sender.name for sender in settings.sources)],
        manual_calls="allowed" if settings.fal_webhook_secret else "refused",
        body_limit_bytes=settings.body_limit_bytes,
        uptime_seconds=round(services.uptime(), 1),
        inbox=current_app.extensions["counts"].read(),
    )
    response.headers.update(_NO_STORE)
    return response


@blueprint.get("/metrics")
def show_metrics() -> Response:
    """Metrics for Prometheus. nginx gives these to the local network only."""
    shown = metrics.render() + generate_latest(_services().gauges)
    return Response(shown, content_type=metrics.CONTENT_TYPE_LATEST)


_NO_STORE: Final = {"Cache-Control": "no-store"}


def _services() -> Services:
    services = current_app.extensions["services"]
    assert isinstance(services, Services)  # noqa: S101  (for the type checker; init_app sets it)
    return services
