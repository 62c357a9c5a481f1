"""Gradients of a causal rollout that was made without: its last steps, made once more.

Block by block when the backward pass comes (replay), or all at once on a past that is encoded with
a gradient (self-gradient forcing, arXiv:2607.20368). Letters as in model/types.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.causal import BlockCausal, CausalLayout, TeacherForced
from model.flow import constant_sigma
from model.types import Conditioning, Context, Denoiser
from model.wan.cache import KVCache
from pipeline.blocks import Block
from pipeline.few_step import predict_x0


@dataclass(frozen=True, eq=False)
class LastStep:
    """How a block of a rollout was made last, and what became of it; without gradient."""

    block: Block
    x: Tensor  # [B, C, f, H, W] what it was made of
    sigma: float  # the noise level of that
    x0: Tensor  # [B, C, f, H, W] what was made
    past: Tensor | None = None  # [B, C, f, H, W] what a further pass remembered; None = none did

    def on(self, cache: KVCache | None) -> LastStep:
        """The same, with what was kept before it; None = nothing is held for it."""
        block = self.block
        return replace(self, block=replace(block, context=replace(block.context, cache=cache)))


@dataclass(frozen=True, eq=False)
class Past:
    """What a rollout's blocks saw of those before them."""

    layout: CausalLayout
    clean: bool  # by passes over finished blocks; false: by the last steps themselves
    sigma: float  # the noise level of those passes


def in_parallel(
    net: Denoiser, steps: Sequence[LastStep], conditioning: Conditioning, past: Past
) -> Tensor:
    """All of `steps` in one pass with a gradient, also through how each block is remembered.

    steps: of all blocks of a video; one that was given has noise level 0. Returns x0
    [B, C, F, H, W]: the rollout's values up to rounding.
    """
    x = torch.cat([step.x for step in steps], dim=2)
    sigma = torch.cat([constant_sigma(s.sigma, x).expand(-1, s.block.size) for s in steps], dim=1)
    over: Denoiser = BlockCausal(net, past.layout)
    if past.clean:
        # What nobody remembered nobody sees: the last block's part only fills its place.
        seen = [step.x0 if step.past is None else step.past for step in steps]
        clean_sigma = constant_sigma(past.sigma, x)
        over = TeacherForced(net, past.layout, torch.cat(seen, dim=2), clean_sigma)
    context = Context(frame_index=torch.arange(x.shape[2]))
    with torch.enable_grad():
        return over(x, sigma, conditioning, context=context).x0


def replayed(net: Denoiser, steps: Sequence[LastStep], x0: Tensor) -> Tensor:
    """x0 [B, C, F, H, W] as it is; its backward pass makes the blocks of `steps` again, one by one.

    Each is made on the cache of its block and passed backward before the next, so that one block's
    activations are held at a time. Gradients are added to the weights, as `backward()` does;
    `torch.autograd.grad` finds none of them.
    """
    learns = torch.zeros((), device=x0.device, requires_grad=True)
    result: Tensor = _Replay.apply(x0, learns, net, steps)  # type: ignore[no-untyped-call]
    return result


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x0: Tensor, learns: Tensor, net: Denoiser, steps: Sequence[LastStep]
    ) -> Tensor:
        del learns  # autograd asks for the backward pass of what depends on something that does
        ctx.net, ctx.steps = net, steps
        return x0.view_as(x0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        for step in ctx.steps:
            block = step.block
            with torch.enable_grad():
                x0 = predict_x0(ctx.net, step.x, step.sigma, block.conditioning, block.context)
            torch.autograd.backward(x0, grads[0][:, :, slice(*block.frames)])
        return None, None, None, None
