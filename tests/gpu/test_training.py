"""Training on a device: each method's losses near the CPU's, nothing waited for, runs resumed."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.devices import CPU, CUDA, every_device, training_with_the_same_noise, working_on
from tests.runs import CONFIGS, build, cut_after, read_state, rows, run, step_folder
from trainer.base import Trainer
from trainer.build import RunOptions, build_trainer
from trainer.config import load
from utils.distributed import distributed_session

# Every role moves in the first step.
FIRST = {"gan": ("loss.discriminator_warmup_steps=0",)}
# Some on the CPU too, so that these lines run where there is no GPU.
CASES = [
    *(pytest.param(name, CPU, id=f"{name}-cpu") for name in ("dmd_gan", "self_forcing_sid")),
    *(pytest.param(name, CUDA, id=f"{name}-cuda", marks=pytest.mark.gpu) for name in CONFIGS),
]
BF16 = 0.01  # relative to 1 or to the loss; measured on a CPU: 0.0013 at most
FP32 = 5e-4
DATA = "trainer/batches.py"  # copies records to the device


def first_losses(
    config: Path, logdir: Path, device: torch.device, *overrides: str
) -> dict[str, float]:
    """The losses of the first step, whose noise is the same on every device."""
    settings = [*FIRST.get(config.stem, ()), "steps=1", *overrides]
    with (
        working_on(device),
        training_with_the_same_noise(),
        distributed_session(timeout_s=60.0) as session,
    ):
        assert session.device.type == device.type
        options = RunOptions(logdir, config.stem, save=False, wandb=False)
        build_trainer(load(config, settings), session, options).train()
    gc.collect()  # LMDB opens a folder only once
    (row,) = rows(logdir)
    return {name: value for name, value in row.items() if name.endswith("/loss")}


@pytest.mark.parametrize(("method", "device"), CASES)
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("mixed_precision=true", BF16), ("mixed_precision=false", FP32)],
    ids=["bf16", "fp32"],
)
def test_the_first_losses_are_near_those_of_the_cpu_in_fp32(
    method: str,
    device: torch.device,
    precision: str,
    tolerance: float,
    configs: dict[str, Path],
    tmp_path: Path,
) -> None:
    found = first_losses(configs[method], tmp_path / "found", device, precision)
    expected = first_losses(configs[method], tmp_path / "expected", CPU)
    assert "generator/loss" in expected
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["mixed_precision=true", "mixed_precision=false"])
@pytest.mark.parametrize("method", CONFIGS)
def test_an_update_waits_for_nothing_but_its_data(
    method: str, precision: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    """As tests/trainer/test_waiting.py counts on a pretended device; here CUDA itself tells."""
    with working_on(CUDA), distributed_session(timeout_s=60.0) as session:
        settings = (*FIRST.get(method, ()), precision, "accumulation=2")
        trainer = build(configs[method], tmp_path, session, *settings)
        update(trainer)  # encodes prompts, sets up kernels
        trainer.state.draws = 0  # the same prompts again
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                update(trainer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waited = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    places = {f"{w.filename}:{w.lineno}" for w in waited if not w.filename.endswith(DATA)}
    assert not places


def update(trainer: Trainer) -> None:
    """All phases of one step, without its log."""
    for phase in trainer.phases(0):
        trainer.optimise(phase)


@every_device
def test_a_resumed_run_ends_as_the_unbroken_one(
    device: torch.device, configs: dict[str, Path], tmp_path: Path
) -> None:
    """Near it on CUDA, where attention's gradients are summed in no fixed order."""
    settings = ("steps=4", "batch_size=2", "save_every=2", "mixed_precision=true")
    with working_on(device):
        whole = run(configs["dmd"], tmp_path / "whole", *settings)
        resumed = cut_after(whole, tmp_path / "resumed", 2)
        run(configs["dmd"], resumed, *settings)
    near = 0.0 if device == CPU else 1e-2
    assert [row["step"] for row in rows(resumed)] == [1, 2, 3, 4]
    for found, expected in zip(rows(resumed), rows(whole), strict=True):
        assert found == pytest.approx(expected, rel=near, abs=near)
    left, right = (weights(path) for path in (resumed, whole))
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=near, atol=near)


def weights(logdir: Path) -> dict[str, Any]:
    """What the last checkpoint holds of the networks."""
    state = read_state(step_folder(logdir, 4))
    return {name: value for name, value in state.items() if name.startswith("roles.")}


@every_device
def test_a_checkpoint_is_read_on_another_device(
    device: torch.device, configs: dict[str, Path], tmp_path: Path
) -> None:
    settings = ("batch_size=2", "save_every=1")
    with working_on(device):
        run(configs["diffusion"], tmp_path, "steps=1", *settings)
    with working_on(CPU):
        run(configs["diffusion"], tmp_path, "steps=2", *settings)
    with working_on(device):
        run(configs["diffusion"], tmp_path, "steps=3", *settings)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_the_cpu_is_taken_where_tests_say_so() -> None:
    with working_on(CPU), distributed_session() as session:
        assert session.device == torch.device("cpu")
