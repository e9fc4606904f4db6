"""The pure parts of the effects: what to write into the avatar, and which files a payload names."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest
from webhook_api.effects import ORDER
from webhook_api.effects.archive import MAX_ARTIFACTS, MAX_KEY, find, prefix, safe_segment
from webhook_api.effects.avatar_rules import Avatar, Facts, allowed, forward, plan, response_data
from webhook_api.effects.avatar_table import Column, spell
from webhook_api.media import MediaPolicy
from webhook_api.states import EffectError, Failure

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
URL = "https://v3.fal.media/a"
COLUMNS = {
    "diffusers_lora_file_url": Column("character varying(500)"),
    "config_file_url": Column("character varying(500)"),
    "finetune_id": Column("character varying(255)"),
}
MEDIA = MediaPolicy(frozenset({"v3.fal.media"}), frozenset({"127.0.0.1:8000"}))
BOTH = {"diffusers_lora_file": {"url": URL}, "config_file": {"url": URL}}


def told(status: str = "completed", payload: Any = None, **more: Any) -> Facts:
    given: dict[str, Any] = {
        "media": MEDIA, "progress": None, "error": None, "payload_error": None, "type_hints": (), "finetune_id": None,
        **more,
    }  # fmt: skip
    return Facts(status=status, payload=payload, received_at=NOW, **given)


@pytest.mark.parametrize("current", ["draft", "photos_uploading", "ready_for_training", "training", ""])
@pytest.mark.parametrize("target", ["training", "completed", "error", "cancelled"])
def test_an_unfinished_avatar_may_go_anywhere(current: str, target: str) -> None:
    assert allowed(current, target)


@pytest.mark.parametrize("current", ["completed", "error", "cancelled"])
@pytest.mark.parametrize("target", ["training", "completed", "error", "cancelled"])
def test_a_finished_one_stays(current: str, target: str) -> None:
    assert allowed(current, target) is ((current, target) == ("error", "completed"))


def test_the_row_beats_every_hint() -> None:
    portrait = plan(
        Avatar("training", "portrait"), told(payload=BOTH, type_hints=("style", "style")), COLUMNS
    )
    assert portrait.values["status"] == "completed"
    assert portrait.values["finetune_id"] is None
    style = plan(Avatar("training", "style"), told(payload=BOTH, type_hints=("portrait",)), COLUMNS)
    assert style.values["status"] == "error"
    assert "finetune_id is missing" in style.values["training_error"]


def test_a_style_gets_no_urls() -> None:
    change = plan(Avatar("training", "style"), told(payload={**BOTH, "finetune_id": "ft"}), COLUMNS)
    assert change.values["finetune_id"] == "ft"
    assert change.values["diffusers_lora_file_url"] is None
    assert change.values["config_file_url"] is None


def test_an_old_bodys_finetune_id_stands_outside_its_result() -> None:
    assert plan(Avatar("training", "style"), told(finetune_id="ft"), COLUMNS).values["finetune_id"] == "ft"


@pytest.mark.parametrize(
    "payload",
    [None, {}, [], "text", {"diffusers_lora_file": None}, {"diffusers_lora_file": {"url": ""}},
     {"diffusers_lora_file": {"url": 7}, "config_file": {}}, {"finetune_id": {}}],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["portrait", "style", None])
def test_a_completed_event_without_results_is_an_error_and_invents_nothing(
    payload: Any, kind: str | None
) -> None:
    change = plan(Avatar("training", kind), told(payload=payload), COLUMNS)
    assert change.values["status"] == "error"
    assert change.values["training_error"]
    assert not {"diffusers_lora_file_url", "config_file_url", "finetune_id", "training_progress"} & set(
        change.values
    )


@pytest.mark.parametrize(("length", "status"), [(500, "completed"), (501, "error")])
def test_an_address_too_long_for_the_column_is_an_error_not_a_cut(length: int, status: str) -> None:
    url = URL + "x" * (length - len(URL))
    payload = {"diffusers_lora_file": {"url": url}, "config_file": {"url": URL}}
    change = plan(Avatar("training", "portrait"), told(payload=payload), COLUMNS)
    assert change.values["status"] == status
    if status == "error":
        assert "501" in change.values["training_error"]


@pytest.mark.parametrize(
    "url",
    [
        "https://v3.fal.media.evil.example/a",
        "https://v3.fal.media@evil.example/a",
        "https://evil.example/v3.fal.media",
        "https://v3.fal.media:444/a",
        "http://v3.fal.media/a",
        "http://127.0.0.1:8001/a",
        "https://169.254.169.254/latest",
    ],
)
@pytest.mark.parametrize("name", ["diffusers_lora_file", "config_file"])
def test_the_bot_is_given_addresses_of_allowed_hosts_only(name: str, url: str) -> None:
    """And the avatar is left as it is: neither completed with a stranger's file nor shown as failed."""
    with pytest.raises(EffectError) as refused:
        plan(Avatar("training", "portrait"), told(payload={**BOTH, name: {"url": url}}), COLUMNS)
    assert (refused.value.kind, refused.value.reason) == (Failure.PERMANENT, "avatar_url_refused")
    assert name in str(refused.value)


def test_a_file_inside_the_delivery_is_no_failed_training() -> None:
    """The training succeeded, but there is no address for the bot: an operator decides, and the avatar stays."""
    payload = {**BOTH, "diffusers_lora_file": {"url": "data:application/octet-stream;base64,AAAA"}}
    with pytest.raises(EffectError) as refused:
        plan(Avatar("training", "portrait"), told(payload=payload), COLUMNS)
    assert (refused.value.kind, refused.value.reason) == (Failure.PERMANENT, "avatar_file_inline")


def test_a_host_that_is_allowed_by_name_may_be_plain_http() -> None:
    payload = {**BOTH, "config_file": "http://127.0.0.1:8000/c.json"}
    change = plan(Avatar("training", "portrait"), told(payload=payload), COLUMNS)
    assert change.values["config_file_url"] == "http://127.0.0.1:8000/c.json"


@pytest.mark.parametrize(
    ("current", "reported", "result"),
    [
        (None, None, None),
        (None, 5, 5),
        (40, 5, 40),
        (40, 50, 50),
        (40, 500, 100),
        (-3, -9, 0),
        (40, None, 40),
    ],
)
def test_progress(current: int | None, reported: int | None, result: int | None) -> None:
    assert forward(current, reported) == result


@pytest.mark.parametrize(
    ("column", "example", "spelled"),
    [
        (Column("character varying(50)"), "training", "completed"),
        (Column("character varying(50)"), "TRAINING", "COMPLETED"),
        (Column("character varying(50)"), None, "completed"),
        (Column("s", ("DRAFT", "COMPLETED")), "draft", "COMPLETED"),
        (Column("s", ("draft", "completed")), "DRAFT", "completed"),
    ],
)
def test_spelling(column: Column, example: str | None, spelled: str) -> None:
    assert spell("completed", column, example) == spelled


def test_an_enum_without_the_value_is_named() -> None:
    with pytest.raises(EffectError, match="'cancelled'"):
        spell("cancelled", Column("avatar_status", ("draft", "completed")), "draft")


def test_response_data_is_what_json_columns_take() -> None:
    text = response_data(
        {"a\x00": "b\x00\ud800", "nan": float("nan"), "seed": 2**70, "image": "data:" + "x" * 10_000}
    )
    assert "\x00" not in text
    assert "\\u0000" not in text
    read = json.loads(text)
    assert read["seed"] == 2**70
    assert read["nan"] is None
    assert len(read["image"]) < 200
    text.encode("utf-8")


def test_files_are_found_wherever_they_stand() -> None:
    payload = {
        "config_file": {"url": URL, "file_name": "c.json", "file_size": 3},
        "images": [{"url": URL + "/1.png"}, {"url": URL + "/2.png", "file_size": True}],
        "deep": {"er": {"url": URL, "file_name": "../x/../../y.bin"}},
        "no": {"url": 7},
        "text": URL,
    }
    found = {artifact.place: artifact for artifact in find(payload, "w/fal/r")}
    assert {place: artifact.key for place, artifact in found.items()} == {
        "config_file": "w/fal/r/config_file/c.json",
        "images/0": "w/fal/r/images.0/1.png",
        "images/1": "w/fal/r/images.1/2.png",
        "deep/er": "w/fal/r/deep.er/y.bin",
    }
    assert found["config_file"].declared_size == 3
    assert found["images/1"].declared_size is None


def test_the_walk_is_bounded() -> None:
    deep: Any = {"url": URL}
    for _ in range(5000):
        deep = {"x": deep}
    assert find(deep, "b") == []
    assert len(find([{"url": URL}] * 10_000, "b")) == MAX_ARTIFACTS + 1


def nested(depth: int, name: str, leaf: dict[str, Any]) -> dict[str, Any]:
    for number in range(depth):
        leaf = {f"{number:02}{name}"[:150]: leaf}
    return leaf


def test_keys_are_bounded_however_deep_and_long_the_names() -> None:
    base = prefix("fal", "r" * 5000)
    leaf = {"url": "data:,deep", "file_name": "z" * 300}
    payload = {"a": nested(30, "n" * 150, leaf), "b": nested(30, "n" * 150, leaf), "é" * 400: leaf}
    keys = [artifact.key for artifact in find(payload, base)]
    assert len(set(keys)) == 3
    for key in keys:
        assert key.isascii()
        assert len(key) <= MAX_KEY
        assert all(len(segment) <= 120 for segment in key.split("/"))
    assert keys == [artifact.key for artifact in find(payload, base)]


@pytest.mark.parametrize(
    "payload",
    [
        {"a": {"url": "data:,1", "file_name": "x", "x": {"url": "data:,2", "file_name": "y"}}},
        {"url": "data:,1", "file_name": "x", "payload": {"url": "data:,2", "file_name": "x"}},
        {"a.b": {"url": "data:,1", "file_name": "x"}, "a": {"b": {"url": "data:,2", "file_name": "x"}}},
        {
            "a b": {"url": "data:,1", "file_name": "x"},
            safe_segment("a b"): {"url": "data:,2", "file_name": "x"},
        },
    ],
    ids=["a file and a folder", "the payload itself", "a name with a dot", "a name that looks marked"],
)
def test_no_key_is_anothers_or_anothers_folder(payload: dict[str, Any]) -> None:
    first, second = (artifact.key for artifact in find(payload, "w/fal/r"))
    assert first != second
    assert not first.startswith(f"{second}/")
    assert not second.startswith(f"{first}/")
    assert [first, second] == [artifact.key for artifact in find(payload, "w/fal/r")]


def test_keys_of_two_deliveries_of_a_request_do_not_stand_in_each_others_way() -> None:
    [file] = find({"a": {"url": "data:,1", "file_name": "x"}}, "w/fal/r")
    [deeper] = find({"a": {"x": {"url": "data:,2", "file_name": "y"}}}, "w/fal/r")
    assert not deeper.key.startswith(f"{file.key}/")


def test_the_delivery_itself_is_stored_before_its_files() -> None:
    always = ["avatar", "raw_archive", "archive", "stream"]
    assert [effect.name for effect in ORDER] == [*always, "forward", "telegram", "telegram_alarm"]


@pytest.mark.parametrize(
    "text", ["a/b", "../..", "..", ".", "", "a b", "é", "x" * 300, "a\x00b", "\ud800", ".hidden"]
)
def test_segments_are_safe_and_stay_apart(text: str) -> None:
    safe = safe_segment(text)
    assert safe
    assert "/" not in safe
    assert not safe.startswith(".")
    assert len(safe) <= 120
    assert safe.isascii()
    assert safe != safe_segment(text + "?")


def test_plain_names_stay_as_they_are() -> None:
    assert safe_segment("pytorch_lora_weights.safetensors") == "pytorch_lora_weights.safetensors"
    assert safe_segment("764cabcf-b745-4b3e-ae38-1200304cf45b") == "764cabcf-b745-4b3e-ae38-1200304cf45b"
