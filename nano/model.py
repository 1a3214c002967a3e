"""The model as it is trained: plain torch, the tensor names of the checkpoint.

Frames are padded to the largest of a batch and rows to one length, so that the language model compiles once. Experts
are computed for every token and weighted with zero outside the chosen ones: at this size that is faster than sorting.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.ernie.config import ErnieConfig, TextConfig, VisionConfig
from actors.ernie.config_keys import DEFAULT_MEAN, DEFAULT_STD

EARLY, LATE = 2, 4
"""Layers after which tokens of pictures and clips are to know where they lie, and whether something changed there."""
BLIND = 2
"""Layers in which words are not to look at pictures: what they read later has passed the vision experts."""


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_heads
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, config.intermediate_size), "fc2": nn.Linear(config.intermediate_size, width)}
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        frames, patches, width = x.shape
        q, k, v = self.attn["qkv"](self.norm1(x)).view(frames, patches, 3, self.heads, -1).unbind(2)
        q, k = (rotate_half(t.float(), cos, sin).to(v.dtype).transpose(1, 2) for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask)
        x = x + self.attn["proj"](out.transpose(1, 2).reshape(frames, patches, width))
        h = self.mlp["fc1"](self.norm2(x))
        return x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h))


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat((-high, low), dim=-1) * sin[:, :, None]


class VisionTower(nn.Module):
    inverse: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(3 * 14 * 14, config.hidden_size, bias=False)})
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        head = config.hidden_size // config.num_heads
        inverse = config.rope_theta ** (-torch.arange(0, head // 2, 2).float() / (head // 2))
        self.register_buffer("inverse", inverse, persistent=False)

    def forward(self, patches: Tensor, places: Tensor, valid: Tensor) -> Tensor:
        """patches [F, P, 588] normalised, places int [F, P, 2] (row, column), valid bool [F, P] -> [F, P, width]."""
        angles = (places.float()[..., None] * self.inverse).flatten(2)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        x = self.patch_embed["proj"](patches)
        mask = valid[:, None, None, :]
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        return self.ln(x)


def two_layers(inputs: int, width: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"fc1": nn.Linear(inputs, width), "fc2": nn.Linear(width, width), "ln": nn.LayerNorm(width, eps=1e-6)}
    )


class Resampler(nn.Module):
    def __init__(self, config: ErnieConfig) -> None:
        super().__init__()
        wide = 4 * config.vision.hidden_size
        self.spatial_linear = two_layers(wide, wide)
        self.temporal_linear = two_layers(2 * wide, wide)
        self.mlp = nn.Linear(wide, config.text.hidden_size)
        self.after_norm = nn.RMSNorm(config.text.hidden_size, eps=config.text.rms_norm_eps)

    def forward(self, x: Tensor, pairs: Tensor) -> Tensor:
        """x [F, P, width], pairs int [U, 2] of frames (a picture twice) -> [U, P / 4, hidden]."""
        frames, patches, width = x.shape
        x = apply_two(self.spatial_linear, x.reshape(frames, patches // 4, 4 * width))
        x = apply_two(self.temporal_linear, torch.cat((x[pairs[:, 0]], x[pairs[:, 1]]), dim=-1))
        return self.after_norm(self.mlp(x).float())


def apply_two(layers: nn.ModuleDict, x: Tensor) -> Tensor:
    return layers["ln"](layers["fc2"](F.gelu(layers["fc1"](x))))


class Gate(nn.Module):
    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, width) * 0.02)
        self.moe_statics = nn.ParameterDict(
            {"e_score_correction_bias": nn.Parameter(torch.zeros(1, experts), requires_grad=False)}
        )


class Bank(nn.Module):
    """The experts of one modality."""

    def __init__(self, config: TextConfig, inter: int) -> None:
        super().__init__()
        width, count = config.hidden_size, config.moe_num_experts
        self.k = config.moe_k
        self.gate = Gate(count, width)
        self.experts = nn.ParameterDict(
            {
                "gate_up_proj": nn.Parameter(torch.randn(count, 2 * inter, width) / math.sqrt(width) * 0.7),
                "down_proj": nn.Parameter(torch.randn(count, width, inter) / math.sqrt(inter) * 0.3),
            }
        )

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, width], valid float [N] -> out [N, width], load and mean probability of the experts [E]."""
        with torch.autocast("cpu", enabled=False):
            p = torch.softmax(x.float() @ self.gate.weight.t(), dim=-1)
        biased = p.detach() + self.gate.moe_statics["e_score_correction_bias"]
        chosen = torch.zeros_like(p).scatter_(1, biased.topk(self.k, dim=-1).indices, 1.0)
        weights = p * chosen
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
        gate_up, down = self.experts["gate_up_proj"], self.experts["down_proj"]
        count, double, width = gate_up.shape
        inter = double // 2
        g = F.linear(x, gate_up[:, :inter].reshape(count * inter, width))
        u = F.linear(x, gate_up[:, inter:].reshape(count * inter, width))
        h = (F.silu(g) * u).view(-1, count, inter) * (weights * valid[:, None])[:, :, None].to(g.dtype)
        out = F.linear(h.view(-1, count * inter), down.permute(1, 0, 2).reshape(width, count * inter))
        total = valid.sum().clamp_min(1)
        return out, (chosen * valid[:, None]).sum(0) / total, (p * valid[:, None]).sum(0) / total


class Mlp(nn.Module):
    def __init__(self, width: int, inter: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inter, bias=False)
        self.up_proj = nn.Linear(width, inter, bias=False)
        self.down_proj = nn.Linear(inter, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Moe(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        text, vision = config.moe_intermediate_size
        self.text_moe = Bank(config, text)
        self.vision_moe = Bank(config, vision)
        self.shared_experts = Mlp(config.hidden_size, text * config.moe_num_shared_experts)


class Attention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, self.heads * head, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * head, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * head, bias=False)
        self.o_proj = nn.Linear(self.heads * head, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [R, S, width] -> the same, and which share of their attention [R, heads, S] tokens give to those of
        ``seen`` (bool [R, S]); zeros without it."""
        rows, length, _ = x.shape
        q = self.q_proj(x).view(rows, length, self.heads, -1)
        k = self.k_proj(x).view(rows, length, self.kv_heads, -1)
        v = self.v_proj(x).view(rows, length, self.kv_heads, -1).transpose(1, 2)
        q, k = (rotate_pairs(t.float(), cos, sin).to(v.dtype).transpose(1, 2) for t in (q, k))
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        if seen is None:
            share = torch.zeros(rows, self.heads, length)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = (q @ k.mT).float() / math.sqrt(q.shape[-1])
            weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
            share = (weights * seen[:, None, None, :]).sum(-1)
            out = weights.to(v.dtype) @ v
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1)), share


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


class Layer(nn.Module):
    def __init__(self, config: TextConfig, dense: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: Mlp | Moe = Mlp(config.hidden_size, config.intermediate_size) if dense else Moe(config)


class Passed(NamedTuple):
    """What a pass through the language model tells."""

    hidden: Tensor
    """[R, S, width] after the last norm."""
    loads: Tensor
    """[L, 2, E]: share of its bank's tokens that each expert of a sparse layer gets."""
    probabilities: Tensor
    """[L, 2, E]: their mean."""
    early: Tensor
    """[V, width]: states of pictures and clips after EARLY layers."""
    late: Tensor
    """[V, width]: after LATE layers."""
    before: Tensor
    """The size of states there before the first sparse layer: the root mean square of a token."""
    written: Tensor
    """The same for what attention and shared experts add to them in the first BLIND layers, summed."""
    looks: Tensor
    """The share of their attention that words give to pictures and clips in the first BLIND layers, summed."""


class LanguageModel(nn.Module):
    inverse: Tensor
    axis: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i == 0) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        head = config.head_dim
        inverse = config.rope_theta ** (-torch.arange(0, head, 2).float() / head)
        spatial = sum(config.mrope_section[:2])
        # Frequencies alternate between height and width; the lowest are of time.
        axis = torch.tensor([1 if i % 2 == 0 else 2 for i in range(spatial)] + [0] * (head // 2 - spatial))
        self.register_buffer("inverse", inverse, persistent=False)
        self.register_buffer("axis", axis, persistent=False)

    def embed(self, ids: Tensor, vision: Tensor, source: Tensor, slot: Tensor) -> Tensor:
        """Embeddings [R, S, width] of ids [R, S] with rows of ``vision`` [N, width] in their places.

        ``slot`` int [V] are places in [R * S] that go to the vision experts (0 for padding), ``source`` int [V] the
        rows of ``vision`` for them (-1 for delimiters and padding, which keep their embeddings).
        """
        x = self.embed_tokens(ids)
        flat = x.view(-1, x.shape[-1])
        there = source >= 0
        places = slot[there]
        return flat.index_add(0, places, vision[source[there]].to(flat.dtype) - flat[places]).view_as(x)

    def forward(self, x: Tensor, positions: Tensor, branch: Tensor, special: Tensor, slot: Tensor) -> Passed:
        """Hidden states [R, S, width] of rows packed with a shared beginning and branches.

        x [R, S, width] from ``embed``; positions int [R, S, 3]; branch int [R, S]: 0 for what every branch sees, -1 for
        padding; special bool [R, S]: for the vision experts.
        """
        rows, length, width = x.shape
        angles = positions.gather(2, self.axis.expand(rows, length, -1)).float() * self.inverse
        cos, sin = angles.cos(), angles.sin()
        earlier = torch.ones(length, length, dtype=torch.bool).tril()
        same = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        mask = (earlier & same)[:, None]
        text_valid = ((branch >= 0) & ~special).view(-1).float()
        routed = (slot > 0).float()

        def size(out: Tensor) -> Tensor:
            rms = out.reshape(-1, width)[slot].float().square().mean(-1).add(1e-6).sqrt()
            return (rms * routed).sum() / routed.sum().clamp_min(1)

        words = ((branch >= 0) & ~special).float()
        loads, probabilities, before, written, looks = [], [], [], [], []
        early = late = x
        for i, layer in enumerate(cast("list[Layer]", list(self.layers))):
            if i == EARLY:
                early = x.view(-1, width)[slot]
            if i == LATE:
                late = x.view(-1, width)[slot]
            attended, share = layer.self_attn(layer.input_layernorm(x), cos, sin, mask, special if i < BLIND else None)
            if i < BLIND:
                looks.append((share.mean(1) * words).sum() / words.sum())
                written.append(size(attended))
            x = x + attended
            h = layer.post_attention_layernorm(x)
            moe, flat = layer.mlp, h.view(-1, width)
            if isinstance(moe, Mlp):
                x = x + moe(h)
                before.append(size(x))
                continue
            text, text_load, text_p = moe.text_moe(flat, text_valid)
            seen, seen_load, seen_p = moe.vision_moe(flat[slot], routed)
            shared = moe.shared_experts(flat)
            if i < BLIND:
                written.append(size(shared))
            out = text.index_add(0, slot, seen.to(text.dtype)) + shared
            x = x + out.view(rows, length, width)
            loads.append(torch.stack((text_load, seen_load)))
            probabilities.append(torch.stack((text_p, seen_p)))
        return Passed(
            hidden=self.norm(x.float()),
            loads=torch.stack(loads),
            probabilities=torch.stack(probabilities),
            early=early,
            late=late,
            before=torch.stack(before).sum(),
            written=torch.stack(written).sum(),
            looks=torch.stack(looks).sum(),
        )


class Nano(nn.Module):
    """All parts, with the names of the checkpoint under ``model``."""

    def __init__(self, config: ErnieConfig) -> None:
        super().__init__()
        self.vision_tower = VisionTower(config.vision)
        self.resampler_model = Resampler(config)
        self.language_model = LanguageModel(config.text)
        self.apply(_initialise)

    def see(self, patches: Tensor, places: Tensor, valid: Tensor, pairs: Tensor) -> Tensor:
        """uint8 patches [F, P, 588] -> [U, P / 4, hidden]."""
        return self.resampler_model(self.vision_tower(normalise(patches), places, valid), pairs)


_MEAN, _STD = (torch.tensor(values).repeat_interleave(14 * 14) for values in (DEFAULT_MEAN, DEFAULT_STD))


def normalise(patches: Tensor) -> Tensor:
    return (patches.float() / 255 - _MEAN) / _STD


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.7 / math.sqrt(module.in_features))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.05)
