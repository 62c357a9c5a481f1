"""A probe of health observes: with it and without it a run is the same in every bit."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.matching import DistributionMatching
from tests.ranks import run_on_ranks
from tests.runs import assert_same_end, built, cut_after, rows, run, write_config
from trainer.base import Trainer
from trainer.config import load
from trainer.faults import RunFailedError
from trainer.health import HealthProbe
from trainer.health_networks import Marks, removed_share
from trainer.phases import Phase
from utils import checkpoint
from utils.config import ConfigError
from utils.distributed import Session
from utils.health import alarms
from utils.health.alarms import Rule
from utils.health.log import HealthLog, read_health, read_reference
from utils.seeding import generator

PROBED = ("health.every=2", "health.count=2", "sampling.steps=2")
SHORT = ("steps=4", "save_every=2")


def figures(logdir: Path) -> list[dict[str, Any]]:
    """The lines of health.jsonl."""
    return read_health(logdir / "health.jsonl")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, configs: dict[str, Path]) -> tuple[Path, Path]:
    """A run with probes, and the same without."""
    base = tmp_path_factory.mktemp("health")
    with_ = run(configs["dmd"], base / "with", *SHORT, *PROBED)
    return with_, run(configs["dmd"], base / "without", *SHORT)


def test_probes_change_no_weight_no_optimizer_and_no_metric(pair: tuple[Path, Path]) -> None:
    with_, without = pair
    assert [row["step"] for row in figures(with_)] == [2, 4]
    assert not (without / "health.jsonl").exists()
    assert not (without / "health").exists()
    assert_same_end(with_, without, 4)


def test_a_probe_measures_samples_networks_and_weights(pair: tuple[Path, Path]) -> None:
    first, last = figures(pair[0])
    of_samples = {
        "exposure", "contrast", "chroma", "sharpness", "clipped", "motion", "drift",
        "diversity_seeds", "diversity_prompts", "prompt_effect", "distance_teacher",
    }  # fmt: skip
    of_networks = {"score_gap", "removed", "critic_fresh", "teacher_fresh", "critic_excess"}
    since = {
        "critic_replayed", "critic_lag", "sample_change", "generator_change", "critic_change",
        "generator_updates", "critic_updates", "generator_rate", "critic_rate",
    }  # fmt: skip
    norms = {"generator_grad_norm", "critic_grad_norm"}
    assert first["figures"].keys() == of_samples | of_networks | norms
    assert last["figures"].keys() == of_samples | of_networks | norms | since
    assert (last["figures"]["generator_updates"], last["figures"]["critic_updates"]) == (1.0, 2.0)
    assert 0.0 < last["score"] <= 1.0
    assert last["figures"]["critic_change"] > 0.0


def test_what_the_teachers_clips_measure_is_kept(pair: tuple[Path, Path]) -> None:
    assert {"motion", "diversity_seeds", "chroma"} <= read_reference(pair[0]).keys()


def test_clips_of_every_probe_lie_beside_the_teachers(pair: tuple[Path, Path]) -> None:
    names = ("teacher", "step_000002", "step_000004")
    found = [sorted(p.name for p in (pair[0] / "health" / name).iterdir()) for name in names]
    assert found == [["0.mp4", "1.mp4"]] * 3


def test_a_resumed_run_goes_on_with_its_probes_and_ends_alike(
    pair: tuple[Path, Path], configs: dict[str, Path], tmp_path: Path
) -> None:
    copy = cut_after(pair[0], tmp_path / "copy", 2)
    stamp = (copy / "health" / "teacher.safetensors").stat().st_mtime_ns
    shutil.copy(pair[0] / "health.jsonl", copy / "health.jsonl")  # it ran on after the save
    run(configs["dmd"], copy, *SHORT, *PROBED)
    assert_same_end(pair[0], copy, 4)
    assert (copy / "health" / "teacher.safetensors").stat().st_mtime_ns == stamp
    straight, resumed = figures(pair[0]), figures(copy)
    assert resumed[0] == straight[0]
    assert [row["step"] for row in resumed] == [2, 4]
    kept = {k: v for k, v in straight[1]["figures"].items() if k in resumed[1]["figures"]}
    assert {k: resumed[1]["figures"][k] for k in kept} == kept


def test_other_settings_have_the_teacher_sampled_anew(
    pair: tuple[Path, Path], configs: dict[str, Path], tmp_path: Path
) -> None:
    copy = cut_after(pair[0], tmp_path / "copy", 2)
    before = (copy / "health" / "teacher.safetensors").read_bytes()
    run(configs["dmd"], copy, *SHORT, *PROBED, "sampling.steps=3")
    assert (copy / "health" / "teacher.safetensors").read_bytes() != before


def test_a_damaged_file_of_samples_is_made_anew(
    pair: tuple[Path, Path], configs: dict[str, Path], tmp_path: Path
) -> None:
    copy = cut_after(pair[0], tmp_path / "copy", 2)
    good = (copy / "health" / "teacher.safetensors").read_bytes()
    (copy / "health" / "teacher.safetensors").write_bytes(good[:100])
    (copy / "health" / "student.safetensors").write_bytes(b"")
    run(configs["dmd"], copy, *SHORT, *PROBED)
    assert (copy / "health" / "teacher.safetensors").read_bytes() == good


@pytest.mark.parametrize("method", ["diffusion", "gan", "self_forcing_dmd", "causvid", "ode"])
def test_every_kind_of_method_can_be_probed(
    method: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    run(configs[method], tmp_path, "steps=2", "health.every=1", *PROBED[1:])
    first, last = figures(tmp_path)
    assert first["figures"]["contrast"] > 0.0
    assert "generator_change" in last["figures"]
    judged = method in ("self_forcing_dmd", "causvid")
    assert ("score_gap" in last["figures"]) == judged
    assert (last["score"] is not None) == judged


def test_without_a_codec_latents_are_measured_and_no_clip_is_shown(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    with built(configs["dmd"], tmp_path, "steps=1", *PROBED) as trainer:
        assert trainer.parts.health is not None
        parts = trainer.parts.health.parts
        trainer.parts.health.parts = replace(parts, vae=None)
        trainer.train()
    (row,) = figures(tmp_path)
    assert "clipped" not in row["figures"]
    assert row["figures"]["motion"] > 0.0
    assert not list((tmp_path / "health").rglob("*.mp4"))


def test_trackers_are_told_and_metrics_are_left_alone(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    class Told:
        def __init__(self) -> None:
            self.values: dict[str, float] = {}

        def log(self, step: int, values: dict[str, float]) -> None:
            self.values |= values

        def picture(self, *_: object) -> None: ...

        def close(self) -> None: ...

    told = Told()
    with built(configs["dmd"], tmp_path, "steps=1", *PROBED) as trainer:
        trainer.parts.trackers.append(told)  # type: ignore[attr-defined]
        trainer.train()
    assert {"health/motion", "health/score", "health/alarms"} <= told.values.keys()
    assert not [name for row in rows(tmp_path) for name in row if name.startswith("health")]


# ---- two ranks


def two_runs(config: Path, base: Path) -> None:
    """On each rank: a run with probes and one without."""
    run(config, base / "with", *SHORT, *PROBED)
    run(config, base / "without", *SHORT)


@pytest.mark.slow
def test_on_two_ranks_probes_change_nothing_and_measure_what_one_rank_does(
    pair: tuple[Path, Path], tmp_path: Path, tiny_root: Path
) -> None:
    config = write_config(tmp_path, tiny_root, "dmd")
    run_on_ranks(2, two_runs, config, tmp_path)
    assert_same_end(tmp_path / "with", tmp_path / "without", 4)
    for two, one in zip(figures(tmp_path / "with"), figures(pair[0]), strict=True):
        assert two["figures"].keys() == one["figures"].keys()
        whole = [k for k in one["figures"] if not k.endswith("_change")]  # of other elements
        assert {k: two["figures"][k] for k in whole} == pytest.approx(
            {k: one["figures"][k] for k in whole}, rel=2e-3, abs=1e-5
        )


# ---- parts


def test_what_lies_along_the_critics_error_is_its_share_of_the_difference() -> None:
    error = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    difference = torch.tensor([[3.0, 0.0, 4.0], [0.0, -5.0, 0.0], [0.0, 1.0, 1.0]])
    assert removed_share(difference, error).tolist() == pytest.approx([0.6, 1.0, 0.0])


def test_a_critic_that_lags_by_a_shift_has_most_of_its_difference_removed() -> None:
    """Critic and teacher around a sample: what both miss of it is wide, the lag is common."""
    rng = generator("lag")
    unbiased = 0.3 * torch.randn((64, 512), generator=rng)
    small = 0.1 * torch.randn((64, 512), generator=rng)
    kept_up = removed_share(small, unbiased + small)
    lag = 2.0 * torch.ones(64, 512)
    lagging = removed_share(small + lag, unbiased + small + lag)
    assert float(kept_up.mean()) < 0.4
    assert float(lagging.mean()) > 0.9


def test_marks_tell_how_far_a_role_has_moved_as_a_share_of_its_size(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    with built(configs["dmd"], tmp_path) as trainer:
        marks, totals = Marks(Session(0, 1, torch.device("cpu"))), {"generator": 4, "critic": 4}
        assert marks.moved(trainer.roles, {"generator": 0, "critic": 0}, totals) == {}
        with torch.no_grad():
            for parameter in trainer.roles["critic"].parameters.values():
                parameter.mul_(1.1)
        found = marks.moved(trainer.roles, {"generator": 0, "critic": 3}, totals)
        trainer.parts.batches.close()
    assert found["generator_change"] == 0.0
    assert found["critic_change"] == pytest.approx(0.1 / 1.1, rel=1e-4)
    assert (found["generator_updates"], found["critic_updates"]) == (0.0, 3.0)


def test_the_critic_is_compared_with_the_teacher_it_began_as(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    """Before any update both networks are one, so that the critic is as good as the teacher."""
    with built(configs["dmd"], tmp_path, "loss.cfg_scale=1.0", *PROBED) as trainer:
        assert trainer.parts.health is not None
        assert isinstance(trainer.method, DistributionMatching)
        trainer.parts.health.probe(trainer)
        trainer.parts.batches.close()
    (row,) = figures(tmp_path)
    assert row["figures"]["critic_excess"] == pytest.approx(1.0)
    assert row["figures"]["score_gap"] == pytest.approx(0.0, abs=1e-6)


# ---- settings and files


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("health.every=-1", "health.every: must be at least 0 (0 = never), got -1"),
        ("health.count=0", "health.count: must be at least 1, got 0"),
        ("health.seeds=0", "health.seeds: must be at least 1, got 0"),
        ("health.patience=0", "health.patience: must be at least 1, got 0"),
        ("health.roll_back=true", "health.roll_back: alarms need probes; set health.every"),
    ],
)
def test_impossible_settings_are_refused(word: str, message: str, configs: dict[str, Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(configs["dmd"], [word])
    assert str(caught.value) == message


GOES_BACK = (
    "steps=6", "save_every=1", "health.every=1", "health.count=1", "sampling.steps=2",
    "health.roll_back=true", "keep_checkpoints=4",
)  # fmt: skip


def sicken(monkeypatch: pytest.MonkeyPatch, probes: Collection[int]) -> None:
    """Let these probes of a run, counted from 1 however often it goes back, see one sign."""
    made = itertools.count(1)
    sign = {"sick": 1.0}
    monkeypatch.setattr(
        HealthProbe, "_grad_norms", lambda self, step: sign if next(made) in probes else {}
    )
    rule = Rule(
        "collapse", lambda past, _: "all alike" if past.now("sick") else None, "Help.", spoils=True
    )
    monkeypatch.setattr(alarms, "RULES", (rule,))


def test_an_alarm_takes_a_run_back_to_before_its_signs(
    configs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sicken(monkeypatch, (3, 4))
    logdir = run(configs["dmd"], tmp_path / "run", *GOES_BACK)
    assert any("collapse: all alike. Help.; rolled back to step 2" in m for m in caplog.messages)
    assert [row["step"] for row in figures(logdir)] == [1, 2, 3, 4, 5, 6]
    assert all("sick" not in row["figures"] for row in figures(logdir))
    assert [row["step"] for row in rows(logdir)] == [1, 2, 3, 4, 5, 6]
    (fault,) = map(json.loads, (logdir / "faults.jsonl").read_text(encoding="utf-8").splitlines())
    assert (fault["what"], fault["step"], fault["to"]) == ("rolled back", 4, 2)
    saved = sorted(path.name for path in (logdir / "checkpoints").glob("step_*"))
    assert saved == [f"step_{step:06d}" for step in (3, 4, 5, 6)]


@pytest.mark.slow
def test_a_killed_run_does_not_go_on_from_what_an_alarm_has_spoilt(
    configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sicken(monkeypatch, (3, 4))
    monkeypatch.setattr(Trainer, "optimise", killed_after_going_back(Trainer.optimise))
    with pytest.raises(ZeroDivisionError):
        run(configs["dmd"], tmp_path / "run", *GOES_BACK)
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoint.latest(folder) == folder / "step_000002"
    assert (folder / "latest").read_text(encoding="utf-8") == "step_000002\n"
    assert json.loads((tmp_path / "run" / "last_save.json").read_text())["step"] == 2


def killed_after_going_back(optimise: Callable[..., None]) -> Callable[..., None]:
    """`optimise`, that fails when a run has gone back."""
    steps: list[int] = []

    def failing(trainer: Trainer, phase: Phase) -> None:
        if steps and trainer.state.step < steps[-1]:
            raise ZeroDivisionError
        steps.append(trainer.state.step)
        optimise(trainer, phase)

    return failing


@pytest.mark.parametrize(
    ("probes", "words", "message"),
    [
        pytest.param(
            range(3, 99),
            ("faults.max_roll_backs=2",),
            "has gone back to .*step_000002 2 times",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (3, 4),
            ("keep_checkpoints=1",),
            "no checkpoint is kept of step 2 or before",
            marks=pytest.mark.slow,
        ),
        ((1, 2), (), "no checkpoint is kept of step 0 or before"),
    ],
)
def test_a_run_that_cannot_go_back_stops_with_the_advice(
    probes: Collection[int],
    words: tuple[str, ...],
    message: str,
    configs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sicken(monkeypatch, probes)
    with pytest.raises(RunFailedError, match=rf"collapse: all alike\. Help\. .*{message}"):
        run(configs["dmd"], tmp_path / "run", *GOES_BACK, *words)


def test_health_jsonl_is_cut_where_a_run_goes_on_and_survives_a_torn_line(tmp_path: Path) -> None:
    log = HealthLog(tmp_path, resumed_at=0, patience=2)
    for step in (10, 20, 30):
        log.add(step, {"contrast": 0.2, "exposure": float("nan")}, {})
    path = tmp_path / "health.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"step": 40, "fig', encoding="utf-8")
    again = HealthLog(tmp_path, resumed_at=20, patience=2)
    assert [probe.step for probe in again.probes] == [10, 20]
    again.add(30, {"contrast": 0.3}, {})
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[0]["figures"] == {"contrast": 0.2, "exposure": None}
    assert lines[0].keys() == {"step", "score", "figures", "alarms", "rose", "fell"}
