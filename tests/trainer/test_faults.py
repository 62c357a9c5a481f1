"""A loss or gradient that is not finite moves nothing, is recorded, and seldom ends a run."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.types import Batch, LossOutput
from tests.ranks import run_on_ranks
from tests.runs import (
    assert_same_end,
    build,
    built,
    cut_after,
    read_state,
    rows,
    run,
    step_folder,
    unequal,
)
from trainer.base import Trainer
from trainer.config import load
from trainer.faults import (
    FAULTS,
    Faults,
    FaultsConfig,
    LimitReachedError,
    RunFailedError,
    Share,
    SkippedUpdate,
    samples_of,
)
from trainer.phases import Phase
from utils import checkpoint
from utils.distributed import distributed_session
from utils.finite import marked, not_finite_in
from utils.seeding import StepRNG

SETTINGS = ("steps=6", "save_every=2")
Spoil = Callable[[LossOutput], LossOutput]


def nan_loss(output: LossOutput) -> LossOutput:
    """A loss that is NaN, as of a damaged sample."""
    return LossOutput(output.loss * float("nan"), output.metrics)


def nan_gradient(output: LossOutput) -> LossOutput:
    """A finite loss with a gradient that is infinite."""
    loss = output.loss
    return LossOutput(loss + (loss - loss.detach()).abs().sqrt(), output.metrics)


def spoiled(
    trainer: Trainer,
    draws: Iterable[int],
    *,
    phase: str = "generator",
    by: Spoil = nan_loss,
    rank: int | None = None,
) -> None:
    """Have `phase` fail wherever it is given a global batch that begins at one of `draws`."""
    phases, bad = trainer.phases, set(draws)

    def failing(at: int) -> Iterable[Phase]:
        for one in phases(at):
            loss = one.loss

            def spoil(batch: Batch, rng: StepRNG, loss: Any = loss) -> LossOutput:
                output = loss(batch, rng)
                here = rank is None or rank == trainer.session.rank
                return by(output) if here and trainer.state.draws in bad else output

            yield Phase(one.name, spoil if one.name == phase else loss, one.roles, one.hands_on)

    trainer.phases = failing  # type: ignore[method-assign]


def faults(logdir: Path) -> list[dict[str, Any]]:
    lines = (logdir / FAULTS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def run_spoiled(path: Path, logdir: Path, draws: Iterable[int], *overrides: str) -> Path:
    with built(path, logdir, *SETTINGS, *overrides) as trainer:
        spoiled(trainer, draws)
        trainer.train()
    return logdir


@pytest.mark.parametrize("by", [nan_loss, nan_gradient])
def test_an_update_that_is_not_finite_moves_nothing_and_the_next_one_does(
    by: Spoil, configs: dict[str, Path], tmp_path: Path
) -> None:
    with built(configs["diffusion"], tmp_path, "accumulation=2") as trainer:
        (phase,) = trainer.phases(0)
        trainer.optimise(phase)
        before = copied(trainer)
        spoiled(trainer, [4], by=by)
        (bad,) = trainer.phases(1)
        trainer.optimise(bad)
        after = copied(trainer)
        assert unequal(before, after) == ["state.draws"]
        assert trainer.state.updates == {"generator": 1}
        parameters = trainer.roles["generator"].parameters.values()
        assert all(parameter.grad is None for parameter in parameters)
        trainer.optimise(phase)
        assert len(unequal(after, copied(trainer))) > 10


def copied(trainer: Trainer) -> dict[str, Any]:
    """The state of a trainer by flat name, as it is now."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = value.clone() if isinstance(value, torch.Tensor) else value

    walk("", trainer.state_dict())
    return flat


def test_one_phase_that_is_skipped_leaves_the_other_of_its_step_alone(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    with built(configs["dmd"], tmp_path, "steps=1") as trainer:
        spoiled(trainer, [4], phase="critic")
        trainer.train()
        assert trainer.state.updates == {"generator": 1, "critic": 0}
    (row,) = rows(tmp_path)
    assert row["faults/skipped"] == 1.0
    assert "generator/loss" in row
    assert "critic/loss" not in row


def test_what_was_skipped_is_said_and_its_samples_are_recorded(
    configs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_spoiled(configs["diffusion"], tmp_path, [8])
    with built(configs["diffusion"], tmp_path, *SETTINGS) as trainer:
        order, dataset = trainer.parts.batches.order, trainer.parts.batches.dataset
        names = [(order[draw], dataset.prompt(order[draw])) for draw in range(8, 12)]
    (row,) = faults(tmp_path)
    assert {key: row[key] for key in ("what", "step", "phase", "draws", "norms")} == {
        "what": "skipped", "step": 3, "phase": "generator", "draws": [8, 12],
        "norms": {"generator": "nan"},
    }  # fmt: skip
    assert [(one["record"], one["caption"]) for one in row["samples"]] == names
    (line,) = [m for m in caplog.messages if "is skipped" in m]
    assert line.startswith(
        "step 3: the generator update is skipped, its loss or gradient is not finite (1 of at most "
        f"10 among 100 steps); samples: {names[0][0]} ({names[0][1]!r}), "
    )
    assert [row["step"] for row in rows(tmp_path) if "faults/skipped" in row] == [3]


def test_a_run_that_skips_and_is_resumed_ends_as_one_that_skips(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    whole = run_spoiled(configs["diffusion"], tmp_path / "whole", [4, 12])
    gc.collect()
    again = cut_after(whole, tmp_path / "again", 3)  # where the save of step 2 was made up for
    run_spoiled(configs["diffusion"], again, [4, 12])
    assert_same_end(again, whole, 6)
    assert [row["step"] for row in faults(again)] == [2, 4, 4]


def test_a_save_is_put_off_until_an_update_has_been_made(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    run_spoiled(configs["diffusion"], tmp_path, [4, 8, 20])
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    # Step 2 was skipped, and 3; the last step is saved in any case.
    assert saved == ["step_000004", "step_000006"]


def train_ranks(path: Path, logdir: Path, rank: int | None) -> dict[str, int]:
    with distributed_session(timeout_s=60.0) as session:
        trainer = build(path, logdir, session, "steps=4", "save_every=4")
        if rank is not None:
            spoiled(trainer, [4], rank=rank)
        trainer.train()
        return trainer.state.updates


def test_a_nan_on_one_rank_of_two_is_skipped_by_both_which_end_equal(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    found = run_on_ranks(2, train_ranks, configs["diffusion"], tmp_path / "one", 1)
    assert found == [{"generator": 3}, {"generator": 3}]
    run_on_ranks(2, train_ranks, configs["diffusion"], tmp_path / "other", 0)
    states = [read_state(step_folder(tmp_path / name, 4)) for name in ("one", "other")]
    assert unequal(*states) == []  # whichever rank it was
    assert all(
        bool(torch.isfinite(value).all())
        for value in states[0].values()
        if isinstance(value, torch.Tensor)
    )
    (row,) = faults(tmp_path / "one")
    assert [sample["draw"] for sample in row["samples"]] == [6, 7]  # of the rank that failed


# ---- the limit


def limit(path: Path, logdir: Path, draws: Iterable[int], *overrides: str) -> str:
    with pytest.raises(RunFailedError) as caught:
        run_spoiled(path, logdir, draws, *overrides)
    message = str(caught.value)
    del caught
    gc.collect()
    return message


def test_too_many_skipped_updates_stop_the_run_which_may_go_on_at_another_rate(
    configs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    message = limit(configs["diffusion"], tmp_path, [12, 16], "faults.max_skipped=2")
    assert message.startswith(
        "step 5: 2 generator updates of the last 100 steps had a loss or gradient that is not "
        f"finite (faults.max_skipped=2); the last good checkpoint is {step_folder(tmp_path, 2)}. "
    )
    with caplog.at_level("INFO"):
        run(configs["diffusion"], tmp_path, *SETTINGS, "generator.lr=1e-4")
    assert "continuing with generator.lr = 0.0001 (was 0.001)" in caplog.messages
    assert checkpoint.latest(tmp_path / "checkpoints") == step_folder(tmp_path, 6)


def test_a_run_that_may_roll_back_goes_past_the_samples(
    configs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("faults.max_skipped=2", "faults.on_limit=roll_back")
    run_spoiled(configs["diffusion"], tmp_path, [12, 16], *words)
    assert [row["what"] for row in faults(tmp_path)] == ["skipped", "skipped", "rolled back"]
    last = faults(tmp_path)[-1]
    assert last.pop("why").startswith("step 5: 2 generator updates of the last 100 steps had")
    assert last == {"what": "rolled back", "step": 4, "to": 2, "draws": 20}
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert all("faults/skipped" not in row for row in rows(tmp_path))
    assert any("rolled back to step 2" in message for message in caplog.messages)
    state = read_state(step_folder(tmp_path, 6))
    assert int(state["state.draws"]) == 20 + 4 * 4
    assert int(state["state.updates.generator"]) == 6


def test_a_run_rolls_back_so_often_and_then_stops(configs: dict[str, Path], tmp_path: Path) -> None:
    words = ("faults.max_skipped=1", "faults.on_limit=roll_back", "faults.max_roll_backs=2")
    message = limit(configs["diffusion"], tmp_path, range(8, 400), *words)
    assert message.startswith("step 3: 1 generator updates of the last 100 steps had")
    assert [row["what"] for row in faults(tmp_path)].count("rolled back") == 2


def test_without_a_checkpoint_there_is_nothing_to_roll_back_to(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    words = ("faults.max_skipped=1", "faults.on_limit=roll_back")
    message = limit(configs["diffusion"], tmp_path, [0], *words)
    assert "; there is no checkpoint yet. Samples of the last one: " in message


def test_skipped_updates_far_apart_are_no_limit(tmp_path: Path) -> None:
    with distributed_session() as session:
        kept = Faults(FaultsConfig(max_skipped=2), tmp_path, session)
        kept.skip(skipped(1), [])
        kept.skip(skipped(101), [])
        with pytest.raises(LimitReachedError, match="step 200: 2 generator updates"):
            kept.skip(skipped(200), [])


def skipped(step: int) -> SkippedUpdate:
    return SkippedUpdate(step, "generator", {"generator": "nan"}, (0, 4), [])


# ---- parts


def test_a_loss_that_is_not_finite_makes_every_gradient_nan() -> None:
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * torch.tensor([1.0, float("inf"), 1.0])).sum()
    torch.autograd.backward(loss, marked(loss))
    assert weight.grad is not None
    assert weight.grad.isnan().all()
    assert marked(torch.tensor(2.0)) == 1.0


def test_numbers_that_are_not_finite_are_named_wherever_they_are_nested() -> None:
    nan, inf = torch.tensor([1.0, float("nan")]), torch.tensor(float("-inf"))
    state = {"a": {"b": nan, "c": torch.ones(2)}, "d": inf, "e": 1.0, "f": torch.tensor(3)}
    assert not_finite_in({**state, "g": torch.zeros(0)}) == ["a.b", "d"]


def test_samples_are_those_of_the_micro_batches_that_failed_or_else_all() -> None:
    def share(first: int, suspect: bool) -> Share:
        return Share([first], [10 + first], ["a"], [suspect])

    def drawn(*shares: Share) -> list[int]:
        return [sample["draw"] for sample in samples_of(shares)]

    assert drawn(share(0, False), share(1, True), share(1, True)) == [1]
    assert drawn(share(1, False), share(0, False)) == [0, 1]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("faults.max_skipped=0", "faults.max_skipped: must be at least 1, got 0"),
        ("faults.max_roll_backs=0", "faults.max_roll_backs: must be at least 1, got 0"),
        ("faults.step_timeout_s=0", "faults.step_timeout_s: must be positive, or null for no"),
        ("faults.straggler_ratio=1.0", "faults.straggler_ratio: must be greater than 1, got 1"),
    ],
)
def test_limits_that_make_no_sense_are_refused(
    word: str, told: str, configs: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=told):
        load(configs["diffusion"], [word])
