"""Ranks that share a sample's tokens: what they predict, learn, send, and refuse."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.wan.cache import KeyValue, KVCache
from model.wan.context import Context, Taps
from model.wan.masks import block_causal, teacher_forcing
from model.wan.transformer import WanTransformer
from tests.conftest import MINIATURE, build_wan
from tests.ranks import run_on_ranks
from utils.context_parallel import (
    Ulysses,
    context_mesh,
    context_parallel,
    divisors,
    ranks_at_hand,
    sharing_problems,
)
from utils.distributed import Session, distributed_session
from utils.errors import UserError
from utils.parallel import recompute_blocks

CONFIG = replace(MINIATURE, num_heads=4)
FRAMES, BATCH, SIDE = 4, 2, 4  # tokens per frame: 4
TOLERANCE = 1e-5  # relative to the largest entry; measured: below 2e-6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(model: WanTransformer, x: Tensor, **context: Any) -> Tensor:
    """Every frame at a noise level of its own."""
    frames = x.shape[2]
    level = torch.linspace(900.0, 100.0, frames).expand(len(x), -1)
    text = random(len(x), 12, 64, seed=1)
    output: Tensor = model(x, level, text, context=Context(**context))
    return output


def video(seed: int = 4, frames: int = FRAMES) -> Tensor:
    return random(BATCH, 16, frames, SIDE, SIDE, seed=seed).requires_grad_()


def squares(output: Tensor) -> Tensor:
    return (output * random(*output.shape, seed=7)).square().mean()


def bidirectional(model: WanTransformer, x: Tensor) -> Tensor:
    return squares(call(model, x))


def masked(model: WanTransformer, x: Tensor) -> Tensor:
    return squares(call(model, x, mask=block_causal([2, 2], window=3, sink=1)))


def teacher_forced(model: WanTransformer, x: Tensor) -> Tensor:
    index = torch.arange(2).repeat(2)
    return squares(call(model, x, mask=teacher_forcing([1, 1]), frame_index=index))


def tapped(model: WanTransformer, x: Tensor) -> Tensor:
    """A loss on what the blocks say, as a discriminator's, beside one on the output."""
    taps = Taps([0, 1])
    output = call(model, x, taps=taps)
    return squares(output) + squares(taps.tokens[0]) + squares(taps.tokens[1])


def rolled_out(model: WanTransformer, x: Tensor, *, straight_through: bool, window: int) -> Tensor:
    """Blocks of a frame on a cache, as self-forcing has them."""
    cache, loss = KVCache(window=window, sink=1, frames=FRAMES), x.new_zeros(())
    for frame in range(FRAMES):
        index = torch.tensor([frame])
        keys: list[KeyValue] | None = [] if straight_through else None
        x0 = call(model, x[:, :, frame : frame + 1], cache=cache, frame_index=index, keys=keys)
        loss = loss + squares(x0)
        with torch.no_grad():
            call(model, x0, cache=cache, frame_index=index, commit=True)
        if keys is not None:
            cache.graft(keys)
    return loss


def detached(model: WanTransformer, x: Tensor) -> Tensor:
    return rolled_out(model, x, straight_through=False, window=3)


def straight_through(model: WanTransformer, x: Tensor) -> Tensor:
    return rolled_out(model, x, straight_through=True, window=3)


def relative(model: WanTransformer, x: Tensor) -> Tensor:
    """Positions that count from the window: keys are kept, and exchanged, unrotated."""
    cache = KVCache(window=2, relative_positions=True)
    with torch.no_grad():
        call(model, x[:, :, :2], cache=cache, frame_index=torch.arange(2), commit=True)
    return squares(call(model, x[:, :, 2:3], cache=cache, frame_index=torch.tensor([2])))


MODES: dict[str, Callable[[WanTransformer, Tensor], Tensor]] = {
    mode.__name__: mode
    for mode in (
        bidirectional, masked, teacher_forced, tapped, detached, straight_through, relative
    )
}  # fmt: skip


class Sent(TorchDispatchMode):
    """Counts the bytes that all-to-alls send to others; compiled blocks refuse to run in it."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.bytes = ranks, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            self.bytes += args[0].nbytes * (self.ranks - 1) // self.ranks
        return func(*args, **(kwargs or {}))


@dataclass
class Learnt:
    """A loss, the gradients of a pass, and what was sent for it."""

    loss: float = 0.0
    gradients: dict[str, Tensor] = field(default_factory=dict)
    forward_bytes: int = 0
    backward_bytes: int = 0


def learn(model: WanTransformer, mode: str, ranks: int, *, counted: bool = True) -> Learnt:
    x, found, sent = video(), Learnt(), Sent(ranks)
    with sent if counted else nullcontext():
        loss = MODES[mode](model, x)
        found.loss, found.forward_bytes = float(loss.detach()), sent.bytes
        loss.backward()
    found.backward_bytes = sent.bytes - found.forward_bytes
    assert x.grad is not None
    found.gradients["x"] = x.grad
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            found.gradients[name], weight.grad = weight.grad, None
    return found


def compiled(model: WanTransformer, backend: str) -> None:
    """Each block on its own, and an error wherever a graph would break."""
    for block in model.blocks:
        block.forward = torch.compile(  # type: ignore[method-assign]
            block.forward, fullgraph=True, dynamic=False, backend=backend
        )


def learn_together(jobs: list[tuple[str, str]]) -> list[Learnt]:
    """Each mode and way on all ranks: plain, recomputed, or compiled by a backend."""
    found = []
    with distributed_session(timeout_s=60.0) as session:
        mesh = context_mesh(replace(session, group=session.world_size))
        assert mesh is not None
        for mode, way in jobs:
            model = build_wan(CONFIG)
            if "recomputed" in way:
                recompute_blocks(model.blocks)
            if "selective" in way:
                recompute_blocks(model.blocks, "selective")
            if "eager" in way:
                torch.compiler.reset()
                compiled(model, way.split()[-1])
            context_parallel(model, mesh)
            found.append(learn(model, mode, session.world_size, counted="eager" not in way))
    return found


def averaged(ranks: list[Learnt]) -> dict[str, Tensor]:
    """As FSDP2 does over all ranks; an input's gradient is whole on each."""
    names = ranks[0].gradients
    mean = {k: torch.stack([r.gradients[k] for r in ranks]).mean(0) for k in names}
    return mean | {"x": ranks[0].gradients["x"]}


def check(ranks: list[Learnt], mode: str) -> None:
    alone = learn(build_wan(CONFIG), mode, 1)
    mean = averaged(ranks)
    assert {rank.loss for rank in ranks} == {ranks[0].loss}, "ranks of a group have one loss"
    assert ranks[0].loss == pytest.approx(alone.loss, rel=TOLERANCE)
    assert mean.keys() == alone.gradients.keys()
    for name, expected in alone.gradients.items():
        error = float((mean[name] - expected).abs().max() / expected.abs().max())
        assert error < TOLERANCE, f"{name}: {error:.1e}"


FAST = [(mode, "plain") for mode in MODES] + [("bidirectional", "recomputed")]
SLOW = [(mode, way) for mode in MODES for way in ("recomputed", "selective")]
ONE_GRAPH = [
    *((mode, "recomputed eager") for mode in MODES),
    *((mode, "aot_eager") for mode in ("bidirectional", "masked")),
    ("bidirectional", "recomputed aot_eager"),
]
Cases = dict[tuple[str, str], list[Learnt]]


def learn_on(ranks: int, cases: list[tuple[str, str]]) -> Cases:
    found = run_on_ranks(ranks, learn_together, cases, timeout_s=280.0)
    return dict(zip(cases, map(list, zip(*found, strict=True)), strict=True))


@pytest.fixture(scope="module")
def fast_on_two() -> Cases:
    return learn_on(2, FAST)


@pytest.fixture(scope="module")
def slow_on_two() -> Cases:
    return learn_on(2, SLOW)


@pytest.fixture(scope="module")
def compiled_on_two() -> Cases:
    return learn_on(2, ONE_GRAPH)


@pytest.fixture(scope="module")
def on_four() -> Cases:
    return learn_on(4, FAST)


@pytest.mark.parametrize("case", FAST, ids="-".join)
def test_the_average_of_two_ranks_gradients_is_the_gradient_of_one(
    case: tuple[str, str], fast_on_two: Cases
) -> None:
    """Forward passes are exact whatever factors the backward pass has; this alone tells."""
    check(fast_on_two[case], case[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids="-".join)
def test_gradients_of_blocks_that_run_again_average_to_those_of_one_rank(
    case: tuple[str, str], slow_on_two: Cases
) -> None:
    check(slow_on_two[case], case[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_GRAPH, ids="-".join)
def test_a_block_with_its_exchanges_is_one_graph(
    case: tuple[str, str], compiled_on_two: Cases
) -> None:
    check(compiled_on_two[case], case[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", FAST, ids="-".join)
def test_the_average_of_four_ranks_gradients_is_the_gradient_of_one(
    case: tuple[str, str], on_four: Cases
) -> None:
    check(on_four[case], case[0])


def exchanged(ranks: int, *, exchanges: int = 4) -> int:
    """Bytes by the formula in the docstring of `Ulysses`, of one pass over all blocks, fp32."""
    values = BATCH * FRAMES * (SIDE // 2) ** 2 * CONFIG.dim  # B N D
    return 4 * CONFIG.num_layers * exchanges * (ranks - 1) * values // ranks**2


def test_all_to_alls_send_what_the_formula_says(fast_on_two: Cases) -> None:
    plain, again = (fast_on_two["bidirectional", way][0] for way in ("plain", "recomputed"))
    assert plain.forward_bytes == plain.backward_bytes == exchanged(2)
    assert (again.forward_bytes, again.backward_bytes) == (exchanged(2), 2 * exchanged(2))


def test_unrotated_keys_that_are_kept_are_exchanged_as_well(fast_on_two: Cases) -> None:
    first = exchanged(2, exchanges=5) // 2  # two frames of four are put into the cache
    assert fast_on_two["relative", "plain"][0].forward_bytes == first + exchanged(2) // 4


@pytest.mark.slow
def test_all_to_alls_of_four_ranks_send_what_the_formula_says(on_four: Cases) -> None:
    plain = on_four["bidirectional", "plain"][0]
    assert plain.forward_bytes == plain.backward_bytes == exchanged(4)


def test_tokens_are_divided_inside_frames() -> None:
    tokens = torch.arange(12).reshape(1, 12, 1)  # three frames of four
    halves = [Ulysses("", rank, 2).own_part(tokens, 3).flatten().tolist() for rank in (0, 1)]
    assert halves == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


def test_ranks_without_company_need_no_group() -> None:
    assert context_mesh(Session(0, 4, torch.device("cpu"))) is None


def test_a_network_without_a_place_for_exchanges_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        context_parallel(torch.nn.Linear(2, 2), None)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "Linear: this network cannot share a sample's tokens among ranks; set parallel.context=1 "
        "(or --context 1)"
    )


def test_neighbours_share_samples_and_one_of_them_leads() -> None:
    sessions = [Session(rank, 6, torch.device("cpu"), group=3) for rank in range(6)]
    assert [s.data_rank for s in sessions] == [0, 0, 0, 1, 1, 1]
    assert {s.data_world for s in sessions} == {2}
    assert [s.leads for s in sessions] == [True, False, False, True, False, False]


@pytest.mark.parametrize(
    ("heads", "allowed"),
    [
        (12, [1, 2, 3, 4, 6, 12]),
        (24, [1, 2, 3, 4, 6, 8, 12, 24]),
        (40, [1, 2, 4, 5, 8, 10, 20, 40]),
    ],
)
def test_heads_of_released_sizes_are_divided_by(heads: int, allowed: list[int]) -> None:
    assert divisors(heads) == allowed


def test_what_ranks_cannot_divide_is_told_with_the_numbers_that_they_can() -> None:
    counts = {"tokens of a frame": 1560, "heads of teacher b": 40, "ranks of a host": 8}
    assert list(sharing_problems("parallel.context", 4, counts)) == []
    assert list(sharing_problems("parallel.context", 3, counts)) == [
        "parallel.context: 3 ranks must divide the 40 heads of teacher b and the 8 ranks of a "
        "host; choose one of 1, 2, 4, 8"
    ]


def test_ranks_that_share_a_sample_share_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert list(ranks_at_hand(8).values()) == [2]
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert list(ranks_at_hand(8).values()) == [8]
