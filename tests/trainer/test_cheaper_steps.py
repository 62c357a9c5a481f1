"""Keys that make a step cheaper: what is saved, and what stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model.types import Batch, Sample
from tests.runs import assert_same_end, built, cut_after, rows, run, step_folder
from tests.trainer.test_loop import Evaluation, exit_step, watched, watched_dmd
from trainer.base import Trainer
from trainer.distillation import AlternatingTrainer, ScoreDistillationTrainer

REUSE, APART = "loss.reuse_rollout=true", "loss.batched_guidance=false"
ALTERNATING = ("dmd", "sid", "gan", "causvid", "self_forcing_dmd", "dmd_gan")


def one_step(trainer: Trainer, step: int) -> None:
    """All phases of `step`."""
    trainer.state.step = step
    for phase in trainer.phases(step):
        trainer.optimise(phase)


def generator_calls(trainer: Trainer, *, grad: bool) -> list[Evaluation]:
    """What the generator is called for in a step, in which it moves or (not `grad`) does not."""
    assert isinstance(trainer, ScoreDistillationTrainer)
    calls = watched({"generator": trainer.method.generator})
    one_step(trainer, 0 if grad else 1)
    return calls


def test_a_critic_that_reuses_the_rollout_costs_no_evaluation_of_the_generator(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    with built(configs["dmd"], tmp_path, REUSE) as trainer:
        calls = generator_calls(trainer, grad=True)
    assert calls == [
        *[Evaluation("generator", 4, grad=False)] * exit_step("generator", 0),
        Evaluation("generator", 4, grad=True),
    ]


def test_where_the_generator_does_not_move_the_critic_has_samples_of_its_own(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    with built(configs["dmd"], tmp_path, REUSE) as trainer:
        calls = generator_calls(trainer, grad=False)
    assert calls == [Evaluation("generator", 4, grad=False)] * (exit_step("critic", 1) + 1)


def made_and_read(trainer: Trainer) -> tuple[list[Any], list[Any]]:
    """What fills with the generator's batches and samples, and with those of its opponent."""
    made: list[tuple[Batch, Tensor]] = []
    read: list[tuple[Batch, Tensor]] = []
    reused = trainer.method.rollout  # type: ignore[attr-defined]

    def noting(generator: Any, batch: Batch, rng: Any, *, grad: bool) -> Sample:
        sample: Sample = reused(generator, batch, rng, grad=grad)
        (made if grad else read).append((batch, sample.x0))
        return sample

    trainer.method.rollout = noting  # type: ignore[attr-defined]
    return made, read


@pytest.mark.parametrize("method", ALTERNATING)
def test_the_opponent_learns_on_the_samples_and_prompts_that_moved_the_generator(
    method: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    with built(configs[method], tmp_path, REUSE, "accumulation=2") as trainer:
        made, read = made_and_read(trainer)
        assert isinstance(trainer, AlternatingTrainer)
        one_step(trainer, 4 + trainer.head_start)
    assert len(made) == len(read) == 2
    for (batch, sample), (again, seen) in zip(made, read, strict=True):
        assert sample.requires_grad
        assert not seen.requires_grad
        assert torch.equal(sample, seen)
        assert torch.equal(batch.conditioning.text, again.conditioning.text)
    assert not torch.equal(made[0][1], made[1][1])


def test_a_step_that_reuses_takes_a_batch_of_the_data_and_another_takes_two(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    draws = []
    for name, words in (("reused", (REUSE,)), ("own", ())):
        with built(configs["dmd"], tmp_path / name, *words) as trainer:
            one_step(trainer, 0)
            draws.append(trainer.state.draws)
            one_step(trainer, 1)
            draws.append(trainer.state.draws)
    assert draws == [4, 8, 8, 12]


def test_data_that_is_handed_on_is_read_ahead_too(configs: dict[str, Path], tmp_path: Path) -> None:
    with built(configs["gan"], tmp_path, REUSE, "accumulation=2") as trainer:
        one_step(trainer, 1)  # begins to read what the next step needs
        batches, missed = trainer.parts.batches, []
        read, ahead = batches._read, batches.prefetch

        def late(draws: Any) -> Any:
            missed.append(draws)
            return read(draws)

        def early(draws: int, indices: Any) -> None:
            with patch.object(batches, "_read", read):
                ahead(draws, indices)

        with patch.object(batches, "_read", late), patch.object(batches, "prefetch", early):
            one_step(trainer, 2)
    assert missed == []


def test_a_run_that_reuses_continues_bit_for_bit(configs: dict[str, Path], tmp_path: Path) -> None:
    words = (REUSE, "steps=4", "save_every=1")
    whole = run(configs["dmd"], tmp_path / "whole", *words)
    copy = cut_after(whole, tmp_path / "copy", 3)
    assert not step_folder(copy, 4).exists()
    run(configs["dmd"], copy, *words)
    assert_same_end(copy, whole, 4)


def test_reusing_is_another_recipe_and_guidance_one_by_one_is_the_same(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    for name, words in (("usual", ()), ("reused", (REUSE,)), ("apart", (APART,))):
        run(configs["dmd"], tmp_path / name, "steps=2", *words)
    usual, reused, apart = (rows(tmp_path / name) for name in ("usual", "reused", "apart"))
    assert apart == [pytest.approx(row, rel=1e-5) for row in usual]
    assert reused[0]["generator/loss"] == usual[0]["generator/loss"]
    assert reused[0]["critic/loss"] != pytest.approx(usual[0]["critic/loss"], rel=1e-3)


def test_guidance_one_by_one_shows_the_teacher_half_as_much_twice(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    with built(configs["dmd"], tmp_path, APART) as trainer:
        assert isinstance(trainer, ScoreDistillationTrainer)
        calls = watched_dmd(trainer)
        one_step(trainer, 0)
    assert [c for c in calls if c.role == "teacher"] == [Evaluation("teacher", 4, grad=False)] * 2


@pytest.mark.parametrize("method", ["sid", "consistency"])
def test_other_losses_with_guidance_are_the_same_one_by_one(
    method: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    run(configs[method], tmp_path / "both", "steps=2")
    run(configs[method], tmp_path / "apart", "steps=2", APART)
    found, expected = rows(tmp_path / "apart"), rows(tmp_path / "both")
    assert found == [pytest.approx(row, rel=1e-5) for row in expected]
