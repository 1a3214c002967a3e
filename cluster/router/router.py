"""The router: admits requests, names them, runs them and remembers how they ended."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import Any

from actors.errors import (
    AlreadyExists,
    ContextExceeded,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServingError,
    Unavailable,
)
from actors.log_context import about
from actors.types import PreprocessReply, PreprocessRequest
from cluster.config import PREPROCESSORS
from cluster.generation import Event, Finished, GenerateCall, ModelCard, PromptTokens, Vocabulary
from cluster.registry import LoadingEntry
from cluster.router.prompt import preprocess_request
from cluster.router.request import RequestRun, Whereabouts
from cluster.router.services import Services
from cluster.router.stages import StageLost
from cluster.router.story import MOST_ENDED, REMEMBER_S, Stories

log = logging.getLogger(__name__)

_SEED_SPACE = 1 << 64


class Router:
    """Implements ``cluster.generation.GenerationService``. Lives on one event loop."""

    def __init__(
        self,
        services: Services,
        *,
        incarnation: str,
        source: str,
        max_active: int,
        default_timeout_s: float,
        random_seed: Callable[[], int] = lambda: secrets.randbits(64),
    ) -> None:
        self._services = services
        self._incarnation = incarnation
        self._source = source
        self._created = int(time.time())
        self._max_active = max_active
        self._default_timeout_s = default_timeout_s
        self._random_seed = random_seed
        self._count = 0
        self._active: dict[str, RequestRun] = {}
        self._aliases: dict[str, str] = {}
        self._ended: OrderedDict[str, float] = OrderedDict()
        self._stories = Stories()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def active_count(self) -> int:
        return len(self._active)

    def whereabouts(self) -> list[Whereabouts]:
        """Of every request that runs, the oldest first."""
        return [run.whereabouts() for run in self._active.values()]

    async def generate(self, call: GenerateCall) -> AsyncIterator[Event]:
        """See ``GenerationService``; closing the iterator cancels the request everywhere."""
        run, task = self._admit(call)
        try:
            while True:
                event = await run.events.get()
                if isinstance(event, ServingError):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            task.cancel()

    def _admit(self, call: GenerateCall) -> tuple[RequestRun, asyncio.Task[None]]:
        try:
            self._check_admissible(call)
        except ServingError as error:
            self.note_refused(error)
            raise
        self._services.budget.admit()
        self._count += 1
        request_id = f"{self._incarnation}-{self._count}"
        run = RequestRun(
            request_id,
            call,
            seed=(self._random_seed() if call.seed is None else call.seed) % _SEED_SPACE,
            timeout_s=self._default_timeout_s if call.timeout_s is None else call.timeout_s,
            services=self._services,
        )
        self._active[request_id] = run
        self._idle.clear()
        if call.request_id is not None:
            self._aliases[call.request_id] = request_id
        self._services.recorder.admitted(request_id)
        with about(request_id):
            task = run.start()
            task.add_done_callback(lambda _: self._end(request_id, call.request_id))
        return run, task

    def note_refused(self, error: ServingError) -> None:
        """See ``GenerationService``."""
        self._services.recorder.refused(error.reason)

    def _check_admissible(self, call: GenerateCall) -> None:
        self._check_open()
        self._check_model(call.model)
        self._check_bounds(call)
        if len(self._active) >= self._max_active:
            raise Overloaded(f"{self._max_active} requests are active: the router's queue is full", retry_after_s=1.0)
        if call.request_id is not None and call.request_id in self._aliases:
            raise AlreadyExists(f"request_id: {call.request_id!r} is active", field="request_id")

    def _end(self, request_id: str, alias: str | None) -> None:
        run = self._active.pop(request_id)
        self._stories.add(run.story)
        now = time.monotonic()
        for name in (request_id, alias):
            if name is not None:
                self._ended[name] = now
                self._ended.move_to_end(name)
        if alias is not None:
            del self._aliases[alias]
        while self._ended and next(iter(self._ended.values())) < now - REMEMBER_S:
            self._ended.popitem(last=False)
        if not self._active:
            self._idle.set()
        record = run.record()
        log.info("request %s: %s after %.3f s", request_id, record.reason or record.outcome, record.e2e_s)
        self._services.recorder.ended(record)

    async def cancel(self, request_id: str) -> None:
        """Ends a request by assigned id or alias; no effect when already over.

        Raises:
            NotFound: this router never saw it, or it ended more than ten minutes ago.
        """
        run = self._active.get(self._aliases.get(request_id, request_id))
        if run is not None:
            run.cancel_by_name()
        elif request_id not in self._ended:
            raise NotFound(f"request_id: {request_id!r} is not known", reason="REQUEST_NOT_FOUND", field="request_id")

    def explain(self, request_id: str) -> dict[str, Any]:
        """What became of a request and why, by assigned id or alias, as JSON values.

        Raises:
            NotFound: it was never here, or ended too long or too many requests ago.
        """
        run = self._active.get(self._aliases.get(request_id, request_id))
        story = self._stories.find(request_id) if run is None else run.story
        if story is None:
            message = f"request_id: {request_id!r} does not run and is not one of the last {MOST_ENDED}"
            message += f" that ended within {REMEMBER_S:.0f} s"
            raise NotFound(message, reason="REQUEST_NOT_FOUND", field="request_id")
        return story.told()

    async def tokenize(self, call: GenerateCall) -> PromptTokens:
        """The prompt of a call, without keeping anything.

        Raises:
            DeadlineExceeded: it took longer than a request that names no deadline may take.
        """
        self._check_open()
        self._check_model(call.model)
        self._check_bounds(call)
        request = preprocess_request(call, lease="", context_limit=self._services.context_limit(), keep_patches=False)
        try:
            async with asyncio.timeout(self._default_timeout_s):
                reply = await self._preprocess(request)
        except TimeoutError:
            raise DeadlineExceeded(f"counting took longer than {self._default_timeout_s:g} s") from None
        return PromptTokens(ids=reply.prompt_ids, media_tokens=sum(item.grid.tokens for item in reply.media))

    @property
    def vocabulary(self) -> Vocabulary:
        return self._services.vocabulary

    async def _preprocess(self, request: PreprocessRequest) -> PreprocessReply:
        """By another preprocessor when one is lost, as often as it takes."""
        while True:
            try:
                return (await self._services.preprocess.run(request)).reply
            except StageLost:
                await asyncio.sleep(self._services.budget.spend())

    def models(self) -> tuple[ModelCard, ...]:
        return (
            ModelCard(
                name=self._services.model_name,
                source=self._source,
                max_model_len=self._services.context_limit(),
                created=self._created,
            ),
        )

    async def not_ready(self) -> str | None:
        return self.missing

    @property
    def missing(self) -> str | None:
        """What keeps it from answering requests; None when nothing does."""
        if self._draining:
            return "draining"
        snapshot = self._services.fleet.snapshot
        if not self._services.fleet.has_path:
            return "no prefill and decode path" + "".join(map(_progress, snapshot.loading))
        if not snapshot.preprocessors and not snapshot.may_be_empty(PREPROCESSORS):
            return "no preprocessor"
        if not self._services.fleet.encoders:
            return "no vision encoder"
        return None

    async def drain(self, timeout_s: float) -> int:
        """Refuses new requests and waits for running ones; returns how many were still running at the end."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d requests still run after a drain of %.0f s", len(self._active), timeout_s)
        return len(self._active)

    def check_integrity(self) -> None:
        """Raises RuntimeError when something is held for no request."""
        leases, suspects = self._services.leases.count, self._services.suspects.count
        if not self._active and (self._aliases or leases or suspects):
            raise RuntimeError(f"held by no request: {self._aliases}, {leases} leases, {suspects} suspects")

    def _check_open(self) -> None:
        if self._draining:
            raise Unavailable("the server is draining", reason="DRAINING", retry_after_s=5.0)

    def _check_model(self, model: str | None) -> None:
        name = self._services.model_name
        if model == "":
            raise InvalidRequest("model: must not be empty; leave it out for the only model", field="model")
        if model is not None and model != name:
            raise NotFound(f"model: {model!r} is not served here; the model is {name!r}", field="model")

    def _check_bounds(self, call: GenerateCall) -> None:
        """What is out of bounds whatever the prompt is, told before any work is done."""
        vocab_size, max_model_len = self._services.vocab_size, self._services.context_limit()
        prompt_ids = call.prompt if isinstance(call.prompt, tuple) else ()
        for name, ids in (("prompt", prompt_ids), ("stop_token_ids", call.stop_token_ids)):
            for index, token_id in enumerate(ids):
                if not 0 <= token_id < vocab_size:
                    message = f"{token_id} is no token: ids end at {vocab_size - 1}"
                    raise InvalidRequest(message, field=f"{name}[{index}]")
        if call.max_tokens is not None and call.max_tokens >= max_model_len:
            message = f"{call.max_tokens} tokens and a prompt do not fit the context of {max_model_len}"
            raise ContextExceeded(message, field="max_tokens")


def _progress(entry: LoadingEntry) -> str:
    return f"; {entry.role} engine loading" + (f" {entry.progress}" if entry.progress else "")
