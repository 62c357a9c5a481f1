"""Blocks that run again in the backward pass: equal numbers, and what is kept where meanwhile."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from model.wan.cache import KVCache
from model.wan.context import Context
from model.wan.masks import FrameMask, block_causal
from model.wan.transformer import WanTransformer
from tests.conftest import MINIATURE, build_wan
from tests.model.test_block import MODES, call, compile_blocks, first_frames, outcome
from utils.parallel import ParallelConfig, parallelize
from utils.recompute import ATTENTION as ATTENTION_OPERATORS
from utils.recompute import HostMemory, keep_attention, offload_inputs, recompute_blocks

LAYERS = 4
WAYS = {
    "block": ParallelConfig(activation_checkpoint="block"),
    "selective": ParallelConfig(activation_checkpoint="selective"),
    "every second": ParallelConfig(activation_checkpoint="block", checkpoint_every=2),
    "offloaded": ParallelConfig(activation_checkpoint="block", offload_inputs=True),
    "all at once": ParallelConfig("selective", checkpoint_every=2, offload_inputs=True),
}
every_way = pytest.mark.parametrize("config", WAYS.values(), ids=WAYS.keys())
every_mode = pytest.mark.parametrize("mode", MODES)


def network(config: ParallelConfig | None = None) -> WanTransformer:
    model = build_wan(replace(MINIATURE, num_layers=LAYERS))
    if config is not None:
        parallelize(model, model.blocks, None, torch.float32, config)
    return model


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def calls(model: WanTransformer) -> Counter[str]:
    """Those of a forward and a backward pass."""
    with Calls() as counted:
        call(model).square().sum().backward()
    return counted.counts


@every_mode
@every_way
def test_recomputing_changes_no_bit_of_any_gradient(config: ParallelConfig, mode: str) -> None:
    plain, model = network(), network(config)
    run = MODES[mode]
    expected = outcome(plain, first_frames(plain), run, grad=True)
    found = outcome(model, first_frames(model), run, grad=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


ATTENTION, PRODUCT = "_scaled_dot_product_flash_attention_for_cpu", "addmm"


@pytest.mark.parametrize(("kind", "times"), [("block", 2), ("selective", 1)])
def test_selective_recomputing_computes_attention_once_and_all_else_again(
    kind: str, times: int
) -> None:
    plain, found = calls(network()), calls(network(WAYS[kind]))
    assert plain[ATTENTION] == 2 * LAYERS  # self-attention and cross-attention
    assert found[ATTENTION] == times * plain[ATTENTION]
    assert plain[PRODUCT] < 1.5 * plain[PRODUCT] < found[PRODUCT]


def test_kernels_of_packages_are_kept_as_torch_s_own_are() -> None:
    names = (torch.ops.fewstep.attention.default, *ATTENTION_OPERATORS)
    assert {keep_attention(None, name) for name in names} == {CheckpointPolicy.MUST_SAVE}
    assert keep_attention(None, torch.ops.aten.mm.default) == CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(("every", "again"), [(1, {0, 1, 2, 3}), (2, {0, 2}), (3, {0, 3})])
def test_every_nth_block_runs_again(every: int, again: set[int]) -> None:
    model = network(ParallelConfig(activation_checkpoint="block", checkpoint_every=every))
    runs: Counter[int] = Counter()
    for number, block in enumerate(model.blocks):
        block.self_attn.register_forward_hook(lambda *_, n=number: runs.update([n]))  # type: ignore[union-attr]
    call(model).square().sum().backward()
    assert runs == {number: 1 + (number in again) for number in range(LAYERS)}


def test_without_autograd_nothing_waits_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(WAYS["offloaded"])
    monkeypatch.setattr(HostMemory, "put", None)
    with torch.no_grad():
        call(model)


def test_of_an_offloaded_block_the_input_alone_waits_and_its_own_memory_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, put, waiting = network(WAYS["offloaded"]), HostMemory.put, []
    inputs: list[StorageWeakRef] = []

    def noting(host: HostMemory, tensor: Tensor) -> Any:
        waiting.append(put(host, tensor))
        inputs.append(StorageWeakRef(tensor.untyped_storage()))
        return waiting[-1]

    monkeypatch.setattr(HostMemory, "put", noting)
    output = call(model)
    assert output.requires_grad
    assert [tuple(one.host.shape) for one in waiting] == [(1, 8, 32)] * LAYERS
    assert [reference.expired() for reference in inputs] == [True] * LAYERS


def test_whoever_takes_a_tensor_from_the_host_has_the_one_before_it_begin_to_come_back() -> None:
    host = HostMemory()
    tensors = [torch.full((2,), float(i)) for i in range(3)]
    first, second, third = (host.put(tensor) for tensor in tensors)
    assert torch.equal(host.take(third), tensors[2])
    assert second.back is not None
    assert first.back is None
    assert third.back is None
    assert torch.equal(host.take(second), tensors[1])
    assert torch.equal(host.take(second), tensors[1])  # as a second backward pass does


def test_what_is_never_taken_from_the_host_does_not_stay_there() -> None:
    host = HostMemory()
    gone = StorageWeakRef(host.put(torch.ones(2)).host.untyped_storage())
    last = host.put(torch.ones(2))
    assert gone.expired()
    assert torch.equal(host.take(last), torch.ones(2))


def test_a_copy_of_an_offloaded_network_has_weights_and_host_memory_of_its_own() -> None:
    model = network(WAYS["offloaded"])
    twin = copy.deepcopy(model)
    assert twin.blocks[0].forward.host is not model.blocks[0].forward.host  # type: ignore[union-attr]
    assert twin.blocks[0].forward.host is twin.blocks[1].forward.host  # type: ignore[union-attr]
    before = call(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(call(twin), before)


@every_way
def test_recomputing_and_offloading_rename_no_weight(config: ParallelConfig) -> None:
    assert list(network(config).state_dict()) == list(network().state_dict())


@pytest.mark.parametrize("mode", ["bidirectional", "cached"])
def test_a_selectively_recomputed_block_is_one_graph_and_its_input_may_wait_on_the_host(
    mode: str,
) -> None:
    torch.compiler.reset()
    plain, model = network(), network()
    expected = outcome(plain, first_frames(plain), MODES[mode], grad=True)
    cache = first_frames(model)
    recompute_blocks(model.blocks, "selective")
    compile_blocks(model, "aot_eager")
    offload_inputs(model.blocks)
    for found, wanted in zip(outcome(model, cache, MODES[mode], grad=True), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.gpu
@every_way
@pytest.mark.parametrize("mask", [None, block_causal([2, 2])], ids=["whole", "masked"])
def test_on_a_gpu_recomputing_changes_no_gradient(
    config: ParallelConfig, mask: FrameMask | None
) -> None:
    found = []
    for model in (network(), network(config)):
        model.to("cuda")
        text, x = torch.ones(1, 12, 64, device="cuda"), torch.ones(1, 16, 4, 32, 32, device="cuda")
        context = Context(mask=mask)
        for _ in range(2):  # the second reuses memory of the first
            model.zero_grad()
            output = model(x, torch.full((1, 1), 600.0, device="cuda"), text, context=context)
            output.square().sum().backward()
        found.append([weight.grad for weight in model.parameters()])
    for gradient, expected in zip(*found, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_on_a_gpu_inputs_that_wait_on_the_host_take_no_memory_there() -> None:
    held = []
    for way in ("block", "offloaded"):
        model = network(WAYS[way]).to("cuda")
        text, x = torch.ones(1, 12, 64, device="cuda"), torch.ones(1, 16, 8, 64, 64, device="cuda")
        before = torch.cuda.memory_allocated()
        output = model(x, torch.full((1, 1), 600.0, device="cuda"), text)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        del output
    one_input = 8 * 32 * 32 * 32 * 4  # tokens x width x fp32
    assert held[0] - held[1] >= (LAYERS - 1) * one_input


def test_a_cache_is_read_the_same_by_blocks_that_run_again_and_by_those_that_do_not() -> None:
    model = network(ParallelConfig("selective", checkpoint_every=2))
    cache = first_frames(model)
    output = MODES["cached"](model, cache)
    with torch.no_grad():
        again = MODES["cached"](model, cache)
    assert isinstance(cache, KVCache)
    assert torch.equal(output, again)
