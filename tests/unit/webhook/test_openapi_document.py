"""The OpenAPI document says what the service does: its routes, its methods, its reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from flask import Flask
from flask.testing import FlaskClient
from webhook_api import openapi
from webhook_api.app import create_app
from webhook_api.config import load_settings
from webhook_api.errors import HTTP_STATUS
from webhook_api.inbox import Delivery, Stored
from webhook_api.services import Services
from webhook_api.shapes import SHAPES

from tests.support.falfake import ACCOUNT, SECRET, delivery, jwks, new_key

KEY = new_key()


class Inbox:
    available = True

    def store(self, arrived: Delivery, *, until: float | None = None) -> Stored:
        return Stored(1, True, 1, False)


@pytest.fixture
def app(tmp_path: Path) -> Flask:
    (tmp_path / "jwks.json").write_bytes(jwks(KEY))
    settings = load_settings(
        {
            "DATABASE_URL": "postgresql://u@127.0.0.1:1/d", "REDIS_URL": "redis://127.0.0.1:1",
            "MINIO_ENDPOINT": "127.0.0.1:1", "MINIO_ACCESS_KEY": "a", "MINIO_SECRET_KEY": "b",
            "FAL_WEBHOOK_SECRET": SECRET, "FAL_ACCOUNT_IDS": ACCOUNT, "FAL_JWKS_FILE": str(tmp_path / "jwks.json"),
        }
    )  # fmt: skip
    services = Services(settings)
    services.inbox = Inbox()
    return create_app(settings, services)


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def document(client: FlaskClient) -> Any:
    answer = client.get(openapi.PATH)
    assert answer.status_code == 200
    return answer.json


def test_routes_and_methods_are_those_of_the_application(app: Flask, document: Any) -> None:
    served = {
        (rule.rule.replace("<", "{").replace(">", "}"), method.lower())
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    described = {(path, method) for path, operations in document["paths"].items() for method in operations}
    assert described == served


def test_reasons_and_statuses_are_those_of_the_table(document: Any) -> None:
    responses = document["paths"]["/api/v1/sources/{source}"]["post"]["responses"]
    described = {
        reason: int(status)
        for status, response in responses.items() if status != "200"
        for reason in response["content"]["application/json"]["schema"]["allOf"][1]["properties"]["error"]["enum"]
    }  # fmt: skip
    assert described.pop("not_found") == 404
    assert described == dict(HTTP_STATUS)
    assert "Retry-After" in responses["503"]["headers"]


def test_every_reference_leads_somewhere(document: Any) -> None:
    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [found for value in node.values() for found in references(value)]
        return [found for item in node for found in references(item)] if isinstance(node, list) else []

    found = set(references(document))
    assert len(found) > 8
    for reference in found:
        node = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


def check(document: Any, path: str, status: int, answer: Any) -> None:
    operation = next(iter(document["paths"][path].values()))
    content = operation["responses"][str(status)]["content"]["application/json"]
    jsonschema.Draft202012Validator({**content["schema"], "components": document["components"]}).validate(
        answer
    )


PLAIN = [
    name for name, shape in SHAPES.items()
    if shape.transport == "plain" and not shape.large and shape.needs != "standard"
]  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_each_answer_has_the_described_form(client: FlaskClient, document: Any, name: str) -> None:
    sent = delivery(name, KEY)
    for path in ("/api/v1/avatar/status_update", "/api/v1/avatar/test_webhook"):
        answer = client.post(path, data=sent.body, headers=sent.headers)
        check(document, path, answer.status_code, answer.json)


def test_each_page_has_the_described_form(client: FlaskClient, document: Any) -> None:
    for path in ("/", "/health", "/api/v1/webhook/status", openapi.PATH):
        answer = client.get(path)
        check(document, path, answer.status_code, answer.json)


def test_the_front_page_names_every_path(client: FlaskClient, document: Any) -> None:
    named = {endpoint.split()[1] for endpoint in client.get("/").json["endpoints"].values()}
    assert named <= set(document["paths"])
    assert openapi.PATH in named
