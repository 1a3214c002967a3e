"""Names of a prompt's KV blocks, for routing to engines that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from actors.engine.scheduling.block_hash import hash_blocks
from actors.reports import EncoderInfo, KvIdentity
from actors.types import EngineRequest, MediaSpan, PromptMedia
from actors.wire.media import embedding_key
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


def request_hashes(request: EngineRequest) -> PrefixHashes:
    """Every token of a prompt that is to be scored is computed, whatever is cached."""
    if request.sampling.prompt_logprobs is not None:
        return no_hashes
    return PromptHashes((*request.prompt_ids, *request.output_ids), request.media, request.salt)


def spans_to_be(media: Iterable[PromptMedia], encoder: EncoderInfo) -> tuple[MediaSpan, ...]:
    """Media as engines will see them once the encoder has them: keys follow from contents."""
    weights = bytes.fromhex(encoder.fingerprint)
    return tuple(
        MediaSpan(
            kind=item.kind,
            offset=item.offset,
            grid=item.grid,
            embedding_keys=tuple(embedding_key(key, weights, encoder.dtype) for key in item.content_keys),
            encoder_address=encoder.address,
        )
        for item in media
    )
