"""What ``ernie chat`` does: asks, streams the reply, lets the model look closer, draws the boxes it names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from cluster.boxes import LabelledBox, find_boxes
from cluster.client import DEFAULT_ADDRESS, Client, ClientError, FinishReason, Reply, generate_request
from cluster.client.looking import Look, Looking
from cluster.client.media import picture_bytes
from cluster.pictures import draw_boxes, open_upright
from cluster.reply_printer import ReplyPrinter, print_cost
from ernie_serving.v1 import inference_pb2

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130


class _Unusable(Exception):
    """What the command was given cannot be used."""


@dataclass(kw_only=True)
class _Exchange:
    """A request and what is done around it. ``pictures`` are the given ones where boxes are drawn, else empty."""

    request: inference_pb2.GenerateRequest
    looking: Looking | None
    pictures: list[bytes]
    draw: Path | None


def run_chat(
    prompt: str,
    *,
    images: Sequence[str] = (),
    videos: Sequence[str] = (),
    think: bool | None = None,
    address: str = DEFAULT_ADDRESS,
    model: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    tools: str | None = None,
    zoom: bool = False,
    draw: str | None = None,
    timeout_s: float | None = None,
    show_timings: bool = True,
    console: Console | None = None,
    errors: Console | None = None,
) -> int:
    """Runs one exchange and returns the exit code. ``tools`` is a JSON file of functions as OpenAI has them.

    ``zoom`` offers the tool that looks closer and carries it out; ``timeout_s`` is then for each of the requests.
    ``draw`` names a picture file to write: the last picture with the boxes of the answer and of what was looked at.
    Boxes of other pictures go into files of their own, with the number of the picture in their names.

    0: answered. 1: the cluster refused or failed, or the reply was cancelled elsewhere. 2: a file could not be read or
    written. 3: nothing answers at the address. 130: interrupted.
    """
    console = console or Console(highlight=False)
    errors = errors or Console(stderr=True, highlight=False)
    try:
        request = generate_request(
            prompt,
            images=images,
            videos=videos,
            model=model,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            tools=_read_tools(tools),
            enable_thinking=think,
            return_timings=show_timings,
            timeout_s=timeout_s,
        )
        exchange = _exchange(request, zoom=zoom, draw=draw)
        with Client(address) as client:
            reply = _ask(client, exchange, console)
        print_cost(console, reply)
        if exchange.draw is not None:
            _draw(exchange, reply, exchange.draw, console)
    except _Unusable as error:
        errors.print(Text(str(error), style="red"), soft_wrap=True)
        return EXIT_USAGE
    except OSError as error:
        errors.print(Text(f"cannot read {error.filename}: {error.strerror}", style="red"), soft_wrap=True)
        return EXIT_USAGE
    except UnicodeEncodeError:
        errors.print("the prompt is not UTF-8", style="red")
        return EXIT_USAGE
    except ClientError as error:
        _print_error(error, address, errors)
        return EXIT_UNREACHABLE if error.unreachable else EXIT_FAILED
    except KeyboardInterrupt:
        errors.print("interrupted", style="red")
        return EXIT_INTERRUPTED
    return EXIT_FAILED if reply.finish_reason is FinishReason.CANCELLED else EXIT_OK


def _read_tools(file: str | None) -> list[dict[str, object]]:
    if file is None:
        return []
    try:
        offered = json.loads(Path(file).read_bytes())
        if not isinstance(offered, list):
            raise ValueError("must be a list of functions")
        generate_request("", tools=offered)
    except (ValueError, TypeError) as error:
        raise _Unusable(f"{file}: {error}") from None
    return offered


def _exchange(request: inference_pb2.GenerateRequest, *, zoom: bool, draw: str | None) -> _Exchange:
    pictures: list[bytes] = []
    try:
        if draw is not None:
            sources = [part.image.source for part in request.messages[0].parts if part.HasField("image")]
            pictures = [picture_bytes(source, f"picture {index + 1}") for index, source in enumerate(sources)]
            if not pictures:
                raise _Unusable("--draw: there is no picture to draw on, give one with --image")
            if Path(draw).suffix.lower() not in Image.registered_extensions():
                raise _Unusable(f"--draw: {draw} must end like a picture file, in .png for example")
            for content in pictures:
                open_upright(content)
        looking = Looking(request) if zoom else None
    except ValueError as error:
        raise _Unusable(str(error)) from None
    except OSError as error:
        raise _Unusable(f"a picture cannot be read: {error}") from None
    return _Exchange(request=request, looking=looking, pictures=pictures, draw=None if draw is None else Path(draw))


def _ask(client: Client, exchange: _Exchange, console: Console) -> Reply:
    looking = exchange.looking
    if looking is None:
        return stream_reply(client, exchange.request, console)
    while (request := looking.request) is not None:
        reply = stream_reply(client, request, console)
        for look in looking.take(reply):
            console.print(Text(_told(look), style="dim"), soft_wrap=True)
    return reply


def stream_reply(client: Client, request: inference_pb2.GenerateRequest, console: Console) -> Reply:
    """Shows a reply as it comes, and returns it whole.

    Raises:
        ClientError: the cluster refused or failed, or the reply broke off.
    """
    printer = ReplyPrinter(console)
    with client.stream_request(request) as stream:
        try:
            for event in stream:
                printer.show(event)
        finally:
            printer.end()
        return stream.rest()


def _told(look: Look) -> str:
    if look.error is not None:
        return f"That call is wrong, and the model is told: {look.error}"
    assert look.box is not None and look.picture is not None
    x1, y1, x2, y2 = (f"{corner:g}" for corner in look.box.corners)
    return f"From {x1}, {y1} to {x2}, {y2} of picture {look.picture + 1}: cut out, and shown to the model."


def _draw(exchange: _Exchange, reply: Reply, draw: Path, console: Console) -> None:
    """Writes each given picture that has boxes: the last one, which an answer is taken to be about, as ``draw``."""
    boxes: dict[int, list[LabelledBox]] = {}
    for look in exchange.looking.looks if exchange.looking is not None else ():
        if look.box is not None and look.picture is not None:
            boxes.setdefault(look.picture, []).append(LabelledBox(look.box.corners, look.box.label or "zoom"))
    last = len(exchange.pictures) - 1
    boxes.setdefault(last, []).extend(find_boxes(reply.text))
    contents = exchange.looking.pictures if exchange.looking is not None else exchange.pictures
    for picture, found in sorted(boxes.items()):
        if not found:
            console.print(Text(f"There is no box in the answer: {draw} is not written.", style="dim"), soft_wrap=True)
            continue
        file = draw if picture == last else draw.with_stem(f"{draw.stem}-{picture + 1}")
        try:
            draw_boxes(open_upright(contents[picture]), found).save(file)
        except OSError as error:
            raise _Unusable(f"cannot write {file}: {error.strerror or error}") from None
        named = f"{len(found)} box{'es' if len(found) > 1 else ''}"
        console.print(Text(f"{file}: {named} on picture {picture + 1}", style="dim"), soft_wrap=True)


def _print_error(error: ClientError, address: str, errors: Console) -> None:
    if error.unreachable:
        line = f"nothing answers at {address}: start a cluster with `ernie serve`, or give another --address"
    elif error.reason is None and error.message == "the reply ended early":
        line = error.message
    else:
        line = f"{error.code.name}: {error.message}"
        if error.retry_after_s is not None:
            line += f" - try again in {error.retry_after_s:g} s"
    errors.print(Text(line, style="red"), soft_wrap=True)
