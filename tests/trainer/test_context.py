"""One run is the same run where ranks share each sample's tokens, alone or beside sharding."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from model.families.wan21.folder import CONFIG
from model.wan.config import write_wan_config
from scripts.make_tiny_world import NAME
from tests.conftest import MINIATURE
from tests.ranks import run_on_ranks
from tests.runs import built, cut_after, run, write_config
from tests.trainer.test_ranks import (
    HYBRID,
    MICRO,
    RECOMPUTED,
    TOLERANCE,
    Findings,
    Gradients,
    Job,
    difference,
    first_gradients,
    gradient_difference,
    job,
    train_all,
)
from trainer.config import load
from trainer.inputs import check_inputs
from trainer.run import resolve
from utils.compiling import compile_blocks
from utils.config import ConfigError
from utils.distributed import Session

BLOCK = RECOMPUTED[0]
STRAIGHT = RECOMPUTED[1]
WINDOW = ("causal.local_attn_size=4", "causal.sink_size=1")
PAIRS, FOURS = "parallel.context=2", "parallel.context=4"
COMPILE = "parallel.compile=true"
COPIES = "sharding_strategy=none"


@dataclass(frozen=True)
class Case:
    """A training, and what of it is special."""

    name: str  # method-optimizer, as test_ranks has it
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join([self.name, *(word.rpartition("=")[2] for word in self.overrides)])


FAST = (
    Case("dmd-adamw"),
    Case("self_forcing_dmd-adamw"),
)
SLOW = (
    Case("gan-adamw"),
    Case("dmd-muon"),
    Case("dmd-adamw", (BLOCK, MICRO)),
    Case("self_forcing_dmd-adamw", (BLOCK, *WINDOW)),
    Case("self_forcing_dmd-adamw", (STRAIGHT, *WINDOW)),
    Case("self_forcing_dmd-adamw", ("causal.relative_positions=true", *WINDOW)),
    Case("self_forcing_sid-adamw", (MICRO,)),
    Case("sid-adamw"),
    Case("causal_diffusion-adamw"),
    Case("causal_diffusion-adamw", (BLOCK, MICRO)),
    Case("diffusion-adamw"),
    Case("causvid-adamw"),
    Case("ode-adamw"),
    Case("consistency-adamw"),
    Case("gan-adamw", (BLOCK, MICRO)),
    Case("dmd_gan-adamw"),
    Case("dmd-adamw", ("validation.every=2",)),
)
COMPILED = (
    Case("dmd-adamw", (COMPILE, BLOCK)),
    Case("self_forcing_dmd-adamw", (COMPILE, *WINDOW)),
)
WIDE = (
    Case("dmd-adamw"),
    Case("dmd-adamw", (BLOCK, MICRO)),
    Case("self_forcing_dmd-adamw", (STRAIGHT, *WINDOW)),
    Case("causal_diffusion-adamw", (BLOCK,)),
    Case("gan-adamw"),
)
FIRST = Case("dmd-adamw", (MICRO,))  # whose gradients are compared weight by weight
FOUR_RANKS = {"1x4": (FOURS,), "2x2": (PAIRS,), "2x2-copies": (PAIRS, COPIES)}


@pytest.fixture(scope="module")
def root(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world with a model of four heads; weights have the same shapes."""
    root = tmp_path_factory.mktemp("four_heads")
    (root / "data").symlink_to(tiny_root / "data")
    folder = root / "wan_models" / NAME
    shutil.copytree(tiny_root / "wan_models" / NAME, folder)
    write_wan_config(replace(MINIATURE, num_heads=4), folder / CONFIG)
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this file's runs: <base>/<layout>-<special>/<case>."""
    return tmp_path_factory.mktemp("context")


def job_of(base: Path, root: Path, layout: str, case: Case, *more: str) -> Job:
    return job(base, root, f"{layout}-{case}", case.name, *case.overrides, *more)


def train_compiled(jobs: list[Job]) -> None:
    """On each rank: all jobs, in graphs that are traced but not made into machine code."""
    traced = partial(compile_blocks, backend="aot_eager")
    with patch("utils.parallel.compile_blocks", traced):
        train_all(jobs, [])


def train_on(ranks: int, jobs: list[Job], gradient_jobs: Sequence[Job] = ()) -> list[Findings]:
    """What each rank reports of all jobs; one spawn."""
    found: list[Findings] = run_on_ranks(
        ranks, train_all, jobs, list(gradient_jobs), timeout_s=280.0
    )
    return found


@pytest.fixture(scope="module")
def fast_pairs(base: Path, root: Path) -> list[Findings]:
    jobs = [job_of(base, root, "1x2", case, PAIRS) for case in FAST]
    return train_on(2, jobs, [job_of(base, root, "1x2-first", FIRST, PAIRS)])


@pytest.fixture(scope="module")
def slow_pairs(base: Path, root: Path) -> None:
    train_on(2, [job_of(base, root, "1x2", case, PAIRS) for case in SLOW])


@pytest.fixture(scope="module")
def compiled_pairs(base: Path, root: Path) -> None:
    jobs = [job_of(base, root, "1x2-compiled", case, PAIRS) for case in COMPILED]
    run_on_ranks(2, train_compiled, jobs, timeout_s=800.0)


@pytest.fixture(scope="module")
def fours(base: Path, root: Path) -> list[Findings]:
    """All four ranks to a sample, and two pairs, sharded over all or each pair a copy."""
    jobs = [
        job_of(base, root, layout, case, *overrides)
        for layout, overrides in FOUR_RANKS.items()
        for case in WIDE
    ]
    return train_on(4, jobs, [job_of(base, root, "2x2-first", FIRST, PAIRS)])


def check(base: Path, root: Path, layout: str, case: Case, plain: Case | None = None) -> None:
    """The run in `layout` reports the numbers of one process, which runs here if it has not yet."""
    alone = job_of(base, root, "1", plain or case)
    if not alone.logdir.exists():
        run(alone.config, alone.logdir, *alone.overrides)
    assert difference(job_of(base, root, layout, case).logdir, alone.logdir) < TOLERANCE


@pytest.mark.parametrize("case", FAST, ids=str)
@pytest.mark.usefixtures("fast_pairs")
def test_two_ranks_to_a_sample_report_the_losses_and_gradient_norms_of_one(
    case: Case, base: Path, root: Path
) -> None:
    check(base, root, "1x2", case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
@pytest.mark.usefixtures("slow_pairs")
def test_two_ranks_to_a_sample_report_the_losses_and_gradient_norms_of_one_in_any_setting(
    case: Case, base: Path, root: Path
) -> None:
    check(base, root, "1x2", case)


@pytest.mark.slow
@pytest.mark.timeout(900)  # compilers of two ranks share the cores with whatever else there is
@pytest.mark.parametrize("case", COMPILED, ids=str)
@pytest.mark.usefixtures("compiled_pairs")
def test_compiled_blocks_of_two_ranks_to_a_sample_report_the_numbers_of_one_rank_uncompiled(
    case: Case, base: Path, root: Path
) -> None:
    alone = Case(case.name, case.overrides[1:])
    check(base, root, "1x2-compiled", case, alone)


@pytest.mark.slow
@pytest.mark.parametrize("case", WIDE, ids=str)
@pytest.mark.parametrize("layout", FOUR_RANKS)
@pytest.mark.usefixtures("fours")
def test_four_ranks_report_the_losses_and_gradient_norms_of_one(
    layout: str, case: Case, base: Path, root: Path
) -> None:
    check(base, root, layout, case)


@pytest.mark.slow
def test_pairs_of_two_hosts_each_with_its_shards_report_the_numbers_of_one_rank(
    base: Path, root: Path
) -> None:
    case = Case("dmd-adamw")
    one = job_of(base, root, "2x2-hybrid", case, PAIRS, HYBRID)
    run_on_ranks(4, train_all, [one], [], local_world=2)
    check(base, root, "2x2-hybrid", case)


@pytest.mark.slow
def test_a_run_of_one_rank_goes_on_where_two_share_a_sample(base: Path, root: Path) -> None:
    case = Case("dmd-adamw")
    alone = job_of(base, root, "1-saved", case, "save_every=1")
    run(alone.config, alone.logdir, *alone.overrides)
    part = cut_after(alone.logdir, base / "1-then-2", 1)
    later = replace(alone, logdir=part, overrides=(*alone.overrides, PAIRS))
    run_on_ranks(2, train_all, [later], [])
    assert difference(part, alone.logdir) < TOLERANCE


@pytest.fixture(scope="module")
def plain_gradients(base: Path, root: Path) -> Gradients:
    """Of the first step on one process, without micro-batches."""
    one = job_of(base, root, "1-first", Case("dmd-adamw"))
    with built(one.config, one.logdir, *one.overrides) as trainer:
        return first_gradients(trainer)


def test_each_weight_of_each_role_has_the_gradient_of_one_rank(
    base: Path, root: Path, fast_pairs: list[Findings], plain_gradients: Gradients
) -> None:
    """Outer weights as well: those before tokens are cut, and those behind."""
    logdir = str(job_of(base, root, "1x2-first", FIRST).logdir)
    for found in fast_pairs:
        assert gradient_difference(found.gradients[logdir], plain_gradients) < TOLERANCE


@pytest.mark.slow
def test_each_weight_has_the_gradient_of_one_rank_where_pairs_have_samples_of_their_own(
    base: Path, root: Path, fours: list[Findings], plain_gradients: Gradients
) -> None:
    logdir = str(job_of(base, root, "2x2-first", FIRST).logdir)
    assert gradient_difference(fours[0].gradients[logdir], plain_gradients) < TOLERANCE


def refused(base: Path, root: Path, method: str, world: int, *overrides: str) -> str:
    config = load(write_config(base, root, method), overrides)
    with pytest.raises(ConfigError) as caught:
        check_inputs(resolve(config), Session(0, world, torch.device("cpu")))
    return str(caught.value)


def test_ranks_that_cannot_divide_heads_tokens_and_ranks_are_refused_with_those_that_can(
    base: Path, root: Path
) -> None:
    model = root / "wan_models" / NAME
    assert refused(base, root, "dmd", 8, "parallel.context=8") == (
        f"parallel.context: 8 ranks must divide the 4 attention heads of generator {model} and the "
        f"4 attention heads of critic {model} and the 4 attention heads of teacher {model} and the "
        f"4 tokens of a frame of latents [16, 5, 4, 4]; choose one of 1, 2, 4"
    )
    assert refused(base, root, "dmd", 2, FOURS) == (
        "parallel.context: 4 ranks must divide the 2 ranks of this host (torchrun "
        "--nproc_per_node); choose one of 1, 2"
    )


def test_tokens_of_every_shape_of_the_data_are_counted(
    base: Path, root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root / "wan_models" / NAME, tmp_path / NAME)
    write_wan_config(replace(MINIATURE, num_heads=8), tmp_path / NAME / CONFIG)
    data = root / "data/tiny/latents"  # of four tokens to a frame
    words = (f"data.path={data}", "data.buckets=true", "latent_shape=[16,5,4,8]", "batch_size=8")
    error = refused(
        base, root, "causvid", 8, f"model_root={tmp_path}", "parallel.context=8", *words
    )
    assert error == (
        f"data.path: {data}: parallel.context: 8 ranks must divide the 4 tokens of a frame of "
        f"latents [16, 5, 4, 4]; choose one of 1, 2, 4"
    )


def test_a_batch_is_divided_over_groups_of_ranks(base: Path, root: Path) -> None:
    assert refused(base, root, "dmd", 8, PAIRS, "batch_size=6") == (
        "batch_size: 6 samples do not divide over 4 groups of 2 ranks x 1 micro-batches; use a "
        "multiple of 4"
    )
