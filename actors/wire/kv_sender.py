"""A prefill engine's side of KvControl: pairs with decode engines, opened on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from actors.engine.events import ComputedChunk
from actors.errors import Unavailable
from actors.parallel.kv_ends import KvRank
from actors.parallel.kv_transfer import KvGeometry, KvTransferConfig
from actors.reports import KvIdentity
from actors.types import SequenceKey
from actors.wire.kv_control import DRAINING, OnTransferred, PrefillEngine, TransferCounters
from actors.wire.kv_sending_pair import SenderParts, SendingPair


class KvSender:
    """Sends the KV of sequences to decode engines as it is computed.

    ``reserve``, ``push`` and ``cancel`` may be called from any thread and never block; everything else belongs to
    ``loop``. For every key that was reserved the engine hears ``refused`` or, once nothing reads its blocks any more,
    ``transferred``; ``fail`` comes before ``transferred`` when the transfer was lost.
    """

    def __init__(
        self,
        *,
        engine: PrefillEngine,
        ranks: Sequence[KvRank],
        geometry: KvGeometry,
        incarnation: str,
        loop: asyncio.AbstractEventLoop,
        config: KvTransferConfig | None = None,
        on_transferred: OnTransferred = lambda _key, _busy_s: None,
    ) -> None:
        """``incarnation``, ``ranks``: this engine's. ``on_transferred``: see ``OnTransferred``."""
        self.counters = TransferCounters()
        self._engine = engine
        self._loop = loop
        self._config = config or KvTransferConfig()
        self._parts = SenderParts(
            engine=engine,
            ranks=ranks,
            geometry=geometry,
            incarnation=incarnation,
            config=self._config,
            counters=self.counters,
            on_transferred=on_transferred,
        )
        self._pairs: dict[tuple[str, str], SendingPair] = {}
        self._ending: set[SendingPair] = set()
        self._closed = False

    @property
    def pair_count(self) -> int:
        """Pairs that are open."""
        return len(self._pairs)

    def reserve(
        self, key: SequenceKey, peer_address: str, peer_incarnation: str, token_count: int, identity: KvIdentity
    ) -> None:
        """Asks engine ``peer_incarnation`` at ``peer_address`` (host:port) for blocks for ``token_count`` tokens."""
        self._post(lambda: self._reserve(key, peer_address, peer_incarnation, token_count, identity))

    def push(self, chunk: ComputedChunk) -> None:
        """Sends a chunk of a sequence that is reserved. Its blocks must stay as they are until ``transferred``."""
        self._post(lambda: self._push(chunk))

    def cancel(self, key: SequenceKey) -> None:
        """Gives a sequence up. ``transferred`` follows, also for keys that are unknown here or done."""
        self._post(lambda: self._cancel(key))

    async def close(self) -> None:
        """Fails what is under way and ends every pair and thread."""
        self._closed = True
        pairs = [*self._pairs.values(), *self._ending]
        await asyncio.gather(*(pair.close() for pair in pairs))

    def check_integrity(self) -> None:
        """Raises ``RuntimeError`` naming a sequence or buffer that is in use. For idle engines."""
        for pair in [*self._pairs.values(), *self._ending]:
            if pair.busy_reason is not None:
                raise RuntimeError(f"KV sender to {pair.address} is not idle: {pair.busy_reason}")

    def _post(self, action: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(action)

    def _reserve(
        self, key: SequenceKey, peer_address: str, peer_incarnation: str, token_count: int, identity: KvIdentity
    ) -> None:
        if self._closed:
            self._engine.fail(key, Unavailable("the engine is stopping", reason=DRAINING))
            self._engine.transferred(key)
            return
        name = (peer_address, peer_incarnation)
        pair = self._pairs.get(name)
        if pair is None:
            self._make_room()
            pair = SendingPair(self._parts, peer_address, peer_incarnation, self._left)
            self._pairs[name] = pair
        pair.reserve(key, token_count, identity)

    def _push(self, chunk: ComputedChunk) -> None:
        """Chunks of sequences that have just ended here are dropped: the engine learns of the end by itself."""
        pair = self._pair_of(chunk.key)
        if pair is not None:
            pair.push(chunk)

    def _cancel(self, key: SequenceKey) -> None:
        pair = self._pair_of(key)
        if pair is not None:
            pair.cancel(key)
        else:
            self._engine.transferred(key)

    def _pair_of(self, key: SequenceKey) -> SendingPair | None:
        return next((pair for pair in self._pairs.values() if key in pair), None)

    def _make_room(self) -> None:
        idle = sorted((pair for pair in self._pairs.values() if pair.idle), key=lambda pair: pair.used_at)
        for pair in idle[: max(0, len(self._pairs) + 1 - self._config.pair_limit)]:
            del self._pairs[pair.address, pair.incarnation]
            self._watch(pair)
            pair.close_when_idle()

    def _left(self, pair: SendingPair) -> None:
        if self._pairs.get((pair.address, pair.incarnation)) is pair:
            del self._pairs[pair.address, pair.incarnation]
            self._watch(pair)

    def _watch(self, pair: SendingPair) -> None:
        """Keeps a pair that has left until its thread has ended."""
        self._ending.add(pair)
        pair.released.add_done_callback(lambda _task: self._ending.discard(pair))
