"""Names of a prompt's KV blocks, for routing to engines that hold them."""

from __future__ import annotations

from actors.engine.scheduling.block_hash import hash_blocks
from actors.reports import KvIdentity
from actors.types import EngineRequest


class RequestHashes:
    """``cluster.policy.PrefixHashes`` of one request; made when first asked for, once per identity."""

    def __init__(self, request: EngineRequest) -> None:
        self._request = request
        self._known: dict[KvIdentity, tuple[bytes, ...]] = {}

    def __call__(self, identity: KvIdentity) -> tuple[bytes, ...]:
        request = self._request
        if request.sampling.prompt_logprobs is not None:
            return ()  # every token of its prompt is computed, whatever is cached
        if identity not in self._known:
            token_ids = (*request.prompt_ids, *request.output_ids)
            self._known[identity] = hash_blocks(identity, token_ids, request.media, request.salt)
        return self._known[identity]
