"""The Wan2.1 transformer: patches and a noise level in, velocity out, for every mode of use.

Letters as in model/types.py; n tokens per frame, T = 1 (one noise level per sample) or F (one per
frame). Module names are those of the official release, so its weights load as they are.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.wan.attention import attend
from model.wan.config import WanConfig
from model.wan.context import FULL_ATTENTION, Context
from model.wan.rope import coordinate_channels, rotary_table, rotate


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
        if config.model_type == "i2v":
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
        [0, 1000], fp32. text: [B, L, text_dim]. clip: [B, 257, image_dim] for i2v. Returns
        [B, out_dim, F, H, W] in the dtype of the weights.
        """
        _, _, frames, height, width = x.shape
        _, patch_h, patch_w = self.config.patch_size
        if height % patch_h or width % patch_w:
            raise ValueError(
                f"latents of {height} x {width} do not divide into {patch_h} x {patch_w} patches"
            )
        rows, columns = height // patch_h, width // patch_w
        frame_index = context.frame_index
        if frame_index is None:
            frame_index = torch.arange(frames, device=x.device)
        table = rotary_table(frame_index, rows, columns, self.config.head_dim)
        mask = None if context.mask is None else context.mask.tokens(rows * columns)

        tokens = self.embed_patches(x, frame_index)
        time, modulation = self.embed_time(timestep)
        memory = self.embed_text(text, clip)
        for layer, block in enumerate(self.blocks):
            arguments = (tokens, modulation, memory, table, mask, context, layer)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                tokens = checkpoint(block, *arguments, use_reentrant=False)
            else:
                tokens = block(*arguments)
        patches = self.head(tokens, time)
        return rearrange(
            patches,
            "b (f h w) (p q c) -> b c f (h p) (w q)",
            f=frames,
            h=rows,
            p=patch_h,
            q=patch_w,
        )

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
        """Text states [B, L, text_dim] to memory [B, L, D], behind 257 image tokens for i2v."""
        memory = self.text_embedding(text.to(_dtype(self.text_embedding)))
        if self.config.model_type == "t2v":
            return memory
        if clip is None:
            raise ValueError("an i2v model needs the first frame's CLIP states")
        return torch.cat([self.img_emb(clip), memory], dim=1)


def initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The starting value of the parameter `name`, fp32: Xavier linears, zero biases and head."""
    if name.endswith("modulation"):
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    if name.endswith("bias") or name == "head.head.weight":
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
        memory: Tensor,
        table: Tensor,
        mask: Tensor | None,
        context: Context,
        layer: int,
    ) -> Tensor:
        """x: [B, N, D]; modulation: [B, T, 6, D] fp32; memory: [B, L, D]; table: rotary."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation.float() + modulation
        ).unbind(2)
        h = self.self_attn(modulate(self.norm1, x, shift1, scale1), table, mask, context, layer)
        x = add_gated(x, h, gate1)
        x = x + self.cross_attn(self.norm3(x), memory)
        h = self.ffn(modulate(self.norm2, x, shift2, scale2))
        return add_gated(x, h, gate2)


class SelfAttention(nn.Module):
    """Attention among video tokens, with rotary positions and RMS-normalised queries and keys."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
        self.attend = attend

    def forward(
        self, x: Tensor, table: Tensor, mask: Tensor | None, context: Context, layer: int
    ) -> Tensor:
        """x: [B, N, D]; table: [N, 1, head_dim / 2] complex; mask: [N, N] bool or None."""
        heads = (self.num_heads, -1)
        q = rotate(self.norm_q(self.q(x)).unflatten(-1, heads), table)
        k = rotate(self.norm_k(self.k(x)).unflatten(-1, heads), table)
        v = self.v(x).unflatten(-1, heads)
        if context.cache is not None:
            k, v = context.cache.extend(layer, k, v)
            if context.commit:
                context.cache.commit(layer, k, v)
        return self.o(self.attend(q, k, v, mask=mask).flatten(2))


class CrossAttention(nn.Module):
    """Attention from video tokens to the text, and for i2v to the first frame's image tokens."""

    IMAGE_TOKENS = 257

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
        self.sees_image = config.model_type == "i2v"
        if self.sees_image:
            self.k_img, self.v_img = (nn.Linear(config.dim, config.dim) for _ in range(2))
            self.norm_k_img = nn.RMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x: [B, N, D]; memory: [B, L, D], image tokens first. Padding counts, as in Wan."""
        heads = (self.num_heads, -1)
        q = self.norm_q(self.q(x)).unflatten(-1, heads)
        image = memory[:, : self.IMAGE_TOKENS] if self.sees_image else None
        text = memory[:, self.IMAGE_TOKENS :] if self.sees_image else memory
        k = self.norm_k(self.k(text)).unflatten(-1, heads)
        out = attend(q, k, self.v(text).unflatten(-1, heads))
        if image is not None:
            k = self.norm_k_img(self.k_img(image)).unflatten(-1, heads)
            out = out + attend(q, k, self.v_img(image).unflatten(-1, heads))
        return self.o(out.flatten(2))


class ImageEmbedding(nn.Module):
    """CLIP states of the first frame to tokens of the transformer's width."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width = config.image_dim
        self.proj = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, config.dim),
            nn.LayerNorm(config.dim),
        )

    def forward(self, clip: Tensor) -> Tensor:
        """clip: [B, 257, image_dim]. Returns [B, 257, D]."""
        return self.proj(clip.to(_dtype(self.proj)))


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
