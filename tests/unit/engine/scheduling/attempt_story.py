"""What may be told of one attempt, and in which order."""

from __future__ import annotations

from actors.engine import events as ev
from actors.engine.plan import ALL_LAYERS
from actors.engine.scheduling.sequence import Sequence
from actors.types import AttemptMode, MilestoneKind, PromptLogprobs, TokenEvent


class Story:
    """Raises AssertionError at the first word that does not belong."""

    def __init__(self, sequence: Sequence) -> None:
        self.request = sequence.request
        self.mode = sequence.mode
        self.bound = sequence.needs_constraint
        self.next_index = len(self.request.output_ids) + (self.mode is AttemptMode.DECODE)
        self.over = False
        """Its last token or its end was told."""
        self.error: str | None = None
        self.released = False
        self.started = False
        self.asked = False
        self.granted: int | None = None
        """Decode: held tokens of the reservation, until its KV came or it was dropped."""
        self.over_there = False
        """Decode: the reply ended with token 0."""
        self.transfer_over = False
        self.read = False
        """No transfer reads the blocks any more."""
        self.chunks: list[ev.ComputedChunk] = []
        self.sent_to = 0
        self.awaited: set[tuple[int, int]] = set()
        """Units whose embeddings were asked for and not consumed."""
        self.preemptions = 0
        self.constraint_owed = False
        wanted = self.request.sampling.prompt_logprobs is not None
        told_elsewhere = self.mode is AttemptMode.DECODE or bool(self.request.output_ids)
        self.scored = 0 if wanted and not told_elsewhere else len(self.request.prompt_ids)

    def hear_token(self, token: TokenEvent) -> None:
        assert not self.over and not self.released, "a token after the end"
        assert self.started or self.mode is AttemptMode.DECODE, "a token before any compute"
        assert token.index == self.next_index, "tokens skipped or repeated"
        assert self.scored == len(self.request.prompt_ids), "a token before the prompt's log-probabilities"
        assert self.granted is None, "a token before the KV came"
        assert token.logprobs is not None and token.logprobs.token_id == token.token_id
        self.next_index += 1
        if self.mode is AttemptMode.PREFILL:
            assert token.index == len(self.request.output_ids), "a prefill engine draws one token"
        self.over = token.finish is not None

    def hear_scores(self, piece: PromptLogprobs) -> None:
        assert not self.over
        assert piece.entries, "an empty piece"
        assert piece.first == self.scored, "log-probabilities skipped or repeated"
        told = [entry and entry.token_id for entry in piece.entries]
        self.scored += len(told)
        assert told == [at or None for at in range(piece.first, self.scored)]
        assert self.scored <= len(self.request.prompt_ids)

    def hear(self, event: ev.Event) -> None:
        assert not self.released, "something after RELEASED"
        owed, self.constraint_owed = self.constraint_owed, False
        assert owed == isinstance(event, ev.ConstraintNeeded), "a constraint is needed after each preemption"
        match event:
            case ev.Ended(_, error):
                assert not self.over, "ended twice"
                self.over, self.error = True, error.reason
            case ev.Milestone(_, MilestoneKind.RELEASED, _, _):
                handed_over = bool(self.chunks) and self.chunks[-1].last
                assert self.over or handed_over or self.over_there, "released without an end"
                assert self.granted is None, "released with a reservation"
                assert self.read or not self.chunks, "released while a transfer may read"
                self.released = True
            case ev.Milestone(_, MilestoneKind.PREFILL_STARTED, _, cached_tokens):
                assert not self.started and self.mode is not AttemptMode.DECODE, "started twice"
                assert 0 <= cached_tokens <= len(self.request.prompt_ids)
                self.started = True
            case ev.Admitted(_, cached_tokens):
                assert not self.over and not self.awaited, "admitted twice"
                self.awaited = {
                    (media, unit)
                    for media, span in enumerate(self.request.media)
                    for unit in range(span.grid.units)
                    if span.offset + (unit + 1) * span.grid.tokens_per_unit > cached_tokens
                }
                assert self.awaited, "nothing to pull"
                assert self.mode is not AttemptMode.PREFILL or self.asked, "pulled before the decode engine has room"
            case ev.MediaConsumed(_, media_index, unit_index):
                assert self.error is None  # tokens of a step are told first, so its last one may have been
                self.awaited.remove((media_index, unit_index))
            case ev.Preempted():
                assert not self.over and not self.chunks
                self.preemptions += 1
                self.awaited = set()
                self.constraint_owed = self.bound
            case ev.ConstraintNeeded():
                pass
            case ev.ReserveNeeded(_, token_count):
                assert self.mode is AttemptMode.PREFILL and not self.asked and not self.started
                assert token_count == len(self.request.prompt_ids) + len(self.request.output_ids)
                self.asked = True
            case ev.ComputedChunk():
                self._hear_chunk(event)
            case ev.TransferCancelled():
                assert self.asked and not self.transfer_over, "a transfer cancelled twice, or never begun"
                self.transfer_over = True
            case ev.ReservationGranted(_, _, _, held_tokens):
                assert self.mode is AttemptMode.DECODE and not self.over
                assert 0 <= held_tokens < len(self.request.prompt_ids) + len(self.request.output_ids)
                self.granted = held_tokens
            case ev.ReservationDropped():
                assert self.granted is not None, "no reservation to drop"
                self.granted = None
            case ev.ReservationFailed():
                assert self.granted is None or event.reason == "DUPLICATE"

    def _hear_chunk(self, chunk: ev.ComputedChunk) -> None:
        assert not self.over or chunk.finished, "a chunk after the end"
        assert self.started and not self.transfer_over
        assert chunk.index == len(self.chunks) and not (self.chunks and self.chunks[-1].last)
        assert chunk.first_token == self.sent_to, "tokens skipped or sent twice"
        assert chunk.token_count or chunk.last, "an empty chunk"
        assert chunk.last == (chunk.first_output_id is not None)
        before = self.chunks[-1].part if self.chunks else ALL_LAYERS
        assert chunk.part.index == (0 if before.is_last else before.index + 1), "layers skipped or sent twice"
        assert chunk.part.is_last or not chunk.last
        self.sent_to += chunk.token_count if chunk.part.is_last else 0
        total = len(self.request.prompt_ids) + len(self.request.output_ids)
        assert self.sent_to == total or not chunk.last
        self.chunks.append(chunk)
