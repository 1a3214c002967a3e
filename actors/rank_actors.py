"""The further ranks of an engine group as Ray actors, in all bundles of the leader's placement group but the first.

The leader owns them: when its process ends, however it does, Ray ends them, and they end by themselves if Ray is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.config import EngineReplicaConfig
from actors.engine.group.meeting import Invitation
from actors.engine_group import EngineGroup, balance_config
from actors.engine_rank import rank_main
from actors.parallel.world import Seat
from actors.types import EngineRole
from actors.wire.channels import node_address


class EngineRank:
    """A process for one rank."""

    def host(self) -> str:
        """Of its node."""
        return node_address()

    def run(
        self,
        invitation: Invitation,
        seat: Seat,
        config: EngineReplicaConfig,
        role: EngineRole,
        find_model: Callable[[], str],
    ) -> None:
        rank_main(invitation, seat, config, role, find_model)


@dataclass(frozen=True, slots=True)
class _ActorProcess:
    """Implements ``RankProcess``: it is alive as long as ``run`` has not ended."""

    actor: Any
    ended: Any

    def is_alive(self) -> bool:
        return not self._wait(0.0)

    def join(self, timeout: float | None = None) -> None:
        if self._wait(timeout):
            self.kill()  # Ray keeps an actor's process for further calls.

    def kill(self) -> None:
        ray.kill(self.actor)

    def _wait(self, timeout: float | None) -> bool:
        done, _ = ray.wait([self.ended], timeout=timeout)
        return bool(done)


def start_actors(
    find_model: Callable[[], str], config: EngineReplicaConfig, role: EngineRole, host: str
) -> EngineGroup:
    """A group whose leader is this actor. Its placement group has a bundle for every rank, which the rank takes whole.

    ``find_model``: the directory of the model on the node of whoever calls it; it may have to be fetched.
    ``host``: where the leader listens. The others listen on their own node's address if this is its node's, else (where
    one machine is all there is) on the same.
    """
    placement_group = get_current_placement_group()
    if placement_group is None or placement_group.bundle_count != config.ranks:
        raise RuntimeError(f"the placement group of an engine of {config.ranks} ranks has a bundle for each")
    actors: list[Any] = []
    for rank in range(1, config.ranks):
        bundle = placement_group.bundle_specs[rank]
        place = PlacementGroupSchedulingStrategy(placement_group, placement_group_bundle_index=rank)
        options = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0), "scheduling_strategy": place}
        actors.append(ray.remote(EngineRank).options(**options).remote())
    hosts = [host] * config.ranks
    if host == node_address():
        hosts[1:] = ray.get([actor.host.remote() for actor in actors])

    def start(invitation: Invitation, seat: Seat) -> _ActorProcess:
        actor = actors[seat.rank - 1]
        return _ActorProcess(actor, actor.run.remote(invitation, seat, config, role, find_model))

    try:
        return EngineGroup(hosts, start, balance=balance_config(config))
    except BaseException:
        for actor in actors:
            ray.kill(actor)
        raise
