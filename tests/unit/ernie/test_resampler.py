from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.ernie.resampler import Resampler, UnitRun
from tests.small_models import fill, vision_config

RUNS = [
    UnitRun(count=2, frames=1, patches=8),
    UnitRun(count=1, frames=2, patches=8),
    UnitRun(count=2, frames=2, patches=12),
]


def resampler() -> Resampler:
    model = Resampler(vision_config(layer_norm_eps=0.01, rms_norm_eps=0.02), torch.float64, torch.device("cpu"))
    fill(model.parameters(), 0)
    return model


def test_one_token_computed_by_hand() -> None:
    """Token 1 of the frame pair: squares 1 of both frames, each four neighbouring rows laid side by side."""
    model = resampler()
    p = {name.removeprefix("model.resampler_model."): view for name, view in model.parameters().items()}
    features = torch.randn(16 + 16 + 48, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def merge(part: str, x: Tensor) -> Tensor:
        x = F.linear(x, p[f"{part}.fc1.weight"], p[f"{part}.fc1.bias"])
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        x = F.linear(x, p[f"{part}.fc2.weight"], p[f"{part}.fc2.bias"])
        x = (x - x.mean()) / (x.var(correction=0) + 0.01).sqrt()
        return x * p[f"{part}.ln.weight"] + p[f"{part}.ln.bias"]

    squares = [merge("spatial_linear", features[start : start + 4].flatten()) for start in (20, 28)]
    x = F.linear(merge("temporal_linear", torch.cat(squares)), p["mlp.weight"], p["mlp.bias"])
    expected = x / (x.square().mean() + 0.02).sqrt() * p["after_norm.weight"]
    tokens = model(features, RUNS)
    assert tokens.shape == (4 + 2 + 6, 48)
    torch.testing.assert_close(tokens[5], expected)


def test_a_still_image_is_paired_with_itself() -> None:
    model = resampler()
    frame = torch.randn(8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    still = model(frame, [UnitRun(count=1, frames=1, patches=8)])
    pair = model(torch.cat([frame, frame]), [UnitRun(count=1, frames=2, patches=8)])
    torch.testing.assert_close(still, pair)
