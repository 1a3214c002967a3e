from __future__ import annotations

from actors.reports import KvIdentity
from actors.wire.kv_control import Outbox, given_up, identity_from_proto, identity_to_proto


async def test_outbox_keeps_order_and_beats_when_silent() -> None:
    outbox = Outbox("beat", 0.01)
    for message in ("a", "b"):
        outbox.put(message)
    read = aiter(outbox)
    assert [await anext(read) for _ in range(4)] == ["a", "b", "beat", "beat"]
    outbox.put("c")
    outbox.end()
    assert [message async for message in read if message != "beat"] == ["c"]


def test_identity_round_trip() -> None:
    identity = KvIdentity(fingerprint="ab", dtype="bfloat16", block_size=16, switches="routing=x,positions=y")
    assert identity_from_proto(identity_to_proto(identity)) == identity


def test_reasons_of_a_peer() -> None:
    assert given_up("CANCELLED").reason == "PEER_CANCELLED"
    assert given_up("TRANSFER_FAILED").reason == "TRANSFER_FAILED"
