"""How long a cancelled request still holds anything, anywhere.

A cluster of one preprocessor, one encoder, one prefill and one decode engine (nano) gets requests with pictures, one at
a time. Each is cancelled at a random moment of a stage, by turns by leaving and by CancelGeneration, and the whole
cluster is audited until no part holds anything for a request: patches, embeddings, leases, queues, KV blocks,
reservations. The time counts from the cancellation to the arrival of the audit that found nothing, so an audit's own
time is in it. The stage is the one the router tells of afterwards. Trials go on until every stage was met often enough.

    python benchmarks/cancel_to_free.py --json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import random
import statistics
import sys
import time
from collections import deque
from contextlib import aclosing

import httpx
import numpy as np
from PIL import Image
from small_cluster import percentile, small_cluster

from actors.types import Stage
from cluster.client import AsyncClient, generate_request
from cluster.client import errors as client_errors
from cluster.client.requests import user_message
from ernie_serving.v1 import inference_pb2

TIMEOUT_S = 60.0
CLEAN_LIMIT_S = 10.0
GOAL_MS = 250.0
ORDER = {stage: place for place, stage in enumerate(Stage)}
STAGES = (Stage.PREPROCESS, Stage.ENCODE, Stage.PREFILL, Stage.TRANSFER, Stage.DECODE)
PICTURES = 3
WORDS = 600
TOKENS = 400
LATELY = 9
DECODE_S = 0.2
"""Of the decoding that a request is cancelled in."""
SLACK_S = 0.01
"""A request comes to the router a little later than it was sent, and stages last longer or shorter than usual."""


def question(number: int, draw: random.Random) -> inference_pb2.GenerateRequest:
    """Pictures no request had before, and text: every pool has work to do."""
    pictures = []
    for _ in range(PICTURES):
        pixels = np.frombuffer(draw.randbytes(12 * 12 * 3), np.uint8).reshape(12, 12, 3)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((420, 420)).save(file, "PNG")
        pictures.append(file.getvalue())
    text = " ".join(str(draw.randrange(1000)) for _ in range(WORDS))
    request = generate_request(user_message(text, images=pictures), max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    request.request_id = f"trial-{number}"
    return request


class Trials:
    """One request after the other at a running cluster."""

    def __init__(self, client: AsyncClient, http: httpx.AsyncClient, seed: int) -> None:
        self._client = client
        self._http = http
        self._draw = random.Random(seed)
        self._count = 0
        self._lasted_s: dict[Stage, deque[float]] = {}
        """How long requests were in each stage lately."""

    async def run_whole(self) -> None:
        """Learns how long the stages before the first token take."""
        request = self._next()
        async with aclosing(self._client.stream_generate(request, timeout_s=TIMEOUT_S)) as events:
            async for event in events:
                if event.WhichOneof("event") == "delta":
                    break
        await self._wait_clean()
        assert await self._ended_in(request) is not None

    async def cancel_one(self, wanted: Stage) -> tuple[str, float]:
        """The stage it was cancelled in, which may be another one than was aimed at, and the seconds until nothing was
        held.
        """
        request = self._next()
        asking = asyncio.create_task(self._ask(request))
        await asyncio.sleep(self._moment_in(wanted))
        began = time.perf_counter()
        try:
            if self._count % 2:
                await self._client.cancel(request.request_id)
            else:
                asking.cancel()
        except client_errors.NotFoundError:
            asking.cancel()  # it is still on its way to the router
        await self._wait_clean()
        took = time.perf_counter() - began
        with contextlib.suppress(asyncio.CancelledError, client_errors.CancelledError):
            await asking
        return await self._ended_in(request) or "not admitted", took

    async def _ended_in(self, request: inference_pb2.GenerateRequest) -> str | None:
        """The stage; None if the router never saw the request."""
        reply = await self._http.get(f"/requests/{request.request_id}/explain")
        if reply.status_code == httpx.codes.NOT_FOUND:
            return None
        story = reply.raise_for_status().json()
        ended_in: str = next((note["stage"] for note in story["notes"] if note["what"] == "cancelled"), "over")
        for stage, seconds in story["exposed_s"].items():
            if stage != ended_in:
                self._lasted_s.setdefault(Stage(stage), deque(maxlen=LATELY)).append(seconds)
        return ended_in

    def _moment_in(self, wanted: Stage) -> float:
        """Seconds after the start of a request at which it should be in that stage: they follow each other in order."""
        typical = {stage: statistics.median(times) for stage, times in self._lasted_s.items()}
        before = sum(seconds for stage, seconds in typical.items() if ORDER[stage] < ORDER[wanted])
        return before + self._draw.random() * typical.get(wanted, DECODE_S) + self._draw.uniform(0.0, SLACK_S)

    def _next(self) -> inference_pb2.GenerateRequest:
        self._count += 1
        return question(self._count, self._draw)

    async def _ask(self, request: inference_pb2.GenerateRequest) -> None:
        async with aclosing(self._client.stream_generate(request, timeout_s=TIMEOUT_S)) as events:
            async for _ in events:
                pass

    async def _wait_clean(self) -> None:
        deadline = time.perf_counter() + CLEAN_LIMIT_S
        while True:
            status = (await self._http.get("/status", params={"audit": "true"})).raise_for_status().json()
            held = {
                name: audit
                for name, audit in status["audits"].items()
                if any(audit["held"].values()) or audit["problem"]
            }
            if not held:
                return
            if time.perf_counter() > deadline:
                raise RuntimeError(f"still held after {CLEAN_LIMIT_S:g} s: {held}")


async def measure(url: str, address: str, *, each: int, limit_s: float, seed: int) -> dict[str, object]:
    found: dict[str, list[float]] = {}
    audits: list[float] = []
    draw = random.Random(seed)
    async with (
        AsyncClient(address) as client,
        httpx.AsyncClient(base_url=url, timeout=CLEAN_LIMIT_S, trust_env=False) as http,
    ):
        trials = Trials(client, http, seed)
        for _ in range(3):
            await trials.run_whole()
        end = time.monotonic() + limit_s
        for number in itertools.count():
            if time.monotonic() > end or all(len(found.get(stage, [])) >= each for stage in STAGES):
                break
            wanted = min(STAGES, key=lambda stage: len(found.get(stage, []))) if number % 2 else draw.choice(STAGES)
            stage, took = await trials.cancel_one(wanted)
            found.setdefault(stage, []).append(took)
            began = time.perf_counter()
            await http.get("/status", params={"audit": "true"})
            audits.append(time.perf_counter() - began)
            if number % 50 == 49:
                print({stage: len(times) for stage, times in found.items()}, file=sys.stderr)
    counted = [took for stage in STAGES for took in found.get(stage, [])]
    return {
        "trials": len(counted),
        "all": _told(counted),
        "stages": {stage: _told(times) for stage, times in sorted(found.items())},
        "audit": _told(audits),
        "goal_p99_ms": GOAL_MS,
        "complete": all(len(found.get(stage, [])) >= each for stage in STAGES),
    }


def _told(times: list[float]) -> dict[str, float]:
    return {
        "count": len(times),
        "p50_ms": round(1e3 * percentile(times, 0.5), 1),
        "p99_ms": round(1e3 * percentile(times, 0.99), 1),
        "max_ms": round(1e3 * max(times), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=20, help="trials of every stage at least")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which it ends with what it has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    engines = [{"roles": {"prefill": 1, "decode": 1}, "kv_cache_gib": 0.05}]
    with small_cluster({"engines": engines}) as (url, address):
        work = measure(url, address, each=options.each, limit_s=options.limit, seed=options.seed)
        found = asyncio.run(work)
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name}: {value}")
    return 0 if found["complete"] else 1


if __name__ == "__main__":
    sys.exit(main())
