"""Attention under a mask of frames and over a cached past, against its plain dense form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.wan.attention import (
    FLEX_TILE,
    attend,
    attend_blocks,
    attend_flex,
    attend_past,
    device_mask,
    flex_mask,
)
from model.wan.masks import FrameMask, block_causal, teacher_forcing

CPU = torch.device("cpu")
MASKS = {
    "blocks": block_causal([2, 2, 2]),
    "blocks of one": block_causal([1] * 6),
    "independent first frame": block_causal([1, 2, 2]),
    "window": block_causal([2, 2, 2], window=4),
    "window inside a block": block_causal([2, 2, 2], window=3),
    "window and sink": block_causal([1] * 6, window=3, sink=1),
    "one block": block_causal([6]),
    "teacher forcing": teacher_forcing([1, 2]),
    "teacher forcing, window and sink": teacher_forcing([1] * 4, window=3, sink=1),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
# FlexAttention tells that eager mode is slow, which is the point of a comparison on the CPU.
eager_flex = pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(mask: FrameMask, per_frame: int) -> list[Tensor]:
    """Queries, keys and values [B = 2, N, heads = 2, head_dim = 16], small to round off little."""
    return [0.5 * random(2, mask.frames * per_frame, 2, 16, seed=i) for i in range(3)]


def dense(mask: FrameMask, per_frame: int) -> Tensor:
    """The mask between tokens, [N, N] bool."""
    return mask.visible().repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1)


def attend_densely(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=visible).transpose(1, 2)


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((output * random(*output.shape, seed=9)).sum(), inputs)


@every_mask
@pytest.mark.parametrize("per_frame", [1, 5])
def test_a_loop_over_blocks_equals_a_dense_mask(mask: FrameMask, per_frame: int) -> None:
    q, k, v = tokens(mask, per_frame)
    expected = attend_densely(q, k, v, dense(mask, per_frame))
    torch.testing.assert_close(attend_blocks(q, k, v, mask), expected, atol=1e-6, rtol=0.0)


@every_mask
def test_a_loop_over_blocks_has_the_gradients_of_a_dense_mask(mask: FrameMask) -> None:
    inputs = [x.requires_grad_() for x in tokens(mask, 4)]
    expected = gradients(attend_densely(*inputs, dense(mask, 4)), inputs)
    found = gradients(attend_blocks(*inputs, mask), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0.0)


@every_mask
@eager_flex
@pytest.mark.parametrize("per_frame", [7, 64])  # of 6 frames: 42 tokens, and 3 whole tiles
def test_flex_attention_equals_a_dense_mask(mask: FrameMask, per_frame: int) -> None:
    q, k, v = tokens(mask, per_frame)
    expected = attend_densely(q, k, v, dense(mask, per_frame))
    torch.testing.assert_close(
        attend_flex(q, k, v, flex_mask(mask, per_frame, CPU)), expected, atol=1e-6, rtol=0.0
    )


@every_mask
def test_on_the_cpu_a_mask_is_served_by_the_loop(mask: FrameMask) -> None:
    q, k, v = tokens(mask, 4)
    served = device_mask(mask, 4, CPU)
    assert served == mask
    assert torch.equal(attend(q, k, v, mask=served), attend_blocks(q, k, v, mask))


@every_mask
@eager_flex
def test_a_mask_in_flex_attentions_form_is_served_by_it(mask: FrameMask) -> None:
    q, k, v = tokens(mask, 4)
    served = flex_mask(mask, 4, CPU)
    assert torch.equal(attend(q, k, v, mask=served), attend_flex(q, k, v, served))


def test_a_mask_that_hides_nothing_changes_nothing() -> None:
    q, k, v = tokens(MASKS["one block"], 4)
    assert torch.equal(attend(q, k, v, mask=MASKS["one block"]), attend(q, k, v))


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Which tiles [row, column] a BlockMask lists."""
    listed = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, (count, columns) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
        listed[row, columns[:count].long()] = True
    return listed


def shares(mask: FrameMask, per_frame: int) -> Tensor:
    """How much of each tile is visible [row, column], tokens past the end counted as hidden."""
    visible = dense(mask, per_frame).float()
    padding = -len(visible) % FLEX_TILE
    visible = F.pad(visible, (0, padding, 0, padding))
    return F.avg_pool2d(visible[None, None], FLEX_TILE)[0, 0]


# The eager kernel asks for every pair; only the compiled one goes by these lists.
@every_mask
@pytest.mark.parametrize("per_frame", [7, 64, 100, 128, 150])
def test_flex_attention_skips_hidden_tiles_and_asks_inside_mixed_ones_alone(
    mask: FrameMask, per_frame: int
) -> None:
    block_mask = flex_mask(mask, per_frame, CPU)
    share = shares(mask, per_frame)
    assert torch.equal(
        listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices), share == 1.0
    )
    assert torch.equal(
        listed(block_mask.kv_num_blocks, block_mask.kv_indices), (share > 0.0) & (share < 1.0)
    )


@every_mask
@pytest.mark.parametrize("per_frame", [7, 100, 128])
def test_the_backward_lists_of_flex_attention_are_the_transposed_forward_ones(
    mask: FrameMask, per_frame: int
) -> None:
    block_mask = flex_mask(mask, per_frame, CPU)
    share = shares(mask, per_frame).T
    assert torch.equal(
        listed(block_mask.full_q_num_blocks, block_mask.full_q_indices), share == 1.0
    )
    assert torch.equal(
        listed(block_mask.q_num_blocks, block_mask.q_indices), (share > 0.0) & (share < 1.0)
    )


def test_blocks_that_fill_tiles_are_never_asked_about() -> None:
    block_mask = flex_mask(block_causal([2, 2, 2]), 64, CPU)
    assert block_mask.full_kv_num_blocks.flatten().tolist() == [1, 2, 3]
    assert block_mask.kv_num_blocks.flatten().tolist() == [0, 0, 0]


@every_mask
def test_flex_attention_asks_what_the_mask_says(mask: FrameMask) -> None:
    rows = torch.arange(mask.frames * 3)
    asked = flex_mask(mask, 3, CPU).mask_mod(
        torch.tensor(0), torch.tensor(0), rows[:, None], rows[None, :]
    )
    assert torch.equal(asked, dense(mask, 3))


class Pieces:
    """Keys and values in three pieces: two of a past, and the present."""

    def __init__(self, per_frame: int = 4) -> None:
        lengths = (3 * per_frame, 2 * per_frame, per_frame)
        self.q = random(2, per_frame, 2, 16, seed=0).requires_grad_()
        self.k = [random(2, n, 2, 16, seed=i + 1).requires_grad_() for i, n in enumerate(lengths)]
        self.v = [random(2, n, 2, 16, seed=i + 4).requires_grad_() for i, n in enumerate(lengths)]
        self.joins = 0
        self.storages: list[StorageWeakRef] = []

    def keys(self) -> Tensor:
        return self._join([1.5 * k for k in self.k])

    def values(self) -> Tensor:
        return self._join(self.v)

    def inputs(self) -> list[Tensor]:
        return [self.q, *self.k, *self.v]

    def alive(self) -> int:
        """How many of the joined tensors are still in memory."""
        return sum(not storage.expired() for storage in self.storages)

    def _join(self, pieces: list[Tensor]) -> Tensor:
        joined = torch.cat(pieces, dim=1)
        self.joins += 1
        self.storages.append(StorageWeakRef(joined.untyped_storage()))
        return joined


def over_past(pieces: Pieces) -> Tensor:
    return attend_past(attend, pieces.q, pieces.keys, pieces.values)


def plainly(pieces: Pieces) -> Tensor:
    return attend(pieces.q, pieces.keys(), pieces.values())


def test_attention_over_a_past_equals_plain_attention_bit_for_bit() -> None:
    pieces = Pieces()
    assert torch.equal(over_past(pieces), plainly(pieces))


def test_attention_over_a_past_has_the_gradients_of_plain_attention_bit_for_bit() -> None:
    pieces = Pieces()
    found, expected = (gradients(f(pieces), pieces.inputs()) for f in (over_past, plainly))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_attention_over_a_past_without_gradients_joins_once() -> None:
    pieces = Pieces()
    with torch.no_grad():
        over_past(pieces)
    assert pieces.joins == 2


def test_a_past_without_gradients_leaves_those_of_the_present() -> None:
    pieces = Pieces()
    for piece in (*pieces.k[:2], *pieces.v[:2]):
        piece.requires_grad_(False)
    inputs = [pieces.q, pieces.k[2], pieces.v[2]]
    found, expected = (gradients(f(pieces), inputs) for f in (over_past, plainly))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_may_be_asked_for_twice() -> None:
    pieces = Pieces()
    loss = over_past(pieces).square().sum()
    first = torch.autograd.grad(loss, pieces.inputs(), retain_graph=True)
    second = torch.autograd.grad(loss, pieces.inputs())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("attention", "kept"), [(over_past, 0), (plainly, 2)])
def test_joined_keys_and_values_do_not_wait_for_the_backward_pass(
    attention: Callable[[Pieces], Tensor], kept: int
) -> None:
    pieces = Pieces()
    output = attention(pieces)
    assert output.requires_grad
    assert pieces.alive() == kept


def test_nothing_stays_of_a_graph_that_is_dropped() -> None:
    pieces = Pieces()
    output = over_past(pieces)
    storage = StorageWeakRef(output.untyped_storage())
    del output
    assert storage.expired()


def test_joined_keys_and_values_go_after_the_backward_pass() -> None:
    pieces = Pieces()
    gradients(over_past(pieces), pieces.inputs())
    assert pieces.alive() == 0


class Allocations(TorchDispatchMode):
    """Sees every tensor that is made, and knows how many bytes of them are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        del types
        result = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if _is_tensor(x)}
        for tensor in filter(_is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in inputs:
                self.sizes[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes_held(self) -> int:
        return sum(size for storage, size in self.sizes.values() if not storage.expired())


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


def bytes_held(attention: Callable[[Pieces], Tensor], pieces: Pieces) -> int:
    """Between forward and backward pass, beside the inputs."""
    with Allocations() as allocations:
        output = attention(pieces)
    held = allocations.bytes_held()
    del output
    return held


def test_attention_over_a_past_saves_the_bytes_of_the_joined_keys_and_values() -> None:
    pieces = Pieces()
    joined_bytes = 2 * pieces.keys().nbytes
    saved = bytes_held(plainly, pieces) - bytes_held(over_past, pieces)
    assert saved == joined_bytes
