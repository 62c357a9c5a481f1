"""The Wan2.1 transformer: patches and a noise level in, velocity out, for every mode of use.

Letters as in model/types.py; n tokens per frame, T = 1 (one noise level per sample) or F (one per
frame). Module names are those of the official release, so its weights load as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.wan.attention import attend, attend_past
from model.wan.cache import KeyValue, KVCache
from model.wan.config import WanConfig
from model.wan.context import FULL_ATTENTION, Context
from model.wan.images import ImageEmbedding, check_images
from model.wan.masks import FrameMask
from model.wan.rope import coordinate_channels, rotary_table, rotate


@dataclass(frozen=True, eq=False)
class View:
    """What all blocks share in one forward pass."""

    table: Tensor  # rotary positions of this pass's tokens, [N, 1, head_dim / 2] complex
    mask: FrameMask | None
    past_table: Tensor | None  # of the tokens in the cache; None = nothing is cached
    past: list[list[KeyValue]] | None  # per layer, unrotated
    cache: KVCache | None  # for the text's keys
    recomputed: bool  # whether blocks run again in the backward pass
    reports: bool  # whether somebody wants the blocks' keys and values


class WanTransformer(nn.Module):
    """Wan2.1's diffusion transformer. `blocks` is what parallelism wraps."""

    config: WanConfig
    blocks: nn.ModuleList

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False  # recompute each block in the backward pass
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        if config.sees_images:
            self.img_emb = ImageEmbedding(config)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor,
        clip: Tensor | None = None,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Tensor:
        """Predict the velocity.

        x: [B, in_dim, F, H, W], without coordinate channels. timestep: [B, 1] or [B, F] in
        [0, 1000], fp32. text: [B, L, text_dim]. clip: [B, n, image_dim], the images' tokens one
        image behind the other, for models that see images; L is text_len then. Returns
        [B, out_dim, F, H, W] in the dtype of the weights.
        """
        _, _, frames, height, width = x.shape
        _, patch_h, patch_w = self.config.patch_size
        if height % patch_h or width % patch_w:
            raise ValueError(
                f"latents of {height} x {width} do not divide into {patch_h} x {patch_w} patches"
            )
        rows, columns = height // patch_h, width // patch_w
        positions, view = self.view(context, frames, rows, columns, x.device)

        tokens = self.embed_patches(x, positions)
        time, modulation = self.embed_time(timestep)
        known = context.cache is not None and context.cache.has_text()
        memory = None if known else self.embed_text(text, clip)
        keys = []
        for layer, block in enumerate(self.blocks):
            arguments = (tokens, modulation, memory, view, layer)
            if view.recomputed:
                tokens, own = checkpoint(block, *arguments, use_reentrant=False)
            else:
                tokens, own = block(*arguments)
            if own is not None:
                keys.append(own)
            if context.taps is not None and layer in context.taps.layers:
                context.taps.tokens.append(tokens)
        self.report(context, keys, frames, x.device)
        patches = self.head(tokens, time)
        return rearrange(
            patches,
            "b (f h w) (p q c) -> b c f (h p) (w q)",
            f=frames,
            h=rows,
            p=patch_h,
            q=patch_w,
        )

    def view(
        self, context: Context, frames: int, rows: int, columns: int, device: torch.device
    ) -> tuple[Tensor, View]:
        """Time positions [F] of the frames, and what the blocks share."""
        mask, cache = context.mask, context.cache
        if mask is not None and (cache is not None or mask.frames != frames):
            raise ValueError(
                f"a mask of {mask.frames} frames needs as many and no cache, got {frames} frames"
                f"{' and a cache' if cache is not None else ''}"
            )
        positions = frame_positions(context, frames, device)
        past, past_table = None, None
        if cache is not None:
            seen = cache.past(positions)
            positions = seen.query_positions
            if seen.layers:
                past = seen.layers
                past_table = rotary_table(seen.key_positions, rows, columns, self.config.head_dim)
        return positions, View(
            table=rotary_table(positions, rows, columns, self.config.head_dim),
            mask=mask,
            past_table=past_table,
            past=past,
            cache=cache,
            recomputed=self.checkpoint_blocks and torch.is_grad_enabled(),
            reports=context.commit or context.keys is not None,
        )

    def report(
        self, context: Context, keys: list[KeyValue], frames: int, device: torch.device
    ) -> None:
        """Hand each layer's keys and values to whom the context names."""
        if context.keys is not None:
            context.keys.extend(keys)
        if context.commit:
            if context.cache is None:
                raise ValueError("commit needs a cache to write to")
            context.cache.commit(frame_positions(context, frames, device), keys)

    def embed_patches(self, x: Tensor, frame_index: Tensor) -> Tensor:
        """Latents [B, C, F, H, W] to tokens [B, N, D]: the patch convolution as one matmul."""
        weight = self.patch_embedding.weight
        if self.config.absolute_positions:
            coordinates = coordinate_channels(frame_index, *x.shape[3:]).to(x.dtype)
            x = torch.cat([x, coordinates.expand(x.shape[0], -1, -1, -1, -1)], dim=1)
        _, patch_h, patch_w = self.config.patch_size
        patches = rearrange(x, "b c f (h p) (w q) -> b (f h w) (c p q)", p=patch_h, q=patch_w)
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """timestep [B, T] to time states [B, T, D] and block modulation [B, T, 6, D], fp32."""
        frequencies = torch.exp(
            -math.log(10000.0)
            * torch.arange(self.config.freq_dim // 2, device=timestep.device, dtype=torch.float64)
            / (self.config.freq_dim // 2)
        )
        angles = timestep.double()[..., None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
        time = float32_mlp(self.time_embedding, waves)
        return time, float32_mlp(self.time_projection, time).unflatten(-1, (6, -1))

    def embed_text(self, text: Tensor, clip: Tensor | None) -> Tensor:
        """Text states [B, L, text_dim] to memory [B, L, D], behind the images' tokens if any."""
        memory = self.text_embedding(text.to(_dtype(self.text_embedding)))
        if not self.config.sees_images:
            return memory
        check_images(self.config, text, clip)
        return torch.cat([self.img_emb(clip), memory], dim=1)


def frame_positions(context: Context, frames: int, device: torch.device) -> Tensor:
    """Positions [F] of a pass's frames in the video."""
    if context.frame_index is None:
        return torch.arange(frames, device=device)
    return context.frame_index


def initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The starting value of the parameter `name`, fp32: Xavier linears, zero biases and head."""
    if name.endswith("modulation"):
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    if name.endswith("bias") or name in ("head.head.weight", "img_emb.emb_pos"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    if name.startswith(("text_embedding", "time_embedding")):
        return 0.02 * torch.randn(shape, generator=generator)
    bound = math.sqrt(6.0 / (shape[0] + shape[1:].numel()))
    return (2.0 * torch.rand(shape, generator=generator) - 1.0) * bound


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; modulated by the noise level."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, dim),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        memory: Tensor | None,
        view: View,
        layer: int,
    ) -> tuple[Tensor, KeyValue | None]:
        """x: [B, N, D]; modulation: [B, T, 6, D] fp32; memory: [B, L, D], None if it is cached.

        Returns tokens [B, N, D], and the self-attention's unrotated keys and values if wanted.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation.float() + modulation
        ).unbind(2)
        h, keys = self.self_attn(modulate(self.norm1, x, shift1, scale1), view, layer)
        x = add_gated(x, h, gate1)
        x = x + self.cross_attn(self.norm3(x), memory, view.cache, layer)
        h = self.ffn(modulate(self.norm2, x, shift2, scale2))
        x = add_gated(x, h, gate2)
        if not view.reports:
            return x, None
        # Not the views themselves: FSDP2 warns of any view that leaves a block under autograd.
        return x, (keys[0].clone(), keys[1].clone()) if torch.is_grad_enabled() else keys


class SelfAttention(nn.Module):
    """Attention among video tokens, with rotary positions and RMS-normalised queries and keys."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
        self.attend = attend

    def forward(self, x: Tensor, view: View, layer: int) -> tuple[Tensor, KeyValue]:
        """x: [B, N, D]. Returns [B, N, D], and this call's unrotated keys and values."""
        heads = (self.num_heads, -1)
        q = rotate(self.norm_q(self.q(x)).unflatten(-1, heads), view.table)
        k = self.norm_k(self.k(x)).unflatten(-1, heads)
        v = self.v(x).unflatten(-1, heads)
        rotated = rotate(k, view.table)
        if view.past is None or view.past_table is None:
            out = self.attend(q, rotated, v, mask=view.mask)
            return self.o(out.flatten(2)), (k, v)
        past, table = view.past[layer], view.past_table

        def keys() -> Tensor:
            return torch.cat(
                [rotate(torch.cat([piece for piece, _ in past], 1), table), rotated], 1
            )

        def values() -> Tensor:
            return torch.cat([*(piece for _, piece in past), v], dim=1)

        if view.recomputed or not torch.is_grad_enabled():
            out = self.attend(q, keys(), values())
        else:
            out = attend_past(self.attend, q, keys, values)
        return self.o(out.flatten(2)), (k, v)


class CrossAttention(nn.Module):
    """Attention from video tokens to the text, and to the tokens of images if the model has any."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
        self.sees_images, self.text_len = config.sees_images, config.text_len
        if self.sees_images:
            self.k_img, self.v_img = (nn.Linear(config.dim, config.dim) for _ in range(2))
            self.norm_k_img = nn.RMSNorm(config.dim, config.eps)

    def forward(
        self, x: Tensor, memory: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        """x: [B, N, D]; memory: [B, L, D], image tokens first. Padding counts, as in Wan."""

        def compute() -> tuple[Tensor, ...]:
            assert memory is not None, "the cache has no keys of the text yet"
            return self.keys_and_values(memory)

        q = self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))
        pairs = compute() if cache is None else cache.text(layer, compute)
        out = attend(q, pairs[0], pairs[1])
        if self.sees_images:
            out = out + attend(q, pairs[2], pairs[3])
        return self.o(out.flatten(2))

    def keys_and_values(self, memory: Tensor) -> tuple[Tensor, ...]:
        """Of the text, and behind them of the images, [B, L, heads, head_dim] each."""
        heads = (self.num_heads, -1)
        image_tokens = memory.shape[1] - self.text_len if self.sees_images else 0
        image, text = memory[:, :image_tokens], memory[:, image_tokens:]
        pairs = (
            self.norm_k(self.k(text)).unflatten(-1, heads),
            self.v(text).unflatten(-1, heads),
        )
        if not self.sees_images:
            return pairs
        return (
            *pairs,
            self.norm_k_img(self.k_img(image)).unflatten(-1, heads),
            self.v_img(image).unflatten(-1, heads),
        )


class Head(nn.Module):
    """Tokens to patches of velocity."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.out_dim * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: [B, N, D]; time: [B, T, D] fp32. Returns [B, N, patch * out_dim]."""
        shift, scale = (self.modulation.float() + time[:, :, None]).unbind(2)
        return self.head(modulate(self.norm, x, shift, scale))


def modulate(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift in fp32, in x's dtype. x: [B, N, D]; shift, scale: [B, T, D]."""
    h = F.layer_norm(x.float(), norm.normalized_shape, eps=norm.eps)
    h = h.unflatten(1, (shift.shape[1], -1))
    h = torch.addcmul(shift[:, :, None], h, 1.0 + scale[:, :, None])
    return h.flatten(1, 2).to(x.dtype)


def add_gated(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + h gate in fp32, in x's dtype. x, h: [B, N, D]; gate: [B, T, D]."""
    frames = (gate.shape[1], -1)
    sum_ = torch.addcmul(
        x.float().unflatten(1, frames), h.float().unflatten(1, frames), gate[:, :, None]
    )
    return sum_.flatten(1, 2).to(x.dtype)


def _dtype(layers: nn.Module) -> torch.dtype:
    return next(layers.parameters()).dtype


def float32_mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Run an MLP in fp32 whatever the dtype of its weights: bf16 blurs neighbouring timesteps."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            x = F.linear(x, layer.weight.float(), layer.bias.float())
        else:
            x = layer(x)
    return x
