"""What is due after a step, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import built, rows
from trainer.hooks import Hook, Moment, run_hooks
from utils import checkpoint


def steps_of(hook: Hook, count: int, *, stopping_at: int = 0) -> list[int]:
    """The steps of a run of `count` after which a hook is due."""
    moments = [Moment(i, i == count, i == stopping_at) for i in range(1, count + 1)]
    return [moment.step for moment in moments if hook.due(moment)]


def nothing(_: Moment) -> None:
    """A hook's call that does nothing."""


def test_a_hook_is_due_at_its_interval_and_at_the_end() -> None:
    assert steps_of(Hook("h", 3, nothing), 7) == [3, 6, 7]
    assert steps_of(Hook("h", 0, nothing), 7) == [7]


def test_a_signal_makes_only_those_due_that_ask_for_it() -> None:
    assert steps_of(Hook("h", 3, nothing, when_stopping=True), 7, stopping_at=4) == [3, 4, 6, 7]
    assert steps_of(Hook("h", 3, nothing), 7, stopping_at=4) == [3, 6, 7]


def test_a_hook_before_others_is_due_wherever_they_are() -> None:
    save = Hook("save", 4, nothing, when_stopping=True)
    assert steps_of(Hook("log", 3, nothing, before=(save,)), 9, stopping_at=5) == [3, 4, 5, 6, 8, 9]


def test_hooks_are_called_in_order() -> None:
    called: list[str] = []
    names = ("a", "b", "c")
    hooks = [Hook(name, 1, lambda _, name=name: called.append(name)) for name in names]  # type: ignore[misc]
    run_hooks(hooks, Moment(1, last=False, stopping=False))
    assert called == ["a", "b", "c"]


def test_a_picture_that_fails_finds_its_step_saved(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    settings = ("steps=2", "batch_size=2", "save_every=1", "validation.every=1")
    with built(configs["dmd"], tmp_path, *settings) as trainer:
        assert trainer.parts.validator is not None

        def fail(*_: object) -> None:
            raise RuntimeError("no font")

        object.__setattr__(trainer.parts.validator, "show", fail)
        with pytest.raises(RuntimeError, match="no font"):
            trainer.train()
    assert checkpoint.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints/step_000001"
    assert [row["step"] for row in rows(tmp_path)] == [1]
