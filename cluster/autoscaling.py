"""How many replicas a pool is to have. Pure: a snapshot in, decisions out, on a given clock.

The work of a pool is looked at by kind: preprocessing, encoding, prefill, decode. A kind is short while its pressure,
the worst of its queues and latencies over their bounds, is 1 or more. A replica can be spared while the others could do
all of the work and stay below ``idle`` of those bounds, whichever of them goes: Serve picks it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.types import EngineRole
from cluster.config import PREPROCESSORS, VISION_ENCODERS, ClusterConfig, EnginePool
from cluster.config_scaling import Autoscaling, EngineAutoscaling, PreprocessorAutoscaling, VisionEncoderAutoscaling
from cluster.pressure import WORKING, Lateness, lateness, mean, measure, working
from cluster.registry import EncoderEntry, EngineEntry, PreprocessorEntry, Snapshot

MOST_GROWTH = 2.0
"""Those that do a kind of work become more by this factor at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One kind of work of a pool, at one moment."""

    name: str
    count: int
    """Replicas that do it."""
    pressure: float
    load: float
    """Of all together, in replicas that are as busy as is well."""
    late: float = 0.0
    """The latency it decides over what it should be."""
    roles: tuple[EngineRole, ...] = ()
    """Of engines that do it; a further one gets the first."""

    def rest(self, left: int) -> float:
        """What so many of them would bear, over what is well."""
        if left <= 0:
            return math.inf if self.load else 0.0
        return max(self.load / left, self.late)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A pool at one moment."""

    pool: str
    present: int
    """Replicas that are up, those that take another role included."""
    works: tuple[Work, ...]
    spares: tuple[EngineRole | None, ...] = (None,)
    """Roles of which one engine may go, if the work allows it; None in pools without roles."""
    moves_below: float = 0.0
    """Of the pressure on the other kind of work: below it engines change their roles, and the pool need not grow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What was decided of a pool, and since when what could be decided next has been so. Seconds of any clock."""

    target: int
    short_since: float | None = None
    short_by: float = 0.0
    """The pressure at that time."""
    spare_since: float | None = None
    settled_at: float = -math.inf
    """Since when there are as many replicas as there are to be; infinite while there are not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """A pool is to have another number of replicas."""

    pool: str
    former: int
    target: int
    role: EngineRole | None
    """Of which there are to be more or fewer."""
    why: str


def decide(seen: Seen, bounds: Autoscaling, memory: Memory, now: float) -> tuple[Memory, Scaling | None]:
    """What a pool is to have from now on. One that still waits for replicas does not grow further, nor does one that is
    catching up: whose pressure fell over the delay. It shrinks by one at a time, each after the whole delay.
    """
    settled = seen.present >= memory.target
    settled_at = min(memory.settled_at, now) if settled else math.inf
    short = max(seen.works, key=lambda work: work.pressure)
    is_short = short.pressure >= 1.0
    grows = is_short and settled and memory.target < bounds.max_replicas and not _moves_first(seen, short)
    # Where nobody is yet, that they have nothing to do says nothing.
    shrinks = seen.present > 0 and memory.target > bounds.min_replicas and not is_short
    spare = _spare(seen, bounds.idle, settled) if shrinks else None
    short_since = _since(memory.short_since, grows, now)
    short_by = short.pressure if memory.short_since is None else memory.short_by
    if _lasted(short_since, bounds.upscale_delay_s, now) and short.pressure < short_by:
        short_since, short_by = now, short.pressure
    memory = Memory(
        target=memory.target,
        short_since=short_since,
        short_by=short_by,
        spare_since=_since(memory.spare_since, spare is not None, now),
        settled_at=settled_at,
    )
    if _lasted(memory.short_since, bounds.upscale_delay_s, now):
        more = math.ceil(short.count * (min(short.pressure, MOST_GROWTH) - 1.0))
        target = min(bounds.max_replicas, memory.target + max(1, more))
        role = short.roles[0] if short.roles else None
        why = f"{short.name} at {short.pressure:.2f} of what is well"
    elif spare is not None and _lasted(memory.spare_since, bounds.downscale_delay_s, now):
        target, role = memory.target - 1, spare.role
        why = f"without one the others are at {spare.rest:.2f} of what is well"
    else:
        return memory, None
    scaling = Scaling(pool=seen.pool, former=memory.target, target=target, role=role, why=why)
    return Memory(target=target, settled_at=math.inf), scaling


@dataclass(frozen=True, slots=True)
class _Spare:
    role: EngineRole | None
    rest: float


def _spare(seen: Seen, idle: float, settled: bool) -> _Spare | None:
    """Whose work is done most easily by one replica less. One that is still on its way goes first, and takes nothing
    with it."""
    found = []
    for role in seen.spares:
        works = [work for work in seen.works if role is None or role in work.roles]
        rest = max(work.rest(work.count - settled) for work in works)
        if rest <= idle:
            found.append(_Spare(role, rest))
    return min(found, key=lambda spare: spare.rest, default=None)


def _moves_first(seen: Seen, short: Work) -> bool:
    return any(work.count > 1 and work.pressure < seen.moves_below for work in seen.works if work is not short)


def _since(since: float | None, holds: bool, now: float) -> float | None:
    return (now if since is None else since) if holds else None


def _lasted(since: float | None, delay_s: float, now: float) -> bool:
    return since is not None and now - since >= delay_s


def bounds_of(config: ClusterConfig) -> dict[str, Autoscaling]:
    """Of every pool that scales, by its name."""
    pools: dict[str, Autoscaling | None] = {
        PREPROCESSORS: config.preprocessor.autoscaling,
        VISION_ENCODERS: config.vision_encoder.autoscaling,
    }
    pools |= {pool.name: pool.autoscaling for pool in config.pools}
    return {name: bounds for name, bounds in pools.items() if bounds is not None}


def see_preprocessors(entries: Sequence[PreprocessorEntry], bounds: PreprocessorAutoscaling) -> Seen:
    pressure = max((entry.queue_age_s for entry in entries), default=0.0) / bounds.queue_age_s
    load = sum(entry.busy for entry in entries) + pressure
    work = Work(name="preprocessing", count=len(entries), pressure=pressure, load=load)
    return Seen(pool=PREPROCESSORS, present=len(entries), works=(work,))


def see_encoders(entries: Sequence[EncoderEntry], bounds: VisionEncoderAutoscaling) -> Seen:
    """Patches that wait while encoders have little to do wait for something else."""
    queued = sum(entry.queued_patches for entry in entries) / bounds.queued_patches
    busy = [entry.busy for entry in entries]
    work = Work(
        name="encoding",
        count=len(entries),
        pressure=min(queued / max(1, len(entries)), mean(busy) / WORKING),
        load=max(queued, sum(busy)),
    )
    return Seen(pool=VISION_ENCODERS, present=len(entries), works=(work,))


def see_engines(
    entries: Sequence[EngineEntry],
    pool: EnginePool,
    bounds: EngineAutoscaling,
    wanted: Mapping[EngineRole, int],
    late: Lateness,
) -> Seen:
    """``entries``: engines of the pool that are up; ``wanted``: how many of them are to have each role."""
    serving = [entry for entry in entries if entry.serves]
    loads = [(entry.info.role, entry.load) for entry in serving if entry.load is not None]
    pressure = measure(serving, bounds, late)
    prefills = [load for role, load in loads if role.prefills]
    decodes = [load for role, load in loads if role.decodes]
    roles = [role for role in EngineRole if wanted.get(role, 0) > 0]
    works = []
    if doing := tuple(role for role in roles if role.prefills):
        queued = sum(load.queued_tokens for load in prefills) / bounds.queued_tokens
        works.append(
            Work(
                name="prefill",
                count=len(prefills),
                pressure=min(pressure.prefill, working(serving)),
                load=max(queued, sum(load.prefill_busy for load in prefills)),
                late=late.ttft,
                roles=doing,
            )
        )
    if doing := tuple(role for role in roles if role.decodes):
        smallest = min((load.total_blocks for load in decodes), default=1)
        used = sum(load.total_blocks - load.free_blocks for load in decodes) / max(1, smallest) / bounds.kv_use
        running = sum(load.running for load in decodes) / (pool.max_num_seqs * pool.expert_parallel)
        works.append(
            Work(
                name="decode",
                count=len(decodes),
                pressure=pressure.decode,
                load=max(used, running),
                late=late.tpot,
                roles=doing,
            )
        )
    return Seen(
        pool=pool.name,
        present=len(entries),
        works=tuple(works),
        spares=tuple(role for role in roles if wanted[role] > 1),
        moves_below=0.0 if pool.move_roles is None else pool.move_roles.idle,
    )


def see(
    snapshot: Snapshot,
    config: ClusterConfig,
    wanted: Mapping[str, Mapping[EngineRole, int]],
    memories: Mapping[str, Memory],
    now: float,
) -> dict[str, Seen]:
    """Every pool that scales. ``wanted``: of each engine pool."""
    seen: dict[str, Seen] = {}
    if (preprocessing := config.preprocessor.autoscaling) is not None:
        seen[PREPROCESSORS] = see_preprocessors(snapshot.preprocessors, preprocessing)
    if (encoding := config.vision_encoder.autoscaling) is not None:
        seen[VISION_ENCODERS] = see_encoders(snapshot.encoders, encoding)
    for pool in config.pools:
        if pool.autoscaling is not None:
            entries = [entry for entry in snapshot.engines if entry.pool == pool.name and entry.ready]
            late = lateness(snapshot.routers, config.slo, changed_s_ago=now - memories[pool.name].settled_at)
            seen[pool.name] = see_engines(entries, pool, pool.autoscaling, wanted[pool.name], late)
    return seen
