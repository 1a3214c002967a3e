"""One request from admission to its last event.

    QUEUED -> PREPROCESS -> (ENCODE) -> QUEUED -> PREFILL -> (TRANSFER) -> DECODE -> FINISHED

A request owns its prompt, the leases on its media and its choices. Choice 0 begins; the others follow when its prompt
is computed and find it in the prefix caches of the same engines. A part that is lost is replaced by another one and
ends no request (``choice``, ``prompt``). Whatever does - finish, stop, error, cancel, deadline - ``run`` ends once and
frees everything it holds in every place: attempts on links, leases on patches and embeddings. A choice that fails fails
the request.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace

from actors.errors import DeadlineExceeded, InternalError, RequestCancelled, ServingError
from actors.types import EngineRequest, Stage, vision_end
from cluster.generation import Event, Finished, GenerateCall, Started, Usage
from cluster.router.choice import ChoiceRun, RequestState
from cluster.router.prompt import Prompt, PromptKeeper
from cluster.router.records import Outcome, RequestRecord
from cluster.router.scores import PromptScores
from cluster.router.services import Services
from cluster.router.story import Story, What
from cluster.router.timeline import Progress, Timeline

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Whereabouts:
    """Where a running request is now, for people: its first choice, where there are several."""

    request_id: str
    alias: str | None
    stage: Stage
    elapsed_s: float
    output_tokens: int
    preprocessor: str | None = None
    """Addresses of what works for it, or did last."""
    encoder: str | None = None
    prefill: str | None = None
    decode: str | None = None


class RequestRun:
    """Runs in a task of its own. ``events`` gets what ``GenerationService.generate`` yields, or one ServingError at
    last.
    """

    def __init__(self, request_id: str, call: GenerateCall, *, seed: int, timeout_s: float, services: Services) -> None:
        self.request_id = request_id
        self.events: asyncio.Queue[Event | ServingError] = asyncio.Queue()
        self.timeline = Timeline(services.clock)
        self._progress = Progress(self.timeline)
        self._call = call
        self._seed = seed
        self._timeout_s = timeout_s
        self._services = services
        self._arrival_s = services.wall_clock()
        self.story = Story(request_id, call.request_id, self.timeline, self._arrival_s)
        self.story.note(What.ADMITTED, choices=call.n, timeout_s=timeout_s, priority=call.priority)
        self._keeper = PromptKeeper(
            request_id,
            call,
            timeout_s=timeout_s,
            services=services,
            timeline=self.timeline,
            progress=self._progress,
            story=self.story,
        )
        self._state: RequestState | None = None
        self._choices: list[ChoiceRun] = []
        self._cancelled_by_name = False
        self._outcome = Outcome.CANCELLED
        """Until something else is known: only cancelling ends a request from outside."""
        self._reason: str | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"request {self.request_id}")
        self._task.add_done_callback(self._tell_of_cancellation)
        return self._task

    def _tell_of_cancellation(self, task: asyncio.Task[None]) -> None:
        """A task that is cancelled before its first step runs nothing of ``_run``."""
        if task.cancelled():
            if self.timeline.stage is not Stage.FINISHED:
                self.story.note(What.CANCELLED, by=self._canceller, stage=str(self.timeline.stage))
                self.timeline.finish()
            self.events.put_nowait(RequestCancelled("the request was cancelled"))

    def whereabouts(self) -> Whereabouts:
        first = self._choices[0] if self._choices else None
        route = None if first is None else first.route
        return Whereabouts(
            request_id=self.request_id,
            alias=self._call.request_id,
            stage=self.timeline.stage,
            elapsed_s=self.timeline.elapsed_s,
            output_tokens=0 if first is None else len(first.output.token_ids),
            preprocessor=self._keeper.patch_address,
            encoder=self._keeper.embedding_address,
            prefill=None if route is None else route.prefill.address,
            decode=None if route is None else (route.decode or route.prefill).address,
        )

    @property
    def _canceller(self) -> str:
        return "name" if self._cancelled_by_name else "its client, who left"

    def cancel_by_name(self) -> None:
        """Ends the request from another connection: its own client sees that it was cancelled."""
        self._cancelled_by_name = True
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._work()
            self._outcome = Outcome.FINISHED
            self._finish()
        except TimeoutError:
            self._fail(DeadlineExceeded(f"the request took longer than {self._timeout_s:g} s", field="timeout"))
        except ServingError as error:
            if error.field == "structure" and self._call.forces_call:
                # Engines know calls that are forced as a structure; the client wrote them as tools.
                error.field = "tools"
            self._fail(error)
        except asyncio.CancelledError:
            self.story.note(What.CANCELLED, by=self._canceller, stage=str(self.timeline.stage))
            if not self._cancelled_by_name:
                raise
            if self._state is None:
                self.events.put_nowait(RequestCancelled("the request was cancelled"))
            else:
                for choice in self._choices:
                    choice.cancel()
                self._finish()
        except Exception:
            log.exception("request %s failed", self.request_id)
            self._fail(InternalError(f"internal error; request {self.request_id}"))
        finally:
            self.timeline.finish()
            await self._keeper.close()

    def _fail(self, error: ServingError) -> None:
        self._outcome, self._reason = Outcome.ERROR, error.reason
        self.story.note(What.FAILED, reason=error.reason, message=error.message)
        self.events.put_nowait(error)

    async def _work(self) -> None:
        call = self._call
        prompt = await self._keeper.make()
        self._state = state = self._begin(prompt)
        self._choices = [ChoiceRun(index, state) for index in range(call.n)]
        self.events.put_nowait(
            Started(
                request_id=self.request_id,
                model=self._services.model_name,
                prompt_tokens=len(prompt.reply.prompt_ids),
                prompt_token_ids=prompt.reply.prompt_ids if call.return_token_ids else None,
            )
        )
        first, *others = self._choices
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(first.run())
                if others:
                    await state.prompt_computed.wait()
                for choice in others:
                    tasks.create_task(choice.run())
                    # Each writes out the whole prompt: other requests get their turn in between.
                    await asyncio.sleep(0)
        except BaseExceptionGroup as group:
            # The first failure cancelled the others; a second one at the same moment says no more.
            raise group.exceptions[0] from None

    def _begin(self, prompt: Prompt) -> RequestState:
        call, prompt_ids = self._call, prompt.reply.prompt_ids
        sampling = self._services.resolve_sampling(call, prompt.reply)
        scores = None if call.prompt_logprobs is None else PromptScores(len(prompt_ids), self._services.score)
        return RequestState(
            request_id=self.request_id,
            call=call,
            services=self._services,
            events=self.events,
            timeline=self.timeline,
            progress=self._progress,
            keeper=self._keeper,
            story=self.story,
            vision_end=vision_end(prompt_ids, self._services.im_patch_id),
            request=EngineRequest(
                prompt_ids=prompt_ids,
                media=prompt.spans,
                sampling=replace(sampling, prompt_logprobs=None),
                seed=self._seed,
                salt=call.salt,
                arrival_s=self._arrival_s,
                deadline_s=self._arrival_s + self._timeout_s,
                # Callers put the urgent first by lower numbers, engines by higher ones.
                priority=-call.priority,
            ),
            prompt_scores=scores,
        )

    def _finish(self) -> None:
        timings = self.timeline.finish()
        usage = self._usage()
        self.story.note(What.FINISHED, output_tokens=usage.output_tokens)
        self.events.put_nowait(Finished(usage=usage, timings=timings if self._call.return_timings else None))

    def _usage(self) -> Usage:
        """So far."""
        state, outputs = self._state, [choice.output for choice in self._choices]
        prompt = None if state is None else self._keeper.prompt
        prompt_tokens = 0 if prompt is None else len(prompt.reply.prompt_ids)
        return Usage(
            prompt_tokens=prompt_tokens,
            media_tokens=0 if prompt is None else prompt.media_tokens,
            video_tokens=0 if prompt is None else prompt.video_tokens,
            cached_tokens=0 if state is None else min(state.cached_tokens or 0, prompt_tokens),
            output_tokens=sum(len(output.token_ids) for output in outputs),
            reasoning_tokens=sum(output.reasoning_tokens for output in outputs),
            time_to_first_token_s=None if state is None else state.first_token_s,
        )

    def record(self) -> RequestRecord:
        """Of a request that is over."""
        timings, usage = self.timeline.finish(), self._usage()
        reasons = (choice.finish_reason for choice in self._choices)
        gaps = sum(choice.gap_count for choice in self._choices)
        return RequestRecord(
            request_id=self.request_id,
            alias=self._call.request_id,
            outcome=self._outcome,
            reason=self._reason,
            finish_reasons=tuple(reason for reason in reasons if reason is not None),
            usage=usage,
            ttft_s=usage.time_to_first_token_s,
            tpot_s=sum(choice.decoded_s for choice in self._choices) / gaps if gaps else None,
            e2e_s=self.timeline.spans[-1].ended_s,
            attempts=sum(choice.attempts for choice in self._choices),
            timings=timings,
            spans=self.timeline.spans,
        )
