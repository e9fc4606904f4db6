"""Merging a batch: copies become one event, other bodies stay apart, nothing is forgotten, and the order is the keys'."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st
from webhook_api.inbox import Delivery
from webhook_api.inbox.batch import Packed, merge

from tests.support.properties import examples


def arrived(source: str, request_id: str, key: str, body: bytes) -> Delivery:
    return Delivery(
        source=source, request_id=request_id, dedup_key=key, status="completed", body=body,
        body_sha256=hashlib.sha256(body).hexdigest(),
    )  # fmt: skip


DELIVERIES = st.lists(
    st.builds(
        arrived,
        st.sampled_from(["fal", "manual"]),
        st.sampled_from(["r1", "r2", "r3"]),
        st.sampled_from(["completed", "failed"]),
        st.sampled_from([b"{}", b"[]", b"other"]),
    ),
    min_size=1,
    max_size=40,
)


@examples(100)
@given(DELIVERIES)
def test_every_arrival_is_in_exactly_one_place(deliveries: list[Delivery]) -> None:
    """fal.md's fault table, "duplicate, also inside one batch"."""
    events, alone = merge(deliveries)
    placed = [position for event in events for position in event.members] + alone
    assert sorted(placed) == list(range(len(deliveries)))


@examples(100)
@given(DELIVERIES)
def test_an_event_is_one_identity_with_one_body(deliveries: list[Delivery]) -> None:
    events, alone = merge(deliveries)
    identities = [event.delivery.identity for event in events]
    assert len(set(identities)) == len(identities)
    for event in events:
        assert {deliveries[position].identity for position in event.members} == {event.delivery.identity}
        assert {deliveries[position].body for position in event.members} == {event.delivery.body}
        assert event.members == sorted(event.members)
    bodies = {event.delivery.identity: event.delivery.body_sha256 for event in events}
    for position in alone:
        assert bodies[deliveries[position].identity] != deliveries[position].body_sha256


@examples(100)
@given(DELIVERIES)
def test_the_first_to_arrive_is_the_event(deliveries: list[Delivery]) -> None:
    for event in merge(deliveries)[0]:
        first = next(
            n for n, delivery in enumerate(deliveries) if delivery.identity == event.delivery.identity
        )
        assert event.members[0] == first


@examples(100)
@given(DELIVERIES, st.randoms(use_true_random=False))
def test_two_batches_take_the_same_keys_in_the_same_order(deliveries: list[Delivery], random: object) -> None:
    """Otherwise two instances could wait for each other in a circle."""
    shuffled = list(deliveries)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    order = [event.delivery.identity for event in merge(deliveries)[0]]
    assert order == [event.delivery.identity for event in merge(shuffled)[0]] == sorted(order)


def test_an_array_is_what_postgresql_expects() -> None:
    header = bytes.fromhex("00000001 00000001 00000019 00000002 00000001")
    packed = Packed(25, [b"ab", None])
    assert packed.data == header + b"\0\0\0\2ab" + b"\xff\xff\xff\xff"
    assert packed.oid == 1009
