"""What preprocessors, vision encoders and engines say of themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actors.wire.unit_store import UnitStore
from cluster.config import PREPROCESSORS, VISION_ENCODERS
from cluster.metrics.sheet import Sheet, node_of

if TYPE_CHECKING:
    from actors.engine_stats import EngineStats
    from actors.preprocessor import Preprocessor
    from actors.reports import GroupReport, LoadReport
    from actors.vision_encoder import VisionEncoder
    from actors.wire.kv_control import TransferCounters


def preprocessor_sheet(part: Preprocessor) -> Sheet:
    sheet = Sheet(pool=PREPROCESSORS, worker=part.incarnation[:8], node=node_of(part.address))
    sheet.add("ernie_preprocessor_waiting", part.waiting_count)
    sheet.add("ernie_preprocessor_queue_age_seconds", part.queue_age_s)
    sheet.add("ernie_preprocessor_busy_ratio", part.busy)
    sheet.add("ernie_preprocess_seconds", part.seconds)
    _add_store(sheet, part.store)
    return sheet


def encoder_sheet(part: VisionEncoder) -> Sheet:
    info, queue = part.identity, part.queue
    sheet = Sheet(pool=VISION_ENCODERS, worker=info.encoder_id, node=node_of(info.address))
    sheet.add("ernie_encoder_queued_patches", queue.queued_patches)
    sheet.add("ernie_encoder_busy_ratio", part.busy)
    sheet.add("ernie_encoder_window_bytes", queue.window_bytes_used)
    sheet.add("ernie_encoder_batch_seconds", queue.batch_seconds)
    sheet.add("ernie_encoder_batch_patches", queue.batch_patches)
    sheet.add("ernie_encoder_patch_misses_total", queue.patch_misses)
    for source, count in part.unit_sources.items():
        sheet.add("ernie_encoder_units_total", count, source=source)
    _add_store(sheet, part.store)
    return sheet


def _add_store(sheet: Sheet, store: UnitStore[Any]) -> None:
    stats, counters = store.stats(), store.counters
    held = stats.byte_count - stats.cached_bytes - stats.reserved_bytes
    for state, byte_count in (("held", held), ("cached", stats.cached_bytes), ("reserved", stats.reserved_bytes)):
        sheet.add("ernie_media_bytes", byte_count, state=state)
    sheet.add("ernie_media_limit_bytes", store.limit_bytes)
    for state, units in (("held", stats.units - stats.cached_units), ("cached", stats.cached_units)):
        sheet.add("ernie_media_units", units, state=state)
    sheet.add("ernie_media_leases", stats.leases)
    sheet.add("ernie_media_waiting", stats.waiting)
    for result, count in (("hit", counters.hits), ("miss", counters.misses)):
        sheet.add("ernie_media_pulls_total", count, result=result)
    sheet.add("ernie_media_pulled_bytes_total", counters.hit_bytes)
    sheet.add("ernie_media_evictions_total", counters.evictions)


def engine_sheet(stats: EngineStats) -> Sheet:
    info = stats.info
    sheet = Sheet(pool=stats.pool, worker=info.engine_id, node=node_of(info.address), role=info.role)
    sheet.add("ernie_engine_role", 1)
    _add_load(sheet, stats.load)
    sheet.add("ernie_kv_vision_tail_blocks", stats.tail_blocks)
    steps = stats.steps
    for name, tallies in (("seconds", steps.seconds), ("tokens", steps.tokens), ("sequences", steps.sequences)):
        for kind, tally in tallies.items():
            sheet.add(f"ernie_step_{name}", tally, kind=kind)
    sheet.add("ernie_sampled_tokens_total", steps.sampled_tokens)
    _add_transfers(sheet, "sent", stats.sender.counters, stats.sender.pair_count)
    _add_transfers(sheet, "received", stats.receiver.counters, stats.receiver.pair_count)
    sheet.add("ernie_kv_transfer_resent_bytes_total", stats.sender.counters.resent_bytes)
    embeddings = stats.embeddings
    for result, count in (("hit", embeddings.pulled_units), ("miss", embeddings.misses)):
        sheet.add("ernie_embedding_pulls_total", count, result=result)
    sheet.add("ernie_embedding_pulled_bytes_total", embeddings.pulled_bytes)
    sheet.add("ernie_embedding_window_bytes", embeddings.held_bytes)
    if stats.group is not None:
        _add_group(sheet, stats.group)
    return sheet


def _add_load(sheet: Sheet, load: LoadReport) -> None:
    for state, count in (("running", load.running), ("waiting", load.waiting), ("reserved", load.reserved)):
        sheet.add("ernie_engine_sequences", count, state=state)
    sheet.add("ernie_engine_queued_tokens", load.queued_tokens)
    sheet.add("ernie_engine_prefill_busy_ratio", load.prefill_busy)
    used, cached = load.total_blocks - load.free_blocks, load.cached_blocks
    for state, count in (("used", used), ("cached", cached), ("empty", load.free_blocks - cached)):
        sheet.add("ernie_kv_blocks", count, state=state)
    sheet.add("ernie_kv_block_tokens", load.block_size)
    sheet.add("ernie_prefix_queried_tokens_total", load.prefix_queried_tokens)
    sheet.add("ernie_prefix_hit_tokens_total", load.prefix_hit_tokens)
    sheet.add("ernie_preemptions_total", load.preemptions)


def _add_transfers(sheet: Sheet, direction: str, counters: TransferCounters, pairs: int) -> None:
    streamed = counters.streamed_bytes
    whole = counters.sent_bytes if direction == "sent" else counters.received_bytes
    for path, byte_count in (("pair", whole - streamed), ("stream", streamed)):
        sheet.add("ernie_kv_transfer_bytes_total", byte_count, direction=direction, path=path)
    for name, value in (
        ("seconds", counters.seconds),
        ("chunks", counters.chunks),
        ("nacks", counters.nacks),
        ("generations", counters.generations),
        ("failures", counters.failures),
    ):
        sheet.add(f"ernie_kv_transfer_{name}_total", value, direction=direction)
    sheet.add("ernie_kv_transfer_pairs", pairs, direction=direction)


def _add_group(sheet: Sheet, report: GroupReport) -> None:
    sheet.add("ernie_engine_ranks", report.ranks)
    for bank, skew in (("text", report.text_skew), ("vision", report.vision_skew)):
        sheet.add("ernie_expert_load_skew", skew, bank=bank)
    sheet.add("ernie_expert_rebalances_total", report.moves)
    sheet.add("ernie_experts_moved_total", report.moved_experts)
    sheet.add("ernie_group_steps_total", report.steps)
    parts = (("plan", report.plan_s), ("own", report.own_s), ("gather", report.gather_s), ("move", report.move_s))
    for name, seconds in parts:
        sheet.add("ernie_group_step_seconds_total", seconds, part=name)
