"""Settings of the worker's own jobs: their defaults, and everything that cannot be meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from webhook_api.cli import main
from webhook_api.config import ConfigError, Settings, load_settings

from tests.unit.webhook.test_config import GOOD


def load(**changes: str) -> Settings:
    return load_settings({**GOOD, **changes})


def faults(**changes: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(**changes)
    return list(caught.value.faults)


def test_without_a_key_nothing_is_asked_and_what_is_kept_is_kept() -> None:
    settings = load()
    assert settings.reconcile.key is None
    assert settings.reconcile.models["portrait"] == "fal-ai/flux-lora-portrait-trainer"
    assert settings.retention.dead_letters == settings.retention.aside == settings.retention.audit == 0
    assert 0 < settings.retention.bodies < settings.retention.effects < settings.retention.deliveries


def test_the_key_comes_from_a_file_and_is_never_shown(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("key-id:key-secret\n")
    settings = load(FAL_API_KEY_FILE=str(secret))
    assert settings.reconcile.key == settings.fal_api_key == "key-id:key-secret"
    assert "key-secret" not in repr(settings)
    shown = CliRunner().invoke(main, ["config"], env={**GOOD, "FAL_API_KEY_FILE": str(secret)})
    assert shown.exit_code == 0, shown.output
    assert "key-secret" not in shown.output
    assert json.loads(shown.output)["reconcile"]["host"] == "queue.fal.run"


def test_types_may_be_given_one_by_one() -> None:
    settings = load(RECONCILE_MODELS="style=me/my-app/train", RECONCILE_AFTER_SECONDS=" portrait=60 ")
    assert settings.reconcile.models == {
        "portrait": "fal-ai/flux-lora-portrait-trainer",
        "style": "me/my-app/train",
    }
    assert settings.reconcile.after == {"portrait": 60, "style": 1800}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RECONCILE_MODELS", "portrait"),
        ("RECONCILE_MODELS", "video=fal-ai/x"),
        ("RECONCILE_MODELS", "portrait=flux"),
        ("RECONCILE_MODELS", "portrait=https://queue.fal.run/fal-ai/x"),
        ("RECONCILE_AFTER_SECONDS", "portrait=soon"),
        ("RECONCILE_AFTER_SECONDS", "1800"),
        ("RECONCILE_REQUESTS_PER_MINUTE", "0"),
        ("FAL_QUEUE_RUN_HOST", "https://queue.fal.run"),
        ("FAL_QUEUE_RUN_HOST", "queue.fal.run/path"),
        ("RETENTION_BODIES_DAYS", "-1"),
        ("RETENTION_AUDIT_DAYS", "7"),
        ("RETENTION_EFFECTS_DAYS", "10"),
        ("RETENTION_DELIVERIES_DAYS", "100"),
        ("RETENTION_BATCH_ROWS", "0"),
    ],
)
def test_a_bad_value_is_named(name: str, value: str) -> None:
    assert any(name in fault for fault in faults(**{name: value}))


def test_effects_are_not_kept_shorter_than_bodies_that_are_kept_for_ever() -> None:
    assert "RETENTION_BODIES_DAYS" in faults(RETENTION_BODIES_DAYS="0")[0]
    kept = load(RETENTION_BODIES_DAYS="0", RETENTION_EFFECTS_DAYS="0").retention
    assert (kept.bodies, kept.effects, kept.deliveries) == (0, 0, 400)
