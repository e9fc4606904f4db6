"""schemathesis against a running service: whatever it makes of the OpenAPI document, the answers are as described."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.webhook.test_intake_service import Lab, Parts, bucket, parts
from tests.support.apiservice import running
from tests.support.falfake import SECRET

__all__ = ["bucket", "parts"]
pytestmark = [pytest.mark.backends, pytest.mark.timeout(1800)]


@pytest.fixture
def lab(parts: Parts, tmp_path: Path) -> Iterator[Lab]:
    environment = parts.environment | {"WEBHOOK_WORKERS": "1"}
    with running(environment, tmp_path / "api.log") as service:
        service.wait_health("healthy")
        yield parts.lab(service)


def test_no_answer_differs_from_the_document(lab: Lab, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{lab.service.url}/api/v1/openapi.json",
        "--phases", "examples,coverage,fuzzing", "--max-examples", "25", "--seed", "3", "--workers", "1",
        "--request-timeout", "10", "--continue-on-failure", "--no-color",
        "--header", f"X-Webhook-Secret: {SECRET}",
        "--exclude-checks", "ignored_auth",
    ]  # fmt: skip
    environment = {**os.environ, "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path / "hypothesis")}
    environment.pop("PYTHONWARNINGS", None)
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "traceback" not in lab.service.log.read_text().lower()
    assert lab.rows(), "nothing was accepted, so nothing was tried"
