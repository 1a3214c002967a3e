"""Runs one long reply over gRPC through each given address and prints how they go, as JSON lines.

    python streams.py TOKENS TIMEOUT_S ADDRESS ADDRESS ...

A line has the stream's index and address, its tokens so far and, when it is over, how it ended: one line at the first
token, one every 100 and a last one. It runs on the operator's machine, with the Python client of the package.
"""

from __future__ import annotations

import asyncio
import json
import sys

from cluster.client import AsyncClient, ClientError, generate_request, user_message
from ernie_serving.v1 import inference_pb2

EVERY = 100
APART_S = 0.5
"""Between two streams: the router spreads them over engines by what these last said of their load."""


async def stream(index: int, address: str, tokens: int, timeout_s: float) -> None:
    request = generate_request(
        user_message("Tell me about numbers."),
        max_tokens=tokens,
        ignore_eos=True,
        temperature=0,
        return_token_ids=True,
        # What one engine has cached must not draw them all there.
        cache_salt=f"stream {index}",
    )
    count, end = 0, "nothing"

    def tell(end: str | None) -> None:
        print(json.dumps({"stream": index, "address": address, "tokens": count, "end": end}), flush=True)

    try:
        async with AsyncClient(address, retries=0, own_connection=True) as client:
            async for response in client.stream_generate(request, timeout_s=timeout_s):
                before, count = count, count + len(response.delta.token_ids)
                if count // EVERY > before // EVERY or (count and not before):
                    tell(None)
                if response.HasField("choice_finished"):
                    end = inference_pb2.FinishReason.Name(response.choice_finished.finish_reason)
    except ClientError as error:
        end = f"{error.code.name} {error.reason}"
    tell(end)


async def main(tokens: int, timeout_s: float, addresses: list[str]) -> None:
    async with asyncio.TaskGroup() as group:
        for index, address in enumerate(addresses):
            group.create_task(stream(index, address, tokens, timeout_s))
            await asyncio.sleep(APART_S)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
