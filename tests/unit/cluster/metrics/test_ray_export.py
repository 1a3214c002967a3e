"""What Ray's agents hear, with doubles of Ray's instruments."""

from __future__ import annotations

import pytest

from actors.tallies import Tally
from cluster.metrics import ray_export
from cluster.metrics.ray_export import RayExport
from cluster.metrics.sheet import Sheet

Heard = list[tuple[str, float, dict[str, str]]]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    found: Heard = []

    class Instrument:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.keys = name, set(tag_keys)

        def tell(self, value: float, tags: dict[str, str]) -> None:
            assert tags.keys() == self.keys
            found.append((self.name, value, tags))

    class Counter(Instrument):
        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value > 0
            self.tell(value, tags)

    class Gauge(Instrument):
        def set(self, value: float, tags: dict[str, str]) -> None:
            self.tell(value, tags)

    monkeypatch.setattr(ray_export, "Counter", Counter)
    monkeypatch.setattr(ray_export, "Gauge", Gauge)
    return found


def sheet(role: str, sent: int, free: int) -> Sheet:
    made = Sheet(pool="p", worker="w", node="n", role=role)
    made.add("ernie_kv_transfer_chunks_total", sent, direction="sent")
    made.add("ernie_kv_transfer_chunks_total", 0, direction="received")
    made.add("ernie_kv_blocks", free, state="empty")
    made.add("ernie_step_seconds", Tally((1.0,)), kind="decode")
    return made


def test_counters_are_told_as_they_grow_whatever_the_role(heard: Heard) -> None:
    export = RayExport()
    for role, sent in (("prefill", 3), ("prefill", 3), ("decode", 5)):
        export.tell(sheet(role, sent, free=7))
    chunks = [(value, tags) for name, value, tags in heard if name == "ernie_kv_transfer_chunks"]
    part = {"pool": "p", "worker": "w", "node": "n", "direction": "sent"}
    assert chunks == [(3, part | {"role": "prefill"}), (2, part | {"role": "decode"})]
    others = [(name, value) for name, value, _ in heard if name != "ernie_kv_transfer_chunks"]
    assert others == [("ernie_kv_blocks", 7)] * 3
