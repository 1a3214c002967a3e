"""The options of ``ernie eval``. Everything else is imported when it runs."""

from __future__ import annotations

from typing import Annotated, Any, NoReturn

import typer

from cluster.eval.world.seeds import EVALUATION_SEEDS

eval_app = typer.Typer(help="Scores a model's answers.", no_args_is_help=True)


@eval_app.callback()
def _group() -> None:
    """Scores a model's answers."""


@eval_app.command()
def nano(
    seed: Annotated[
        int, typer.Option(help=f"Same seed, same samples; {EVALUATION_SEEDS[0]} to {EVALUATION_SEEDS[-1]}.")
    ] = 0,
    url: Annotated[
        str | None,
        typer.Option(help="grpc://HOST:PORT of a running server. Unset: a cluster of its own.", show_default=False),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples of each task.")] = 100,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Some of colour, shape, count, region, digits, moving, direction, event_time, position, compare, "
            "timestamp, grounding and zoom, between commas. Unset: all.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint directory for the cluster of its own; nano when unset.", show_default=False),
    ] = None,
    json_: Annotated[
        str | None, typer.Option("--json", help="Write one JSON object to a file, or to standard output with -.")
    ] = None,
) -> None:
    """Asks about new pictures and clips of nano's world and counts the right answers.

    Starts a cluster with one prefill and one decode engine unless --url names one. Questions of position and compare
    are asked in thinking mode, all others without; zoom is asked with the tool that looks closer and also without.
    """
    from rich.console import Console

    from cluster.eval.run import (
        EXIT_FAILED,
        EXIT_INTERRUPTED,
        EXIT_USAGE,
        EvalSettings,
        parse_address,
        parse_tasks,
        run_eval,
    )
    from cluster.launch import StopRequested, leave
    from cluster.session import StartFailed

    try:
        if url is not None and model is not None:
            raise ValueError("--model: the server that --url names has its own")
        options: dict[str, Any] = {
            "tasks": None if tasks is None else parse_tasks(tasks),
            "address": None if url is None else parse_address(url),
            "model": model,
        }
        given = {name: value for name, value in options.items() if value is not None}
        settings = EvalSettings(seed=seed, samples=samples, **given)
    except ValueError as error:
        _fail(str(error), EXIT_USAGE)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        code = run_eval(settings, json_to=json_, console=console, errors=errors)
    except StopRequested:
        leave(EXIT_INTERRUPTED)
    except StartFailed as error:
        _fail(str(error), EXIT_FAILED)
    raise typer.Exit(code)


def _fail(message: str, code: int) -> NoReturn:
    typer.secho(message, fg=typer.colors.RED, err=True)
    raise typer.Exit(code)
