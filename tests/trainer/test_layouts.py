"""Losses and gradients of one process, whatever the ranks, the layout, and what is recomputed.

A row of WAYS is a way to lay a run out, a row of RANKS what it is laid over; each of METHODS is
trained in each way on each of them, and compared with one process that does nothing of the kind.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.ranks import run_on_ranks
from tests.runs import rows, write_config
from tests.trainer.test_ranks import gradient_difference, whole
from trainer.base import Trainer
from trainer.build import RunOptions, build_trainer
from trainer.config import load
from utils.compiling import compile_blocks
from utils.distributed import Session, distributed_session

TOLERANCE = 1e-5  # relative, of losses and of a role's gradient as one vector
EACH = 1e-4  # of each weight's own gradient: where a softmax forgives, sums nearly cancel
# A sample for each of four ranks in two micro-batches; generator_every is 2: it moves twice.
COMMON = ("steps=3", "batch_size=8")

# Of a relativistic discriminator the logits' bias has no gradient but rounding.
METHODS = {
    "dmd": (),
    "self_forcing_dmd": ("causal.rollout_frames=9", "causal.same_step_across_blocks=false"),
    "causal_diffusion": (),  # teacher forcing
    "gan": ("loss.adversarial.relativistic=false", "loss.discriminator_warmup_steps=0"),
}

MICRO = "accumulation=2"
ADAPTERS = (
    "generator.adapter.rank=4", "generator.adapter.targets=blocks+embeddings",
    "critic.adapter.rank=2", "critic.adapter.alpha=3",
)  # fmt: skip
BLOCK = "parallel.activation_checkpoint=block"
SELECTIVE = "parallel.activation_checkpoint=selective"
WAYS = {
    "plain": (),
    "plain, accumulated": (MICRO,),
    "block": (BLOCK,),
    "block, accumulated": (BLOCK, MICRO),
    "selective": (SELECTIVE,),
    "selective, accumulated": (SELECTIVE, MICRO),
    "every second": (SELECTIVE, "parallel.checkpoint_every=2", "parallel.reduce_gradients=last"),
    "offloaded": (BLOCK, "parallel.offload_inputs=true", MICRO),
    "gathered": ("parallel.keep_gathered=true", "parallel.prefetch=2"),
    "whole teacher": ("teacher.sharded=false", SELECTIVE),
    "reused, offloaded": ("loss.reuse_rollout=true", BLOCK, "parallel.offload_inputs=true", MICRO),
    "compiled": ("parallel.compile=true", BLOCK, MICRO),
    "adapters": ADAPTERS,
    "adapters, recomputed": (*ADAPTERS, BLOCK, "parallel.offload_inputs=true", MICRO),
    "adapters, whole base": (*ADAPTERS, SELECTIVE, "teacher.sharded=false", MICRO),
    "adapters, gathered": (*ADAPTERS, "parallel.keep_gathered=true", "parallel.prefetch=2"),
    "adapters, compiled": (*ADAPTERS, "parallel.compile=true", BLOCK),
}
# Ways that mean something to some methods alone.
OF = {"whole teacher": ("dmd", "self_forcing_dmd"), "reused, offloaded": ("dmd", "gan")}
OF |= {way: ("dmd", "self_forcing_dmd") for way in WAYS if way.startswith("adapters")}
# What changes the recipe is compared with one process of the same recipe.
RECIPES = {"reused, offloaded": ("loss.reuse_rollout=true",)}
RECIPES |= {way: ADAPTERS for way in WAYS if way.startswith("adapters")}


Case = tuple[str, str, str]  # ranks, method, way


@dataclass(frozen=True)
class Ranks:
    """What a run is laid over."""

    world: int
    local_world: int | None = None  # ranks of a node; None = all
    words: tuple[str, ...] = ()


RANKS = {
    "1": Ranks(1),
    "2": Ranks(2),
    "2 whole": Ranks(2, words=("sharding_strategy=none",)),
    "4": Ranks(4),
    "2 x 2": Ranks(4, 2, ("sharding_strategy=hybrid_full",)),
}
ON = {way: ("1", "2", "2 x 2") for way in WAYS if "compiled" in way}  # which takes most of the time
CASES = [
    (ranks, method, way)
    for ranks in RANKS
    for method in METHODS
    for way in WAYS
    if method in OF.get(way, METHODS) and ranks in ON.get(way, RANKS)
]
FAST = {
    ("2", "self_forcing_dmd", "gathered"),
    ("2", "gan", "reused, offloaded"),
}


@dataclass(frozen=True)
class Job:
    """One training."""

    config: Path
    logdir: Path
    words: tuple[str, ...]


@dataclass
class Seen:
    """The gradients of an early update of each role, and where its metrics are."""

    logdir: Path
    gradients: dict[str, Tensor] = field(default_factory=dict)


def train(job: Job, session: Session) -> Seen:
    """Train, and look at each role's first gradients before they are clipped."""
    options = RunOptions(job.logdir, job.config.stem, save=False, visualize=False, wandb=False)
    trainer = build_trainer(load(job.config, [*COMMON, *job.words]), session, options)
    seen = Seen(job.logdir)
    watch(trainer, seen.gradients)
    trainer.train()
    return seen


def watch(trainer: Trainer, gradients: dict[str, Tensor]) -> None:
    """Note each role's gradients of its first update; of an adapter, whose factor a has none then,
    those of its second one."""
    clip = trainer.clip

    def noting(name: str) -> Tensor:
        own = trainer.roles[name].parameters
        if trainer.state.updates[name] == int(any(".adapters." in key for key in own)):
            for key, parameter in own.items():
                if parameter.grad is not None:  # some of a discriminator serve other methods
                    gradients[f"{name}.{key}"] = whole(parameter.grad).clone()
        return clip(name)

    trainer.clip = noting  # type: ignore[method-assign]


def train_all(jobs: list[Job]) -> list[Seen]:
    """On each rank: one after the other."""
    found = []
    # As graphs without generated code: how that rounds is known from tests/utils/test_compiling.py.
    traced = partial(compile_blocks, backend="aot_eager")
    with (
        patch("utils.parallel.compile_blocks", traced),
        distributed_session(timeout_s=300.0) as session,
    ):
        for job in jobs:
            found.append(train(job, session))
            gc.collect()  # LMDB opens a folder once, and sharded networks hold on in cycles
    return found


class Runs:
    """What each case did; those of a method on some ranks run together, when one is asked for."""

    def __init__(self, base: Path, root: Path, cases: Sequence[Case]) -> None:
        """cases: those that will be asked for."""
        self.base = base
        self.cases = cases
        self.configs = {method: write_config(base, root, method) for method in METHODS}
        self.seen: dict[Case, Seen] = {}

    def job(self, ranks: str, method: str, way: str, words: tuple[str, ...]) -> Job:
        logdir = self.base / ranks / method / way
        return Job(self.configs[method], logdir, (*METHODS[method], *RANKS[ranks].words, *words))

    def case(self, case: Case) -> Seen:
        if case not in self.seen:
            over = RANKS[case[0]]
            cases = [one for one in self.cases if one[:2] == case[:2]]
            jobs = [self.job(*one, WAYS[one[2]]) for one in cases]
            results = run_on_ranks(
                over.world, train_all, jobs, local_world=over.local_world, timeout_s=1800.0
            )
            self.seen.update(zip(cases, results[0], strict=True))
        return self.seen[case]

    def alone(self, method: str, recipe: tuple[str, ...]) -> Seen:
        """One process with nothing but what changes the recipe."""
        key = ("alone", method, ",".join(recipe))
        if key not in self.seen:
            job = self.job("1", method, f"alone{len(recipe)}", recipe)
            (self.seen[key],) = train_all([job])
        return self.seen[key]


def losses(logdir: Path) -> list[dict[str, float]]:
    """A run's losses and norms of gradients, per step. Means of logits of either sign are none."""
    kept = ("/loss", "/grad_norm")
    return [{k: v for k, v in row.items() if k.endswith(kept)} for row in rows(logdir)]


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The length of the difference of each role's gradients, relative to theirs."""
    assert found.keys() == expected.keys()
    parts: dict[str, list[Tensor]] = {}
    for name, gradient in expected.items():
        pair = torch.stack([(found[name] - gradient).norm(), gradient.norm()])
        parts.setdefault(name.partition(".")[0], []).append(pair)
    return {role: float(torch.div(*torch.stack(p).norm(dim=0))) for role, p in parts.items()}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_root: Path
) -> Runs:
    chosen = [
        item.callspec.params["case"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path
    ]
    return Runs(tmp_path_factory.mktemp("layouts"), tiny_root, chosen)


@pytest.mark.timeout(900)  # the first of a method pays for all
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=", ".join(case), marks=() if case in FAST else pytest.mark.slow)
        for case in CASES
    ],
)
def test_losses_and_gradients_are_those_of_one_process(case: Case, runs: Runs) -> None:
    _, method, way = case
    found, alone = runs.case(case), runs.alone(method, RECIPES.get(way, ()))
    assert losses(found.logdir) == [
        pytest.approx(row, rel=TOLERANCE) for row in losses(alone.logdir)
    ]
    for role, error in errors(found.gradients, alone.gradients).items():
        assert error < TOLERANCE, role
    assert gradient_difference(found.gradients, alone.gradients) < EACH
