"""Where KV and media lie, and how they travel."""

from __future__ import annotations

from deploy.dashboards.expressions import rate, series
from deploy.dashboards.forms import BYTES, BYTES_PER_SECOND, COUNT, PER_SECOND, SECONDS, SHARE, Page, Query


def page() -> Page:
    page = Page("kv", "KV and transfers", "Where KV and media lie, and how they travel.", series())
    page.row("KV cache")
    page.lines(
        "KV, in tokens",
        "Used, cached (free, with a known prefix) and empty, of all engines of a role.",
        COUNT,
        Query(
            "sum by (role, state) (ernie_kv_blocks * on (job, worker, role) group_left ernie_kv_block_tokens)",
            "{{role}} {{state}}",
        ),
        stacked=True,
    )
    page.lines(
        "KV in use, by engine",
        "Share of its blocks.",
        SHARE,
        Query(
            'sum by (worker, role) (ernie_kv_blocks{state="used"}) / sum by (worker, role) (ernie_kv_blocks)',
            "{{worker}} {{role}}",
        ),
        top=1.0,
        bound=0.95,
    )
    page.lines(
        "Prefix cache hits",
        "Share of the prompt tokens looked up that were found.",
        SHARE,
        Query(
            f"{rate('ernie_prefix_hit_tokens_total', 'role')} / {rate('ernie_prefix_queried_tokens_total', 'role')}",
            "{{role}}",
        ),
        top=1.0,
    )
    page.lines(
        "Preemptions",
        "Sequences that lost their blocks to another.",
        PER_SECOND,
        Query(rate("ernie_preemptions_total", "worker, role"), "{{worker}} {{role}}"),
    )
    page.lines(
        "Blocks in place of vision experts",
        "Of a decode engine's leader: KV blocks that lie where a prefill engine has the vision experts.",
        COUNT,
        Query("sum by (worker, role) (ernie_kv_vision_tail_blocks)", "{{worker}} {{role}}"),
    )
    page.lines(
        "Waiting for room",
        "Choices that no engine has KV blocks for.",
        COUNT,
        Query("sum(ernie_requests_waiting_for_room)", "choices"),
    )

    page.row("KV from prefill to decode")
    page.lines(
        "Bytes",
        "By path: over the pair of ranks, or streamed over gRPC, which is slower.",
        BYTES_PER_SECOND,
        Query(rate("ernie_kv_transfer_bytes_total", "direction, path"), "{{direction}} by {{path}}"),
    )
    page.lines(
        "Time at work for a chunk",
        "What ranks worked on transfers, by the chunks that arrived and were verified.",
        SECONDS,
        Query(
            f"{rate('ernie_kv_transfer_seconds_total', 'direction')} / "
            f"{rate('ernie_kv_transfer_chunks_total', 'direction')}",
            "{{direction}}",
        ),
    )
    page.lines(
        "Trouble",
        "Chunks that did not arrive as they were sent, pairs of ranks connected anew, transfers given up.",
        PER_SECOND,
        Query(rate("ernie_kv_transfer_nacks_total"), "chunks refused"),
        Query(rate("ernie_kv_transfer_generations_total"), "pairs connected"),
        Query(rate("ernie_kv_transfer_failures_total"), "transfers given up"),
    )
    page.lines(
        "Bytes sent again",
        "Of the bytes sent.",
        BYTES_PER_SECOND,
        Query(rate("ernie_kv_transfer_resent_bytes_total"), "sent again"),
    )
    page.lines(
        "Connected engines",
        "For transfers, by engine.",
        COUNT,
        Query("sum by (worker, direction) (ernie_kv_transfer_pairs)", "{{worker}} {{direction}}"),
    )

    page.row("Pictures and videos")
    page.lines(
        "Media held",
        "Patches in preprocessors, embeddings in vision encoders: under leases, cached without one, or reserved.",
        BYTES,
        Query("sum by (pool, state) (ernie_media_bytes)", "{{pool}} {{state}}"),
        Query("sum by (pool) (ernie_media_limit_bytes)", "{{pool}} at most"),
    )
    page.lines(
        "Units held",
        "Pictures and frame pairs, under leases or cached without one.",
        COUNT,
        Query("sum by (pool, state) (ernie_media_units)", "{{pool}} {{state}}"),
    )
    page.lines(
        "Pulled",
        "Patches by vision encoders, embeddings by engines.",
        BYTES_PER_SECOND,
        Query(rate("ernie_media_pulled_bytes_total", "pool"), "from {{pool}}"),
        Query(rate("ernie_embedding_pulled_bytes_total"), "embeddings, by engines"),
    )
    page.lines(
        "Units encoded",
        "Cached, shared with a call that asked before, or computed.",
        PER_SECOND,
        Query(rate("ernie_encoder_units_total", "source"), "{{source}}"),
        stacked=True,
    )
    page.lines(
        "Gone when they were pulled",
        "What was evicted or lost and is made again, and cached units that gave way to others.",
        PER_SECOND,
        Query('sum by (pool) (rate(ernie_media_pulls_total{result="miss"}[$__rate_interval]))', "in {{pool}}"),
        Query(rate("ernie_encoder_patch_misses_total"), "patches, for encoders"),
        Query('sum(rate(ernie_embedding_pulls_total{result="miss"}[$__rate_interval]))', "embeddings, for engines"),
        Query(rate("ernie_media_evictions_total", "pool"), "evicted in {{pool}}"),
    )
    page.lines(
        "Waiting for memory",
        "Calls that wait for bytes to become free, and bytes held ahead of use.",
        COUNT,
        Query("sum by (pool) (ernie_media_waiting)", "{{pool}}"),
    )
    page.lines(
        "Held ahead of use",
        "Patches in vision encoders and embeddings in engines.",
        BYTES,
        Query("sum(ernie_encoder_window_bytes)", "vision encoders"),
        Query("sum(ernie_embedding_window_bytes)", "engines"),
    )
    return page
