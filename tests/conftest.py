"""Shared by all tests: one torch thread, so that small models are fast and results repeat."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
