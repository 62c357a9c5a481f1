"""One run is the same run where ranks share each sample's tokens, alone or beside sharding."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from model.families.wan21.folder import CONFIG
from model.wan.config import write_wan_config
from scripts.make_tiny_world import NAME
from tests.conftest import MINIATURE
from tests.ranks import run_on_ranks
from tests.runs import built, refusal, run, write_config
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
from utils.config import ConfigError
from utils.distributed import Session

BLOCK = RECOMPUTED[0]
STRAIGHT = RECOMPUTED[1]
WINDOW = ("causal.local_attn_size=4", "causal.sink_size=1")
PAIRS, FOURS = "parallel.context=2", "parallel.context=4"


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
    Case("causvid-adamw"),
    Case("ode-adamw"),
    Case("consistency-adamw"),
    Case("gan-adamw", (BLOCK, MICRO)),
    Case("dmd_gan-adamw"),
)
WIDE = (
    Case("dmd-adamw"),
    Case("self_forcing_dmd-adamw", (STRAIGHT, *WINDOW)),
    Case("causal_diffusion-adamw", (BLOCK,)),
    Case("gan-adamw"),
)


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


def train_on(
    ranks: int, base: Path, root: Path, layouts: dict[str, tuple[str, ...]], *cases: Case
) -> None:
    """Train every case in every layout, the latter given by its overrides; one spawn."""
    jobs = [
        job_of(base, root, layout, case, *overrides)
        for layout, overrides in layouts.items()
        for case in cases
    ]
    run_on_ranks(ranks, train_all, jobs, [], timeout_s=280.0)


@pytest.fixture(scope="module")
def fast_pairs(base: Path, root: Path) -> None:
    train_on(2, base, root, {"1x2": (PAIRS,)}, *FAST)


@pytest.fixture(scope="module")
def slow_pairs(base: Path, root: Path) -> None:
    train_on(2, base, root, {"1x2": (PAIRS,)}, *SLOW)


@pytest.fixture(scope="module")
def fours(base: Path, root: Path) -> None:
    """All four ranks to a sample, and two pairs, sharded over all."""
    train_on(4, base, root, {"1x4": (FOURS,), "2x2": (PAIRS,)}, *WIDE)


def check(base: Path, root: Path, layout: str, case: Case) -> None:
    """The run in `layout` reports the numbers of one process, which runs here if it has not yet."""
    alone = job_of(base, root, "1", case)
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
@pytest.mark.parametrize("case", WIDE, ids=str)
@pytest.mark.parametrize("layout", ["1x4", "2x2"])
@pytest.mark.usefixtures("fours")
def test_four_ranks_report_the_losses_and_gradient_norms_of_one(
    layout: str, case: Case, base: Path, root: Path
) -> None:
    check(base, root, layout, case)
