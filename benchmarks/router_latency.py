"""What the way through a cluster adds to an engine's own latency.

A cluster of one preprocessor, one encoder, one router and one colocated engine (nano) gets the same prompts of token
ids in turns: over its gRPC API, and at the engine itself, over the stream that the router uses too. One request runs at
a time. The difference is everything between a client and an engine: the proxy, the preprocessor and the router. What
the preprocessor takes is the router's own count of that stage, the call of it included. What proxy and Serve take is
measured beside: a call that the router's process answers at once from what it knows (ListModels). The rest is the
router's: checks, choice, submission, and whatever both ways do not share.

    python benchmarks/router_latency.py --json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import grpc.aio
import httpx
from small_cluster import percentile, small_cluster

from actors.reports import EncoderInfo, EngineInfo, LoadReport
from actors.types import AttemptMode, EngineRequest, EngineRole, SamplingParams, SequenceKey
from actors.wire import convert
from actors.wire.channels import open_channel
from cluster.client import AsyncClient
from cluster.policy.choose import choose
from cluster.policy.views import Demand, EncoderView, EngineView
from ernie_serving.internal.v1 import engine_link_pb2 as pb
from ernie_serving.internal.v1 import engine_link_pb2_grpc
from ernie_serving.v1 import inference_pb2

WARM_UP = 20
TIMEOUT_S = 60.0
GOAL_MS = 3.0


@dataclass(kw_only=True)
class Side:
    """Seconds of each request of one way."""

    first_s: list[float] = field(default_factory=list)
    last_s: list[float] = field(default_factory=list)

    def told(self) -> dict[str, float]:
        return {
            f"{name}_{point}_ms": round(1e3 * percentile(values, share), 3)
            for name, values in (("first_token", self.first_s), ("last_token", self.last_s))
            for point, share in (("p50", 0.5), ("p99", 0.99))
        }


class DirectEngine:
    """An engine, spoken to as a router does."""

    def __init__(self, call: grpc.aio.StreamStreamCall[pb.LinkRequest, pb.LinkResponse], epoch: int) -> None:
        self._call = call
        self._epoch = epoch
        self._count = 0

    @classmethod
    @asynccontextmanager
    async def at(cls, address: str) -> AsyncIterator[DirectEngine]:
        async with open_channel(address) as channel:
            stub: engine_link_pb2_grpc.EngineLinkServiceAsyncStub = engine_link_pb2_grpc.EngineLinkServiceStub(channel)
            call = stub.Link()
            hello = pb.RouterHello(protocol_version=convert.PROTOCOL_VERSION, router_incarnation="benchmark")
            await call.write(pb.LinkRequest(hello=hello))
            answer = await call.read()
            beats = asyncio.create_task(_heartbeats(call))
            try:
                yield cls(call, answer.hello.epoch)
            finally:
                beats.cancel()
                call.cancel()

    async def ask(self, prompt: Sequence[int], tokens: int) -> tuple[float, float]:
        """Seconds until the first and the last token."""
        self._count += 1
        key = SequenceKey(f"direct-{self._count}", 0, 0)
        now = time.time()
        request = EngineRequest(
            prompt_ids=tuple(prompt),
            sampling=SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True),
            seed=0,
            arrival_s=now,
            deadline_s=now + TIMEOUT_S,
        )
        began = time.perf_counter()
        await self._call.write(
            pb.LinkRequest(
                submit=pb.Submit(
                    key=convert.key_to_proto(key),
                    request=convert.request_to_proto(request),
                    mode=convert.MODES[AttemptMode.COLOCATED],
                    epoch=self._epoch,
                )
            )
        )
        first = 0.0
        while True:
            answer = await self._call.read()
            if answer.WhichOneof("message") == "attempt_ended":
                raise RuntimeError(f"the engine ended the request: {answer.attempt_ended.message}")
            for token in answer.step_output.tokens:
                first = first or time.perf_counter() - began
                if token.index == tokens - 1:
                    return first, time.perf_counter() - began


async def _heartbeats(call: grpc.aio.StreamStreamCall[pb.LinkRequest, pb.LinkResponse]) -> None:
    while True:
        await asyncio.sleep(1.0)
        await call.write(pb.LinkRequest(heartbeat=pb.RouterHeartbeat()))


async def through_cluster(
    client: AsyncClient, prompt: Sequence[int], tokens: int, stages: dict[str, list[float]]
) -> tuple[float, float]:
    """Seconds until the first and the last token; adds what the router counted by stage."""
    request = inference_pb2.GenerateRequest(
        prompt_token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling_params=inference_pb2.SamplingParams(temperature=0.0, max_output_token_count=tokens, ignore_eos=True),
        return_token_ids=True,
        return_timings=True,
    )
    began = time.perf_counter()
    first = 0.0
    count = 0
    last = 0.0
    async for event in client.stream_generate(request, timeout_s=TIMEOUT_S):
        if event.WhichOneof("event") == "delta":
            count += len(event.delta.token_ids)
            first = first or time.perf_counter() - began
            last = time.perf_counter() - began
        elif event.WhichOneof("event") == "finished":
            for stage in event.finished.timings.stages:
                stages.setdefault(_name(stage), []).append(stage.exposed_duration.ToTimedelta().total_seconds())
    if count != tokens:
        raise RuntimeError(f"{count} tokens came, not {tokens}")
    return first, last


def _name(stage: inference_pb2.StageTiming) -> str:
    return inference_pb2.Stage.Name(stage.stage).removeprefix("STAGE_").lower()


def decision_ms(engines: int = 100, encoders: int = 10, blocks: int = 64) -> float:
    """Median time of one choice among so many engines, half of each role, which all have the whole prompt cached."""
    names = tuple(str(number).encode() * 8 for number in range(blocks))
    load = LoadReport(step=0, running=0, waiting=0, free_blocks=900, total_blocks=1000, block_size=16, queued_tokens=0)
    views = [
        EngineView(
            info=EngineInfo(
                engine_id=f"engine-{number}",
                incarnation=str(number),
                address=f"10.0.0.{number % 25}:1",
                role=(EngineRole.PREFILL, EngineRole.DECODE)[number % 2],
                epoch=1,
                fingerprint="f",
                dtype="bfloat16",
                block_size=16,
                switches="",
                max_model_len=131072,
            ),
            load=replace(load, queued_tokens=97 * number % 3000),
            cached_blocks=frozenset(names),
        )
        for number in range(engines)
    ]
    places = [
        EncoderView(
            info=EncoderInfo(
                encoder_id=f"encoder-{number}",
                incarnation=str(number),
                address=f"10.0.0.{number}:2",
                fingerprint="f",
                dtype="bfloat16",
            )
        )
        for number in range(encoders)
    ]
    demand = Demand(
        token_count=16 * blocks + 6,
        prefix_hashes=lambda identity: names,
        units=((b"unit", 4096),),
        media_tokens=1024,
    )
    times = []
    for _ in range(200):
        began = time.perf_counter()
        choose(demand, views, places)
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


async def measure(engine: str, address: str, *, count: int, prompt_tokens: int, tokens: int) -> dict[str, object]:
    draw = random.Random(0)
    direct, routed = Side(), Side()
    stages: dict[str, list[float]] = {}
    hops: list[float] = []
    async with AsyncClient(address) as client, DirectEngine.at(engine) as link:
        for number in range(-WARM_UP, count):
            prompt = [draw.randrange(100, 500) for _ in range(prompt_tokens)]
            seen: dict[str, list[float]] = {}
            ways = [(direct, link.ask(prompt, tokens)), (routed, through_cluster(client, prompt, tokens, seen))]
            for side, asking in ways if number % 2 else ways[::-1]:
                first, last = await asking
                if number >= 0:
                    side.first_s.append(first)
                    side.last_s.append(last)
            began = time.perf_counter()
            await client.models()
            if number >= 0:
                hops.append(time.perf_counter() - began)
                for stage, values in seen.items():
                    stages.setdefault(stage, []).extend(values)
    added = {
        "first_token_p50_ms": 1e3 * (statistics.median(routed.first_s) - statistics.median(direct.first_s)),
        "last_token_p50_ms": 1e3 * (statistics.median(routed.last_s) - statistics.median(direct.last_s)),
    }
    preprocess_ms = 1e3 * statistics.median(stages["preprocess"])
    hop_ms = 1e3 * statistics.median(hops)
    return {
        "requests": count,
        "prompt_tokens": prompt_tokens,
        "output_tokens": tokens,
        "direct": direct.told(),
        "routed": routed.told(),
        "added": {name: round(value, 3) for name, value in added.items()},
        "stages_p50_ms": {stage: round(1e3 * statistics.median(values), 3) for stage, values in stages.items()},
        "proxy_hop_p50_ms": round(hop_ms, 3),
        "router_added_p50_ms": round(added["first_token_p50_ms"] - preprocess_ms - hop_ms, 3),
        "goal_ms": GOAL_MS,
        "decision_100_engines_p50_ms": round(decision_ms(), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    # Both sides compute every prompt whole.
    engines = [{"roles": {"colocated": 1}, "prefix_caching": False, "kv_cache_gib": 0.05}]
    with contextlib.ExitStack() as stack:
        url, address = stack.enter_context(small_cluster({"engines": engines}))
        (engine,) = httpx.get(f"{url}/status", timeout=10.0, trust_env=False).json()["engines"]
        work = measure(
            engine["address"], address, count=options.requests, prompt_tokens=options.prompt, tokens=options.tokens
        )
        found = asyncio.run(work)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
