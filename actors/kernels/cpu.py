"""What a decode step computes on a CPU in bfloat16, compiled: products of few rows, and the row-wise work between them.

The plain forms of the same are torch code beside the callers. Results differ from theirs by rounding alone: sums are
float32 in another order, and the product inside an expert is rounded once instead of three times.

T tokens, I inputs, O outputs, D width, M width inside an expert, E experts of a bank, X of both, K choices of a token,
N = T * K rows, H heads, K key heads, d head width, F = d / 2, n queries, m keys.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from actors.kernels.compiler import KernelUnavailable, cpu_flags, find_compiler, load_library

SOURCES = ("common.c", "products.c", "rows.c", "attention.c")
ROW_LIMITS = {"avx512_bf16": 64}
"""Rows per weight matrix up to which the products are no slower than torch's. Measured: equal at 64 to 128 with 512-bit
bfloat16 instructions; without them torch has no fast bfloat16 product at all and these always win."""
NO_LIMIT = 1 << 30
MAX_HEAD_WIDTH = 256
NEEDED_FLAGS = frozenset({"avx2", "fma"})

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


def kernel_problem(device: str, dtype: torch.dtype, flags: frozenset[str], compiler: str | None) -> str | None:
    """Why the kernels cannot serve a model of ``dtype`` on ``device`` (a torch device type); None if they should."""
    if device != "cpu":
        return f"the model is on {device}"
    if dtype != torch.bfloat16:
        return f"the compiled kernels are for bfloat16, not {str(dtype).removeprefix('torch.')}"
    if not flags >= NEEDED_FLAGS:
        return f"the processor lacks {', '.join(sorted(NEEDED_FLAGS - flags))}"
    if compiler is None:
        return "there is no C compiler"
    return None


class CpuKernels:
    """The loaded library. Threads: as many as torch uses, from the same pool.

    Every tensor is a contiguous bfloat16 one on the CPU unless said otherwise; ValueError for others, and for shapes
    that do not fit.
    """

    def __init__(self, library: ctypes.CDLL, team: Any) -> None:
        def function(name: str, *types: Any, result: Any = None) -> Any:
            found = getattr(library, name)
            found.argtypes, found.restype = [_POINTER, _INT, *types], result
            return functools.partial(found, team)

        self._linear = function("linear", *[_POINTER] * 4, *[_SIZE] * 3)
        self._experts = function(
            "experts", _POINTER, _SIZE, _POINTER, _SIZE, *[_POINTER] * 4, *[_SIZE] * 2, result=_INT
        )
        self._rms_norm = function("rms_norm", *[_POINTER] * 3, *[_SIZE] * 2, _FLOAT)
        self._rotate = function("rotate", _POINTER, _SIZE, *[_POINTER] * 3, *[_SIZE] * 3, _INT)
        self._quick_gelu = function("quick_gelu", *[_POINTER] * 2, _SIZE)
        self._route = function("route", *[_POINTER] * 8, *[_SIZE] * 4, _FLOAT)
        self._group_rows = function("group_rows", *[_POINTER] * 5, *[_SIZE] * 4, result=_INT)
        self._combine_rows = function("combine_rows", *[_POINTER] * 4, *[_SIZE] * 3)
        self._attention: Any = None
        if library.has_attention():
            strided = [_POINTER, _SIZE] * 3
            self._attention = function("attention", *strided, *[_POINTER] * 2, *[_SIZE] * 5, _INT, result=_INT)
        library.products_name.restype = ctypes.c_char_p
        self.name: str = library.products_name().decode()
        """Instructions the products use."""
        self.row_limit = ROW_LIMITS.get(self.name, NO_LIMIT)
        """Rows per weight matrix beyond which torch's products are the faster ones."""

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x W^T + b, summed in float32 and rounded once: [T, O]."""
        rows, inputs = x_TI.shape
        outputs = weight_OI.shape[0]
        if weight_OI.shape[1] != inputs or (bias_O is not None and bias_O.shape != (outputs,)):
            raise ValueError(f"{tuple(x_TI.shape)} rows do not fit weights {tuple(weight_OI.shape)}")
        out_TO = x_TI.new_empty(rows, outputs)
        bias = None if bias_O is None else _address(bias_O)
        pointers = _address(x_TI), _address(weight_OI), bias, _address(out_TO)
        self._linear(torch.get_num_threads(), *pointers, rows, inputs, outputs)
        return out_TO

    def experts(self, rows_ND: Tensor, counts_E: Tensor, gate_up_EFD: Tensor, down_EDM: Tensor) -> Tensor:
        """down(silu(gate x) * up x) of each expert over its rows, which lie in the order of experts: [N, D].

        Sums and the product inside are float32, rounded to bfloat16 before ``down`` and at the end. F = 2 M, gate over
        up. ``counts_E``: int32, summing to N.
        """
        if counts_E.dtype != torch.int32 or counts_E.shape != down_EDM.shape[:1] or not counts_E.is_contiguous():
            raise ValueError(f"the counts must be int32 [{down_EDM.shape[0]}]")
        return self._run_experts(rows_ND, counts_E, gate_up_EFD, down_EDM)

    def gated_mlp(self, x_TD: Tensor, gate_up_FD: Tensor, down_DM: Tensor) -> Tensor:
        """``experts`` with one expert for all rows: [T, D]."""
        return self._run_experts(x_TD, None, gate_up_FD.unsqueeze(0), down_DM.unsqueeze(0))

    def _run_experts(self, x_ND: Tensor, counts_E: Tensor | None, gate_up_EFD: Tensor, down_EDM: Tensor) -> Tensor:
        experts, width, inner = down_EDM.shape
        rows = x_ND.shape[0]
        if gate_up_EFD.shape != (experts, 2 * inner, width) or x_ND.shape[1] != width:
            raise ValueError(f"experts {tuple(gate_up_EFD.shape)} and {tuple(down_EDM.shape)} do not fit the rows")
        hidden_NM = x_ND.new_empty(rows, inner)
        out_ND = torch.empty_like(x_ND)
        weights = _address(gate_up_EFD), _address(down_EDM), _address(hidden_NM), _address(out_ND)
        counts = None if counts_E is None else counts_E.data_ptr()
        threads = torch.get_num_threads()
        if self._experts(threads, _address(x_ND), rows, counts, experts, *weights, width, inner):
            raise ValueError(f"{rows} rows, but the counts of {experts} experts give another number")
        return out_ND

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See ``layers.rms_norm``."""
        rows, width = x_TD.shape
        if weight_D.shape != (width,):
            raise ValueError(f"rows of {width} do not fit a weight {tuple(weight_D.shape)}")
        out_TD = torch.empty_like(x_TD)
        pointers = _address(x_TD), _address(weight_D), _address(out_TD)
        self._rms_norm(torch.get_num_threads(), *pointers, rows, width, eps)
        return out_TD

    def rotate_pairs(self, x_THd: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
        """See ``rope.rotate_pairs``. ``x_THd`` may be the first heads of wider rows; the tables are float32."""
        return self._rotated(x_THd, cos_TF, sin_TF, halves=False)

    def rotate_halves(self, x_THd: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
        """See ``rope.rotate_halves``; as ``rotate_pairs``."""
        return self._rotated(x_THd, cos_TF, sin_TF, halves=True)

    def _rotated(self, x_THd: Tensor, cos_TF: Tensor, sin_TF: Tensor, *, halves: bool) -> Tensor:
        tokens, heads, width = x_THd.shape
        start, stride = _heads(x_THd)
        for table in (cos_TF, sin_TF):
            if table.shape != (tokens, width // 2) or table.dtype != torch.float32 or not table.is_contiguous():
                raise ValueError(f"tables must be contiguous float32 [{tokens}, {width // 2}]")
        out_THd = x_THd.new_empty(tokens, heads, width)
        pointers = cos_TF.data_ptr(), sin_TF.data_ptr(), out_THd.data_ptr()
        self._rotate(torch.get_num_threads(), start, stride, *pointers, tokens, heads, width // 2, halves)
        return out_THd

    def quick_gelu(self, x: Tensor) -> Tensor:
        """x sigmoid(1.702 x), rounded once."""
        out = torch.empty_like(x)
        self._quick_gelu(torch.get_num_threads(), _address(x), _address(out), x.numel())
        return out

    def attends(self, width: int) -> bool:
        """Whether ``attention`` takes heads of ``width`` on this processor."""
        return self._attention is not None and width % 16 == 0 and width <= MAX_HEAD_WIDTH

    def attention(self, q_nHd: Tensor, k_mKd: Tensor, v_mKd: Tensor, *, causal: bool) -> Tensor:
        """softmax(q k^T / sqrt(d)) v of one sequence, float32 inside: [n, H, d]. H is a multiple of K.

        ``causal``: query i sees the first m - n + i + 1 keys; there are at least as many keys as queries. Operands may
        be heads of wider rows.
        """
        queries, heads, width = q_nHd.shape
        keys, kv_heads, _ = k_mKd.shape
        if k_mKd.shape != v_mKd.shape or k_mKd.shape[2] != width or heads % kv_heads or not self.attends(width):
            raise ValueError(f"no attention of {tuple(q_nHd.shape)} over {tuple(k_mKd.shape)}, {tuple(v_mKd.shape)}")
        if keys < max(queries, 1):
            raise ValueError(f"{queries} queries, {keys} keys")
        padded = -(-keys // 64) * 64
        scratch = q_nHd.new_empty(2 * kv_heads * padded * width)
        out_nHd = q_nHd.new_empty(queries, heads, width)
        strided = *_heads(q_nHd), *_heads(k_mKd), *_heads(v_mKd)
        sizes = queries, keys, heads, kv_heads, width
        self._attention(torch.get_num_threads(), *strided, scratch.data_ptr(), out_nHd.data_ptr(), *sizes, causal)
        return out_nHd

    def route(
        self,
        x_TD: Tensor,
        text: tuple[Tensor, Tensor],
        vision: tuple[Tensor, Tensor] | None,
        vision_T: Tensor | None,
        *,
        k: int,
        norm_min: float,
    ) -> tuple[Tensor, Tensor]:
        """See ``moe.route``; a bank is its router [E, D] and correction [E], float32. ``vision_T`` is bool."""
        tokens, width = x_TD.shape
        experts = text[1].shape[0]
        if not 0 < k <= experts:
            raise ValueError(f"{k} of {experts} experts")
        if vision_T is not None and vision is None:
            raise ValueError("vision tokens need the vision expert bank")
        for router_ED, correction_E in (text,) if vision is None else (text, vision):
            for tensor, shape in ((router_ED, (experts, width)), (correction_E, (experts,))):
                if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_contiguous():
                    raise ValueError(f"a router must be contiguous float32 {shape}, got {tuple(tensor.shape)}")
        if vision_T is not None and (vision_T.shape != (tokens,) or vision_T.dtype != torch.bool):
            raise ValueError(f"vision_T must be bool [{tokens}]")
        mask_T = None if vision_T is None else vision_T.contiguous()
        ids_TK = torch.empty(tokens, k, dtype=torch.int64)
        weights_TK = x_TD.new_empty(tokens, k)
        banks = [tensor.data_ptr() for tensor in (*text, *(vision or ()))] + [None] * (0 if vision else 2)
        mask = None if mask_T is None else mask_T.data_ptr()
        pointers = _address(x_TD), *banks, mask, ids_TK.data_ptr(), weights_TK.data_ptr()
        self._route(torch.get_num_threads(), *pointers, tokens, width, experts, k, norm_min)
        return ids_TK, weights_TK

    def group_rows(self, x_TD: Tensor, ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [N, D] in the order of expert ids, int32 rows of each expert [X], and int64 row of each choice [N].

        ``ids_TK``: int64, each below ``experts``.
        """
        tokens, k = ids_TK.shape
        width = x_TD.shape[1]
        if ids_TK.dtype != torch.int64 or not ids_TK.is_contiguous() or x_TD.shape[0] != tokens:
            raise ValueError(f"ids must be contiguous int64 [{x_TD.shape[0]}, choices]")
        rows_ND = x_TD.new_empty(tokens * k, width)
        counts_X = torch.empty(experts, dtype=torch.int32)
        row_of_choice_N = torch.empty(tokens * k, dtype=torch.int64)
        pointers = rows_ND.data_ptr(), counts_X.data_ptr(), row_of_choice_N.data_ptr()
        threads = torch.get_num_threads()
        if self._group_rows(threads, _address(x_TD), ids_TK.data_ptr(), *pointers, tokens, k, width, experts):
            raise ValueError(f"an expert id is none of {experts}")
        return rows_ND, counts_X, row_of_choice_N

    def combine_rows(self, rows_ND: Tensor, row_of_choice_N: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum, in float32, of each token's rows: [T, D]. ``row_of_choice_N`` as ``group_rows`` made it."""
        tokens, k = weights_TK.shape
        width = rows_ND.shape[1]
        if rows_ND.shape[0] != tokens * k or row_of_choice_N.shape != (tokens * k,):
            raise ValueError(f"{rows_ND.shape[0]} rows for {tokens} tokens of {k} choices")
        out_TD = rows_ND.new_empty(tokens, width)
        pointers = _address(rows_ND), row_of_choice_N.data_ptr(), _address(weights_TK), out_TD.data_ptr()
        self._combine_rows(torch.get_num_threads(), *pointers, tokens, k, width)
        return out_TD


def _heads(x_THd: Tensor) -> tuple[int, int]:
    """Address, and elements from token to token."""
    if x_THd.dtype != torch.bfloat16 or x_THd.stride()[1:] != (x_THd.shape[2], 1) or x_THd.device.type != "cpu":
        raise ValueError("the heads of a token must lie together, bfloat16, on the CPU")
    return x_THd.data_ptr(), x_THd.stride(0)


def _address(tensor: Tensor) -> int:
    if tensor.dtype != torch.bfloat16 or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("the kernels take contiguous bfloat16 tensors on the CPU")
    return tensor.data_ptr()


@functools.cache
def load_cpu_kernels() -> CpuKernels:
    """The kernels of this process, built first if need be. Raises KernelUnavailable.

    torch's OpenMP runtime is found by the entry point that GNU's, LLVM's and Intel's all have: a runtime of our own
    would make two pools fight over the cores.
    """
    problem = kernel_problem("cpu", torch.bfloat16, cpu_flags(), find_compiler())
    if problem is not None:
        raise KernelUnavailable(problem)
    try:
        team = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except AttributeError:
        raise KernelUnavailable("torch's OpenMP runtime has no GOMP_parallel") from None
    return CpuKernels(load_library("cpu", SOURCES), team)


def find_cpu_kernels(device: str, dtype: torch.dtype) -> tuple[CpuKernels | None, str]:
    """The kernels for a model of ``dtype`` on ``device`` (a torch device type), or None and why not."""
    problem = kernel_problem(device, dtype, cpu_flags(), find_compiler())
    if problem is not None:
        return None, problem
    try:
        return load_cpu_kernels(), ""
    except KernelUnavailable as error:
        return None, str(error)
