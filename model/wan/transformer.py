"""The Wan2.1 transformer: patches and a noise level in, velocity out, for every mode of use.

Letters as in model/types.py; n tokens per frame, T = 1 (one noise level per sample) or F (one per
frame). Module names are those of the official release, so its weights load as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.wan.adapted import sequential, with_adapters
from model.wan.attention import Mask, MaskedBy, device_mask
from model.wan.block import Block, Call, Head, LayerPast, Wanted
from model.wan.cache import KeyValue, Past, TextKeys, TimeStates
from model.wan.config import WanConfig
from model.wan.context import FULL_ATTENTION, Context
from model.wan.exchange import Alone, Exchange
from model.wan.heads import PLAIN_WEIGHT, WEIGHT, bank_of, has_plain
from model.wan.images import ImageEmbedding, check_images
from model.wan.memo import Memo
from model.wan.rope import coordinate_channels, rotary_table

# Rotary tables of a rollout of 21 frames at 480 x 832, block by block, take 70 MB.
MEMO_BYTES = 256 * 2**20


class WanTransformer(nn.Module):
    """Wan2.1's diffusion transformer. `blocks` is what parallelism wraps."""

    takes_adapters: ClassVar[bool] = True  # see model.adapters
    config: WanConfig
    blocks: nn.ModuleList

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.exchange: Exchange = Alone()
        self.masked_by: MaskedBy = "auto"
        self.memo = Memo(MEMO_BYTES)  # of shapes and positions; no weight, nothing to save
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
        if config.reads_clip:
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
        rows, columns = self.patches(x)
        self.check_asked(context)
        index = frame_index(context, x.shape[2])
        past = look_back(context, index)
        on = context.adapters
        frames = len(index)
        tokens = self.exchange.cut(self.embed_patches(x, past.query_positions), frames)
        time, modulation = self.time_states(timestep, context)
        texts = self.texts(context, text, clip)
        whole = self.rotary(past.query_positions, rows, columns, x.device)
        table = self.exchange.cut(whole[None], frames)[0]
        pasts = self.layer_pasts(past, rows, columns, x.device)
        mask = self.mask(context, rows * columns, x.device)
        call = Call(frames, mask, keys_wanted(context, past), on)
        keys: list[KeyValue] = []
        read: list[TextKeys] = []
        for layer, block in enumerate(self.blocks):
            if layer in context.skips:
                continue
            output = block(tokens, modulation, texts[layer], table, pasts[layer], call)
            tokens = output.tokens
            if output.keys is not None:
                keys.append(output.keys)
            if context.cache is not None and output.text is not None:
                read.append(output.text)
            if context.taps is not None and layer in context.taps.layers:
                context.taps.tokens.append(self.exchange.join(tokens, frames))
        report(context, index, past, keys, read)
        patches = self.exchange.join(self.head(tokens, time, on, context.spans), frames)
        if context.spans is None:
            return self.unpatch(patches, rows, columns)
        said = patches.chunk(context.spans.positions.shape[1], dim=-1)
        context.spans.said.extend(self.unpatch(other, rows, columns) for other in said[1:])
        return self.unpatch(said[0], rows, columns)

    def patches(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in latents [B, C, F, H, W]."""
        height, width = x.shape[3:]
        _, patch_h, patch_w = self.config.patch_size
        if height % patch_h or width % patch_w:
            raise ValueError(
                f"latents of {height} x {width} do not divide into {patch_h} x {patch_w} patches"
            )
        return height // patch_h, width // patch_w

    def check_asked(self, context: Context) -> None:
        """Raise ValueError for heads that are not here, or blocks that a cache would miss."""
        bank, plain = bank_of(self), has_plain(self)
        if context.spans is not None and bank is None:
            raise ValueError("spans of the path need a head for each, and this network has one")
        if context.spans is None and not plain:
            raise ValueError("this network has a head for each part of its path: ask for spans")
        if context.skips and context.cache is not None:
            raise ValueError("blocks cannot be left out where a cache has keys of all of them")

    def unpatch(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """Patches [B, N, patch * out_dim] to [B, out_dim, F, H, W]."""
        _, patch_h, patch_w = self.config.patch_size
        return rearrange(
            patches,
            "b (f h w) (p q c) -> b c f (h p) (w q)",
            h=rows,
            w=columns,
            p=patch_h,
            q=patch_w,
        )

    def layer_pasts(
        self, past: Past, rows: int, columns: int, device: torch.device
    ) -> list[LayerPast] | list[None]:
        """What each block sees of the past."""
        if not past.layers:
            return [None] * len(self.blocks)
        table = None
        if not past.rotated:
            table = self.rotary(past.key_positions, rows, columns, device)[None]
        if past.rooms is None:
            return [LayerPast(pieces, table) for pieces in past.layers]
        pairs = zip(past.layers, past.rooms, strict=True)
        return [LayerPast(pieces, table, room) for pieces, room in pairs]

    def rotary(self, positions: Tensor, rows: int, columns: int, device: torch.device) -> Tensor:
        """The rotary table of frames at `positions` [f]; see `rotary_table`."""
        return self.memo.get(
            ("rotary", *positions.tolist(), rows, columns, device),
            lambda: rotary_table(positions.to(device), rows, columns, self.config.head_dim),
        )

    def mask(self, context: Context, per_frame: int, device: torch.device) -> Mask | None:
        """The context's mask in the form that attention reads."""
        mask = context.mask
        if mask is None:
            return None
        return self.memo.get(
            ("mask", mask, per_frame, device, self.masked_by),
            lambda: device_mask(mask, per_frame, device, self.masked_by),
        )

    def texts(
        self, context: Context, text: Tensor, clip: Tensor | None
    ) -> list[TextKeys] | list[Tensor]:
        """What each block reads of the text: its keys where a cache has them, or the memory."""
        known = None if context.cache is None else context.cache.text
        return known or [self.embed_text(text, clip, context.adapters)] * len(self.blocks)

    def embed_patches(self, x: Tensor, positions: Tensor) -> Tensor:
        """Latents [B, C, F, H, W] to tokens [B, N, D]: the patch convolution as one matmul."""
        weight = self.patch_embedding.weight
        if self.config.absolute_positions:
            coordinates = self.memo.get(
                ("coordinates", *positions.tolist(), *x.shape[3:], x.device),
                lambda: coordinate_channels(positions.to(x.device), *x.shape[3:]),
            )
            x = torch.cat([x, coordinates.to(x.dtype).expand(len(x), -1, -1, -1, -1)], dim=1)
        _, patch_h, patch_w = self.config.patch_size
        patches = rearrange(x, "b c f (h p) (w q) -> b (f h w) (c p q)", p=patch_h, q=patch_w)
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)

    def time_states(self, timestep: Tensor, context: Context) -> TimeStates:
        """What `embed_time` says of timestep [B, T]; of a level that returns, what it said."""
        on = context.adapters
        if context.cache is None or context.level is None:
            return self.embed_time(timestep, on)
        key = (context.level, *timestep.shape)
        return context.cache.time(key, lambda: self.embed_time(timestep, on))

    def embed_time(self, timestep: Tensor, adapters: Sequence[str] = ()) -> TimeStates:
        """timestep [B, T] to time states [B, T, D] and block modulation [B, T, 6, D], fp32."""
        frequencies = torch.exp(
            -math.log(10000.0)
            * torch.arange(self.config.freq_dim // 2, device=timestep.device, dtype=torch.float64)
            / (self.config.freq_dim // 2)
        )
        angles = timestep.double()[..., None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
        time = float32_mlp(self.time_embedding, waves, adapters)
        return time, float32_mlp(self.time_projection, time, adapters).unflatten(-1, (6, -1))

    def embed_text(self, text: Tensor, clip: Tensor | None, adapters: Sequence[str] = ()) -> Tensor:
        """Text states [B, L, text_dim] to memory [B, L, D], behind the images' tokens if any."""
        text_states = text.to(_dtype(self.text_embedding))
        memory = sequential(self.text_embedding, text_states, adapters)
        if not self.config.reads_clip:
            return memory
        check_images(self.config, text, clip)
        return torch.cat([self.img_emb(clip, adapters), memory], dim=1)


def frame_index(context: Context, frames: int) -> Tensor:
    """Positions [F] of a pass's frames in the video, on the CPU."""
    return torch.arange(frames) if context.frame_index is None else context.frame_index.cpu()


def look_back(context: Context, index: Tensor) -> Past:
    """The clean past that new frames at `index` [F] see, and where they and it lie."""
    mask, cache, frames = context.mask, context.cache, len(index)
    if mask is not None and (cache is not None or mask.frames != frames):
        raise ValueError(
            f"a mask of {mask.frames} frames needs as many and no cache, got {frames} frames"
            f"{' and a cache' if cache is not None else ''}"
        )
    if cache is not None:
        cache.serve(context.adapters)
    return Past([], index[:0], index) if cache is None else cache.past(index)


def keys_wanted(context: Context, past: Past) -> Wanted:
    """Which keys of a pass somebody waits for."""
    if context.keys is None and (past.rooms is not None or not context.commit):
        return "nothing"
    return "rotated" if past.rotated else "unrotated"


def report(
    context: Context, index: Tensor, past: Past, keys: list[KeyValue], read: list[TextKeys]
) -> None:
    """Hand each layer's keys and values to whom the context names; outside of the blocks."""
    if context.keys is not None:
        context.keys.extend(keys)
    if context.cache is not None and read:
        context.cache.keep_text(read)
    if context.commit:
        if context.cache is None:
            raise ValueError("commit needs a cache to write to")
        context.cache.commit(index, keys if past.rooms is None else [])


def initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The starting value of the parameter `name`, fp32: Xavier linears, zero biases and head."""
    if name.endswith("modulation"):
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    if name.endswith("bias") or name in (PLAIN_WEIGHT, WEIGHT, "img_emb.emb_pos"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    if name.startswith(("text_embedding", "time_embedding")):
        return 0.02 * torch.randn(shape, generator=generator)
    bound = math.sqrt(6.0 / (shape[0] + shape[1:].numel()))
    return (2.0 * torch.rand(shape, generator=generator) - 1.0) * bound


def _dtype(layers: nn.Sequential) -> torch.dtype:
    weight = layers[0].weight
    assert isinstance(weight, Tensor)
    return weight.dtype


def float32_mlp(layers: nn.Sequential, x: Tensor, adapters: Sequence[str] = ()) -> Tensor:
    """Run an MLP in fp32 whatever the dtype of its weights: bf16 blurs neighbouring timesteps."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            y = F.linear(x, layer.weight.float(), layer.bias.float())
            x = with_adapters(layer, x, y, adapters)
        else:
            x = layer(x)
    return x
