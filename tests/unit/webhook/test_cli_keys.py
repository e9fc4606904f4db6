"""`webhook-api keys`: what deliveries are verified with, and asking for it anew."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from webhook_api.auth import Accounts, KeyStore, LearnedFile
from webhook_api.auth.keys import Cache
from webhook_api.cli import main

from tests.support.falfake import jwks, jwks_server, new_key


def run(*arguments: str, **env: str) -> Result:
    clean = {name: None for name in os.environ if name.startswith(("DATABASE", "FAL", "WEBHOOK"))}
    return CliRunner().invoke(main, ["keys", *arguments], env={**clean, "ENVIRONMENT": "test", **env})


def test_the_account_that_was_learned_is_shown(tmp_path: Path) -> None:
    cache = tmp_path / "jwks.json"
    env = {"FAL_JWKS_CACHE_FILE": str(cache), "FAL_JWKS_URL": "http://127.0.0.1:1/jwks"}
    Cache(cache, env["FAL_JWKS_URL"]).save(jwks(new_key()), time.time() - 60)
    shown = json.loads(run("show", "--json", **env).stdout)
    assert shown["account"]["learned"] is None
    Accounts(frozenset(), LearnedFile(tmp_path / "fal-account.json")).admit("user-17", 0, fresh=True)
    result = run("show", "--json", **env)
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert (shown["ok"], shown["keys"], shown["stale"], len(shown["public_keys"])) == (True, 1, False, 1)
    assert 60 <= shown["age_seconds"] < 600
    assert shown["account"]["learned"] == "user-17"
    assert "account at fal: user-17 (learning)" in run("show", **env).stdout


def test_without_keys_it_exits_1_and_fetches_nothing() -> None:
    with jwks_server(new_key()) as server:
        result = run("show", FAL_JWKS_URL=server.url)
        assert result.exit_code == 1
        assert "fal's keys: 0" in result.stdout
        assert server.requests == 0


def test_a_refresh_is_what_running_instances_take_over(tmp_path: Path) -> None:
    cache, key = tmp_path / "jwks.json", new_key()
    with jwks_server(new_key()) as server:
        running = KeyStore(_NoSource(server.url), cache_file=cache)
        for document in (jwks(key), jwks(key, new_key())):
            server.document = document
            result = run("refresh", "--json", FAL_JWKS_URL=server.url, FAL_JWKS_CACHE_FILE=str(cache))
            assert result.exit_code == 0
            assert json.loads(result.stdout)["refreshed"] is True
            running.tick()
            assert len(running.current()) == len(json.loads(document)["keys"])


class _NoSource:
    def __init__(self, name: str) -> None:
        self.name = name

    def fetch(self) -> bytes:
        raise AssertionError("nothing is fetched here")


@pytest.mark.parametrize("status", [500, 302, 200])
def test_a_failed_refresh_exits_69_and_keeps_the_known_keys(tmp_path: Path, status: int) -> None:
    cache = tmp_path / "jwks.json"
    with jwks_server(new_key()) as server:
        env = {"FAL_JWKS_URL": server.url, "FAL_JWKS_CACHE_FILE": str(cache)}
        assert run("refresh", **env).exit_code == 0
        before = cache.read_bytes()
        server.status, server.document = status, b"<html>"
        result = run("refresh", "--json", **env)
        assert result.exit_code == 69
        shown = json.loads(result.stdout)
        assert (shown["refreshed"], shown["ok"], shown["keys"]) == (False, True, 1)
        assert shown["error"] == ("not_jwks" if status == 200 else "status")
        assert cache.read_bytes() == before


def test_further_senders_are_shown_without_their_secrets(tmp_path: Path) -> None:
    table = {"replicate": {"scheme": "standard", "shape": "replicate", "secrets": [{"file": "/nowhere"}]}}
    (tmp_path / "jwks.json").write_bytes(jwks(new_key()))
    result = run("show", WEBHOOK_SOURCES=json.dumps(table), FAL_JWKS_FILE=str(tmp_path / "jwks.json"))
    assert result.exit_code == 0
    assert "sender replicate: standard, shape replicate" in result.stdout
