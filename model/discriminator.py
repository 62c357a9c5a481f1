"""A discriminator on the features of a denoiser: small heads, their losses, their penalties.

Letters as in model/types.py; K heads, one per tapped layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.guidance import concatenate
from model.types import Conditioning, Context, Denoiser, FeatureSpec
from model.wan.attention import attend
from model.wan.context import Taps
from utils.errors import UserError
from utils.optim import OptimizerConfig
from utils.seeding import SampleRNG

DEPTHS = (0.45, 0.72, 0.98)  # of the tapped layers; 13, 21 and 29 of 30, as in the 1.3B reference
SIGMA_BINS = 10  # noise levels share the mean weight of their bin
MEAN_STEP = 0.01  # how far one Adam step moves a mean weight, whatever the learning rate


@dataclass(frozen=True)
class DiscriminatorConfig(OptimizerConfig):
    """The heads; sizes that are left out follow from the network that they read."""

    lr: float = 1e-5
    layers: list[int] = field(default_factory=list)  # 0-based blocks to read; empty = three of them
    ffn_dim: int | None = None  # None = 4 x the network's width


@dataclass(frozen=True)
class AdversarialConfig:
    """How real and generated samples are told apart."""

    relativistic: bool = False  # score the difference of a real and a fake logit (arXiv:1807.00734)
    r1_weight: float = 0.0  # approximate gradient penalty on real samples (APT, arXiv:2501.08316)
    r2_weight: float = 0.0  # the same on generated ones
    r1_sigma: float = 0.01  # size of the perturbation, on noisy latents
    r2_sigma: float = 0.01

    def problems(self) -> Iterator[str]:
        """What is impossible about these settings, one line each."""
        for name in ("r1_weight", "r2_weight"):
            if not getattr(self, name) >= 0:
                yield f"loss.adversarial.{name}: must be at least 0, got {getattr(self, name)}"
        for name in ("r1_sigma", "r2_sigma"):
            if not getattr(self, name) > 0:
                yield f"loss.adversarial.{name}: must be positive, got {getattr(self, name)}"


@dataclass(frozen=True, eq=False)
class DiscriminatorOutput:
    """A discriminator on noisy samples."""

    logits: Tensor  # [B], positive = real
    mean_weight: Tensor  # [B] running mean of f-divergence weights at the sample's noise level


class DiscriminatorHeads(nn.Module):
    """One learned query per tapped layer, and a logit from all of them together."""

    blocks: nn.ModuleList

    def __init__(self, features: FeatureSpec, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.layers = tapped_layers(features, config)
        width, hidden = features.width, config.ffn_dim or 4 * features.width
        self.blocks = nn.ModuleList(
            Head(width, hidden, features.heads, features.eps) for _ in self.layers
        )
        self.norm = nn.LayerNorm(len(self.layers) * width)
        self.hidden = nn.Linear(len(self.layers) * width, width)
        self.logit = nn.Linear(width, 1)
        # Fitted by regression with the heads: gradients keep ranks and resumed runs in agreement.
        self.mean_weight_bias = nn.Parameter(torch.zeros(SIGMA_BINS))
        self.mean_weight_scale = MEAN_STEP / config.lr

    def forward(self, tokens: Sequence[Tensor], sigma: Tensor) -> tuple[Tensor, Tensor]:
        """tokens: [B, N, D] per tapped layer; sigma: [B, 1]. Returns logits, mean weights: [B]."""
        pairs = zip(self.blocks, tokens, strict=True)
        read = torch.cat([head(states.float()) for head, states in pairs], dim=-1)
        logits = self.logit(F.silu(self.hidden(self.norm(read))))[:, 0]
        bins = (sigma[:, 0] * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1)
        bias = self.mean_weight_bias[bins]
        # Scaled in value alone: its gradient shares one clipping norm with the heads'.
        return logits, 1.0 + bias + (self.mean_weight_scale - 1.0) * bias.detach()


def initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The starting value of the heads' parameter `name`, fp32: Xavier linears, zero biases."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    bound = math.sqrt(6.0 / (shape[0] + shape[1:].numel()))
    return (2.0 * torch.rand(shape, generator=generator) - 1.0) * bound


class Head(nn.Module):
    """A learned query reads all tokens of one layer; fp32."""

    def __init__(self, width: int, hidden: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.register_token = nn.Parameter(torch.empty(1, width))
        self.norm_token = nn.RMSNorm(width, eps)
        self.norm_states = nn.LayerNorm(width, eps)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.norm_ffn = nn.LayerNorm(width, eps)
        self.ffn = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
        )

    def forward(self, states: Tensor) -> Tensor:
        """states: [B, N, D]. Returns [B, D]."""
        token: Tensor = self.norm_token(self.register_token).expand(len(states), 1, -1)
        states, split = self.norm_states(states), (self.heads, -1)
        q = self.norm_q(self.q(token)).unflatten(-1, split)
        k = self.norm_k(self.k(states)).unflatten(-1, split)
        read = attend(q, k, self.v(states).unflatten(-1, split)).flatten(2)
        token = token + self.o(read)
        token = token + self.ffn(self.norm_ffn(token))
        return token[:, 0]


def tapped_layers(features: FeatureSpec, config: DiscriminatorConfig) -> list[int]:
    """Which blocks the heads read. Raises ValueError for layers that the network has not."""
    if not config.layers:
        return sorted({int(depth * features.layers) for depth in DEPTHS})
    wrong = [layer for layer in config.layers if not 0 <= layer < features.layers]
    if wrong or len(set(config.layers)) < len(config.layers):
        raise UserError(
            f"discriminator.layers: must be different blocks of 0 .. {features.layers - 1}, "
            f"got {config.layers}"
        )
    return sorted(config.layers)


class Discriminator(nn.Module):
    """The heads as a role: they read the features of a network that is handed to them."""

    model: DiscriminatorHeads

    def __init__(self, model: DiscriminatorHeads) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, net: Denoiser, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> DiscriminatorOutput:
        """x: [B, C, F, H, W] at noise level sigma [B, 1]; gradients pass through `net` to x."""
        taps = Taps(self.model.layers)
        output = net(x, sigma, conditioning, context=Context(taps=taps)).velocity
        logits, mean_weight = self.model(taps.tokens, sigma)
        # FSDP2 gathers a network's outer weights for the backward pass when a gradient reaches its
        # own output; with one at the taps alone it would find them released.
        return DiscriminatorOutput(logits + 0.0 * output.mean(dim=(1, 2, 3, 4)), mean_weight)


def adversarial_loss(fake: Tensor, real: Tensor | None) -> Tensor:
    """What the generator minimises: softplus(-fake), or against a real logit if there is one."""
    return F.softplus(-fake if real is None else real - fake).mean()


def discrimination_loss(fake: Tensor, real: Tensor, *, relativistic: bool) -> Tensor:
    """What the discriminator minimises; logits [B], positive = real."""
    if relativistic:
        return F.softplus(fake - real).mean()
    return F.softplus(fake).mean() + F.softplus(-real).mean()


@dataclass(frozen=True, eq=False)
class Pair:
    """A real and a generated batch at the same noise levels."""

    real: Tensor  # [B, C, F, H, W]
    fake: Tensor  # [B, C, F, H, W]
    sigma: Tensor  # [B, 1]
    conditioning: Conditioning


@dataclass(frozen=True, eq=False)
class DiscriminatorLoss:
    """The discriminator's loss on a pair, and what it gave for the generated half."""

    loss: Tensor
    fake: DiscriminatorOutput
    metrics: dict[str, Tensor]


def discriminate(
    discriminator: Discriminator,
    net: Denoiser,
    pair: Pair,
    config: AdversarialConfig,
    rng: SampleRNG,
) -> DiscriminatorLoss:
    """The discriminator's loss on a pair: one network pass for both, one more with penalties."""
    both = _on_both(discriminator, net, pair, pair.real, pair.fake)
    real, fake = both.logits.chunk(2)
    loss = discrimination_loss(fake, real, relativistic=config.relativistic)
    if config.relativistic:  # only differences mean anything
        accuracy = (real > fake).float().mean()
    else:
        accuracy = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
    metrics = {"discrimination": loss.detach(), "accuracy": accuracy}
    if config.r1_weight or config.r2_weight:
        moved = _on_both(
            discriminator,
            net,
            pair,
            pair.real + config.r1_sigma * rng.randn(pair.real.shape[1:]),
            pair.fake + config.r2_sigma * rng.randn(pair.fake.shape[1:]),
        )
        steps = (moved.logits - both.logits).chunk(2)
        r1 = (steps[0] / config.r1_sigma).square().mean()
        r2 = (steps[1] / config.r2_sigma).square().mean()
        loss = loss + 0.5 * (config.r1_weight * r1 + config.r2_weight * r2)
        metrics |= {"r1": r1.detach(), "r2": r2.detach()}
    return DiscriminatorLoss(loss, DiscriminatorOutput(fake, both.mean_weight.chunk(2)[1]), metrics)


def _on_both(
    discriminator: Discriminator, net: Denoiser, pair: Pair, real: Tensor, fake: Tensor
) -> DiscriminatorOutput:
    twice = concatenate(pair.conditioning, pair.conditioning)
    sigma = torch.cat([pair.sigma, pair.sigma])
    output: DiscriminatorOutput = discriminator(net, torch.cat([real, fake]), sigma, twice)
    return output
