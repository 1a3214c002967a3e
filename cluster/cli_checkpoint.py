"""``ernie checkpoint``: what deals with model directories and starts nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from actors.checkpoint.inspection import Inspection

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


@checkpoint_app.command("inspect")
def checkpoint_inspect(
    directory: Annotated[Path, typer.Argument(help="Model directory.")],
    json_: Annotated[bool, typer.Option("--json", help="All of it, as JSON.")] = False,
) -> None:
    """Tells what a model directory holds, and what is wrong with it, from its headers; exit code 1 for problems."""
    import dataclasses
    import json

    from actors.checkpoint.inspection import inspect

    if not directory.is_dir():
        _fail(f"{directory} is not a directory")
    found = inspect(directory.expanduser())
    if json_:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False))
    else:
        for line in report_lines(found):
            typer.echo(line)
    raise typer.Exit(1 if found.problems else 0)


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


def report_lines(found: Inspection) -> Iterator[str]:
    """An inspection as people read it. Sizes are in powers of ten."""
    yield found.directory
    if found.config is not None:
        shape = "" if found.layers is None else f", {found.layers} layers, context of {found.context} tokens"
        yield f"config      of {found.config}{shape}"
    if (weights := found.weights) is not None:
        dtypes = ", ".join(f"{_size(count)} in {dtype}" for dtype, count in weights.dtypes.items())
        yield f"weights     {weights.tensors} tensors in {weights.files} files, named as {weights.names}: {dtypes}"
        for part in weights.parts:
            yield f"  {part.name:<15} {part.parameters:>16,} parameters  {_size(part.bytes):>9}"
        total = sum(part.parameters for part in weights.parts)
        yield f"  {'all':<15} {total:>16,} parameters  {_size(sum(part.bytes for part in weights.parts)):>9}"
        language, vision = weights.language_fingerprint[:16], weights.vision_fingerprint[:16]
        yield f"  fingerprints    language {language}  vision {vision}"
    if found.ranks:
        yield "each rank holds, in bfloat16"
        for held in found.ranks:
            name = f"{held.ranks} rank{'s' if held.ranks > 1 else ' '}"
            yield f"  {name}  prefill {_size(held.prefill):>9}  decode {_size(held.decode):>9}"
        yield f"  vision encoder {_size(found.encoder_bytes or 0)}"
    if (text := found.text) is not None:
        kind = text.file if text.tokenizer == text.file else f"{text.file} ({text.tokenizer})"
        yield f"tokenizer   {kind}, {text.tokens} tokens"
        for name, token_id in text.special_ids.items():
            yield f"  {token_id:>6}  {name}"
        yield f"template    {text.template}, of the kind of {text.style}: {', '.join(text.template_takes)}"
    if (media := found.media) is not None:
        yield f"pictures    {media.image_tokens[0]} to {media.image_tokens[1]} tokens"
        yield (
            f"videos      {media.frames[0]} to {media.frames[1]} frames at {media.frames_per_second:g} a second, "
            f"{media.video_tokens[0]} to {media.video_tokens[1]} tokens a pair"
        )
    for problem in found.problems:
        yield f"problem     {problem}"
    yield f"{len(found.problems)} problems" if found.problems else "nothing is wrong with it"


def _size(count: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"


def _fail(message: str) -> NoReturn:
    typer.secho(message, fg=typer.colors.RED, err=True)
    raise typer.Exit(1)
