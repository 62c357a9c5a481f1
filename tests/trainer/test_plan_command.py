"""`--plan`: from a configuration to figures, with sizes alone on the disk, or not even these."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import inference
import train
from model.families.base import Model
from model.families.registry import sketch_model
from tests.trainer.test_plan import SIZES, TEXT, small_run
from trainer.config import load
from trainer.plan import make_plan
from trainer.plan_fits import candidates
from trainer.plan_trace import World
from utils.gpus import GPUS, HIDDEN_BYTES

H100 = GPUS["H100"]


def config_of(folder: Path, *, model: str | None = None, batch: int = 2) -> Path:
    """A tiny run's configuration; model: of which there is no folder."""
    small_run(folder, "tiny", batch=batch)
    path = folder / "run.yaml"
    if model is not None:
        path.write_text(TEXT.format(shape=SIZES["tiny"][1], batch=batch, model=model))
    return path


@pytest.mark.slow  # three traces of a step
def test_a_plan_needs_no_weights_no_data_and_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = config_of(tmp_path, model="Wan2.1-T2V-Tiny"), tmp_path / "plan.json"
    words = ["--config_path", str(path), "--plan", "--gpus", "2", "--plan_json", str(out)]
    assert train.main([*words, f"model_root={tmp_path / 'none'}"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 x H100 (1 x 2): fits")
    assert all(word in printed for word in ("optimizer", "generator backward", "reduce_scatter"))
    plan = json.loads(out.read_text())
    assert plan["fits"] and plan["gpus"] == 2
    held = sum(count for roles in plan["peak"].values() for count in roles.values())
    assert plan["memory_bytes"] == pytest.approx(held + HIDDEN_BYTES, rel=1e-6)


def test_every_problem_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_of(tmp_path, batch=3)
    words = ["--config_path", str(path), "--plan", "--gpus", "2", "latent_shape=[8,5,4,4]"]
    assert train.main(words) == 2
    told = capsys.readouterr().err
    assert "error: batch_size: 3 samples do not divide over 2 ranks x 1 micro-batches" in told
    assert "error: latent_shape: has 8 channels" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--gpus", "4", "--gpus_per_node", "2", "parallel.context=4"],
            "parallel.context: 4 ranks must divide the 2 GPUs of a machine; choose one of 1, 2",
        ),
        (
            ["--gpus", "1", "parallel.attention=sage"],
            "parallel.attention: 'sage' has no backward pass: it serves inference alone",
        ),
        (["--gpus", "1", "latent_shape=[16,5,3,4]"], "latent_shape: 3 x 4 does not divide into"),
    ],
)
def test_what_the_run_itself_would_refuse_is_not_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert train.main(["--config_path", str(config_of(tmp_path, batch=4)), "--plan", *words]) == 2
    assert f"error: {told}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpu", "T4"], "--gpu: 'T4' is unknown"),
        (["--gpus", "0"], "--gpus: must be at least 1, got 0"),
        (["--gpus", "12"], "--gpus: 12 do not fill machines of 8"),
    ],
)
def test_what_is_planned_for_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert train.main(["--config_path", str(config_of(tmp_path)), "--plan", *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("main", [train.main, inference.main])
def test_without_a_plan_a_command_asks_for_where_to_write(
    main: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(main)
    with pytest.raises(SystemExit):
        main(["--config_path", str(tmp_path)])
    assert "the following arguments are required: --" in capsys.readouterr().err


@pytest.mark.slow  # builds the real codec
def test_clips_are_planned_with_their_codec(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config_path", str(config_of(tmp_path)), "--plan", "--num_output_frames", "2"]
    assert inference.main([*words, "parallel.attention=sage"]) == 0
    printed = capsys.readouterr().out
    assert "no rate of 'sage' is known on H100, so it is counted as flash2" in printed
    assert "text_encoder" in printed and "codec" in printed and "decode" in printed


@pytest.mark.slow  # traces a network of eight layers, and two shallow ones
def test_shallow_networks_extended_are_the_deep_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "deep", (replace(SIZES["small"][0], num_layers=8), [16, 5, 8, 8]))
    run, world = small_run(tmp_path, "deep", "mixed_precision=true"), World(2, 2)
    extended = make_plan(run, world, H100)
    models = {role: Deep.of(model) for role, model in run.models.items()}
    whole = make_plan(replace(run, models=models), world, H100)
    assert whole.layers_traced == "all layers" != extended.layers_traced
    assert extended.memory == pytest.approx(whole.memory, rel=1e-3)
    for name in whole.counts:
        assert extended.phase_seconds(name) == pytest.approx(whole.phase_seconds(name), rel=1e-2)
    flops = [sum(cost.flops for cost in plan.costs.values()) for plan in (extended, whole)]
    assert flops[0] == pytest.approx(flops[1], rel=1e-9)


class Deep:
    """A model that cannot be shortened."""

    @classmethod
    def of(cls, model: Model) -> Any:
        own = type("Deep", (cls, type(model)), {})
        deep: Any = object.__new__(own)
        deep.__dict__.update(vars(model))
        return deep

    def shortened(self, layers: int) -> None:
        """Not this one."""
        del layers


def test_ways_that_fit_are_looked_at_from_the_fastest_on(tmp_path: Path) -> None:
    ways = list(candidates(small_run(tmp_path, "tiny", batch=4), World(2, 1)))
    first = ways[0]
    assert first.accumulation == 1
    assert first.parallel.activation_checkpoint == "none"
    assert len({way.sharding_strategy for way in ways}) == 3
    assert {way.accumulation for way in ways} == {1, 2}  # 4 samples on 2 GPUs


@pytest.mark.parametrize(
    ("world", "tried"),
    [
        (World(1, 1), {"full"}),
        (World(2, 2), {"none", "full"}),
        (World(4, 2), {"none", "hybrid_full", "full"}),
    ],
)
def test_weights_are_laid_in_each_way_that_differs_on_these_machines(
    tmp_path: Path, world: World, tried: set[str]
) -> None:
    ways = candidates(small_run(tmp_path, "tiny", batch=4), world)
    assert {way.sharding_strategy for way in ways} == tried


@pytest.mark.slow  # three plans
def test_what_fits_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config_path", str(config_of(tmp_path)), "--plan", "--fits", "--gpus", "1"]
    assert train.main(words) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("fits 1 x H100 (1 x 1), fastest first")
    times = [float(row.split()[-1]) for row in rows]
    assert times == sorted(times) and times


@pytest.mark.parametrize(
    ("name", "layers"), [("Wan2.1-T2V-1.3B", 30), ("Wan2.1-I2V-14B-480P", 40), ("nothing", None)]
)
def test_released_models_are_known_by_their_names(
    tmp_path: Path, name: str, layers: int | None
) -> None:
    model = sketch_model(name, tmp_path)
    assert (None if model is None else model.features.layers) == layers


@pytest.mark.slow  # minutes: a transformer of 14 billion weights, twice
def test_14b_with_three_full_roles_fits_64_gpus_of_80_gb(tmp_path: Path) -> None:
    config = load(Path("configs/self_forcing_14b_dmd.yaml"), ["data.text_embeddings=none"])
    run = replace(small_run(tmp_path, "tiny"), config=config)
    model = sketch_model("Wan2.1-T2V-14B", tmp_path)
    assert model is not None
    models = dict.fromkeys(run.models, model)
    channels, frames, height, width = config.latent_shape
    run = replace(run, models=models, latent_shape=(channels, frames, height, width))
    assert make_plan(run, World(64, 8), H100).memory < 80e9
