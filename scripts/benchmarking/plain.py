"""The same mathematics written plainly: Wan2.1's transformer, a DMD step, few-step streaming.

The yardstick of scripts/benchmark.py: one file, one process, plain PyTorch, what one would write
from the papers (Wan2.1, DMD2 arXiv:2405.14867, self-forcing arXiv:2506.08009). Nothing of
this project is imported; but weights have the official names, so that they load from ours, and both
draw the same noise: then losses must agree.

B batch, C channels, F frames, H W height and width of latents, L text tokens, N video tokens,
D width; a sigma is a noise level in [0, 1], of x = (1 - sigma) x0 + sigma noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Sizes = Any  # of a transformer, under the names of an official release's config.json
Draws = Any  # randn and rand of a shape, one stream per sample: [B, *shape]
Randomness = Any  # `samples` are Draws; `shared`, a torch.Generator, decides how many steps are run
Cache = list[tuple[Tensor, Tensor]]  # rotated keys and values per layer, [B, N, heads, head_dim]


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., in]."""
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class RMSNorm(nn.RMSNorm):
    """The same of a norm."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D]."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v; [B, N, heads, d] each. Returns [B, N, heads d]."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn adjacent pairs of x [B, N, heads, d] by complex numbers [N, 1, d / 2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Of video tokens to each other, or to the text."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.num_heads
        self.q, self.k, self.v, self.o = (Linear(sizes.dim, sizes.dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(sizes.dim, sizes.eps) for _ in range(2))

    def project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x [B, N, D], keys and values of memory [B, M, D]."""
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(memory)), self.v(memory)
        return tuple(t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; modulated by the noise level."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = Attention(sizes), Attention(sizes)
        self.norm3 = nn.LayerNorm(sizes.dim, sizes.eps)
        up, down = Linear(sizes.dim, sizes.ffn_dim), Linear(sizes.ffn_dim, sizes.dim)
        self.ffn = nn.Sequential(up, nn.GELU(approximate="tanh"), down)
        self.modulation = nn.Parameter(torch.zeros(1, 6, sizes.dim))

    def forward(
        self, x: Tensor, modulation: Tensor, text: Tensor, table: Tensor, past: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, N, D]; modulation: [B, 6, D]; past: keys and values; returned with the own."""
        parts = (self.modulation.float() + modulation).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = modulated(x, shift1, scale1)
        q, k, v = self.self_attn.project(h, h)
        q, k = rotate(q, table), rotate(k, table)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        x = (x + self.self_attn.o(attention(q, k, v)) * gate1).to(x.dtype)
        weight, bias = self.norm3.weight.to(x.dtype), self.norm3.bias.to(x.dtype)
        h = F.layer_norm(x, x.shape[-1:], weight, bias, self.norm3.eps)
        x = x + self.cross_attn.o(attention(*self.cross_attn.project(h, text)))
        x = (x + self.ffn(modulated(x, shift2, scale2)) * gate2).to(x.dtype)
        return x, k, v


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """norm(x) (1 + scale) + shift; x: [B, N, D], shift and scale [B, 1, D] in fp32."""
    return (F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1.0 + scale) + shift).to(x.dtype)


class Head(nn.Module):
    """Tokens to patches."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head = Linear(sizes.dim, 4 * sizes.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, sizes.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: [B, N, D]; time: [B, 1, D]."""
        shift, scale = (self.modulation.float() + time).chunk(2, dim=1)
        return self.head(modulated(x, shift, scale))


class Transformer(nn.Module):
    """Latents and a noise level to a velocity, noise - x0."""

    def __init__(self, sizes: Sizes, compute: torch.dtype, *, recompute: bool = False) -> None:
        super().__init__()
        self.sizes, self.compute, self.recompute = sizes, compute, recompute
        dim = sizes.dim
        self.patch_embedding = nn.Conv3d(sizes.in_dim, dim, (1, 2, 2), (1, 2, 2))
        gelu, silu = nn.GELU(approximate="tanh"), nn.SiLU()
        self.text_embedding = nn.Sequential(Linear(sizes.text_dim, dim), gelu, Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(sizes.freq_dim, dim), silu, Linear(dim, dim))
        self.time_projection = nn.Sequential(silu, Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.num_layers))
        self.head = Head(sizes)
        self.tables: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def forward(
        self, x: Tensor, sigma: Tensor, text: Tensor, *, past: Cache | None = None, start: int = 0,
        remember: bool = False,
    ) -> Tensor:  # fmt: skip
        """x: [B, C, F, H, W]; sigma: [B]; text: [B, L, text_dim]. Returns a velocity like x.

        past: of the frames before number `start`; remember: put this pass's keys behind them.
        """
        table, places = self.positions(start, *x.shape[2:])
        if self.sizes.absolute_positions:
            x = torch.cat([x, places.expand(len(x), -1, -1, -1, -1)], dim=1)
        conv, dtype = self.patch_embedding, self.compute
        patches = F.conv3d(x.to(dtype), conv.weight.to(dtype), conv.bias.to(dtype), conv.stride)  # type: ignore[union-attr]
        frames, rows, columns = patches.shape[2:]
        tokens = patches.flatten(2).transpose(1, 2)
        memory = self.text_embedding(text.to(dtype))
        time = self.time_embedding(waves(1000.0 * sigma, self.sizes.freq_dim))
        modulation = self.time_projection(time).unflatten(-1, (6, -1))
        known = bool(past)
        for layer, block in enumerate(self.blocks):
            own = past[layer] if known and past else None
            arguments = (tokens, modulation, memory, table, own)
            if self.recompute and torch.is_grad_enabled():
                tokens, k, v = checkpoint(block, *arguments, use_reentrant=False)
            else:
                tokens, k, v = block(*arguments)
            if remember and past is not None:
                past[layer : layer + 1] = [(k, v)]
        out = self.head(tokens, time[:, None]).unflatten(1, (frames, rows, columns))
        out = out.unflatten(-1, (2, 2, -1)).permute(0, 6, 1, 2, 4, 3, 5)
        return out.reshape(len(x), -1, frames, 2 * rows, 2 * columns).float()

    def positions(self, start: int, *shape: int) -> tuple[Tensor, Tensor]:
        """Rotary table and coordinate channels of frames, height and width; made once."""
        if (start, *shape) not in self.tables:
            frames, height, width = shape
            head_dim, device = self.sizes.dim // self.sizes.num_heads, self.head.modulation.device
            table = rotary(start, frames, height // 2, width // 2, head_dim).to(device)
            places = coordinates(start, frames, height, width).to(device)
            self.tables[start, *shape] = table, places
        return self.tables[start, *shape]


def waves(timestep: Tensor, width: int) -> Tensor:
    """Cosines and sines [B, width] of timesteps [B] in [0, 1000]."""
    steps = torch.arange(width // 2, device=timestep.device, dtype=torch.float64) / (width // 2)
    angles = timestep.double()[:, None] * torch.exp(-math.log(10000.0) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def rotary(start: int, frames: int, rows: int, columns: int, head_dim: int) -> Tensor:
    """Complex numbers [N, 1, head_dim / 2] by frame, row and column (arXiv:2104.09864)."""
    axes = torch.arange(start, start + frames), torch.arange(rows), torch.arange(columns)
    side = head_dim // 2 // 3
    angles = []
    for places, share in zip(
        torch.meshgrid(*axes, indexing="ij"), (head_dim // 2 - 2 * side, side, side), strict=True
    ):
        rates = torch.exp(-math.log(10000.0) * torch.arange(share, dtype=torch.float64) / share)
        angles.append(places.flatten().double()[:, None] * rates)
    whole = torch.cat(angles, dim=-1)[:, None]
    return torch.polar(torch.ones_like(whole), whole).to(torch.complex64)


def coordinates(start: int, frames: int, height: int, width: int) -> Tensor:
    """Ten channels [10, F, H, W] of the tiny models: first frame, time, half-turns of the sides."""
    axes = (torch.arange(start, start + frames), torch.arange(height), torch.arange(width))
    time, row, column = torch.meshgrid(*(axis.float() for axis in axes), indexing="ij")
    channels = [(time == 0).float(), time / 8.0]
    for turns in (1.0, 2.0):
        for place in ((row + 0.5) / height, (column + 0.5) / width):
            angle = math.pi * turns * place
            channels += [angle.sin(), angle.cos()]
    return torch.stack(channels)


def noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise; sigma: [B]."""
    level = sigma[:, None, None, None, None]
    return (1.0 - level) * x0 + level * noise


def clean(net: Transformer, x: Tensor, sigma: Tensor, text: Tensor, **words: Any) -> Tensor:
    """The x0 that the velocity at x points at."""
    return x - sigma[:, None, None, None, None] * net(x, sigma, text, **words)


def few_steps(
    net: Transformer,
    noise: Tensor,
    sigmas: Sequence[float],
    text: Tensor,
    draws: Draws,
    *,
    grad: bool = False,
    **words: Any,
) -> Tensor:
    """Predict x0, noise it again, predict again; a gradient flows through the last step alone."""
    x, x0 = noise, noise
    for step, value in enumerate(sigmas):
        sigma = torch.full((len(x),), value, device=x.device)
        with torch.set_grad_enabled(grad and step == len(sigmas) - 1):
            if step:
                x = noised(x0, draws.randn(x.shape[1:]).to(x.device), sigma)
            x0 = clean(net, x, sigma, text, **words)
    return x0


def stream(
    net: Transformer,
    text: Tensor,
    shape: Sequence[int],
    blocks: Sequence[int],
    sigmas: Sequence[float],
    draws: Draws,
    *,
    grad: bool = False,
) -> Iterator[Tensor]:
    """Block after block of a causal video [C, F, H, W], each on a cache of those before it."""
    cache: Cache = []
    start = 0
    for size in blocks:
        noise = draws.randn((shape[0], size, *shape[2:]))
        x0 = few_steps(net, noise, sigmas, text, draws, grad=grad, past=cache, start=start)
        yield x0
        if start + size < shape[1]:
            with torch.no_grad():
                level = torch.zeros(len(x0), device=x0.device)
                net(x0.detach(), level, text, past=cache, start=start, remember=True)
        start += size


@dataclass(frozen=True)
class Moves:
    """How a network's weights are moved."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float  # of matrices alone
    max_norm: float
    muon_lr: float | None = None  # of the blocks' matrices; None = AdamW moves them too
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.01


class Optimizer:
    """Clipping, AdamW, and for the blocks' matrices Muon if asked."""

    def __init__(self, net: Transformer, moves: Moves) -> None:
        self.moves, named = moves, dict(net.named_parameters())
        self.all = list(named.values())
        inside = {name for name, p in named.items() if name.startswith("blocks.") and p.ndim == 2}
        self.matrices = [] if moves.muon_lr is None else [named[name] for name in sorted(inside)]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        chosen = set(map(id, self.matrices))
        rest = [p for p in self.all if id(p) not in chosen]
        groups = [
            {"params": [p for p in rest if p.ndim in (2, 5)], "weight_decay": moves.weight_decay},
            {"params": [p for p in rest if p.ndim not in (2, 5)], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=moves.lr, betas=moves.betas, foreach=True)

    def step(self) -> None:
        """Move by the gradients, and clear them."""
        nn.utils.clip_grad_norm_(self.all, self.moves.max_norm)
        self.adam.step()
        for weight, momentum in zip(self.matrices, self.momenta, strict=True):
            self.turn(weight, momentum, self.moves.muon_lr or 0.0)
        for parameter in self.all:
            parameter.grad = None

    @torch.no_grad()
    def turn(self, weight: Tensor, momentum: Tensor, lr: float) -> None:
        """One matrix by Muon: its update is made orthogonal by a Newton-Schulz iteration."""
        assert weight.grad is not None
        momentum.lerp_(weight.grad, 1.0 - self.moves.muon_momentum)
        x = weight.grad.lerp(momentum, self.moves.muon_momentum)
        tall = x.shape[0] > x.shape[1]
        x = x.mT if tall else x
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        rows, columns = weight.shape
        weight.mul_(1.0 - lr * self.moves.muon_weight_decay)
        weight.add_(x.mT if tall else x, alpha=-lr * math.sqrt(max(1.0, rows / columns)))


@dataclass(frozen=True)
class Recipe:
    """Settings of distribution matching distillation."""

    shape: tuple[int, int, int, int]  # [C, F, H, W]
    sigmas: Sequence[float]  # descending from 1
    blocks: Sequence[int] | None  # frames of a causal video's blocks; None = all at once
    cfg_scale: float
    timestep_shift: float
    min_sigma: float
    max_sigma: float
    ema_decay: float
    moves: Mapping[str, Moves]  # of generator and critic


class Distillation:
    """DMD of a teacher into a few-step generator, with a critic beside it."""

    def __init__(self, networks: Mapping[str, Transformer], recipe: Recipe) -> None:
        self.generator, self.critic = networks["generator"], networks["critic"]
        self.teacher, self.recipe = networks["teacher"], recipe
        self.optimizers = {role: Optimizer(networks[role], m) for role, m in recipe.moves.items()}
        self.average = [p.detach().clone() for p in self.generator.parameters()]

    def rollout(self, text: Tensor, rng: Randomness, *, grad: bool) -> Tensor:
        """What inference would make of noise, up to a random step. Returns x0 [B, C, F, H, W]."""
        recipe, draws = self.recipe, rng.samples
        last = int(torch.randint(len(recipe.sigmas), (), generator=rng.shared))
        sigmas = recipe.sigmas[: last + 1]
        if recipe.blocks is None:
            noise = draws.randn(recipe.shape)
            return few_steps(self.generator, noise, sigmas, text, draws, grad=grad)
        blocks = stream(self.generator, text, recipe.shape, recipe.blocks, sigmas, draws, grad=grad)
        return torch.cat(list(blocks), dim=2)

    def level(self, draws: Draws, like: Tensor) -> Tensor:
        """A shifted uniform noise level per sample, [B]."""
        recipe, u = self.recipe, draws.rand((1,)).to(like.device)[:, 0]
        sigma = recipe.timestep_shift * u / (1.0 + (recipe.timestep_shift - 1.0) * u)
        return sigma.clamp(recipe.min_sigma, recipe.max_sigma)

    def generator_loss(self, text: Tensor, negative: Tensor, rng: Randomness) -> Tensor:
        """DMD eq. 7 and 8 (arXiv:2311.18828): teacher and critic on noised samples."""
        x0 = self.rollout(text, rng, grad=True)
        with torch.no_grad():
            sigma = self.level(rng.samples, x0)
            x = noised(x0, rng.samples.randn(x0.shape[1:]), sigma)
            fake = clean(self.critic, x, sigma, text)
            twice = torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([text, negative])
            cond, uncond = self.teacher(*twice).chunk(2)
            velocity = uncond + self.recipe.cfg_scale * (cond - uncond)
            real = x - sigma[:, None, None, None, None] * velocity
            size = (x0 - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp(min=1e-6)
            target = x0 - (fake - real) / size
        return 0.5 * F.mse_loss(x0, target)

    def critic_loss(self, text: Tensor, rng: Randomness) -> Tensor:
        """The critic's velocity on the generator's samples."""
        with torch.no_grad():
            x0 = self.rollout(text, rng, grad=False)
            sigma = self.level(rng.samples, x0)
            noise = rng.samples.randn(x0.shape[1:])
        return F.mse_loss(self.critic(noised(x0, noise, sigma), sigma, text), noise - x0)

    def move(self, role: str, loss: Tensor) -> Tensor:
        """One update of a role, and of the generator's average; returns the loss."""
        loss.backward()
        self.optimizers[role].step()
        if role == "generator":
            weights = [p.detach() for p in self.generator.parameters()]
            torch._foreach_lerp_(self.average, weights, 1.0 - self.recipe.ema_decay)
        return loss.detach()
