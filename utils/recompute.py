"""Blocks that run again in the backward pass: which, what they keep, and where that waits."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import flex_attention_hop
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# Attention as the dispatcher sees it: each returns its output and what its backward pass reads.
# The plain one is missing: it is made of products, and so is computed again.
ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    flex_attention_hop,
)
NAMESPACE = "fewstep"  # of our own operators, which are all kernels of attention


def keep_attention(context: object, operator: Any, *args: Any, **words: Any) -> CheckpointPolicy:
    """What a block keeps that is recomputed but for its attention; see torch.utils.checkpoint."""
    del context, args, words
    if operator in ATTENTION or getattr(operator, "namespace", None) == NAMESPACE:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# What torch is told of each kind; a compiler reads any `context_fn`, so only one that is needed.
KINDS: dict[str, dict[str, Any]] = {
    "block": {},
    "selective": {
        "context_fn": functools.partial(create_selective_checkpoint_contexts, keep_attention)
    },
}


def recompute_blocks(
    blocks: nn.ModuleList, kind: Literal["block", "selective"] = "block", *, every: int = 1
) -> None:
    """Let every n-th block keep but little for the backward pass, which runs it again. In place.

    A block keeps its inputs, and if `selective` what attention returned. Its forward pass takes
    the keyword `recomputed`, and draws no random number. Names of weights stay as they are: it is
    `forward` that is exchanged, not the module.
    """
    for block in recomputed(blocks, every):
        block.forward = Recomputed(block.forward, KINDS[kind])


def offload_inputs(blocks: nn.ModuleList, *, every: int = 1) -> None:
    """Let the first input of recomputed blocks wait in host memory. In place.

    Comes after all that exchanges `forward` to compute it otherwise, compilers included.
    """
    host = HostMemory()
    for block in recomputed(blocks, every):
        block.forward = Offloaded(block.forward, host)


def recomputed(blocks: nn.ModuleList, every: int) -> Iterator[nn.Module]:
    """The blocks that run again: the first, and each n-th after it."""
    return iter(blocks[::every])


@dataclass(frozen=True, eq=False)
class Recomputed:
    """A forward pass that runs again in the backward pass; without autograd it runs as it is."""

    forward: Callable[..., Any]
    options: Mapping[str, Any]  # what torch is told of what is kept

    def __call__(self, *args: Any, **words: Any) -> Any:
        """What `forward` returns."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **words)
        return checkpoint(
            self.forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            recomputed=True,
            **self.options,
            **words,
        )


@dataclass(eq=False)
class Waiting:
    """A tensor in host memory, from where the backward pass takes it."""

    host: Tensor
    device: torch.device
    before: Callable[[], Waiting | None]  # what began to wait before it, if that still does
    back: Tensor | None = None  # on its device, or on its way there


class HostMemory:
    """Where a network's tensors wait between the forward and the backward pass.

    Copies run on a stream of their own where the device is a GPU; and since a backward pass goes
    the other way, whoever takes one tensor has the one before it begin to come back.
    """

    def __init__(self) -> None:
        self._last: Callable[[], Waiting | None] = _nothing
        self._stream: torch.cuda.Stream | None = None

    def __deepcopy__(self, memo: object) -> HostMemory:
        """Empty: what waits belongs to a forward pass."""
        return HostMemory()

    def put(self, tensor: Tensor) -> Waiting:
        """A copy of `tensor` in host memory, pinned if it comes from a GPU."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        with self._aside(tensor):
            host.copy_(tensor.detach(), non_blocking=True)
        waiting = Waiting(host, tensor.device, self._last)
        self._last = weakref.ref(waiting)
        return waiting

    def take(self, waiting: Waiting) -> Tensor:
        """The tensor, on its device again."""
        back = self._fetch(waiting)
        waiting.back = None
        if self._stream is not None and back.is_cuda:
            current = torch.cuda.current_stream(back.device)
            current.wait_stream(self._stream)
            back.record_stream(current)  # it was made on the other stream
        before = waiting.before()
        if before is not None:
            before.back = self._fetch(before)
        return back

    def _fetch(self, waiting: Waiting) -> Tensor:
        if waiting.back is not None:
            return waiting.back
        if self._stream is None:
            return waiting.host.to(waiting.device, non_blocking=True)
        with torch.cuda.stream(self._stream):
            return waiting.host.to(waiting.device, non_blocking=True)

    def _aside(self, tensor: Tensor) -> AbstractContextManager[Any]:
        """The stream of copies, if the device has any.

        It waits for `tensor`, whose memory serves nobody else until it is copied.
        """
        if not tensor.is_cuda:
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        tensor.record_stream(self._stream)
        return torch.cuda.stream(self._stream)


def _nothing() -> None:
    return None


@dataclass(frozen=True, eq=False)
class Offloaded:
    """A recomputed forward pass whose first input waits in host memory.

    All others are the same for all blocks, so that copies of them would be many.
    """

    forward: Callable[..., Any]
    host: HostMemory

    def __call__(self, x: Tensor, *args: Any, **words: Any) -> Any:
        """What `forward` returns."""
        if not torch.is_grad_enabled():
            return self.forward(x, *args, **words)
        place, shape = x.untyped_storage().data_ptr(), x.shape

        def pack(tensor: Tensor) -> Tensor | Waiting:  # lives as long as what it packs: without x
            same = tensor.untyped_storage().data_ptr() == place and tensor.shape == shape
            return self.host.put(tensor) if same else tensor

        with saved_tensors_hooks(pack, self.unpack):
            return self.forward(x, *args, **words)

    def unpack(self, packed: Tensor | Waiting) -> Tensor:
        """What was packed."""
        return self.host.take(packed) if isinstance(packed, Waiting) else packed
