"""The ``ernie`` command. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cluster.bench.cli import bench
from cluster.cli_checkpoint import checkpoint_app
from cluster.eval.cli import eval_app

if TYPE_CHECKING:
    from cluster.config import ClusterConfig
    from cluster.serve_options import ServeOptions

app = typer.Typer(
    name="ernie",
    help="Serves ERNIE-4.5-VL on a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(eval_app, name="eval")

EXIT_INTERRUPTED = 130
"""How many of them ``ernie status`` shows."""
OTHER_PROGRAMS = "For command lines of vLLM and FastDeploy"
ABOUT = {
    "nano": "nano is the small built-in model: it knows coloured shapes, numbers and short clips, and nothing else.",
    "random": "random is a small checkpoint with RANDOM weights: it shows that all works; its answers are nonsense.",
}


@app.command()
def serve(
    model_argument: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The same as --model.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint directory, name on a hub, nano or random; nano when unset.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file; options given here win over it.")] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a model named by its repository.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float32 or float64.")] = None,
    compat: Annotated[str | None, typer.Option(help="original or transformers: whose rules to follow.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 when unset.")] = None,
    http_port: Annotated[
        int | None, typer.Option("--http-port", "--port", help="Port of the HTTP API; 8000 when unset.")
    ] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of the gRPC API; 9000 when unset.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve /metrics on this port, too; it is on the HTTP port anyway.")
    ] = None,
    allowed_media_domains: Annotated[
        list[str] | None, typer.Option(help="Host media may be fetched from; repeat for more.")
    ] = None,
    allowed_media_networks: Annotated[
        list[str] | None, typer.Option(help="Private network that allowed hosts may lie in; repeat for more.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt and reply together.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name clients ask for.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences of a step of an engine; 64 when unset.")] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step of an engine; 2048 when unset.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Share of a GPU's memory an engine may fill; 0.9 when unset.")
    ] = None,
    mm_processor_kwargs: Annotated[
        str | None, typer.Option(help='How media are prepared, as JSON: {"image_max_pixels": 1003520}.')
    ] = None,
    limit_mm_per_prompt: Annotated[
        str | None, typer.Option(help='Media of one request, as JSON: {"image": 100, "video": 4}.')
    ] = None,
    reasoning_parser: Annotated[
        str | None, typer.Option(help="ernie45, ernie-45-vl or ernie-45-vl-thinking: all the same here.")
    ] = None,
    tool_call_parser: Annotated[
        str | None, typer.Option(help="ernie45 (calls anywhere) or ernie-45-vl-thinking (calls before all text).")
    ] = None,
    tensor_parallel_size: Annotated[
        int, typer.Option(help="Only 1.", show_default=False, rich_help_panel=OTHER_PROGRAMS)
    ] = 1,
    quantization: Annotated[str | None, typer.Option(help="Not built yet.", rich_help_panel=OTHER_PROGRAMS)] = None,
    engine_worker_queue_port: Annotated[
        int | None, typer.Option(help="Changes nothing.", rich_help_panel=OTHER_PROGRAMS)
    ] = None,
    enable_mm: Annotated[
        bool, typer.Option("--enable-mm", help="Changes nothing.", rich_help_panel=OTHER_PROGRAMS)
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Changes nothing.", rich_help_panel=OTHER_PROGRAMS)
    ] = False,
    enable_auto_tool_choice: Annotated[
        bool, typer.Option("--enable-auto-tool-choice", help="Changes nothing.", rich_help_panel=OTHER_PROGRAMS)
    ] = False,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="Collector of OpenTelemetry traces, http://host:4317.")
    ] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Keep the logs of the session here.")] = None,
) -> None:
    """Starts a cluster on this machine and keeps it until Ctrl-C."""
    from cluster.launch import StopRequested, grpc_address, http_url, leave, metrics_url, running_cluster
    from cluster.serve_options import ServeOptions
    from cluster.session import StartFailed

    if model is not None and model_argument not in (None, model):
        _fail(f"model: {model_argument} and --model {model} differ: give one")
    options: dict[str, Any] = {
        "model": model or model_argument,
        "revision": revision,
        "dtype": dtype,
        "compat": compat,
        "host": host,
        "http_port": http_port,
        "grpc_port": grpc_port,
        "metrics_port": metrics_port,
        "otlp_endpoint": otlp_endpoint,
        "max_model_len": max_model_len,
        "served_model_name": served_model_name,
        "reasoning_parser": reasoning_parser,
        "tool_call_parser": tool_call_parser,
    }
    others = ServeOptions(
        max_num_seqs=max_num_seqs,
        max_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        mm_processor_kwargs=mm_processor_kwargs,
        limit_mm_per_prompt=limit_mm_per_prompt,
        tensor_parallel_size=tensor_parallel_size,
        quantization=quantization,
        engine_worker_queue_port=engine_worker_queue_port,
        enable_mm=enable_mm,
        trust_remote_code=trust_remote_code,
        enable_auto_tool_choice=enable_auto_tool_choice,
    )
    for notice in others.notices():
        typer.secho(notice, fg=typer.colors.YELLOW)
    settings = _config(config, options, allowed_media_domains, allowed_media_networks, others)
    try:
        with running_cluster(settings, typer.echo, log_dir=log_dir) as signals:
            url = http_url(settings)
            typer.echo(f"  HTTP  {url}/v1")
            typer.echo(f"  gRPC  {grpc_address(settings)}")
            typer.echo(f"  Metrics  {metrics_url(settings)}")
            typer.echo(f"Open {url}/ in a browser, or try:")
            typer.echo(f"  {_example(url)}")
            typer.echo(f'  {_command()} chat "Hello" --address {grpc_address(settings)}')
            typer.echo("Ctrl-C lets running requests finish and stops.")
            signals.wait()
    except StopRequested:
        typer.echo("Interrupted while starting.")
        leave(EXIT_INTERRUPTED)
    except StartFailed as error:
        _fail(str(error))


@app.command()
def demo(
    save: Annotated[Path | None, typer.Option(help="Keep the pictures and the clip in this directory.")] = None,
) -> None:
    """Starts a cluster on free ports, asks it about pictures and a clip, and stops it."""
    import httpx
    from rich.console import Console

    from cluster.client import ClientError
    from cluster.config import resolve
    from cluster.demo import run_demo
    from cluster.launch import StopRequested, leave
    from cluster.ports import free_ports
    from cluster.session import StartFailed

    http_port, grpc_port = free_ports(2)
    settings = _config(None, {"http_port": http_port, "grpc_port": grpc_port}, None)
    try:
        # One worker of each kind, on any machine.
        run_demo(resolve(settings, gpus=0), Console(highlight=False), command=_command(), save=save)
    except StopRequested:
        leave(EXIT_INTERRUPTED)
    except (StartFailed, httpx.HTTPError, ClientError, OSError) as error:
        _fail(str(error))


@app.command()
def chat(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[list[str] | None, typer.Option(help="Picture: a file or a URL; repeat for more.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="Video: a file or a URL; repeat for more.")] = None,
    think: Annotated[
        bool | None, typer.Option("--think/--no-think", help="Unset: the model's default.", show_default=False)
    ] = None,
    address: Annotated[str, typer.Option(help="host:port of the gRPC API.")] = "127.0.0.1:9000",
    model: Annotated[str | None, typer.Option(help="Name of the model; there is only one.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Bound on generated tokens.", min=1, max=2**31 - 1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", min=0, max=2)] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.", min=0, max=2**63 - 1)] = None,
    tools: Annotated[
        str | None, typer.Option(help="JSON file: a list of functions the model may call, as OpenAI has them.")
    ] = None,
    zoom: Annotated[bool, typer.Option("--zoom", help="Lets the model look closer at parts of the pictures.")] = False,
    draw: Annotated[str | None, typer.Option(help="Picture file to write: boxes the answer names, drawn.")] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds the whole request may take.", min=0.001, max=86_400)
    ] = None,
) -> None:
    """Asks a running cluster one question and streams the answer."""
    from cluster.cli_chat import run_chat

    code = run_chat(
        prompt,
        images=image or [],
        videos=video or [],
        think=think,
        address=address,
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        tools=tools,
        zoom=zoom,
        draw=draw,
        timeout_s=timeout,
    )
    raise typer.Exit(code)


@app.command()
def role(
    engine: Annotated[str, typer.Argument(help="Id of the engine as `ernie status` shows it, or a part of it.")],
    role: Annotated[str, typer.Argument(help="prefill, decode or colocated.")],
    url: Annotated[str, typer.Option(help="Base URL of the HTTP API.")] = "http://127.0.0.1:8000",
    token: Annotated[
        str | None, typer.Option(help="The cluster's admin token, if it has one.", envvar="ERNIE_ADMIN_TOKEN")
    ] = None,
    wait: Annotated[float, typer.Option(help="Seconds to wait until it has the role.", min=0)] = 60.0,
) -> None:
    """Gives an engine of a running cluster another role: what it does is finished or goes on elsewhere."""
    from cluster.cli_role import change_role

    try:
        typer.echo(change_role(url.rstrip("/"), engine, role, token=token, wait_s=wait))
    except (OSError, ValueError) as error:
        _fail(str(error))


@app.command()
def status(
    url: Annotated[str, typer.Option(help="Base URL of the HTTP API.")] = "http://127.0.0.1:8000",
    watch: Annotated[bool, typer.Option("--watch", help="Goes on until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks of --watch.", min=0.1)] = 1.0,
) -> None:
    """Shows the pools of a running cluster, their roles and load, latencies and decisions."""
    from functools import partial

    from rich.console import Console

    from cluster.cli_status import read_status, show_status, watch_status

    console = Console(highlight=False)
    source = partial(read_status, url.rstrip("/"))
    try:
        if watch:
            watch_status(source, console, interval_s=interval)
            return
        found = source()
    except (OSError, ValueError) as error:
        _fail(str(error))
    show_status(found, console)
    raise typer.Exit(0 if found["ready"] else 1)


@app.command()
def explain(
    request: Annotated[str, typer.Argument(help="Id of the request, as replies name it, or its own request_id.")],
    url: Annotated[str, typer.Option(help="Base URL of the HTTP API.")] = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON of GET /requests/ID/explain.")] = False,
) -> None:
    """Tells what became of a request and why: places picked and passed over, waits, losses, where the time went."""
    import json

    from cluster.cli_explain import explanation_lines, fetch_explanation

    try:
        told = fetch_explanation(url.rstrip("/"), request)
    except (OSError, ValueError) as error:
        _fail(str(error))
    typer.echo(json.dumps(told, indent=2) if as_json else "\n".join(explanation_lines(told)))


app.command()(bench)


def _config(
    file: Path | None,
    options: dict[str, Any],
    domains: list[str] | None,
    networks: list[str] | None = None,
    others: ServeOptions | None = None,
) -> ClusterConfig:
    from cluster.builtin import locate
    from cluster.config import parse, read_file
    from cluster.hub import locate_checkpoint
    from cluster.model_check import check_model
    from cluster.serve_options import section

    try:
        values = read_file(file) if file is not None else {}
        values |= {name: value for name, value in options.items() if value is not None}
        for name, items in (("allowed_media_domains", domains), ("allowed_media_networks", networks)):
            if items is not None:
                given = [one for item in items for one in item.split(",") if one]
                section(values, "preprocessor", "limits")[name] = given
        if others is not None:
            others.apply(values)
        settings = parse(values, str(file or "options"))
        if settings.model in ABOUT:
            typer.secho(ABOUT[settings.model], fg=typer.colors.YELLOW)
            settings = locate(settings)
        else:
            settings, _ = locate_checkpoint(settings, typer.echo)
        check_model(settings)
        return settings
    except (ValueError, OSError) as error:
        _fail(str(error))


def _command() -> str:
    """How to call this program from here."""
    return "ernie" if shutil.which("ernie") else os.path.relpath(Path(sys.executable).parent / "ernie")


def _example(url: str) -> str:
    body = '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32, "stream": true}'
    return f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def _fail(message: str) -> NoReturn:
    typer.secho(message, fg=typer.colors.RED, err=True)
    raise typer.Exit(1)


def main() -> None:
    """Entry point of the ``ernie`` command."""
    app()


if __name__ == "__main__":
    main()
