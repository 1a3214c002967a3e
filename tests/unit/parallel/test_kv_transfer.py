from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from actors.parallel.kv_transfer import (
    BlockGuard,
    ChunkPlace,
    KvGeometry,
    KvTransferConfig,
    Staging,
    Transport,
    TransportError,
    as_bytes,
    checksum,
    pair_name,
    receive_chunk,
    scatter_chunk,
    send_chunk,
)
from actors.parallel.process_groups import join_address, split_address
from actors.parallel.torch_pairs import TorchMeeting
from actors.reports import KvIdentity

GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=2, head_dim=4, dtype=torch.float32, device=torch.device("cpu"))
ALL = range(GEOMETRY.num_layers)
CONFIG = KvTransferConfig(data_timeout_s=10.0, join_timeout_s=10.0)


class LineCache:
    """Slots in a row; ``block_table`` names the slot of every token."""

    def __init__(self, seed: int | None = None) -> None:
        shape = (GEOMETRY.num_layers, 32, 2, GEOMETRY.num_kv_heads, GEOMETRY.head_dim)
        self.data = torch.zeros(shape) if seed is None else torch.randn(shape, generator=torch.manual_seed(seed))

    def read_tokens(self, layer: int, block_table: Sequence[int], first: int, count: int) -> Tensor:
        return self.data[layer, list(block_table[first : first + count])]

    def write_tokens(self, layer: int, block_table: Sequence[int], first: int, kv: Tensor) -> None:
        self.data[layer, list(block_table[first : first + len(kv)])] = kv


class Memory:
    """A transport whose wire is a list."""

    def __init__(self) -> None:
        self.wire: list[Tensor] = []
        self.after: Callable[[int], None] = lambda _position: None

    def send(self, tensors: Iterable[Tensor]) -> None:
        for position, tensor in enumerate(tensors):
            self.wire.append(tensor.clone())
            self.after(position)

    def recv(self, buffers: Sequence[Tensor], arrived: Callable[[int], None]) -> None:
        for position, buffer in enumerate(buffers):
            buffer.copy_(self.wire.pop(0))
            arrived(position)

    def close(self) -> None:
        self.wire.clear()


def send(transport: Transport, cache: LineCache, staging: Staging, guard: BlockGuard) -> list[int]:
    return send_chunk(transport, staging, cache, ChunkPlace([9, 3, 7, 1], 1, 3, ALL), guard)


def test_gather_wire_scatter() -> None:
    source, target, wire = LineCache(seed=1), LineCache(), Memory()
    outgoing, incoming = Staging(GEOMETRY), Staging(GEOMETRY)
    sent = send(wire, source, outgoing, BlockGuard())
    assert not outgoing.in_use
    assert sum(message.numel() for message in wire.wire) == GEOMETRY.chunk_bytes(3) == 3 * 3 * 2 * 2 * 4 * 4
    messages, received = receive_chunk(wire, incoming, 3, ALL)
    assert sent == received == [zlib.crc32(source.data[layer, [3, 7, 1]].numpy().tobytes()) for layer in range(3)]
    assert scatter_chunk(target, messages, ALL, [0, 20, 21, 22], 1, BlockGuard())
    assert torch.equal(target.data[:, [20, 21, 22]], source.data[:, [3, 7, 1]])
    assert not target.data[:, 0].any()


def test_some_layers_alone() -> None:
    source, target, wire = LineCache(seed=1), LineCache(), Memory()
    outgoing, incoming, layers = Staging(GEOMETRY), Staging(GEOMETRY), range(1, 3)
    sent = send_chunk(wire, outgoing, source, ChunkPlace([9, 3, 7, 1], 1, 3, layers), BlockGuard())
    assert sum(message.numel() for message in wire.wire) == GEOMETRY.chunk_bytes(3, layers) == 2 * 3 * 2 * 2 * 4 * 4
    messages, received = receive_chunk(wire, incoming, 3, layers)
    assert sent == received
    assert scatter_chunk(target, messages, layers, [0, 20, 21, 22], 1, BlockGuard())
    assert torch.equal(target.data[1:, [20, 21, 22]], source.data[1:, [3, 7, 1]])
    assert not target.data[0].any()


def test_shut_guard_sends_the_rest_unread() -> None:
    wire, staging, guard = Memory(), Staging(GEOMETRY), BlockGuard()
    wire.after = lambda position: guard.shut() if position == 0 else None
    checksums = send(wire, LineCache(seed=1), staging, guard)
    assert len(wire.wire) == len(checksums) == GEOMETRY.num_layers
    assert not staging.in_use


def test_shut_guard_stops_a_scatter() -> None:
    target, guard = LineCache(), BlockGuard()
    messages = [torch.ones(2, 2, 2, 4) for _ in range(3)]
    guard.shut()
    assert not scatter_chunk(target, messages, ALL, [0, 1], 0, guard)
    assert not target.data.any()


def test_guard_waits_for_the_copy_under_way() -> None:
    guard, started, finish = BlockGuard(), threading.Event(), threading.Event()
    finished = []

    def copy() -> None:
        started.set()
        finish.wait(10)
        finished.append(True)

    with ThreadPoolExecutor(2) as pool:
        using = pool.submit(guard.use, copy)
        started.wait(10)
        shutting = pool.submit(lambda: (guard.shut(), list(finished))[1])
        finish.set()
        assert shutting.result(10) == [True]
        assert using.result(10)
    assert not guard.use(copy)


def test_staging_grows_and_is_taken_once() -> None:
    staging = Staging(GEOMETRY)
    first = staging.take(2, ALL)
    assert [tuple(message.shape) for message in first] == [(2, 2, 2, 4)] * 3
    assert all(message.dtype == GEOMETRY.dtype for message in first)
    with pytest.raises(ValueError, match="in use"):
        staging.take(1, ALL)
    staging.release()
    assert staging.take(1, ALL)[0].data_ptr() == first[0].data_ptr()
    staging.discard()
    assert staging.take(2, ALL)[0].data_ptr() != first[0].data_ptr()


def test_failed_send_leaves_nothing_staged() -> None:
    wire, staging = Memory(), Staging(GEOMETRY)

    def fail(_position: int) -> None:
        raise TransportError("cut")

    wire.after = fail
    with pytest.raises(TransportError):
        send(wire, LineCache(seed=1), staging, BlockGuard())
    assert not staging.in_use


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_checksum_is_of_the_bytes(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5).to(dtype)
    flipped = tensor.clone()
    as_bytes(flipped)[7] ^= 1
    assert checksum(tensor) == zlib.crc32(bytes(as_bytes(tensor).tolist()))
    assert checksum(tensor) != checksum(flipped)


def test_identity_names_its_differences() -> None:
    one = KvIdentity(fingerprint="a", dtype="bfloat16", block_size=16, switches="x")
    other = KvIdentity(fingerprint="a", dtype="float32", block_size=32, switches="x")
    assert one.differences(other) == ["dtype", "block_size"]
    assert one.differences(one) == []


def test_addresses() -> None:
    assert split_address(join_address("10.0.0.1", 80)) == ("10.0.0.1", 80)
    assert split_address(join_address("fe80::1", 80)) == ("fe80::1", 80)
    for wrong in ("", "host", "host:", ":1", "host:x"):
        with pytest.raises(TransportError):
            split_address(wrong)


# Over gloo.


class Pair:
    """Both ends of one generation, each with a thread."""

    def __init__(self, generation: int = 1, config: KvTransferConfig = CONFIG) -> None:
        self.decode = TorchMeeting(host="127.0.0.1", device=torch.device("cpu"), config=config)
        self.prefill = TorchMeeting(host="127.0.0.1", device=torch.device("cpu"), config=config)
        self.pool = ThreadPoolExecutor(2)
        self.sender, self.receiver = self.build(generation)

    def build(self, generation: int) -> tuple[Transport, Transport]:
        name = pair_name("p", "d", generation)
        listening = self.pool.submit(self.decode.listen, name, threading.Event())
        connecting = self.pool.submit(self.prefill.connect, self.decode.address, name, threading.Event())
        return connecting.result(20), listening.result(20)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sender.close()
        self.receiver.close()
        self.pool.shutdown()
        self.decode.close()


def bytes_of(*sizes: int) -> list[Tensor]:
    return [(torch.arange(size) * (size + 1) % 251).to(torch.uint8) for size in sizes]


def test_gloo_keeps_order() -> None:
    with Pair() as pair:
        tensors = bytes_of(*range(1, 60), 300_000)
        buffers = [torch.zeros_like(tensor) for tensor in tensors]
        order: list[int] = []
        receiving = pair.pool.submit(pair.receiver.recv, buffers, order.append)
        pair.pool.submit(pair.sender.send, iter(tensors)).result(20)
        receiving.result(20)
        assert order == list(range(len(tensors)))
        assert all(torch.equal(tensor, buffer) for tensor, buffer in zip(tensors, buffers, strict=True))


def test_closing_one_end_fails_the_other_at_once() -> None:
    with Pair() as pair:
        receiving = pair.pool.submit(pair.receiver.recv, [torch.zeros(8, dtype=torch.uint8)], lambda _position: None)
        pair.sender.close()
        started = time.monotonic()
        with pytest.raises(TransportError):
            receiving.result(20)
        assert time.monotonic() - started < CONFIG.data_timeout_s
        with pytest.raises(TransportError, match="ended"):
            pair.sender.send(bytes_of(8))


def test_timeout_ends_the_generation_and_another_works() -> None:
    with Pair(config=KvTransferConfig(data_timeout_s=0.2, join_timeout_s=10.0)) as pair:
        buffer = torch.zeros(8, dtype=torch.uint8)
        with pytest.raises(TransportError):
            pair.receiver.recv([buffer], lambda _position: None)
        pair.sender.close()
        pair.receiver.close()
        pair.sender, pair.receiver = pair.build(2)
        receiving = pair.pool.submit(pair.receiver.recv, [buffer], lambda _position: None)
        pair.sender.send(bytes_of(8))
        receiving.result(20)
        assert torch.equal(buffer, bytes_of(8)[0])


def test_errors_of_the_source_are_not_the_transports() -> None:
    def broken() -> Iterable[Tensor]:
        yield torch.zeros(1, dtype=torch.uint8)
        raise RuntimeError("a defect")

    with Pair() as pair, pytest.raises(RuntimeError, match="a defect"):
        pair.sender.send(broken())


def test_join_can_be_stopped() -> None:
    meeting = TorchMeeting(host="127.0.0.1", device=torch.device("cpu"), config=CONFIG)
    stop = threading.Event()
    stop.set()
    with pytest.raises(TransportError, match="stopped"):
        meeting.listen("p>d#1", stop)
    meeting.close()


def test_join_times_out() -> None:
    config = KvTransferConfig(join_timeout_s=0.2)
    meeting = TorchMeeting(host="127.0.0.1", device=torch.device("cpu"), config=config)
    with pytest.raises(TransportError, match="did not come"):
        meeting.listen("p>d#1", threading.Event())
    meeting.close()


def test_store_listens_on_the_given_address_only() -> None:
    import psutil

    meeting = TorchMeeting(host="127.0.0.1", device=torch.device("cpu"), config=CONFIG)
    _, port = split_address(meeting.address)
    listening = [
        c.laddr.ip for c in psutil.Process().net_connections() if c.laddr.port == port and c.status == "LISTEN"
    ]
    assert listening == ["127.0.0.1"]
    meeting.close()
