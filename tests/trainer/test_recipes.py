"""Recipes that train adapters: their headers say what the plan says, and it is below the bars."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sources import ROOT
from trainer.config import load
from trainer.plan import Plan, make_plan
from trainer.plan_command import add_plan_flags, read_world, run_problems, sketched_run
from trainer.plan_trace import BASE, World, trace_step
from utils.gpus import find_gpu
from utils.metering import Tag

RECIPES = sorted((ROOT / "configs").glob("lora_*.yaml"))
PLANNED = re.compile(r"^# Plan:\s+(?P<words>.*): (?P<gb>[\d.]+) GB, (?P<s>\d+) s a step$", re.M)
HEADERS = [
    pytest.param(path, *found.groups(), id=f"{path.stem} {found['words']}")
    for path in RECIPES
    for found in PLANNED.finditer(path.read_text())
]
ENCODED = ["data.text_embeddings=embeddings"]  # 11 GB of text encoder less
ONE = [*ENCODED, "batch_size=1", "accumulation=1", "parallel.context=1"]


def planned(name: str, words: list[str], folder: Path) -> Plan:
    """The plan that train.py --plan makes of a recipe with these words."""
    parser = argparse.ArgumentParser()
    add_plan_flags(parser)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args(words)
    run, world = (
        sketched_run(load(ROOT / "configs" / name, args.overrides), folder),
        read_world(args),
    )
    assert list(run_problems(run, world)) == []
    return make_plan(run, world, find_gpu(args.gpu))


def test_every_recipe_says_what_it_takes() -> None:
    assert len(RECIPES) == 5
    assert {param.values[0] for param in HEADERS} == set(RECIPES)


@pytest.mark.slow  # minutes: three traces of real sizes each
@pytest.mark.parametrize(("path", "words", "gb", "seconds"), HEADERS)
def test_headers_say_what_the_plan_says(
    path: Path, words: str, gb: str, seconds: str, tmp_path: Path
) -> None:
    plan = planned(path.name, words.split(), tmp_path)
    assert plan.fits
    assert f"{plan.memory / 1e9:.1f}" == gb
    assert f"{plan.step_seconds:.0f}" == seconds


@pytest.mark.slow
@pytest.mark.timeout(900)  # the largest takes minutes on an idle core
@pytest.mark.parametrize(
    ("name", "words", "most_gb"),
    [
        ("lora_dmd.yaml", ["--gpus", "1", "--gpu", "RTX4090", *ONE], 17.0),
        ("lora_5b_dmd.yaml", ["--gpus", "1", *ONE], 28.0),
        ("lora_5b_dmd.yaml", ["--gpus", "1", *ONE, "teacher.storage=fp8"], 24.0),
        ("lora_5b_dmd.yaml", ["--gpus", "1", *ONE, "parallel.offload_inputs=true"], 24.0),
        ("lora_14b_dmd.yaml", ["--gpus", "1", *ONE], 66.0),
        ("lora_14b_dmd.yaml", ["--gpus", "1", *ONE, "parallel.offload_inputs=true"], 56.0),
        ("lora_14b_dmd.yaml", ["--gpus", "8", *ENCODED], 24.0),
        ("lora_a14b_high_dmd.yaml", ["--gpus", "8", *ENCODED], 24.0),
    ],
)
def test_adapters_at_real_sizes_stay_below_their_bars(
    name: str, words: list[str], most_gb: float, tmp_path: Path
) -> None:
    plan = planned(name, words, tmp_path)
    print(name, words, plan.memory / 1e9)
    assert plan.memory <= most_gb * 1e9


@pytest.mark.parametrize("words", [[], ["parallel.offload_inputs=true"]])
def test_a_short_1_3b_holds_its_base_once_and_little_beside(
    words: list[str], tmp_path: Path
) -> None:
    """Three layers of thirty at a quarter of the frames, where each figure is known."""
    overrides = [*ONE, *words, "latent_shape=[16,5,60,104]", "denoising_step_list=[1000]"]
    run = sketched_run(load(ROOT / "configs" / "lora_dmd.yaml", overrides), tmp_path)
    shallow = {role: model.shortened(27) for role, model in run.models.items()}
    run = replace(run, models={role: model for role, model in shallow.items() if model})
    trace = trace_step(run, World(1, 1), "most")
    added = 3 * 128 * (18 * 1536 + 2 * 8960)  # parameters of an adapter
    for role in ("generator", "critic"):
        assert trace.standing[Tag(role, "weights")] == 4 * added
    assert trace.standing[Tag(BASE, "weights")] < 2 * 1_418_996_800 / 8
    tokens, width, hidden = 5 * 1560, 1536, 8960
    standing = sum(trace.standing.values())
    block = tokens * (41 * width + 4 * hidden)  # what its backward pass reads, bytes
    inputs = 0 if words else 3 * 2 * tokens * width
    transients = 4 * tokens * (2 * hidden + 4 * width)
    peak = max(p.total for p in trace.peaks.values())
    assert standing < peak <= standing + 4 * added + block + inputs + transients
