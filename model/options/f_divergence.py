"""Weights that turn DMD's reverse KL into another f-divergence (f-distill, arXiv:2502.15681)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 3.0  # density ratios are cut to e^-3 .. e^3: a discriminator may be sure of itself
MIN_MEAN_WEIGHT = math.exp(-MAX_LOG_RATIO)

Divergence = Literal[
    "reverse_kl", "forward_kl", "jensen_shannon", "softened_reverse_kl", "neyman", "hellinger",
    "jeffreys",
]  # fmt: skip


def divergence_weight(divergence: Divergence, logits: Tensor) -> Tensor:
    """h(r) of an f-divergence for density ratios r = p_real / p_fake = exp(logits) [B].

    What the reverse KL's gradient is multiplied by, arXiv:2502.15681 table 1.
    """
    r = logits.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weights = {
        "reverse_kl": torch.ones_like(r),
        "forward_kl": r,
        "jensen_shannon": r / (1.0 + r),
        "softened_reverse_kl": 1.0 / (1.0 + r),
        "neyman": 1.0 / r,
        "hellinger": r.sqrt(),
        "jeffreys": 1.0 + r,
    }
    return weights[divergence]
