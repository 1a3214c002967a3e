"""Two engines' KV sides in one process: real gRPC and gloo on the loopback device, doubles for engine and cache."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.engine.events import ComputedChunk
from actors.engine.plan import LayerPart
from actors.engine.scheduling.reservations import Reservation
from actors.errors import ServingError, Unavailable
from actors.parallel.kv_threads import LocalKvRank
from actors.parallel.kv_transfer import KvGeometry, KvTransferConfig, Meeting, Transport
from actors.parallel.torch_pairs import TorchMeeting
from actors.reports import KvIdentity
from actors.types import SequenceKey
from actors.wire.channels import make_server
from actors.wire.kv_receiver import KvReceiver
from actors.wire.kv_sender import KvSender
from ernie_serving.internal.v1.kv_control_pb2_grpc import add_KvControlServiceServicer_to_server

HOST = "127.0.0.1"
BLOCK_SIZE = 4
BLOCKS = 64
IDENTITY = KvIdentity(fingerprint="f0", dtype="float32", block_size=BLOCK_SIZE, switches="routing=all_special")
CONFIG = KvTransferConfig(heartbeat_s=0.2, lost_after_s=20.0, data_timeout_s=10.0, join_timeout_s=10.0)
PATIENCE_S = 30.0


def geometry_of(dtype: torch.dtype = torch.float32, layers: int = 3) -> KvGeometry:
    return KvGeometry(num_layers=layers, num_kv_heads=2, head_dim=8, dtype=dtype, device=torch.device("cpu"))


class SimpleCache:
    """One tensor per layer, one row per token slot."""

    def __init__(self, geometry: KvGeometry, seed: int | None = None) -> None:
        shape = (geometry.num_layers, BLOCKS * BLOCK_SIZE, 2, geometry.num_kv_heads, geometry.head_dim)
        generator = torch.Generator().manual_seed(seed or 0)
        data = torch.zeros(shape) if seed is None else torch.randn(shape, generator=generator)
        self.data = data.to(geometry.dtype)
        self.before_write: Callable[[], None] = lambda: None
        self.before_read: Callable[[], None] = lambda: None

    def read_tokens(self, layer: int, block_table: Sequence[int], first: int, count: int) -> Tensor:
        self.before_read()
        return self.data[layer, self._slots(block_table, first, count)]

    def write_tokens(self, layer: int, block_table: Sequence[int], first: int, tensor: Tensor) -> None:
        self.before_write()
        self.data[layer, self._slots(block_table, first, tensor.shape[0])] = tensor

    def of(self, block_table: Sequence[int], tokens: int) -> Tensor:
        return self.data[:, self._slots(block_table, 0, tokens)]

    def _slots(self, block_table: Sequence[int], first: int, count: int) -> Tensor:
        token = torch.arange(first, first + count)
        return torch.tensor(list(block_table))[token // BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE


class Recorder:
    """Remembers what an engine was told, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []
        self._changed = asyncio.Event()

    def tell(self, *event: object) -> None:
        self.events.append(event)
        self._changed.set()

    def told(self, kind: str, key: SequenceKey) -> list[tuple[object, ...]]:
        return [event for event in self.events if event[:2] == (kind, key)]

    async def hears(self, kind: str, key: SequenceKey) -> tuple[object, ...]:
        async with asyncio.timeout(PATIENCE_S):
            while not self.told(kind, key):
                self._changed.clear()
                await self._changed.wait()
        return self.told(kind, key)[0]


class PrefillDouble(Recorder):
    def reserved(self, key: SequenceKey, held_tokens: int) -> None:
        self.tell("reserved", key, held_tokens)

    def refused(self, key: SequenceKey, reason: str) -> None:
        self.tell("refused", key, reason)

    def transferred(self, key: SequenceKey) -> None:
        self.tell("transferred", key)

    def fail(self, key: SequenceKey, error: ServingError) -> None:
        self.tell("fail", key, error.reason)


class DecodeDouble(Recorder):
    """Grants blocks from the end of its cache, so that tables of the two sides differ; at once, or on ``submit``."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.free = list(range(blocks))
        self.tables: dict[SequenceKey, list[int]] = {}
        self.held: dict[SequenceKey, list[int]] = {}
        """Blocks at the beginning of a sequence's table that are there already; set before its reservation."""
        self.waiting: dict[SequenceKey, tuple[int, Future[Reservation]]] = {}
        self.wait_for_submit = False

    def reserve(self, key: SequenceKey, token_count: int) -> Future[Reservation]:
        future: Future[Reservation] = Future()
        self.waiting[key] = (token_count, future)
        self.tell("reserve", key, token_count)
        if not self.wait_for_submit:
            self.submit(key)
        return future

    def submit(self, key: SequenceKey) -> None:
        tokens, future = self.waiting.pop(key)
        held = self.held.get(key, [])
        need = -(-tokens // BLOCK_SIZE) - len(held)
        if need > len(self.free):
            future.set_exception(Unavailable("no blocks", reason="NO_BLOCKS"))
            return
        self.tables[key] = [*held, *(self.free.pop() for _ in range(need))]
        future.set_result(Reservation(0, self.tables[key], len(held) * BLOCK_SIZE))

    def kv_arrived(self, key: SequenceKey, first_output_id: int, finished: bool) -> None:
        self.tell("kv_arrived", key, first_output_id, finished)

    def fail(self, key: SequenceKey, error: ServingError) -> None:
        self.tell("fail", key, error.reason)


class WrappedMeeting:
    """Lets a test stand between a pair and its data path. ``wrap(transport, name)`` gets every generation."""

    def __init__(self, inner: Meeting, wrap: Callable[[Transport, str], Transport]) -> None:
        self.inner = inner
        self.wrap = wrap

    @property
    def address(self) -> str:
        return self.inner.address

    def listen(self, name: str, stop: threading.Event) -> Transport:
        return self.wrap(self.inner.listen(name, stop), name)

    def connect(self, address: str, name: str, stop: threading.Event) -> Transport:
        return self.wrap(self.inner.connect(address, name, stop), name)

    def close(self) -> None:
        self.inner.close()


class Through:
    """A transport that changes nothing; tests override one method."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner

    def send(self, tensors: Iterable[Tensor]) -> None:
        self.inner.send(tensors)

    def recv(self, buffers: Sequence[Tensor], arrived: Callable[[int], None]) -> None:
        self.inner.recv(buffers, arrived)

    def close(self) -> None:
        self.inner.close()


def plain(transport: Transport, name: str) -> Transport:
    return transport


@dataclass
class DecodeSide:
    engine: DecodeDouble
    cache: SimpleCache
    receiver: KvReceiver
    address: str
    incarnation: str
    busy: dict[SequenceKey, float]


@dataclass
class PrefillSide:
    engine: PrefillDouble
    cache: SimpleCache
    sender: KvSender
    geometry: KvGeometry
    busy: dict[SequenceKey, float]

    def reserve(self, key: SequenceKey, peer: DecodeSide, tokens: int, identity: KvIdentity = IDENTITY) -> None:
        self.sender.reserve(key, peer.address, peer.incarnation, tokens, identity)

    def push(
        self,
        key: SequenceKey,
        table: Sequence[int],
        bounds: Sequence[int],
        only: int | None = None,
        parts: int = 1,
    ) -> None:
        """Pushes chunks between consecutive ``bounds``, in so many parts of the layers; token 0 is 7."""
        for index in range((len(bounds) - 1) * parts) if only is None else [only]:
            place, part = divmod(index, parts)
            last = index == (len(bounds) - 1) * parts - 1
            self.sender.push(
                ComputedChunk(
                    key=key,
                    rank=0,
                    index=index,
                    first_token=bounds[place],
                    token_count=bounds[place + 1] - bounds[place],
                    part=LayerPart(part, parts),
                    block_table=tuple(table),
                    last=last,
                    first_output_id=7 if last else None,
                )
            )

    async def send(
        self, key: SequenceKey, peer: DecodeSide, table: Sequence[int], bounds: Sequence[int], parts: int = 1
    ) -> None:
        """Reserves and pushes a whole sequence."""
        self.reserve(key, peer, bounds[-1])
        await self.engine.hears("reserved", key)
        self.push(key, table, bounds, parts=parts)


@asynccontextmanager
async def decode_side(
    *,
    name: str = "decode-1",
    geometry: KvGeometry | None = None,
    config: KvTransferConfig = CONFIG,
    wrap: Callable[[Transport, str], Transport] = plain,
    idle_after: bool = True,
) -> AsyncIterator[DecodeSide]:
    geometry = geometry or geometry_of()
    engine, cache = DecodeDouble(), SimpleCache(geometry)
    meeting = WrappedMeeting(TorchMeeting(host=HOST, device=geometry.device, config=config), wrap)
    busy: dict[SequenceKey, float] = {}
    receiver = KvReceiver(
        engine=engine,
        ranks=[LocalKvRank(cache, geometry, meeting)],
        geometry=geometry,
        incarnation=name,
        identity=IDENTITY,
        loop=asyncio.get_running_loop(),
        config=config,
        on_transferred=busy.__setitem__,
    )
    server = make_server()
    add_KvControlServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    try:
        yield DecodeSide(engine, cache, receiver, f"{HOST}:{port}", name, busy)
        if idle_after:
            receiver.check_integrity()
    finally:
        await receiver.close()
        await server.stop(None)
        meeting.close()


@asynccontextmanager
async def prefill_side(
    *,
    name: str = "prefill-1",
    geometry: KvGeometry | None = None,
    config: KvTransferConfig = CONFIG,
    wrap: Callable[[Transport, str], Transport] = plain,
    idle_after: bool = True,
) -> AsyncIterator[PrefillSide]:
    geometry = geometry or geometry_of()
    engine, cache = PrefillDouble(), SimpleCache(geometry, seed=1)
    meeting = WrappedMeeting(TorchMeeting(host=HOST, device=geometry.device, config=config), wrap)
    busy: dict[SequenceKey, float] = {}
    sender = KvSender(
        engine=engine,
        ranks=[LocalKvRank(cache, geometry, meeting)],
        geometry=geometry,
        incarnation=name,
        loop=asyncio.get_running_loop(),
        config=config,
        on_transferred=busy.__setitem__,
    )
    try:
        yield PrefillSide(engine, cache, sender, geometry, busy)
        if idle_after:
            sender.check_integrity()
    finally:
        await sender.close()
        meeting.close()


def key_of(number: int) -> SequenceKey:
    return SequenceKey(f"request-{number}", 0, 0)


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


class Gate:
    """Holds a data thread at a place until the test opens it."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._opened = threading.Event()

    def pass_through(self) -> None:
        self._reached.set()
        if not self._opened.wait(PATIENCE_S):
            raise AssertionError("the gate was never opened")

    async def reached(self) -> None:
        if not await asyncio.to_thread(self._reached.wait, PATIENCE_S):
            raise AssertionError("nobody came to the gate")

    def open(self) -> None:
        self._opened.set()


class HeldRecv(Through):
    """Waits at a gate before it posts its buffers."""

    def __init__(self, inner: Transport, gate: Gate) -> None:
        super().__init__(inner)
        self.gate = gate

    def recv(self, buffers: Sequence[Tensor], arrived: Callable[[int], None]) -> None:
        self.gate.pass_through()
        self.inner.recv(buffers, arrived)
