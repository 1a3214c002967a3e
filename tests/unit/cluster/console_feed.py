"""Simulated clusters, told by the code that tells real ones."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from actors.reports import EncoderInfo, EngineInfo, LoadReport
from actors.types import EngineRole, Stage
from cluster.config_scaling import Slo
from cluster.decisions import Decision, DecisionKind
from cluster.registry import (
    EncoderEntry,
    EngineEntry,
    Latency,
    LoadingEntry,
    Percentiles,
    PoolScale,
    PreprocessorEntry,
    Snapshot,
)
from cluster.router.request import Whereabouts
from cluster.status import cluster_status

GB = 10**9
BEGAN = 1_790_000_000
"""Wall clock of a feed's first status."""
PREFILL, DECODE, COLOCATED = EngineRole.PREFILL, EngineRole.DECODE, EngineRole.COLOCATED
NOTHING_SET = Slo()
EARLY = (Stage.QUEUED, Stage.PREPROCESS)


def decision(number: int, age_s: float, kind: str, pool: str, subject: str, change: str, reason: str = "") -> Decision:
    return Decision(
        number=number,
        time_s=BEGAN - age_s,
        kind=DecisionKind(kind),
        pool=pool,
        subject=subject,
        change=change,
        reason=reason,
    )


def scales(*pools: tuple[str, int, int, int]) -> tuple[PoolScale, ...]:
    """Of (name, target, least, most)."""
    return tuple(PoolScale(name=name, target=target, min=least, max=most) for name, target, least, most in pools)


@dataclass
class Simulated:
    """``next`` is what ``/status`` answers, each time a second later."""

    nodes: int
    engines: tuple[tuple[str, EngineRole, int], ...]
    """(pool, role, count)."""
    requests: int
    """About so many are active."""
    encoders: int = 1
    preprocessors: int = 1
    blocks: int = 4096
    loading: tuple[LoadingEntry, ...] = ()
    unready: tuple[tuple[str, str], ...] = ()
    """(id, state) of engines that are not ready."""
    pools: tuple[PoolScale, ...] = ()
    decisions: tuple[Decision, ...] = ()
    slo: Slo = NOTHING_SET
    missing: str | None = None
    slow: float = 1.0
    """Factor of the latencies."""
    without: tuple[str, ...] = ()
    """Members an older router does not tell."""
    second: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(7)
        self._names = iter(self._make_names())
        self._engines = [
            self._engine(pool, role, index)
            for index, (pool, role) in enumerate(
                (pool, role) for pool, role, count in self.engines for _ in range(count)
            )
        ]
        self._encoders = [
            EncoderInfo(
                encoder_id=f"encoder-{self._name()}",
                incarnation=f"encoder{index}",
                address=f"{self._node(index)}:4{index:03}",
                fingerprint="f",
                dtype="bfloat16",
            )
            for index in range(self.encoders)
        ]
        self._preprocessors = [
            PreprocessorEntry(incarnation=self._name(), address=f"{self._node(index)}:5{index:03}")
            for index in range(self.preprocessors)
        ]

    def _make_names(self) -> Iterator[str]:
        """Like Serve's ids of replicas."""
        while True:
            yield "".join(self._random.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=8))

    def _name(self) -> str:
        return next(self._names)

    def _node(self, index: int) -> str:
        return "127.0.0.1" if self.nodes == 1 else f"10.0.0.{index % self.nodes + 4}"

    def _engine(self, pool: str, role: EngineRole, index: int) -> EngineInfo:
        return EngineInfo(
            engine_id=f"{pool}-{self._name()}",
            incarnation=f"engine{index}",
            address=f"{self._node(index)}:3{index:03}",
            role=role,
            epoch=1,
            fingerprint="f",
            dtype="bfloat16",
            block_size=256,
            switches="s",
            max_model_len=131072,
            notes=("KV arena of 58 GiB: 1.1 million tokens", "attention: varlen, experts: grouped"),
        )

    def change_role(self, index: int, role: EngineRole) -> str:
        """Returns the engine's id."""
        info = self._engines[index]
        self._engines[index] = EngineInfo(**{name: getattr(info, name) for name in info.__slots__} | {"role": role})
        return info.engine_id

    def _load(self, info: EngineInfo, running: int) -> LoadReport:
        draw = self._random
        prefills = info.role is PREFILL
        busy = running > 0
        used = 0 if not busy else int(self.blocks * min(0.97, draw.uniform(0.3, 0.6) + running / 60))
        queued = int(draw.uniform(500, 30_000)) if busy and info.role is not DECODE else 0
        state = dict(self.unready).get(info.engine_id)
        return LoadReport(
            step=self.second,
            running=running,
            waiting=draw.randrange(4) if prefills and busy else 0,
            free_blocks=self.blocks - used,
            total_blocks=self.blocks,
            block_size=256,
            queued_tokens=queued,
            cached_blocks=min(self.blocks - used, self.blocks // 5),
            prefix_queried_tokens=1_000_000,
            prefix_hit_tokens=412_000,
            draining=state == "draining",
        )

    def _whereabouts(self) -> list[Whereabouts]:
        draw = self._random
        if self.requests == 0:
            return []
        count = max(0, round(self.requests * (1 + 0.3 * math.sin(self.second / 9) + draw.uniform(-0.08, 0.08))))
        prefills = [info.address for info in self._engines if info.role is not DECODE]
        decodes = [info.address for info in self._engines if info.role is not PREFILL]
        stages = draw.choices(list(Stage)[:6], weights=(8, 5, 6, 14, 3, 64), k=count)
        return [
            Whereabouts(
                request_id=f"r-{number}",
                alias=None,
                stage=stage,
                elapsed_s=1.0,
                output_tokens=1,
                encoder=draw.choice(self._encoders).address if stage not in EARLY else None,
                prefill=draw.choice(prefills) if stage not in EARLY else None,
                decode=draw.choice(decodes) if stage not in EARLY else None,
            )
            for number, stage in enumerate(stages)
        ]

    def next(self) -> dict[str, Any]:
        self.second += 1
        requests = self._whereabouts()
        at: dict[str | None, int] = {}
        for request in requests:
            if request.stage in (Stage.PREFILL, Stage.DECODE):
                place = request.prefill if request.stage is Stage.PREFILL else request.decode
                at[place] = at.get(place, 0) + 1
        states = dict(self.unready)
        snapshot = Snapshot(
            term=1,
            version=self.second,
            engines=tuple(
                EngineEntry(
                    info=info,
                    pool=info.engine_id.rpartition("-")[0],
                    ready=states.get(info.engine_id) != "starting",
                    load=self._load(info, at.get(info.address, 0)),
                )
                for info in self._engines
            ),
            encoders=tuple(
                EncoderEntry(info=info, queued_patches=self._random.randrange(900) if requests else 0)
                for info in self._encoders
            ),
            preprocessors=tuple(self._preprocessors),
            loading=self.loading,
            pools=self.pools,
            decisions=self.decisions,
        )
        speaking = {info.incarnation for info in self._engines if states.get(info.engine_id) != "silent"}
        status = cluster_status(
            snapshot,
            model="baidu/ERNIE-4.5-VL-28B-A3B-Thinking",
            missing=self.missing,
            requests=requests,
            latency=self._latency(len(requests)),
            slo=self.slo,
            speaking=speaking,
        )
        return json.loads(json.dumps({name: value for name, value in status.items() if name not in self.without}))  # type: ignore[no-any-return]

    def _latency(self, active: int) -> Latency:
        if self.requests == 0:
            return Latency(window_s=60.0, count=0)
        shape = self.slow * (0.7 + 0.5 * active / self.requests) * self._random.uniform(0.95, 1.05)

        def of(middle: float) -> Percentiles:
            return Percentiles(p50=middle * shape, p95=middle * shape * 2.1, p99=middle * shape * 3.4)

        met = None if self.slo == NOTHING_SET else max(0.0, 1.02 - 0.05 * shape)
        return Latency(window_s=60.0, count=active * 11, ttft_s=of(0.31), tpot_s=of(0.021), e2e_s=of(5.2), slo_met=met)

    @property
    def engine_ids(self) -> list[str]:
        return [info.engine_id for info in self._engines]


def small(requests: int, **options: Any) -> Simulated:
    """A laptop's cluster."""
    pools = scales(("preprocessor", 1, 1, 1), ("vision_encoder", 1, 1, 1), ("engine", 2, 2, 2))
    feed = Simulated(
        nodes=1, engines=(("engine", PREFILL, 1), ("engine", DECODE, 1)), requests=requests, pools=pools, **options
    )
    feed.decisions = tuple(
        decision(number, 62 - number, "fleet", pool, subject, "joined")
        for number, (pool, subject) in enumerate(
            [
                ("preprocessor", feed._preprocessors[0].incarnation),
                ("vision_encoder", feed._encoders[0].encoder_id),
                *(("engine", name) for name in feed.engine_ids),
            ],
            1,
        )
    )
    return feed


def eight(requests: int) -> Simulated:
    """A node of eight GPUs, and one more."""
    feed = Simulated(
        nodes=2,
        engines=(("engine", PREFILL, 3), ("engine", DECODE, 5)),
        requests=requests,
        encoders=2,
        preprocessors=4,
        pools=scales(
            ("preprocessor", 5, 0, 8),
            ("vision_encoder", 2, 1, 4),
            ("engine", 9, 4, 12),
        ),
        loading=(LoadingEntry(pool="engine", role=DECODE, ranks=((31 * GB, 44 * GB),)),),
        slow=1.6,
        slo=Slo(ttft_s=2.0, tpot_s=0.1),
    )
    ids = feed.engine_ids
    feed.unready = ((ids[2], "draining"),)
    feed.decisions = (
        decision(31, 340, "fleet", "engine", ids[3], "joined"),
        decision(32, 201, "scale", "preprocessor", "preprocessor", "4 -> 5", "oldest waits 2.4 s, over 1 s for 10 s"),
        decision(33, 122, "fleet", "engine", "engine-q81xv0c2", "lost"),
        decision(34, 64, "scale", "engine", "engine", "8 -> 9", "KV of decode engines 91% full, over 85% for 15 s"),
        decision(
            35, 12, "role", "engine", ids[2], "prefill -> decode", "KV of decode engines 93% full, 90% is too much"
        ),
    )
    return feed


def large(requests: int) -> Simulated:
    """A hundred engines on twelve nodes."""
    feed = Simulated(
        nodes=12,
        engines=(("prefill", PREFILL, 28), ("decode", DECODE, 62), ("mixed", COLOCATED, 10)),
        requests=requests,
        encoders=12,
        preprocessors=24,
        pools=scales(
            ("preprocessor", 24, 4, 48),
            ("vision_encoder", 14, 2, 24),
            ("prefill", 28, 8, 40),
            ("decode", 64, 16, 80),
            ("mixed", 10, 10, 10),
        ),
        loading=(
            LoadingEntry(pool="decode", role=DECODE, ranks=((5 * GB, 8 * GB), (3 * GB, 8 * GB))),
            LoadingEntry(pool="decode", role=DECODE),
        ),
        slo=Slo(ttft_s=1.0),
    )
    ids = feed.engine_ids
    feed.unready = ((ids[3], "draining"), (ids[40], "silent"), (ids[95], "starting"))
    feed.decisions = (
        *(decision(number, 700 - 4 * number, "fleet", "decode", ids[30 + number], "joined") for number in range(1, 40)),
        decision(40, 300, "scale", "decode", "decode", "62 -> 64", "KV of decode engines 87% full, over 85% for 15 s"),
        decision(41, 95, "scale", "vision_encoder", "vision_encoder", "12 -> 14", "9400 patches queued for each"),
        decision(42, 20, "role", "prefill", ids[3], "prefill -> decode", "by hand"),
    )
    return feed
