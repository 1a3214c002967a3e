"""What bounds the tokens of one sequence: the thinking budget, the structure of the answer, or both in turn.

    prompt ends in an open think block:  thinking -> [closing forced by the budget] -> newlines -> structure
    otherwise:                           structure from the first token on

Structures are enforced by llguidance, chosen over xgrammar (0.2.8, compared on a 103,424-token vocabulary and a schema
of nested objects): it has no dependencies (xgrammar brings transformers and triton), compiles in 1 ms against 115,
fills a mask in 130 us on average against 290, and refuses the JSON schema keywords it cannot enforce (uniqueItems, not,
contains, unknown formats), which xgrammar ignores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from actors.errors import ServingError

PackedMask = NDArray[np.int32]
"""A row of bits: bit ``id % 32`` of word ``id // 32`` is set where the id is allowed."""


class TokenConstraint(Protocol):
    """State of one sequence. One thread at a time."""

    def fill(self, mask_W: PackedMask) -> bool:
        """Writes which ids may come next, at least one, into a row of ``mask_words(vocabulary)`` words.

        False: all may, and the row is untouched.
        """
        ...

    def accept(self, token: int) -> None:
        """Advances by one output: every drawn token and, for a sequence that continues, each earlier output."""
        ...


ConstraintFactory = Callable[[Sequence[int], Callable[[ServingError], None]], TokenConstraint]
"""Makes the constraint of one sequence, as before its first output, of its prompt's ids. The second argument is called
at most once, from ``fill`` or ``accept``, when the structure cannot go on: the sequence must end with that error.
"""


def mask_words(vocab_size: int) -> int:
    """Words of 32 ids that cover a vocabulary."""
    return (vocab_size + 31) // 32
