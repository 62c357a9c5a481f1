"""Rollouts that learn once they are made: one run is the same run on ranks that share it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_on_ranks
from tests.runs import run
from tests.trainer.test_context import BLOCK, PAIRS, WINDOW, Case, job_of, root
from tests.trainer.test_ranks import TOLERANCE, difference, train_all

__all__ = ["root"]  # a fixture

DMD = "self_forcing_dmd-adamw"
# As they would be at real size: blocks run again in the backward pass, and a window.
CASES = (
    Case(DMD, (BLOCK, "causal.kv_gradient=replayed", *WINDOW)),
    Case(DMD, (BLOCK, "causal.kv_gradient=parallel", *WINDOW)),
    Case(DMD, ("causal.kv_gradient=parallel", "causal.remember=last_step")),
)
LAYOUTS = {"1x2": (PAIRS,), "2x1": ()}  # tokens of one sample shared; samples and weights divided


@pytest.fixture(scope="module")
def base(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this file's runs; all of those on two ranks are there."""
    base = tmp_path_factory.mktemp("replays")
    jobs = [
        job_of(base, root, layout, case, *more)
        for layout, more in LAYOUTS.items()
        for case in CASES
    ]
    run_on_ranks(2, train_all, jobs, [], timeout_s=280.0)
    return base


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_report_the_losses_and_gradient_norms_of_one(
    layout: str, case: Case, base: Path, root: Path
) -> None:
    alone = job_of(base, root, "1", case)
    if not alone.logdir.exists():
        run(alone.config, alone.logdir, *alone.overrides)
    assert difference(job_of(base, root, layout, case).logdir, alone.logdir) < TOLERANCE
