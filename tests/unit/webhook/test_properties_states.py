"""Properties of the state machines, over sequences of reports in any order and any number of times."""

from __future__ import annotations

import datetime
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from webhook_api.bodies import FINAL_STATUSES
from webhook_api.effects.avatar_rules import FINISHED, TARGETS, Avatar, Facts, plan
from webhook_api.effects.avatar_table import Column
from webhook_api.effects.stream import same_report
from webhook_api.media import MediaPolicy
from webhook_api.states import Backoff, EffectError, Failure, Policy, Setback, counts_as_try, decide

from tests.support.properties import examples

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
MEDIA = MediaPolicy(frozenset({"v3.fal.media"}))
URL = {"url": "https://v3.fal.media/a"}
ELSEWHERE = {"url": "https://elsewhere.example/a"}
COLUMNS = {
    "diffusers_lora_file_url": Column("character varying(500)"),
    "config_file_url": Column("character varying(500)"),
    "finetune_id": Column("character varying(255)"),
}

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=6,
)
payloads = st.one_of(
    anything,
    st.just({"diffusers_lora_file": URL, "config_file": URL}),
    st.just({"diffusers_lora_file": URL, "config_file": ELSEWHERE}),
    st.just({"finetune_id": "ft"}),
    st.just({"diffusers_lora_file": URL, "config_file": URL, "finetune_id": "ft"}),
)
reports = st.builds(
    Facts,
    status=st.sampled_from(sorted(TARGETS)),
    progress=st.none() | st.integers(-1000, 1000),
    payload=payloads,
    error=st.none() | st.text(max_size=30),
    payload_error=st.none() | st.text(max_size=30),
    type_hints=st.tuples(st.sampled_from([None, "portrait", "style"])),
    finetune_id=st.none() | st.text(max_size=10),
    received_at=st.just(NOW),
    media=st.just(MEDIA),
)
rows = st.builds(
    dict,
    status=st.sampled_from(
        ["draft", "photos_uploading", "ready_for_training", "training", *sorted(FINISHED)]
    ),
    training_type=st.sampled_from([None, "portrait", "style"]),
    training_progress=st.none() | st.integers(0, 100),
)


def apply(row: dict[str, Any], told: Facts) -> dict[str, Any]:
    """The row after a report, as the effect writes it: nothing of it when it is refused."""
    avatar = Avatar(row["status"], row["training_type"], row.get("training_progress"))
    try:
        change = plan(avatar, told, COLUMNS)
    except EffectError:
        return row
    values = {
        name: value
        for name, value in change.values.items()
        if not (name == "training_progress" and value is None)
    }
    return {**row, **values}


@examples(300)
@given(rows, st.lists(reports, max_size=12))
def test_a_finished_avatar_never_goes_back(row: dict[str, Any], told: list[Facts]) -> None:
    """Whatever comes late, twice or in the wrong order: completed and cancelled stay, an error may only be healed."""
    for report in told:
        after = apply(row, report)
        if row["status"] in ("completed", "cancelled"):
            assert after == row
        elif row["status"] == "error":
            assert after["status"] in ("error", "completed")
        row = after


@examples(300)
@given(rows, st.lists(reports, max_size=12))
def test_progress_never_goes_backwards_and_stays_within_bounds(
    row: dict[str, Any], told: list[Facts]
) -> None:
    for report in told:
        after = apply(row, report)
        before = row["training_progress"]
        assert before is None or (after["training_progress"] or 0) >= before
        assert after["training_progress"] is None or 0 <= after["training_progress"] <= 100
        row = after


@examples(300)
@given(rows, reports)
def test_a_report_that_comes_again_changes_nothing(row: dict[str, Any], report: Facts) -> None:
    once = apply(row, report)
    assert apply(once, report) == once


@examples(300)
@given(rows, st.lists(reports, min_size=1, max_size=8), st.randoms())
def test_a_completed_one_has_all_its_results_and_only_addresses_of_allowed_hosts(
    row: dict[str, Any], told: list[Facts], random: Any
) -> None:
    started = row["status"]
    random.shuffle(told)
    for report in told:
        row = apply(row, report)
    if row["status"] == "completed" and started != "completed":
        assert row["training_progress"] == 100
        assert row["training_error"] is None
        urls = [row["diffusers_lora_file_url"], row["config_file_url"]]
        assert row["finetune_id"] or urls == [URL["url"], URL["url"]]
    for name in ("diffusers_lora_file_url", "config_file_url"):
        assert row.get(name) in (None, URL["url"])


setbacks = st.builds(
    Setback,
    effect=st.sampled_from(["avatar", "archive", "stream"]),
    kind=st.sampled_from(list(Failure)),
    reason=st.just("reason"),
    message=st.text(max_size=10),
    tries=st.integers(0, 50),
    wait=st.floats(0, 1000),
    lasting=st.floats(0, 1e6),
)
policies = st.builds(
    Policy,
    max_attempts=st.integers(1, 20),
    unreachable_patience=st.floats(1, 1e6),
    parked_patience=st.floats(1, 1e6),
)


@examples(500)
@given(st.lists(setbacks, max_size=5), st.integers(1, 10**6), st.floats(0, 1e8), policies)
@example([], 1, 0.0, Policy())
def test_what_follows_an_attempt(found: list[Setback], tries: int, age: float, policy: Policy) -> None:
    verdict = decide(found, tries, age, policy)
    kinds = {setback.kind for setback in found}
    assert (verdict.state == "done") == (not found)
    if verdict.state == "dead":
        # Nothing that is ours, or that may still come, was given up.
        assert not kinds & {Failure.OUTAGE, Failure.WAITING, Failure.INTERRUPTED}
        assert all(setback.is_final(policy, age) for setback in found)
    if Failure.OUTAGE in kinds and Failure.INTERRUPTED not in kinds:
        assert verdict.state == "retry"
    if verdict.state in ("retry", "parked"):
        asked = max((setback.wait for setback in found), default=0.0)
        assert 0 < verdict.delay <= max(600.0, asked)
    assert (verdict.last_error is None) == (not found)


@examples(100)
@given(st.floats(0.1, 10), st.floats(10, 1000), st.integers(1, 10**9))
def test_every_pause_is_bounded(base: float, cap: float, tries: int) -> None:
    assert 0 < Backoff(base, cap).delay(tries) <= cap


@examples(20)
@given(st.sampled_from(list(Failure)))
def test_only_what_others_are_to_blame_for_is_charged(kind: Failure) -> None:
    charged = counts_as_try(kind)
    assert charged == (kind in (Failure.THEIRS, Failure.PERMANENT))
    if not charged and kind not in (Failure.PARKED, Failure.UNREACHABLE):
        assert not Setback("stream", kind, "r", "m", 10**6, 0.0, 1e9).is_final(Policy(), 1e9)


@examples(20)
@given(st.sampled_from([*sorted(TARGETS), "unknown"]))
def test_only_endings_are_told_by_another_delivery(status: str) -> None:
    assert status in FINAL_STATUSES or not same_report(status, None, None)
    assert status != "completed" or not same_report(status, None, None)
