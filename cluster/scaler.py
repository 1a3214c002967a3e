"""The pools of a cluster and how many replicas each is to have: what the planner remembers of them."""

from __future__ import annotations

from collections.abc import Mapping

from actors.types import EngineRole
from cluster.autoscaling import Memory, Scaling, bounds_of, decide, see
from cluster.config import PREPROCESSORS, ROUTERS, VISION_ENCODERS, ClusterConfig
from cluster.registry import PoolScale, Snapshot
from cluster.scaling_policy import DECISION, TARGET, TERM, Echo, newest


class Scaler:
    """Of one planner. Until ``begin`` it only listens: an earlier planner may have decided something."""

    def __init__(self, config: ClusterConfig, term: int) -> None:
        self._config = config
        self._term = term
        self._bounds = bounds_of(config)
        self._counts = {
            ROUTERS: config.router.replicas,
            PREPROCESSORS: config.preprocessor.replicas,
            VISION_ENCODERS: config.vision_encoder.replicas,
        }
        self._counts |= {pool.name: pool.replicas for pool in config.pools}
        self._memories: dict[str, Memory] = {}
        self._heard: dict[str, Echo] = {}
        self._numbers = dict.fromkeys(self._bounds, 0)
        """Of the last decision about each."""
        self._number = 0

    def target(self, pool: str) -> int:
        return self._memories[pool].target if pool in self._memories else self._counts[pool]

    def pools(self) -> tuple[PoolScale, ...]:
        """Every pool of workers; those that do not scale have one count for everything."""
        return tuple(
            PoolScale(
                name=name,
                target=self.target(name),
                min=count if name not in self._bounds else self._bounds[name].min_replicas,
                max=count if name not in self._bounds else self._bounds[name].max_replicas,
            )
            for name, count in self._counts.items()
        )

    def begin(self) -> None:
        """From now on it decides. It goes on from what replicas heard last; where none heard anything, nothing was
        decided yet."""
        for name, bounds in self._bounds.items():
            target = int(self._heard.get(name, {}).get(TARGET, self._counts[name]))
            self._memories[name] = Memory(target=min(bounds.max_replicas, max(bounds.min_replicas, target)))

    def answer(self, pool: str, known: Echo) -> tuple[Echo, Scaling | None]:
        """What a replica is to echo, which has heard ``known``. One that has heard nothing and belongs to a pool that
        is to have none was started by Serve, because somebody asks for it: the pool has one again."""
        memory = self._memories.get(pool)
        if memory is None:
            self._heard[pool] = newest([known, self._heard.get(pool, {})])
            return known, None
        scaling = None
        if memory.target == 0 and not known:
            scaling = Scaling(pool=pool, former=0, target=1, role=None, why="a request came")
            self._set(pool, Memory(target=1))
        return {TERM: self._term, DECISION: self._numbers[pool], TARGET: self.target(pool)}, scaling

    def decide(self, snapshot: Snapshot, wanted: Mapping[str, Mapping[EngineRole, int]], now: float) -> list[Scaling]:
        """What changes now. ``wanted``: engines of each pool by role."""
        decided = []
        for pool, seen in see(snapshot, self._config, wanted, self._memories, now).items():
            memory, scaling = decide(seen, self._bounds[pool], self._memories[pool], now)
            if scaling is None:
                self._memories[pool] = memory
            else:
                self._set(pool, memory)
                decided.append(scaling)
        return decided

    def _set(self, pool: str, memory: Memory) -> None:
        self._number += 1
        self._numbers[pool] = self._number
        self._memories[pool] = memory
