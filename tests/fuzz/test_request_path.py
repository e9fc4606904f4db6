"""Every kept input still holds, and a bounded search finds none that does not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fuzz.request_path import Target, signature
from tests.fuzz.seeds import BODIES, CORPUS, HEADERS

REPO = Path(__file__).resolve().parents[2]
SECONDS = int(os.environ.get("FUZZ_SECONDS", "20"))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    import logging

    made = Target(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.close()
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_what_was_found_once_holds(target: Target, path: Path) -> None:
    target.check(path.read_bytes())


def test_the_corpus_reaches_both_ends(target: Target) -> None:
    """A target that refuses or takes everything would prove nothing."""
    answers = [target.check(path.read_bytes()) for path in sorted(CORPUS.iterdir())]
    assert {200, 401, 400, 404, 415} <= set(answers)


def test_a_taken_forgery_would_be_seen(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    from webhook_api.auth import fal

    monkeypatch.setattr(fal, "_any_matches", lambda *_: True)
    for how in (0, 8):
        with pytest.raises(AssertionError, match="taken without proof"):
            target.check(bytes([2, how]) + HEADERS["plain"] + BODIES["portrait"])


def test_signature_is_fals() -> None:
    from webhook_api.auth.signing import sign

    from tests.fuzz.request_path import ACCOUNT, KEY

    assert signature("r-1", 17, b"{}") == sign(KEY, "r-1", ACCOUNT, 17, b"{}")


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris has no build for this machine")
def test_a_bounded_search_finds_nothing(tmp_path: Path) -> None:
    found = tmp_path / "found"
    found.mkdir()
    run = subprocess.run(
        [
            sys.executable, "-m", "tests.fuzz.request_path", str(found), str(CORPUS), f"-artifact_prefix={tmp_path}/",
            f"-max_total_time={SECONDS}", "-max_len=4096", "-timeout=20", "-rss_limit_mb=1024", "-seed=20261122",
        ],
        cwd=REPO, env={**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'webhook'}"},
        capture_output=True, text=True, timeout=SECONDS + 200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:] + "".join(
        f"\n{path.name}: {path.read_bytes()!r}" for path in tmp_path.glob("*-*")
    )
    assert "DONE" in run.stderr or "Done" in run.stderr, run.stderr[-2000:]
