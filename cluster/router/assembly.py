"""Puts one router together: from a description and two handles to a running ``Router``."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import grpc.aio

from actors.ernie.config import ErnieConfig
from actors.processing.detokenize import IncrementalDetokenizer
from actors.processing.parser_names import calls_lead
from actors.processing.parsers import ReasoningParser, StopStrings
from actors.processing.tokenizer import TextTokenizer
from actors.processing.tool_calls import ToolCallParser
from actors.types import PreprocessReply, SamplingParams
from actors.wire.audit import Audit, fetch_audit, take_audit
from actors.wire.media_client import MediaClient
from actors.wire.renewal import Registration
from cluster.config import ClusterConfig
from cluster.generation import GenerateCall
from cluster.hub import local_directory
from cluster.metrics.sheet import Sheet
from cluster.registry import places
from cluster.router.encoders import EncoderBook
from cluster.router.fleet import Fleet, call_planner
from cluster.router.latency import LatencyWindow
from cluster.router.leases import LeaseKeeper
from cluster.router.metrics_page import MetricsPage
from cluster.router.output import OutputAssembler
from cluster.router.records import Recorders
from cluster.router.request_metrics import RequestMetrics
from cluster.router.retry_budget import RetryBudget
from cluster.router.router import Router
from cluster.router.sampling import SamplingDefaults, resolve_sampling
from cluster.router.scores import TokenScorer
from cluster.router.services import Services
from cluster.router.stages import EncodeStage, PreprocessStage
from cluster.router.suspects import Suspects
from cluster.router.traces import TraceRecorder, export_to

AUDIT_TIMEOUT_S = 2.0


class RouterParts:
    """A router with the parts it runs on. ``close`` ends them all."""

    def __init__(
        self,
        router: Router,
        services: Services,
        metrics: MetricsPage,
        latency: LatencyWindow,
        traces: TraceRecorder | None,
        media: MediaClient,
        registration: Registration,
    ) -> None:
        self.router = router
        self.fleet = services.fleet
        self.metrics = metrics
        self.latency = latency
        self._traces = traces
        self._registration = registration
        self._leases = services.leases
        self._media = media

    @classmethod
    async def start(cls, config: ClusterConfig, planner: Any, preprocessor: Any) -> RouterParts:
        """``planner`` and ``preprocessor``: Serve handles. Reads the tokenizer and generation defaults only."""
        incarnation = secrets.token_hex(4)
        media = MediaClient()
        silence = {"lost_after_s": config.router.lost_after_s, "suspect_after_s": config.router.suspect_after_s}
        fleet = Fleet(call_planner(planner), incarnation, **silence)
        leases = LeaseKeeper(media, **silence)
        budget = RetryBudget(share=config.router.retry_share, burst=config.router.retry_burst, clock=time.monotonic)
        directory = Path(await asyncio.to_thread(local_directory, config.model))
        tokenizer = await asyncio.to_thread(TextTokenizer.from_dir, directory)
        model = ErnieConfig.from_dir(directory)
        text = model.text
        score = TokenScorer(cache(tokenizer.token_bytes))
        context_limit = partial(fleet.context_limit, config.max_model_len or text.max_position_embeddings)
        counts, latency = RequestMetrics(config.slo), LatencyWindow(config.slo)
        traces = None if config.otlp_endpoint is None else TraceRecorder(export_to(config.otlp_endpoint, incarnation))
        services = Services(
            fleet=fleet,
            leases=leases,
            preprocess=PreprocessStage(
                preprocessor,
                leases,
                budget,
                places=lambda: [entry.address for entry in fleet.snapshot.preprocessors],
                hedge_after_s=config.preprocessor.hedge_after_s,
                timeout_s=config.preprocessor.timeout_s,
            ),
            encode=EncodeStage(media, leases),
            encoders=EncoderBook(),
            budget=budget,
            suspects=Suspects(),
            recorder=Recorders(counts, latency, *([] if traces is None else [traces])),
            model_name=config.model_name,
            context_limit=context_limit,
            vocab_size=text.vocab_size,
            im_patch_id=model.im_patch_id,
            alone_tokens=config.router.alone_tokens,
            vocabulary=tokenizer,
            resolve_sampling=partial(_resolve, SamplingDefaults.from_dir(directory), context_limit, tokenizer),
            make_output=partial(_output, tokenizer, score, calls_lead(config.tool_call_parser)),
            score=score,
            clock=time.monotonic,
            wall_clock=time.time,
        )
        router = Router(
            services,
            incarnation=incarnation,
            source=config.model,
            max_active=config.router.max_active,
            default_timeout_s=config.default_timeout_s,
        )
        fleet.start()
        leases.start()

        async def renew() -> None:
            await planner.renew_router.remote(incarnation, latency.summary())

        page = _metrics_page(router, services, counts, planner)
        return cls(router, services, page, latency, traces, media, Registration(planner, incarnation, renew))

    async def audits(self) -> dict[str, Audit]:
        """What every part holds for requests, by name; a part that does not answer has that as its problem."""
        asked = places(self.fleet.snapshot)
        audits = await asyncio.gather(*(_audit(place.address) for place in asked))
        own = take_audit(
            lambda: {"requests": self.router.active_count, "leases": self._leases.count}, self.router.check_integrity
        )
        names = (f"{place.kind} {place.worker}" for place in asked)
        return {"router": own} | dict(zip(names, audits, strict=True))

    async def close(self) -> None:
        await self._registration.end()
        await self.metrics.close()
        await self._leases.close()
        await self.fleet.close()
        await self._media.close()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)


def _metrics_page(router: Router, services: Services, counts: RequestMetrics, planner: Any) -> MetricsPage:
    fleet = services.fleet

    def tell(sheet: Sheet) -> None:
        counts.add_to(sheet)
        sheet.add("ernie_ready", router.missing is None)
        sheet.add("ernie_requests_active", router.active_count)
        sheet.add("ernie_requests_waiting_for_room", fleet.waiting_for_room)
        sheet.add("ernie_retry_budget", services.budget.saved)
        sheet.add("ernie_suspects", services.suspects.count)
        sheet.add("ernie_leases", services.leases.count)

    async def ask_planner() -> bytes:
        page: bytes = await planner.metrics.remote()
        return page

    return MetricsPage(lambda: fleet.snapshot, tell, ask_planner)


async def _audit(address: str) -> Audit:
    try:
        return await fetch_audit(address, timeout_s=AUDIT_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        return Audit(held={}, problem=f"no answer from {address}: {error.code().name}")


def _resolve(
    defaults: SamplingDefaults,
    context_limit: Callable[[], int],
    tokenizer: TextTokenizer,
    call: GenerateCall,
    reply: PreprocessReply,
) -> SamplingParams:
    return resolve_sampling(
        call,
        defaults,
        prompt_tokens=len(reply.prompt_ids),
        starts_thinking=reply.starts_thinking,
        max_model_len=context_limit(),
        spellings=tokenizer.spellings,
    )


def _output(
    tokenizer: TextTokenizer, score: TokenScorer, leading_calls: bool, call: GenerateCall, starts_thinking: bool
) -> OutputAssembler:
    """Stop strings end answers; a structured answer, forced calls among them, is whole only if nothing cuts it. Calls
    come before any text of it, or there are none: what looks like a call inside is part of it. What follows a raw
    prompt stays as the model writes it.
    """
    structured = call.structure is not None or call.forces_call
    return OutputAssembler(
        IncrementalDetokenizer(tokenizer),
        ReasoningParser(starts_thinking, structured=structured or call.prompt is not None),
        StopStrings(() if structured else call.stop),
        tools=ToolCallParser(
            _new_call_id, most=None if call.parallel_tool_calls else 1, leading=structured or leading_calls
        )
        if call.offered_tools
        else None,
        stop_token_ids=call.stop_token_ids,
        min_tokens=call.min_tokens,
        score=None if call.logprobs is None else score,
    )


def _new_call_id() -> str:
    """Unlike every other, also in other replies: clients keep calls of a conversation by their ids."""
    return f"call_{secrets.token_hex(12)}"
