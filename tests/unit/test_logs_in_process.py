"""Every line about a request carries its id, in whichever part it was logged."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from ray._common.formatters import JSONFormatter

from actors.log_context import RequestFilter, about
from actors.processing.processor import Processor
from actors.types import EngineRole, TextPart
from actors.wire.media_client import MediaClient
from tests.in_process import in_process_cluster
from tests.media import image_part
from tests.tiny_model import tiny_checkpoint
from tests.unit.test_resume_in_process import ask, reply

log = logging.getLogger("actors.test")


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.addFilter(RequestFilter())
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def lines(self) -> list[str]:
        return [record.getMessage() for record in self.records]


@pytest.fixture
def kept() -> Iterator[Kept]:
    handler, loggers = Kept(), [logging.getLogger(name) for name in ("actors", "cluster")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def test_a_line_says_its_request_once(kept: Kept) -> None:
    log.info("nobody's %s", 1)
    with about("r-1#2"):
        log.info("patches of %d units", 3)
        log.info("request r-1 is late")
    log.info("nobody's again")
    assert kept.lines == ["nobody's 1", "request r-1: patches of 3 units", "request r-1 is late", "nobody's again"]
    told = [json.loads(JSONFormatter().format(record)).get("ernie_request") for record in kept.records]
    assert told == [None, "r-1", "r-1", None]


async def test_every_part_knows_whose_work_it_does(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    def talks(kind: type[Any], name: str, line: str) -> None:
        method = getattr(kind, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            log.info(line)
            return method(*args, **kwargs)

        monkeypatch.setattr(kind, name, wrapped)

    talks(Processor, "process", "preprocessing, in a thread")
    talks(MediaClient, "pull_patches", "the encoder pulls")
    talks(MediaClient, "pull_embedding", "the engine pulls")
    async with in_process_cluster(tiny_checkpoint(), EngineRole.PREFILL, EngineRole.DECODE) as cluster:
        calls = [ask(image_part(150, 100, seed), TextPart(text="What is this?"), max_tokens=4) for seed in (1, 2)]
        await asyncio.gather(*(reply(cluster, call) for call in calls))
        incarnation = cluster.parts.router._incarnation
    for number in (1, 2):
        request = f"{incarnation}-{number}"
        about_it = [record for record in kept.records if getattr(record, "ernie_request", None) == request]
        text = " ".join(record.getMessage() for record in about_it)
        for line in ("preprocessing, in a thread", "the encoder pulls", "the engine pulls", "finished after"):
            assert line in text, f"{line!r} is missing in {text}"
        assert all(request in record.getMessage() for record in about_it)
