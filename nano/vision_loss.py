"""How well the resampler's output tells what lies on each patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nano.vision_data import CLASSES, OUTPUTS, VisionBatch

KINDS = ("colour", "shape", "left digit", "right digit")


def losses(head: Tensor, batch: VisionBatch) -> tuple[Tensor, Tensor, dict[str, tuple[float, float]]]:
    """Class loss, box loss and per kind (right, all) from head outputs [U, P / 4, 2 * 4 * OUTPUTS]."""
    units = head.shape[0]
    out = head.float().view(units, -1, 2, 4, OUTPUTS).permute(0, 2, 1, 3, 4).reshape(units, 2, -1, OUTPUTS)
    classes = torch.from_numpy(batch.classes)
    known = classes[:, :, 0] >= 0
    valid = torch.from_numpy(batch.frames.valid)[torch.from_numpy(batch.frames.pairs)] & known
    parts = out.split([*CLASSES, 4], dim=-1)
    total, right = torch.zeros(()), {}
    objects = (classes > 0).sum().clamp_min(1)
    for i, name in enumerate(KINDS):
        wanted = classes[:, :, i]
        total = total + F.cross_entropy(parts[i][valid], wanted[valid], reduction="sum") / objects
        there = wanted > 0
        right[name] = (float((parts[i].argmax(-1) == wanted)[there].sum()), float(there.sum()))
    boxes = torch.from_numpy(batch.boxes)
    there = ~boxes[..., 0].isnan()
    box = F.smooth_l1_loss(parts[4][there], boxes[there], beta=0.1) if there.any() else torch.zeros(())
    return total, box, right
