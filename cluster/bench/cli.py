"""The options of ``ernie bench``. Everything else is imported when it runs."""

from __future__ import annotations

import math
from typing import Annotated

import typer


def bench(
    url: Annotated[
        str | None, typer.Option(help="http://HOST:PORT or grpc://HOST:PORT of a running server.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model; there is only one.")] = None,
    num_requests: Annotated[int, typer.Option(help="Requests to measure.", min=1)] = 100,
    rate: Annotated[
        float | None,
        typer.Option(help="Open loop: conversations a second, Poisson; inf sends all at once (the default).", min=1e-6),
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Closed loop: conversations at a time.", min=1)] = None,
    mix: Annotated[str, typer.Option(help="Shares of text, image and video requests: text=0.8,image=0.2.")] = "text",
    input_tokens: Annotated[
        str, typer.Option(help="Text tokens of a turn: N, uniform:LOW,HIGH, normal:MEAN,DEVIATION, exponential:MEAN.")
    ] = "256",
    output_tokens: Annotated[str, typer.Option(help="Bound on generated tokens, in the same forms.")] = "64",
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Generate exactly that many tokens.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Unset: the server's default.", min=0, max=2)] = None,
    turns: Annotated[int, typer.Option(help="Turns of a conversation; later ones repeat what was said.", min=1)] = 1,
    shared_prefix_tokens: Annotated[int, typer.Option(help="Length of a system prompt requests share.", min=0)] = 0,
    prefix_groups: Annotated[int, typer.Option(help="Different system prompts, used in turn.", min=1)] = 1,
    images_per_request: Annotated[int, typer.Option(help="Pictures in an image request.", min=1)] = 1,
    image_size: Annotated[str, typer.Option(help="Pixels of a picture.")] = "448x448",
    video_size: Annotated[str, typer.Option(help="Pixels of a video.")] = "224x224",
    video_seconds: Annotated[float, typer.Option(help="Length of a video.", min=0.1, max=600)] = 2.0,
    video_fps: Annotated[int, typer.Option(help="Frames per second of a video.", min=1, max=60)] = 4,
    distinct_media: Annotated[
        int | None, typer.Option(help="So many different pictures and videos. Unset: never the same twice.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same requests and arrivals.", min=0)] = 0,
    warmup: Annotated[int, typer.Option(help="Requests sent before, not measured.", min=0)] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds one request may take.", min=0.1, max=86_400)] = 600.0,
    slo: Annotated[str | None, typer.Option(help="Count requests within bounds: ttft=500ms,tpot=50ms,e2e=5s.")] = None,
    json_: Annotated[
        str | None, typer.Option("--json", help="Write one JSON object to a file, or to standard output with -.")
    ] = None,
) -> None:
    """Measures a running server under load: latencies, throughput and goodput."""
    from rich.console import Console

    from cluster.bench.run import EXIT_USAGE, START_HINT, run_bench
    from cluster.bench.settings import BenchSettings, parse_distribution, parse_mix, parse_size, parse_slo

    try:
        if url is None:
            raise ValueError(f"--url is missing: {START_HINT}")
        settings = BenchSettings(
            url=url,
            model=model,
            num_requests=num_requests,
            rate=math.inf if rate is None and concurrency is None else rate,
            concurrency=concurrency,
            mix=parse_mix(mix),
            input_tokens=parse_distribution(input_tokens, "--input-tokens"),
            output_tokens=parse_distribution(output_tokens, "--output-tokens"),
            ignore_eos=ignore_eos,
            temperature=temperature,
            turns=turns,
            shared_prefix_tokens=shared_prefix_tokens,
            prefix_groups=prefix_groups,
            images_per_request=images_per_request,
            image_size=parse_size(image_size, "--image-size"),
            video_size=parse_size(video_size, "--video-size"),
            video_seconds=video_seconds,
            video_fps=video_fps,
            distinct_media=distinct_media,
            seed=seed,
            warmup=warmup,
            timeout_s=timeout,
            slo=parse_slo(slo) if slo else {},
        )
    except ValueError as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        raise typer.Exit(EXIT_USAGE) from None
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    raise typer.Exit(run_bench(settings, json_to=json_, console=console, errors=errors))
