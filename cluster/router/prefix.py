"""Names of a prompt's KV blocks, for routing to engines that hold them."""

from __future__ import annotations

from collections.abc import Sequence

from actors.engine.scheduling.block_hash import hash_blocks
from actors.reports import KvIdentity
from actors.types import EngineRequest, MediaSpan
from cluster.policy.views import PrefixHashes, no_hashes


class PromptHashes:
    """``cluster.policy.views.PrefixHashes`` of one prompt; made when first asked for, once per identity."""

    def __init__(self, token_ids: Sequence[int], media: Sequence[MediaSpan], salt: bytes) -> None:
        self._token_ids = token_ids
        self._media = media
        self._salt = salt
        self._known: dict[KvIdentity, tuple[bytes, ...]] = {}

    def __call__(self, identity: KvIdentity) -> tuple[bytes, ...]:
        if identity not in self._known:
            self._known[identity] = hash_blocks(identity, self._token_ids, self._media, self._salt)
        return self._known[identity]


def reusable(
    token_ids: Sequence[int], media: Sequence[MediaSpan], salt: bytes, prompt_logprobs: int | None
) -> PrefixHashes:
    """Every token of a prompt that is to be scored is computed, whatever is cached."""
    return no_hashes if prompt_logprobs is not None else PromptHashes(token_ids, media, salt)


def request_hashes(request: EngineRequest) -> PrefixHashes:
    token_ids = (*request.prompt_ids, *request.output_ids)
    return reusable(token_ids, request.media, request.salt, request.sampling.prompt_logprobs)
