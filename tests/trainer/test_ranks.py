"""One run is the same run on 1, 2 and 4 ranks, in 1 or 4 micro-batches, sharded or replicated."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.ranks import run_on_ranks
from tests.runs import MUON, build, built, rows, run, write_config
from trainer.base import Trainer
from trainer.build import check_inputs
from trainer.config import load
from trainer.run import resolve
from utils.config import ConfigError
from utils.distributed import Session, distributed_session
from utils.parallel import build_mesh

TOLERANCE = 1e-5  # relative; measured: below 5e-7
CASES = (
    "dmd-adamw", "dmd-muon", "diffusion-adamw", "diffusion-muon", "sid-adamw", "gan-adamw",
    "dmd_gan-adamw", "self_forcing_dmd-adamw", "self_forcing_sid-adamw", "causvid-adamw",
    "ode-adamw", "pdd-adamw",
)  # fmt: skip
# Rollouts of several lengths, whose blocks exit apart: all that ranks must agree on.
ROLLOUTS = ("causal.rollout_frames=9", "causal.same_step_across_blocks=false")
# Of a relativistic discriminator the logits' bias moves by nothing but rounding, and Adam by lr.
ABSOLUTE = ("loss.adversarial.relativistic=false",)
# As shipped at real size: blocks run again in the backward pass; and a gradient through the cache.
RECOMPUTED = ("parallel.activation_checkpoint=block", "causal.kv_gradient=straight_through")
OVERRIDES = {
    "self_forcing_dmd": ROLLOUTS,
    "self_forcing_sid": RECOMPUTED,
    "gan": ABSOLUTE,
    "dmd_gan": ABSOLUTE,
    "causvid": ("loss.project=true",),
    "sid": ("loss.walk=euler",),
}
# On two ranks in the fast tier: both optimizers, whole clips and blocks, sharded and replicated.
FAST_CASES = ("dmd-muon", "self_forcing_dmd-adamw")
every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in FAST_CASES else pytest.mark.slow) for case in CASES],
)
WIDE_CASES = ("dmd-muon", "diffusion-adamw")  # on four ranks, slow where cores are few
PENALTIES = ("/r1", "/r2")  # steps between nearly equal logits: compared as they are
STEPS = "steps=3"  # generator_every is 2, so the generator moves twice
HYBRID = "sharding_strategy=hybrid_full"
MICRO = "accumulation=2"
LAST = "parallel.reduce_gradients=last"
BF16 = "mixed_precision=true"

Gradients = dict[str, Tensor]
Call = tuple[int, int, float]  # first frame, number of frames, noise level


@dataclass(frozen=True)
class Job:
    """One training on some number of ranks."""

    config: Path
    logdir: Path
    overrides: tuple[str, ...]


@dataclass
class Findings:
    """What a job reports beside its metrics."""

    gradients: dict[str, Gradients] = field(default_factory=dict)
    precisions: dict[str, set[torch.dtype]] = field(default_factory=dict)
    timesteps: list[Tensor] = field(default_factory=list)
    rounded: set[str] = field(default_factory=set)  # gradients that bf16 would hold exactly
    calls: list[Call] = field(default_factory=list)  # of the self-forcing generator


def job(base: Path, root: Path, layout: str, case: str, *overrides: str) -> Job:
    """The job `case` (method-optimizer) under `layout`, logging below `base`."""
    method, optimizer = case.split("-")
    muon = MUON[method] if optimizer == "muon" else ()
    own = OVERRIDES.get(method, ())
    config = write_config(base, root, method)
    return Job(config, base / layout / case, (STEPS, *muon, *own, *overrides))


def train_all(jobs: list[Job], gradient_jobs: list[Job]) -> Findings:
    """On each rank: run all jobs in one process group; take the first gradients of some."""
    found = Findings()
    with distributed_session(timeout_s=60.0) as session:
        for one in jobs:
            train_one(one, session, found)
            gc.collect()  # LMDB opens a folder once, and sharded networks hold on in cycles
        for one in gradient_jobs:
            trainer = build(one.config, one.logdir, session, *one.overrides)
            found.gradients[str(one.logdir)] = first_gradients(trainer)
    return found


def train_one(one: Job, session: Session, found: Findings) -> None:
    """Train from start to end; look closer at a run in bf16, or block by block."""
    trainer = build(one.config, one.logdir, session, *one.overrides)
    if ROLLOUTS[0] in one.overrides:
        watch_calls(trainer, found.calls)
    if BF16 not in one.overrides:
        trainer.train()
    elif one.config.stem == "sid":
        watch_gradients(trainer, found.rounded)
        trainer.train()
    else:
        seen = watch_timesteps(trainer)
        trainer.train()
        found.precisions = precisions(trainer)
        found.timesteps = seen


def watch_calls(trainer: Trainer, calls: list[Call]) -> None:
    """Note what the generator is called for."""

    def note(_: nn.Module, inputs: tuple[Any, ...], words: dict[str, Any]) -> None:
        x, sigma, _ = inputs
        calls.append((int(words["context"].frame_index[0]), x.shape[2], float(sigma[0, 0])))

    trainer.roles["generator"].network.register_forward_pre_hook(note, with_kwargs=True)


def watch_gradients(trainer: Trainer, rounded: set[str]) -> None:
    """Note which gradients of the critic, at any step, are all numbers that bf16 has."""
    clip = trainer.clip

    def watched(name: str) -> Tensor:
        for key, parameter in trainer.roles[name].network.model.named_parameters():
            assert parameter.grad is not None, f"{name}.{key} got no gradient"
            gradient = whole(parameter.grad)
            assert gradient.dtype == torch.float32, f"{name}.{key} got {gradient.dtype}"
            if name == "critic" and torch.equal(gradient, gradient.bfloat16().float()):
                rounded.add(key)
        return clip(name)

    trainer.clip = watched  # type: ignore[method-assign]


def watch_timesteps(trainer: Trainer) -> list[Tensor]:
    """A list that fills with the timesteps that reach the generator's time embedding."""
    model = trainer.roles["generator"].network.model
    seen: list[Tensor] = []
    embed = model.embed_time

    def watched(timestep: Tensor, adapters: Sequence[str]) -> tuple[Tensor, Tensor]:
        seen.append(timestep.detach().clone())
        return embed(timestep, adapters)

    model.embed_time = watched  # type: ignore[method-assign]
    return seen


def precisions(trainer: Trainer) -> dict[str, set[torch.dtype]]:
    """The dtypes of everything that is carried from step to step."""
    roles = trainer.roles.values()
    states = [
        value
        for role in roles
        for optimizer in role.optimizers
        for state in optimizer.state.values()
        for value in state.values()
    ]
    return {
        "weights": {p.dtype for role in roles for p in role.network.parameters()},
        "optimizers": {value.dtype for value in states},
        "average": {value.dtype for value in trainer.ema.shadow.values()},
    }


def first_gradients(trainer: Trainer) -> Gradients:
    """The whole gradients of each phase of the first step, by role and weight name."""
    found: Gradients = {}

    def keep(name: str) -> Tensor:
        for key, parameter in trainer.roles[name].network.model.named_parameters():
            assert parameter.grad is not None, f"{name}.{key} got no gradient"
            found[f"{name}.{key}"] = whole(parameter.grad).clone()
            parameter.grad = None
        return torch.zeros(())

    trainer.clip = keep  # type: ignore[method-assign]
    trainer.apply_gradients = lambda _: None  # type: ignore[method-assign]
    for phase in trainer.phases(0):
        trainer.optimise(phase)
    return found


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in full."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def difference(left: Path, right: Path) -> float:
    """The largest relative difference of any number in two runs' metrics."""
    first, second = rows(left), rows(right)
    assert [row.keys() for row in first] == [row.keys() for row in second]
    found = []
    for a, b in zip(first, second, strict=True):
        for key in a:
            size = 1.0 if key.endswith(PENALTIES) else max(abs(b[key]), 1e-9)
            found.append(abs(a[key] - b[key]) / size)
    return max(found)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this file's runs: <base>/<layout>/<case>."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one_rank(base: Path, tiny_root: Path) -> Path:
    """Every case on a single process, and where."""
    for case in CASES:
        one = job(base, tiny_root, "1", case)
        run(one.config, one.logdir, *one.overrides)
    return base / "1"


@pytest.fixture(scope="module")
def both_ranks(base: Path, tiny_root: Path) -> list[Findings]:
    """FAST_CASES on two ranks, replicas, two runs in bf16, and gradients; one spawn.

    What each rank reports. Each is a node of its own, so that the replicas are whole.
    """
    jobs = [job(base, tiny_root, "2", case) for case in FAST_CASES]
    jobs.append(job(base, tiny_root, "2x1", "dmd-muon", HYBRID))
    jobs.append(job(base, tiny_root, "2-bf16", "dmd-muon", BF16))
    jobs.append(job(base, tiny_root, "2-bf16", "sid-adamw", BF16, "loss.generator_every=1"))
    gradients = [
        job(base, tiny_root, "2-gradients", "dmd-adamw", MICRO),
        job(base, tiny_root, "2-gradients-last", "dmd-adamw", MICRO, LAST),
    ]
    return run_on_ranks(2, train_all, jobs, gradients, local_world=1)


@pytest.fixture(scope="module")
def two_ranks(both_ranks: list[Findings]) -> Findings:
    """What the first of two ranks reports."""
    return both_ranks[0]


@pytest.fixture(scope="module")
def more_on_two_ranks(base: Path, tiny_root: Path) -> Findings:
    """All other cases on two ranks."""
    jobs = [job(base, tiny_root, "2", case) for case in CASES if case not in FAST_CASES]
    gradients = [job(base, tiny_root, "2-gradients", "diffusion-adamw", MICRO)]
    return run_on_ranks(2, train_all, jobs, gradients)[0]


@pytest.fixture(scope="module")
def four_ranks(base: Path, tiny_root: Path) -> Findings:
    """Four shards, two nodes with two shards each, and gradients of the latter; one spawn."""
    jobs = [job(base, tiny_root, "4", case) for case in WIDE_CASES]
    jobs += [job(base, tiny_root, "2x2", case, HYBRID) for case in WIDE_CASES]
    gradients = [job(base, tiny_root, "2x2-gradients", "dmd-adamw", HYBRID)]
    return run_on_ranks(4, train_all, jobs, gradients, local_world=2)[0]


@every_case
def test_two_ranks_report_the_losses_and_gradient_norms_of_one(
    case: str, base: Path, one_rank: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("two_ranks" if case in FAST_CASES else "more_on_two_ranks")
    assert difference(base / "2" / case, one_rank / case) < TOLERANCE


@pytest.mark.usefixtures("two_ranks")
def test_two_replicas_report_the_losses_and_gradient_norms_of_one(
    base: Path, one_rank: Path
) -> None:
    assert difference(base / "2x1" / "dmd-muon", one_rank / "dmd-muon") < TOLERANCE


def test_ranks_agree_on_every_block_and_its_noise_level(both_ranks: list[Findings]) -> None:
    first, second = (found.calls for found in both_ranks)
    assert first == second
    ends = {begin + frames for begin, frames, _ in first}
    assert {frames for _, frames, _ in first} == {1, 2}
    assert len(ends & {5, 7, 9}) >= 2, "all rollouts were of one length"
    assert {round(sigma, 4) for _, _, sigma in first} == {0.0, 1.0, 0.9375, 0.8333, 0.625}


def test_a_critic_that_is_frozen_between_its_updates_keeps_its_gradients_in_fp32(
    two_ranks: Findings,
) -> None:
    """Of a network that is frozen at its first forward pass, FSDP2 would reduce them in bf16."""
    assert two_ranks.rounded == set()


@pytest.mark.slow
@pytest.mark.parametrize("case", WIDE_CASES)
@pytest.mark.usefixtures("four_ranks")
def test_four_ranks_report_the_losses_and_gradient_norms_of_one(
    case: str, base: Path, one_rank: Path
) -> None:
    assert difference(base / "4" / case, one_rank / case) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", WIDE_CASES)
@pytest.mark.usefixtures("four_ranks")
def test_two_replicas_of_two_shards_report_the_losses_and_gradient_norms_of_one_rank(
    case: str, base: Path, one_rank: Path
) -> None:
    assert difference(base / "2x2" / case, one_rank / case) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_four_micro_batches_report_the_losses_and_gradient_norms_of_one(
    case: str, base: Path, one_rank: Path, tiny_root: Path
) -> None:
    one = job(base, tiny_root, "micro", case, "accumulation=4")
    run(one.config, one.logdir, *one.overrides)
    assert difference(one.logdir, one_rank / case) < TOLERANCE


def gradient_difference(sharded: Gradients, plain: Gradients) -> float:
    """The largest difference of any gradient, relative to the largest entry of its tensor."""
    assert sharded.keys() == plain.keys()
    return max(
        float((sharded[key] - plain[key]).abs().max() / plain[key].abs().max()) for key in plain
    )


@pytest.fixture(scope="module")
def plain_gradients(base: Path, tiny_root: Path) -> dict[str, Gradients]:
    """The first gradients of each method on one process, without sharding or micro-batches."""
    found = {}
    for method in ("dmd", "diffusion"):
        one = job(base, tiny_root, "1-gradients", f"{method}-adamw")
        with built(one.config, one.logdir, *one.overrides) as trainer:
            found[method] = first_gradients(trainer)
    return found


@pytest.mark.parametrize(
    ("method", "ranks"),
    [
        ("dmd", "two_ranks"),
        pytest.param("diffusion", "more_on_two_ranks", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_two_shards_in_two_micro_batches_equal_those_of_a_plain_process(
    method: str,
    ranks: str,
    base: Path,
    plain_gradients: dict[str, Gradients],
    request: pytest.FixtureRequest,
) -> None:
    found: Findings = request.getfixturevalue(ranks)
    sharded = found.gradients[str(base / "2-gradients" / f"{method}-adamw")]
    assert gradient_difference(sharded, plain_gradients[method]) < TOLERANCE


def test_gradients_that_are_reduced_at_the_last_micro_batch_are_the_same(
    base: Path, two_ranks: Findings, plain_gradients: dict[str, Gradients]
) -> None:
    sharded = two_ranks.gradients[str(base / "2-gradients-last" / "dmd-adamw")]
    assert gradient_difference(sharded, plain_gradients["dmd"]) < TOLERANCE


@pytest.mark.slow
def test_gradients_of_two_replicas_of_two_shards_equal_those_of_a_plain_process(
    base: Path, four_ranks: Findings, plain_gradients: dict[str, Gradients]
) -> None:
    sharded = four_ranks.gradients[str(base / "2x2-gradients" / "dmd-adamw")]
    assert gradient_difference(sharded, plain_gradients["dmd"]) < TOLERANCE


@pytest.mark.parametrize(
    ("world", "overrides", "multiple"), [(4, ("batch_size=6",), 4), (2, (MICRO,), 4)]
)
def test_a_batch_that_does_not_divide_over_ranks_and_micro_batches_is_refused(
    world: int, overrides: tuple[str, ...], multiple: int, base: Path, tiny_root: Path
) -> None:
    config = load(write_config(base, tiny_root, "dmd"), ["batch_size=6", *overrides])
    session = Session(rank=0, world_size=world, device=torch.device("cpu"))
    with pytest.raises(ConfigError) as caught:
        check_inputs(resolve(config), session)
    assert str(caught.value) == (
        f"batch_size: 6 samples do not divide over {world} ranks x {config.accumulation} "
        f"micro-batches; use a multiple of {multiple}"
    )


def test_replicas_over_nodes_of_unequal_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    session = Session(rank=0, world_size=3, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="hybrid_full needs nodes of equal size: 3 ranks, 2 here"):
        build_mesh(session, "hybrid_full")


@pytest.fixture(scope="module")
def one_rank_bf16(base: Path, tiny_root: Path) -> tuple[Path, Findings]:
    """A bf16 run on one process, which FSDP2 wraps for its casts alone."""
    one = job(base, tiny_root, "1-bf16", "dmd-muon", BF16)
    found = Findings()
    with built(one.config, one.logdir, *one.overrides) as trainer:
        found.timesteps = watch_timesteps(trainer)
        trainer.train()
        found.precisions = precisions(trainer)
    return one.logdir, found


def check_bf16_run(logdir: Path, found: Findings, fp32: Path) -> None:
    """A bf16 run takes finite steps near those of fp32, and keeps what it must keep in fp32."""
    for low, full in zip(rows(logdir), rows(fp32), strict=True):
        losses = [key for key in full if key.endswith("/loss")]
        assert all(math.isfinite(value) for value in low.values())
        assert [low[key] for key in losses] == pytest.approx([full[k] for k in losses], rel=0.02)
        assert [low[key] for key in losses] != [full[key] for key in losses]
    every = {torch.float32}
    assert found.precisions == {"weights": every, "optimizers": every, "average": every}


def check_timesteps(seen: list[Tensor]) -> None:
    """Timesteps are those of the list, in fp32; bf16 would have moved 937.5 to 936."""
    listed = torch.tensor([1000.0, 937.5, 1000 * 0.75 / 0.9, 625.0])
    values = torch.cat([timestep.flatten() for timestep in seen])
    assert values.dtype == torch.float32
    assert bool((values[:, None] - listed).abs().min(dim=1).values.max() < 1e-3)
    assert bool((values != values.bfloat16().float()).any())


def test_bf16_compute_on_one_rank_stays_near_fp32_over_fp32_weights(
    one_rank_bf16: tuple[Path, Findings], one_rank: Path
) -> None:
    check_bf16_run(*one_rank_bf16, one_rank / "dmd-muon")


def test_bf16_compute_leaves_timesteps_unrounded(one_rank_bf16: tuple[Path, Findings]) -> None:
    check_timesteps(one_rank_bf16[1].timesteps)


def test_bf16_compute_on_two_ranks_stays_near_fp32_over_fp32_weights(
    base: Path, two_ranks: Findings, one_rank: Path
) -> None:
    check_bf16_run(base / "2-bf16" / "dmd-muon", two_ranks, one_rank / "dmd-muon")
    check_timesteps(two_ranks.timesteps)
