"""What torch's varlen_attn does with block tables, written out for a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_double(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    **options: Any,
) -> Tensor:
    """Checks what the kernel demands; causal, the last query of a sequence at its last used key."""
    assert set(options) == {"window_size", "enable_gqa", "seqused_k", "block_table", "num_splits"}
    # FlashAttention 2 folds query heads of single queries only without a window.
    assert options["window_size"] == ((-1, -1) if max_q == 1 else (-1, 0))
    assert options["enable_gqa"] and options["num_splits"] == 1
    used, table = options["seqused_k"], options["block_table"]
    assert {x.dtype for x in (cu_seq_q, cu_seq_k, used, table)} == {torch.int32}
    assert cu_seq_q.shape == cu_seq_k.shape == (len(used) + 1,) and table.shape[0] == len(used)
    assert key.shape == value.shape and key.stride(-1) == 1
    assert cu_seq_k.diff().tolist() == used.tolist()
    assert int(cu_seq_q.diff().max()) <= max_q and int(used.max()) <= max_k <= table.shape[1] * key.shape[1]
    outs = []
    for index, context in enumerate(used.tolist()):
        q = query[cu_seq_q[index] : cu_seq_q[index + 1]]
        k, v = (pages[table[index].long()].flatten(0, 1)[:context] for pages in (key, value))
        mask = torch.ones(len(q), context, dtype=torch.bool).tril(context - len(q))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outs)
