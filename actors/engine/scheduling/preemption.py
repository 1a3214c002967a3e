"""Whose blocks are taken when a reply must grow and none is free. Pure."""

from __future__ import annotations

from collections.abc import Sequence as Listed

from actors.engine.scheduling.sequence import Sequence, SequenceState
from actors.types import AttemptMode


def choose_victim(holders: Listed[Sequence]) -> Sequence | None:
    """The last of one rank's holders whose blocks can be had at once; None if only the first of these is left.

    Blocks that a transfer may read (a chunk of them was handed out) stay until it ends. Whoever comes first among the
    others is never a victim: it finishes, then the next is first, and so everybody does.
    """
    candidates = (s for s in reversed(holders) if s.state.takes_part and not s.chunk_count)
    victim = next(candidates, None)
    return victim if victim is not None and next(candidates, None) is not None else None


def recomputes_here(sequence: Sequence, im_patch_id: int) -> bool:
    """Whether a victim is computed anew by this engine; otherwise its attempt ends and the router resumes it.

    The KV a reservation waits for is with its sender. Later a DECODE attempt may be computed only from text: a decode
    engine has no vision experts, which ids from ``im_patch_id`` on go to.
    """
    if sequence.mode is not AttemptMode.DECODE:
        return True
    return sequence.state is SequenceState.RUNNING and max(sequence.request.prompt_ids) < im_patch_id
