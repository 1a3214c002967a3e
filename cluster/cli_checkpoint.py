"""``ernie checkpoint``: what deals with model directories and starts nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

checkpoint_app = typer.Typer(help="Fetches, inspects and makes checkpoints.", no_args_is_help=True)


@checkpoint_app.command("download")
def checkpoint_download(
    name: Annotated[str, typer.Argument(help="Repository on the hub: baidu/ERNIE-4.5-VL-28B-A3B-Thinking.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; the main branch when unset.")] = None,
    to: Annotated[Path | None, typer.Option(help="Directory to fetch into; the hub's cache when unset.")] = None,
) -> None:
    """Fetches the files of a model that serving needs, and prints their directory."""
    from cluster.hub import download

    try:
        found = download(name, revision, say=lambda line: typer.echo(line, err=True), to=to)
    except (ValueError, OSError) as error:
        _fail(str(error))
    typer.echo(found.directory)


@checkpoint_app.command("random")
def checkpoint_random(
    directory: Annotated[Path, typer.Argument(help="New or empty directory.")],
    preset: Annotated[str, typer.Option(help="tiny, mid or 28b.")] = "tiny",
    seed: Annotated[int, typer.Option(help="Same seed, same weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    naming: Annotated[str, typer.Option(help="hf or baidu: names of the tensors.")] = "hf",
    style: Annotated[str, typer.Option(help="pt or thinking: whose chat template.")] = "pt",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="text_config.hidden_size=192; repeat for more.")
    ] = None,
    write: Annotated[
        bool | None, typer.Option("--write/--no-write", help="Unset: all but 28b, whose shapes are counted only.")
    ] = None,
) -> None:
    """Writes a complete checkpoint of the real format with random weights."""
    from actors.checkpoint import parse_overrides, write_random_checkpoint

    if naming not in ("hf", "baidu"):
        _fail(f"--naming: {naming!r} is not one of hf, baidu")
    if style not in ("pt", "thinking"):
        _fail(f"--style: {style!r} is not one of pt, thinking")
    try:
        summary = write_random_checkpoint(
            directory,
            preset,
            seed=seed,
            dtype=dtype,
            naming="hf" if naming == "hf" else "baidu",
            style="pt" if style == "pt" else "thinking",
            overrides=parse_overrides(set_ or []),
            write=write,
        )
    except (ValueError, OSError) as error:
        _fail(str(error))
    size = f"{summary.parameters / 1e6:,.1f} M parameters, {summary.nbytes / 1e6:,.1f} MB"
    if summary.directory is None:
        typer.echo(f"{preset}: {size}; nothing was written, --write does")
    else:
        typer.echo(f"{summary.directory}: {size}")


def _fail(message: str) -> NoReturn:
    typer.secho(message, fg=typer.colors.RED, err=True)
    raise typer.Exit(1)
