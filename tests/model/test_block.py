"""A block as one graph: tensors and constants in, tensors out, whatever the pass is for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from model.wan.cache import KVCache
from model.wan.config import WanConfig
from model.wan.context import Context
from model.wan.masks import FrameMask, block_causal
from model.wan.transformer import WanTransformer
from utils.recompute import recompute_blocks

WanFactory = Callable[..., WanTransformer]
Run = Callable[[WanTransformer, KVCache], Tensor]

LATER = torch.arange(2, 4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(model: WanTransformer, frames: int = 2, **context: Any) -> Tensor:
    x, text = random(1, 16, frames, 4, 4, seed=4), random(1, 12, 64, seed=1)
    return model(x, torch.full((1, 1), 600.0), text, context=Context(**context))


def first_frames(model: WanTransformer, *, text: bool = True) -> KVCache:
    """A cache of two frames, which has the keys of the text or not."""
    cache = KVCache()
    with torch.no_grad():
        call(model, cache=cache, commit=True)
        if not text:
            cache.keep_text([])
    return cache


MODES: dict[str, Run] = {
    "bidirectional": lambda model, _: call(model),
    "masked": lambda model, _: call(model, 4, mask=block_causal([2, 2])),
    "cached": lambda model, cache: call(model, cache=cache, frame_index=LATER),
    "reporting": lambda model, cache: call(model, cache=cache, frame_index=LATER, keys=[]),
}
every_mode = pytest.mark.parametrize("run", MODES.values(), ids=MODES.keys())


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Compiled code of one test does not count against the limits of the next."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compile_blocks(model: WanTransformer, backend: str) -> None:
    """Each block on its own, and an error wherever a graph would break."""
    for block in model.blocks:
        block.forward = torch.compile(  # type: ignore[method-assign]
            block.forward, fullgraph=True, dynamic=False, backend=backend
        )


def outcome(model: WanTransformer, cache: KVCache, run: Run, *, grad: bool) -> list[Tensor]:
    """The output, and the gradient of every weight."""
    with torch.set_grad_enabled(grad):
        output = run(model, cache)
    if not grad:
        return [output]
    return [output, *torch.autograd.grad(output.square().mean(), list(model.parameters()))]


def compiled_and_plain(
    model: WanTransformer, run: Run, backend: str, *, grad: bool = False, recompute: bool = False
) -> list[tuple[Tensor, Tensor]]:
    cache = first_frames(model)
    plain = outcome(model, cache, run, grad=grad)
    if recompute:
        recompute_blocks(model.blocks)
    compile_blocks(model, backend)
    return list(zip(outcome(model, cache, run, grad=grad), plain, strict=True))


@every_mode
@pytest.mark.parametrize(
    ("grad", "recompute"), [(False, False), (True, False), (True, True)],
    ids=["forward", "backward", "recomputed"],
)  # fmt: skip
def test_a_block_is_one_graph(
    tiny_wan: WanFactory, run: Run, *, grad: bool, recompute: bool
) -> None:
    pairs = compiled_and_plain(tiny_wan(), run, "eager", grad=grad, recompute=recompute)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.0)


def test_a_block_that_reads_the_text_for_the_first_time_is_one_graph(tiny_wan: WanFactory) -> None:
    model = tiny_wan()
    expected = MODES["cached"](model, first_frames(model))
    cache = first_frames(model, text=False)
    compile_blocks(model, "eager")
    with torch.no_grad():
        found = MODES["cached"](model, cache)
        assert cache.text is not None
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.0)


@pytest.mark.slow
def test_a_compiled_block_predicts_and_learns_the_same(
    tiny_wan: WanFactory, tiny_config: WanConfig
) -> None:
    model = tiny_wan(replace(tiny_config, num_layers=1))
    pairs = compiled_and_plain(model, MODES["cached"], "inductor", grad=True, recompute=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@every_mode
@pytest.mark.parametrize("grad", [False, True])
def test_a_block_is_handed_tensors_and_constants_alone(
    tiny_wan: WanFactory, run: Run, *, grad: bool
) -> None:
    model, seen = tiny_wan(), []

    def note(module: nn.Module, args: tuple[Any, ...], words: dict[str, Any], out: Any) -> None:
        seen.append((args, words))
        assert all(isinstance(leaf, Tensor) for leaf in tree_leaves(out) if leaf is not None)

    cache = first_frames(model)
    for block in model.blocks:
        block.register_forward_hook(note, with_kwargs=True)
    with torch.set_grad_enabled(grad):
        run(model, cache)
    kinds = {type(leaf) for leaf in tree_leaves(seen)}
    assert kinds <= {Tensor, bool, int, str, FrameMask, type(None)}
    assert len(seen) == len(model.blocks)


def test_equal_blocks_are_handed_equal_constants(tiny_wan: WanFactory) -> None:
    """One compiled graph serves all layers: nothing tells them apart but tensors."""
    model, words = tiny_wan(), []
    for block in model.blocks:
        block.register_forward_hook(
            lambda *seen: words.append((seen[1][-1], seen[2])), with_kwargs=True
        )
    MODES["masked"](model, KVCache())
    assert words[0] == words[1]


def test_recomputing_and_compiling_rename_no_weight(tiny_wan: WanFactory) -> None:
    model = tiny_wan()
    names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    recompute_blocks(model.blocks)
    compile_blocks(model, "eager")
    assert names == (list(model.state_dict()), [name for name, _ in model.named_parameters()])


def block_runs(model: WanTransformer) -> list[int]:
    """How often a block's attention ran; counted from now on."""
    counts = [0]

    def count(*_: Any) -> None:
        counts[0] += 1

    for block in model.blocks:
        block.self_attn.register_forward_hook(count)  # type: ignore[union-attr]
    return counts


@pytest.mark.parametrize(("grad", "runs"), [(False, 2), (True, 4)])
def test_blocks_run_again_in_the_backward_pass_and_only_there(
    tiny_wan: WanFactory, *, grad: bool, runs: int
) -> None:
    model = tiny_wan()
    recompute_blocks(model.blocks)
    counts = block_runs(model)
    outcome(model, KVCache(), MODES["bidirectional"], grad=grad)
    assert counts == [runs]


def test_a_copy_of_a_recomputed_network_has_weights_of_its_own(tiny_wan: WanFactory) -> None:
    model = tiny_wan()
    recompute_blocks(model.blocks)
    before = call(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(call(twin), before)


# ---- what is computed once per shape ----


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """How often model.wan.transformer calls `name`; counted from now on."""
    import model.wan.transformer as module

    function, counts = getattr(module, name), [0]

    def counting(*args: Any) -> Any:
        counts[0] += 1
        return function(*args)

    monkeypatch.setattr(module, name, counting)
    return counts


@pytest.mark.parametrize("name", ["rotary_table", "coordinate_channels", "device_mask"])
def test_tables_and_masks_are_computed_once_per_shape(
    tiny_wan: WanFactory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, counts = tiny_wan(), count_calls(monkeypatch, name)
    for _ in range(3):
        MODES["masked"](model, KVCache())
    assert counts == [1]


@pytest.mark.parametrize("name", ["rotary_table", "coordinate_channels"])
def test_other_positions_and_sizes_have_tables_of_their_own(
    tiny_wan: WanFactory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, counts = tiny_wan(), count_calls(monkeypatch, name)
    for index in ([0, 1], [1, 2], [0, 2], [0, 1]):
        call(model, frame_index=torch.tensor(index))
    assert counts == [3]
    text, one = random(1, 12, 64), torch.ones(1, 1)
    for height, width in ((4, 8), (8, 4), (4, 8)):
        model(random(1, 16, 2, height, width), one, text)
    assert counts == [5]


def test_every_pass_of_a_second_rollout_finds_its_tables(
    tiny_wan: WanFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, counts, found = tiny_wan(), count_calls(monkeypatch, "rotary_table"), []
    for _ in range(2):
        cache = KVCache(window=4, sink=1)
        with torch.no_grad():
            for first in range(0, 12, 2):
                call(model, cache=cache, frame_index=torch.arange(first, first + 2), commit=True)
        found.append(counts[0])
    assert found == [6, 6]  # of each block; its keys are kept rotated


def test_tables_that_were_made_without_gradients_serve_training(tiny_wan: WanFactory) -> None:
    model = tiny_wan()
    with torch.inference_mode():
        call(model)
    call(model).square().mean().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_tables_are_not_saved_and_outlive_emptied_weights(tiny_wan: WanFactory) -> None:
    model, weights = tiny_wan(), tiny_wan().state_dict()
    expected = call(model)
    assert model.memo.bytes_held() > 0
    assert model.state_dict().keys() == weights.keys()
    model.to_empty(device="cpu")
    model.load_state_dict(weights)
    assert torch.equal(call(model), expected)
