"""How long pools take to follow a step of load: to decide, and to have the replicas. See README.md beside this file.

A cluster of small random weights on this machine's CPUs, every pool with one replica and bounds that a few requests
exceed. First long replies are asked for, then questions about large pictures, whose files take long to read, then about
small ones that are enlarged, whose patches take long to encode, then nothing, then once more something.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

from cluster.builtin import locate
from cluster.config import parse
from cluster.launch import http_url, running_cluster
from cluster.ports import free_ports

DELAYS = {"upscale_delay_s": 1.0, "downscale_delay_s": 5.0}
ENGINE = {"kv_cache_gib": 0.02, "max_num_seqs": 16, "num_cpus": 0.1}
CONFIG: dict[str, Any] = {
    "model": "random",
    "dtype": "float32",
    "preprocessor": {
        "num_cpus": 0.1,
        "concurrency": 1,
        "patch_bytes": 256 << 20,
        "autoscaling": {"min_replicas": 0, "max_replicas": 2, "queue_age_s": 0.2, **DELAYS},
    },
    "vision_encoder": {
        "num_cpus": 0.1,
        "embedding_bytes": 256 << 20,
        "cache_bytes": 0,
        "autoscaling": {"max_replicas": 2, "queued_patches": 1024, **DELAYS},
    },
    "engines": [
        {
            "name": "prefill",
            "roles": {"prefill": 1},
            **ENGINE,
            "autoscaling": {"max_replicas": 2, "queued_tokens": 256, **DELAYS},
        },
        {
            "name": "decode",
            "roles": {"decode": 1},
            **ENGINE,
            "autoscaling": {"max_replicas": 2, "kv_use": 0.1, **DELAYS},
        },
    ],
}
SIDE = 896
"""Of a picture as it is encoded, in pixels."""
FILE_SIDES = {"pictures": SIDE, "enlarged": 56}
POLL_S = 0.1
DOWN_LIMIT_S = 120.0


@dataclass
class Steps:
    """Of one pool: seconds after a step of load until its target changed, and until there were so many replicas."""

    decided: float | None = None
    effective: float | None = None


@dataclass
class Watch:
    """What ``/status`` says of pools, again and again."""

    url: str
    now: dict[str, dict[str, Any]] = field(default_factory=dict)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    began: float = 0.0
    before: dict[str, int] = field(default_factory=dict)
    steps: dict[str, Steps] = field(default_factory=dict)

    def begin(self) -> None:
        """A step of load begins now."""
        self.began = time.monotonic()
        self.before = {name: pool["target"] for name, pool in self.now.items()}
        self.steps = {name: Steps() for name in self.now}

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    self.see((await client.get(f"{self.url}/status")).json())
                await asyncio.sleep(POLL_S)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns when it holds, and at last after a while."""
        for _ in range(int(DOWN_LIMIT_S / POLL_S)):
            if condition():
                return
            await asyncio.sleep(POLL_S)

    def see(self, status: dict[str, Any]) -> None:
        self.now = {pool["name"]: pool for pool in status["pools"]}
        self.decisions = status["decisions"]
        for name, steps in self.steps.items():
            pool, passed = self.now[name], time.monotonic() - self.began
            if steps.decided is None and pool["target"] != self.before[name]:
                steps.decided = passed
            if steps.decided is not None and steps.effective is None and pool["replicas"] == pool["target"]:
                steps.effective = passed

    def told(self) -> dict[str, dict[str, float | int]]:
        return {
            name: {
                "from": self.before[name],
                "to": self.now[name]["target"],
                "decided_s": round(steps.decided, 1),
                "effective_s": round(steps.effective, 1) if steps.effective is not None else -1,
            }
            for name, steps in self.steps.items()
            if steps.decided is not None
        }


def picture(seed: int, side: int) -> str:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BILINEAR).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def bodies(client: int, pictures: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    number = 0
    while True:
        number += 1
        text: Any = f"client {client} asks question {number}: " + "what is this? " * 4
        if pictures:
            url = {"url": pictures[(client + number) % len(pictures)]}
            text = [{"type": "image_url", "image_url": url}, {"type": "text", "text": text}]
        yield {
            "messages": [{"role": "user", "content": text}],
            "stream": True,
            "max_tokens": 4 if pictures else 200,
            "ignore_eos": True,
            "cache_salt": f"{client}.{number}",
            "mm_processor_kwargs": {"image_min_pixels": SIDE * SIDE},
        }


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """Empty if all went well, else what went wrong."""
    tokens = 0
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        return str(chunk["error"])
                    tokens += bool(chunk["choices"] and chunk["choices"][0]["finish_reason"] == "length")
    except httpx.HTTPError as error:
        return repr(error)
    return "" if response.status_code == 200 and tokens == 1 else f"{response.status_code}, {tokens} ends"


async def load(url: str, clients: int, seconds: float, pictures: Sequence[str]) -> tuple[int, list[str]]:
    """Requests that ended and what went wrong, of so many clients that ask one after the other."""
    end = time.monotonic() + seconds
    wrong: list[str] = []
    count = 0

    async def one(number: int) -> None:
        nonlocal count
        async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:
            for body in bodies(number, pictures):
                if time.monotonic() > end:
                    return
                error = await ask(client, body)
                count += 1
                wrong.extend([error] if error else [])

    await asyncio.gather(*(one(number) for number in range(clients)))
    return count, wrong


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    watch = Watch(url)
    watching = asyncio.create_task(watch.run())
    await watch.until(lambda: bool(watch.now))
    found: dict[str, Any] = {}
    for kind in ("replies", *FILE_SIDES):
        asked = range(2 * options.clients if kind in FILE_SIDES else 0)
        pictures = [picture(number, FILE_SIDES[kind]) for number in asked]
        watch.begin()
        count, wrong = await load(url, options.clients, options.seconds, pictures)
        found[kind] = {"requests": count, "failed": wrong, "pools": watch.told()}
    watch.begin()
    await watch.until(lambda: all(pool["replicas"] == pool["min"] for pool in watch.now.values()))
    found["idle"] = {"pools": watch.told()}
    watch.begin()
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:
        began = time.monotonic()
        error = await ask(client, next(bodies(999)))
    found["first"] = {
        "requests": 1,
        "failed": [error] if error else [],
        "pools": watch.told(),
        "seconds": round(time.monotonic() - began, 1),
    }
    found["decisions"] = watch.decisions
    watching.cancel()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each step of load")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    http_port, grpc_port = free_ports(2)
    config = locate(parse(CONFIG | {"http_port": http_port, "grpc_port": grpc_port}, "benchmark"))
    with running_cluster(config, lambda line: print(line, file=sys.stderr)):
        found = asyncio.run(measure(http_url(config), options))
    if options.json:
        print(json.dumps(found))
    else:
        for step, result in found.items():
            if step != "decisions":
                print(step, {name: value for name, value in result.items() if name != "pools"})
                for pool, times in result["pools"].items():
                    print("  ", pool, times)
    failed = sum(len(result.get("failed", ())) for step, result in found.items() if step != "decisions")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
