"""Meters: seconds with the device done, memory, model FLOPs, and what a device could do at most.

Letters as in model/types.py; n tokens per frame.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.types import Context
from model.wan.config import WanConfig
from utils.gpus import find_device

# Rows of the matrices whose product tells a CPU's peak, and how many are tried: each is so short
# that some run undisturbed beside other processes.
MATMUL, PRODUCTS = 768, 60


def device_name(device: torch.device) -> str:
    """As rows and the plan call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(eq=False)
class Clock:
    """Seconds of several bodies, one after the other."""

    device: torch.device
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # of all threads of this process

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Note the body's time, its device work included."""
        finish(self.device)
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        finish(self.device)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def ratio(self, other: Clock) -> float | None:
        """The median of this clock's seconds over the other's, pair by pair."""
        return median_ratio(self.wall, other.wall)

    def cpu_ratio(self, other: Clock) -> float | None:
        """The same of CPU seconds; None on a device of its own, or with none to compare."""
        return median_ratio(self.cpu, other.cpu) if self.device.type == "cpu" else None


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The median of ours / theirs, pair by pair; None without pairs."""
    if not theirs:
        return None
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Dense FLOP/s that the device can do at most, and where the figure is from.

    A GPU's by its data sheet; another device's by the best of some large products in `dtype`.
    """
    if device.type == "cuda":
        gpu = find_device(torch.cuda.get_device_name(device))
        if gpu is not None:
            return gpu.flops, "data sheet, bf16"
    a = torch.ones(MATMUL, MATMUL, device=device, dtype=dtype)
    clock = Clock(device)
    for _ in range(PRODUCTS):
        with clock():
            a @ a
    return 2 * MATMUL**3 / min(clock.wall), "measured by a matrix product"


def forward_flops(
    sizes: WanConfig,
    shape: torch.Size,
    *,
    pairs: int,
    levels: int = 1,
    known_text: bool = False,
) -> int:
    """FLOPs of the products of one forward pass, a multiplication and an addition counted as two.

    shape: of the latents that go in, [B, C, F, H, W]. pairs: of query and key that self-attention
    computes, per sample. levels: noise levels per sample. known_text: whether a cache has its keys.
    """
    batch, _, frames, height, width = shape
    _, rows, columns = sizes.patch_size
    n, d, text = frames * (height // rows) * (width // columns), sizes.dim, sizes.text_len
    patch = rows * columns
    image = sizes.image_count * sizes.image_tokens if sizes.reads_clip else 0
    per_layer = (
        2 * n * (6 * d * d + 2 * d * sizes.ffn_dim)
    )  # q k v o, q o of the text, feed-forward
    per_layer += 4 * d * (pairs + n * (text + image))
    outside = 2 * n * d * patch * (sizes.in_dim + sizes.out_dim)
    outside += 2 * levels * d * (sizes.freq_dim + 7 * d)
    if not known_text:
        per_layer += 2 * (text + image) * 2 * d * d
        outside += 2 * text * d * (sizes.text_dim + d)
        outside += 2 * image * sizes.image_dim * (sizes.image_dim + d)
    return batch * (sizes.num_layers * per_layer + outside)


def attended_pairs(context: Context, frames: int, per_frame: int) -> int:
    """Pairs of tokens that see each other in a pass of `frames`."""
    if context.mask is not None:
        return int(context.mask.visible().sum()) * per_frame**2
    past = 0
    if context.cache is not None:
        index = torch.arange(frames) if context.frame_index is None else context.frame_index
        past = len(context.cache.past(index.cpu()).key_positions)
    return frames * (frames + past) * per_frame**2


class FlopMeter:
    """Counts the model FLOPs of transformers' calls on this rank, from shapes alone.

    A backward pass is two forward passes where weights are learnt, and one where a gradient only
    passes through. What is recomputed is not counted: it is no part of the model's work.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.flops = 0
        self._handles = []
        for network in networks.values():
            sizes = getattr(getattr(network, "model", None), "config", None)
            if isinstance(sizes, WanConfig):
                handle = network.register_forward_pre_hook(self._count, with_kwargs=True)
                self._handles.append(handle)

    def close(self) -> None:
        """Count no more."""
        for handle in self._handles:
            handle.remove()

    def take(self) -> int:
        """Those since the last call."""
        taken, self.flops = self.flops, 0
        return taken

    def _count(self, network: Any, arguments: Any, words: Mapping[str, Any]) -> None:
        x, sigma, *_ = arguments
        context = words.get("context", Context())
        sizes: WanConfig = network.model.config
        _, rows, columns = sizes.patch_size
        frames, per_frame = x.shape[2], (x.shape[3] // rows) * (x.shape[4] // columns)
        text = context.cache is not None and context.cache.text is not None
        forward = forward_flops(
            sizes,
            x.shape,
            pairs=attended_pairs(context, frames, per_frame),
            levels=sigma.shape[1],
            known_text=text,
        )
        self.flops += forward * (1 + backward_passes(network, x))


def backward_passes(network: nn.Module, x: Tensor) -> int:
    """The cost of a call's backward pass, in forward passes."""
    if not torch.is_grad_enabled():
        return 0
    learnt = any(parameter.requires_grad for parameter in network.parameters())
    return 2 if learnt else int(x.requires_grad)


class LivePeak(TorchDispatchMode):
    """The most bytes of tensors that are held at a time: those that it meets, and those given."""

    def __init__(self, held: int) -> None:
        """held: bytes that are there already, of weights and the state of optimizers."""
        super().__init__()
        self.now = self.peak = held
        self._known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        before = {id(s) for t in args if isinstance(t, Tensor) for s in [t.untyped_storage()]}
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in before:
                self._meet(tensor.untyped_storage())
        return out

    def _meet(self, storage: Any) -> None:
        if self._known.get(id(storage)) is storage:
            return
        self._known[id(storage)] = storage
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size
