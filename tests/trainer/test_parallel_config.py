"""Settings of `parallel` and of frozen networks that no run could follow, and what is said then."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from tests.sources import ROOT
from trainer.config import load
from utils.config import ConfigError
from utils.parallel import ParallelConfig

MINIMAL = """
trainer: score_distillation
steps: 10
batch_size: 4
generator: {model: a, lr: 1.0e-3}
data: {path: prompts.txt}
"""
NOTHING_RUNS_AGAIN = (
    "has no effect with parallel.activation_checkpoint=none; set that to block or selective"
)
RECOMPUTED = "parallel.activation_checkpoint=selective"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            (RECOMPUTED, "parallel.checkpoint_every=0"),
            "parallel.checkpoint_every: must be at least 1, got 0",
        ),
        (
            ("parallel.checkpoint_every=2",),
            f"parallel.checkpoint_every: 2 {NOTHING_RUNS_AGAIN}",
        ),
        (
            ("parallel.offload_inputs=true",),
            f"parallel.offload_inputs: true {NOTHING_RUNS_AGAIN}",
        ),
        (("parallel.prefetch=0",), "parallel.prefetch: must be at least 1, got 0"),
        (("parallel.context=0",), "parallel.context: must be at least 1, got 0"),
        (
            ("teacher.storage=fp8", "teacher.sharded=true"),
            "teacher.storage: fp8 needs whole weights on each rank, since a row's scale belongs "
            "to all of it; set teacher.sharded=false, or teacher.storage=null",
        ),
        (
            ("trainer=diffusion", "teacher.storage=fp8"),
            "teacher.storage: has no effect on method 'diffusion', without teacher",
        ),
        (
            ("trainer=ode", "teacher.sharded=false"),
            "teacher.sharded: has no effect on method 'ode', without teacher",
        ),
    ],
)
def test_an_impossible_setting_is_told_with_what_is_allowed(
    minimal: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(minimal, words)
    assert str(caught.value) == message


def test_the_page_on_memory_and_traffic_explains_each_key() -> None:
    page = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| `")]
    keys = [f"`parallel.{item.name}`" for item in fields(ParallelConfig)]
    assert [key for key in keys if key not in rows] == []


def test_all_ways_to_recompute_go_together(minimal: Path) -> None:
    words = (RECOMPUTED, "parallel.checkpoint_every=2", "parallel.offload_inputs=true")
    assert list(load(minimal, words).parallel.problems()) == []


@pytest.mark.parametrize(
    ("words", "whole"),
    [
        ((), False),
        (("teacher.sharded=true",), False),
        (("teacher.sharded=false",), True),
        (("teacher.storage=fp8",), True),
        (("teacher.storage=fp8", "teacher.sharded=false"), True),
    ],
)
def test_a_teacher_is_whole_on_each_rank_if_asked_or_if_its_storage_needs_it(
    minimal: Path, words: tuple[str, ...], *, whole: bool
) -> None:
    assert load(minimal, words).teacher.whole is whole
