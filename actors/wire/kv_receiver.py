"""A decode engine's side of KvControl: the servicer its replica adds to its gRPC server."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

from actors.errors import Unavailable
from actors.parallel.kv_ends import KvRank
from actors.parallel.kv_transfer import KvGeometry, KvTransferConfig
from actors.reports import KvIdentity
from actors.types import SequenceKey
from actors.wire import convert, status
from actors.wire.kv_control import (
    CANCELLED,
    DRAINING,
    INCARNATION_MISMATCH,
    PROTOCOL,
    VERSION_MISMATCH,
    DecodeEngine,
    OnTransferred,
    TransferCounters,
)
from actors.wire.kv_receiving_lane import Incoming
from actors.wire.kv_receiving_pair import Context, ReceiverParts, ReceivingPair
from ernie_serving.internal.v1 import kv_control_pb2 as pb
from ernie_serving.internal.v1.kv_control_pb2_grpc import KvControlServiceServicer


class KvReceiver(KvControlServiceServicer):
    """Takes the KV of sequences from prefill engines into blocks the engine reserves.

    For every reservation the engine granted it hears ``kv_arrived`` or ``fail``, unless it called ``drop`` itself.
    ``drop`` may be called from any thread; everything else belongs to ``loop``.
    """

    def __init__(
        self,
        *,
        engine: DecodeEngine,
        ranks: Sequence[KvRank],
        geometry: KvGeometry,
        incarnation: str,
        identity: KvIdentity,
        loop: asyncio.AbstractEventLoop,
        config: KvTransferConfig | None = None,
        on_transferred: OnTransferred = lambda _key, _busy_s: None,
    ) -> None:
        """``incarnation``, ``identity``, ``ranks``: this engine's. ``on_transferred``: see ``OnTransferred``."""
        self.counters = TransferCounters()
        self._loop = loop
        self._config = config or KvTransferConfig()
        self._entries: dict[SequenceKey, Incoming] = {}
        self._parts = ReceiverParts(
            engine=engine,
            ranks=ranks,
            geometry=geometry,
            incarnation=incarnation,
            identity=identity,
            config=self._config,
            counters=self.counters,
            on_transferred=on_transferred,
            entries=self._entries,
            next_generation=itertools.count(1).__next__,
            post=self._post,
        )
        self._pairs: dict[ReceivingPair, asyncio.Task[None]] = {}
        self._releasing: dict[ReceivingPair, asyncio.Task[None]] = {}
        self._closed = False

    @property
    def pair_count(self) -> int:
        """Streams that are open."""
        return len(self._pairs)

    def drop(self, key: SequenceKey) -> None:
        """The engine gave a reservation up. The sender is told.

        Once this returns nothing writes to its blocks before the next step of the rank that has them, nor before a
        later reservation there: see ``RemoteKvRank`` where that is another process.
        """
        entry = self._entries.get(key)
        if entry is not None:
            entry.guard.shut()
        self._post(lambda: self._dropped(key))

    async def close(self) -> None:
        """Fails what is under way and ends every stream and thread. New streams are refused."""
        self._closed = True
        for task in self._pairs.values():
            task.cancel()
        if self._pairs:
            await asyncio.wait(list(self._pairs.values()))
        if self._releasing:
            await asyncio.wait(list(self._releasing.values()))

    def check_integrity(self) -> None:
        """Raises ``RuntimeError`` naming a sequence or buffer that is in use. For idle engines."""
        if self._entries:
            raise RuntimeError(f"KV receiver is not idle: sequences {[str(key) for key in self._entries]}")
        for pair in [*self._pairs, *self._releasing]:
            if pair.busy_reason is not None:
                raise RuntimeError(f"KV receiver is not idle: {pair.busy_reason}")

    async def Transfer(  # type: ignore[override]  # noqa: N802
        self, request_iterator: object, context: Context
    ) -> None:
        """One prefill engine's stream, by ``context.read`` and ``context.write``."""
        pair = ReceivingPair(self._parts, await self._greet(context))
        serving = asyncio.create_task(pair.serve(context))
        self._pairs[pair] = serving
        serving.add_done_callback(lambda _task: self._served(pair))
        try:
            await asyncio.wait([serving])
        finally:
            serving.cancel()

    async def _greet(self, context: Context) -> str:
        """Reads and checks the hello; returns the incarnation of the peer."""
        try:
            async with asyncio.timeout(self._config.lost_after_s):
                request = await context.read()
        except TimeoutError:
            request = None
        if not isinstance(request, pb.TransferRequest) or request.WhichOneof("message") != "hello":
            await status.abort(context, Unavailable("a pair begins with a hello", reason=PROTOCOL))
        hello = request.hello
        if hello.protocol_version != convert.PROTOCOL_VERSION:
            message = f"protocol {hello.protocol_version} is not {convert.PROTOCOL_VERSION}, which this engine speaks"
            await status.abort(context, Unavailable(message, reason=VERSION_MISMATCH))
        if hello.peer_incarnation != self._parts.incarnation:
            message = f"this is engine {self._parts.incarnation}, not {hello.peer_incarnation}"
            await status.abort(context, Unavailable(message, reason=INCARNATION_MISMATCH))
        if self._closed:
            await status.abort(context, Unavailable("the engine is stopping", reason=DRAINING))
        return hello.incarnation

    def _served(self, pair: ReceivingPair) -> None:
        del self._pairs[pair]
        releasing = asyncio.create_task(pair.release())
        self._releasing[pair] = releasing
        releasing.add_done_callback(lambda _task: self._releasing.pop(pair))

    def _dropped(self, key: SequenceKey) -> None:
        entry = self._entries.get(key)
        if entry is not None:
            entry.pair.give_up(entry, None, tell_peer=CANCELLED)

    def _post(self, action: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(action)
