"""The language model: embedding, decoder layers, head. Flat batches: tokens of many sequences, no padding.

T tokens, D hidden, H query heads, K key / value heads, d head width, N tokens whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.ernie.attention import Attention
from actors.ernie.bank import VisionBank
from actors.ernie.config import DENSE, TextConfig
from actors.ernie.experts_form import ExpertsForm, resolve_experts_form
from actors.ernie.layers import GatedMlp, Linear, product, rms_norm, wide_dtype
from actors.ernie.moe import ExpertBank, SparseMlp, expert_tensor_names
from actors.ernie.rope import rotate_pairs, text_rope_tables
from actors.kernels.cpu import CpuKernels, load_cpu_kernels
from actors.parallel.dispatch import Dispatcher, LocalDispatcher
from actors.parallel.group import ExpertGroup
from actors.parallel.layout import ExpertPlacement, ExpertShare
from actors.parallel.moves import BankStorage, MoveReport, move_experts

PREFIX = "model.language_model"


class DecoderLayer:
    """x += attention(norm(x)); x += mlp(norm(x)). q, k and v are one matrix, gate and up are one matrix."""

    def __init__(
        self,
        config: TextConfig,
        index: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: CpuKernels | None,
        share: ExpertShare | None,
    ) -> None:
        self.config = config
        self.index = index
        self.kernels = kernels
        width, bias = config.hidden_size, config.use_bias
        qkv_size = config.q_size + 2 * config.kv_size
        self.input_norm_D = torch.empty(width, dtype=dtype, device=device)
        self.qkv = Linear.empty(qkv_size, width, bias=bias, dtype=dtype, device=device, kernels=kernels)
        self.out = Linear.empty(width, config.q_size, bias=bias, dtype=dtype, device=device, kernels=kernels)
        self.mlp_norm_D = torch.empty(width, dtype=dtype, device=device)
        self.mlp: GatedMlp | SparseMlp
        if config.mlp_layer_types[index] == DENSE:
            inner = config.intermediate_size
            self.mlp = GatedMlp.empty(width, inner, bias=bias, dtype=dtype, device=device, kernels=kernels)
        else:
            held = None if share is None else len(share.text(index))
            self.mlp = SparseMlp(config, index, dtype, device, kernels, held)

    def attend(self, x_TD: Tensor, cos_TF: Tensor, sin_TF: Tensor, attention: Attention) -> Tensor:
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv_THd = self.qkv(x_TD).view(x_TD.shape[0], heads + 2 * kv_heads, self.config.head_dim)
        qk_THd = rotate_pairs(qkv_THd[:, : heads + kv_heads], cos_TF, sin_TF, self.kernels)
        out_THd = attention.attend(self.index, qk_THd[:, :heads], qk_THd[:, heads:], qkv_THd[:, heads + kv_heads :])
        return self.out(out_THd.flatten(1))

    def parameters(self) -> dict[str, Tensor]:
        prefix, config = f"{PREFIX}.layers.{self.index}", self.config
        attention = f"{prefix}.self_attn"
        qkv_rows = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
        return {
            f"{prefix}.input_layernorm.weight": self.input_norm_D,
            f"{prefix}.post_attention_layernorm.weight": self.mlp_norm_D,
            **self.qkv.parameters({f"{attention}.{name}": rows for name, rows in qkv_rows.items()}),
            **self.out.parameters({f"{attention}.o_proj": config.hidden_size}),
            **self.mlp.parameters(f"{prefix}.mlp"),
        }


class LanguageModel:
    """The backbone with the text experts. The vision experts come and go with ``attach_vision_bank``.

    Tensors are uninitialised until a loader has filled everything ``parameters_by_name`` lists. ``device="meta"`` gives
    shapes without memory. Inference only.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        vision_bank: VisionBank | None = None,
        share: ExpertShare | None = None,
        dispatcher: Dispatcher[Any] | None = None,
        experts_form: ExpertsForm | None = None,
    ) -> None:
        """``dtype``: bfloat16, float32 or float64 of weights and activations; norms, routers and rotary are at least
        float32. ``share``: which experts this rank of a group holds; without one all are here. A share computes with
        the ``dispatcher`` of its group, which may also be set later and changed between steps. ``experts_form``: None
        takes the fastest there is; raises ValueError for one that cannot be.
        """
        self.config = config
        self.share = share
        self.dtype = dtype
        self.device = torch.device(device)
        self.experts_choice = resolve_experts_form(self.device, dtype, experts_form)
        self.experts_form = self.experts_choice.form
        self.kernels = load_cpu_kernels() if self.experts_form is ExpertsForm.NATIVE else None
        self.dispatcher = dispatcher
        if dispatcher is None and share is None:
            self.dispatcher = LocalDispatcher(2 * config.moe_num_experts, self.kernels)
        self.vision_bank: VisionBank | None = None
        self.embed_VD = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=self.device)
        self.layers = [
            DecoderLayer(config, i, dtype, self.device, self.kernels, share) for i in range(config.num_hidden_layers)
        ]
        self.norm_D = torch.empty(config.hidden_size, dtype=dtype, device=self.device)
        self.head_VD = self.embed_VD if config.tie_word_embeddings else torch.empty_like(self.embed_VD)
        if vision_bank is not None:
            self.attach_vision_bank(vision_bank)

    def attach_vision_bank(self, bank: VisionBank) -> None:
        """Makes vision tokens computable. The bank's tensors must be filled before the next ``forward``."""
        if bank.config != self.config or bank.dtype != self.dtype or bank.share != self.share:
            raise ValueError("this vision bank was laid out for another model or another share of the experts")
        self.vision_bank = bank

    def detach_vision_bank(self) -> None:
        """Forgets the bank; its buffer is free for other use once running work on the device has ended."""
        self.vision_bank = None

    def parameters_by_name(self) -> dict[str, Tensor]:
        """Destination of every language tensor but the vision bank's, by canonical name, in the checkpoint's shape.

        A loader copies into the views (``view.copy_(tensor)``, which converts dtype and device); that q, k, v and gate,
        up lie in one matrix never shows. Tied heads have no tensor of their own. Tensors that ``expert_rows`` names
        have only the rows it tells.
        """
        views = {f"{PREFIX}.embed_tokens.weight": self.embed_VD, f"{PREFIX}.norm.weight": self.norm_D}
        if self.head_VD is not self.embed_VD:
            views["lm_head.weight"] = self.head_VD
        for layer in self.layers:
            views |= layer.parameters()
        return views

    def expert_rows(self) -> dict[str, tuple[int, ...]]:
        """By canonical name, which experts a tensor holds, in its order. Empty if all are here."""
        if self.share is None:
            return {}
        prefixes = {layer: f"{PREFIX}.layers.{layer}.mlp.text_moe" for layer in self.config.sparse_layers}
        return {name: self.share.text(i) for i, prefix in prefixes.items() for name in expert_tensor_names(prefix)}

    def move_experts(self, group: ExpertGroup, wanted: ExpertPlacement) -> MoveReport:
        """Exchanges experts with the other ranks of the group (see ``parallel.moves``), of an attached vision bank too.

        Between steps. A bank that is attached later must have been laid out for the new share.

        Raises ValueError if the model's share is not the group's.
        """
        if self.share != group.share:
            raise ValueError("the model does not hold the share of the experts that its group knows")
        banks: dict[int, ExpertBank] = {} if self.vision_bank is None else self.vision_bank.layers
        storage = {
            layer.index: BankStorage(
                text=layer.mlp.text.experts, vision=banks[layer.index].experts if layer.index in banks else ()
            )
            for layer in self.layers
            if isinstance(layer.mlp, SparseMlp)
        }
        report = move_experts(group, wanted, storage)
        self.share = group.share
        if self.vision_bank is not None:
            self.vision_bank.share = group.share
        return report

    def embed(self, ids_T: Tensor) -> Tensor:
        """Embedding rows [T, D] of int64 ids. Placeholder rows are the caller's to overwrite with media embeddings."""
        return F.embedding(ids_T, self.embed_VD)

    def forward(self, x_TD: Tensor, positions_3T: Tensor, vision_T: Tensor | None, attention: Attention) -> Tensor:
        """Final normed hidden states [T, D] of embeddings at integer positions (rows t, h, w).

        ``vision_T``: bool, True routes to the vision experts; None when all tokens are text (then no vision router
        runs). A rank of a group without tokens takes part with T = 0. Raises ValueError if vision tokens are present
        and no vision bank is attached, or a share of the experts has no dispatcher.
        """
        if self.dispatcher is None:
            raise ValueError("this model holds a share of the experts; it needs the dispatcher of its group")
        if vision_T is not None and self.vision_bank is None:
            if bool(vision_T.any()):
                raise ValueError("vision tokens in a batch, but no vision expert bank is attached")
            vision_T = None
        banks: dict[int, ExpertBank] = {} if self.vision_bank is None else self.vision_bank.layers
        cos_TF, sin_TF = text_rope_tables(positions_3T, self.config, wide_dtype(self.dtype))
        eps = self.config.rms_norm_eps
        for index, layer in enumerate(self.layers):
            x_TD = x_TD + layer.attend(rms_norm(x_TD, layer.input_norm_D, eps, self.kernels), cos_TF, sin_TF, attention)
            normed_TD = rms_norm(x_TD, layer.mlp_norm_D, eps, self.kernels)
            if isinstance(layer.mlp, SparseMlp):
                bank = banks.get(index)
                x_TD = x_TD + layer.mlp(normed_TD, vision_T, bank, self.dispatcher, self.experts_form)
            else:
                x_TD = x_TD + layer.mlp(normed_TD)
        return rms_norm(x_TD, self.norm_D, eps, self.kernels)

    def logits(self, h_ND: Tensor) -> Tensor:
        """float32 (float64 in a float64 model) logits [N, V] of states from ``forward``."""
        return product(h_ND, self.head_VD, None, self.kernels).to(wide_dtype(self.dtype))
