"""Runs of the first release go on, and what this one trains are the same numbers.

tests/fixtures/v0.1 was made by release 0.1.0: the first two of four steps of `dmd_fdistill`, the
log of all four, and the log of four steps of every method in tests/runs.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import convert_checkpoint
from tests.runs import CONFIGS, built, read_state, rows, run, step_folder
from trainer.config import read_run
from utils.config import ConfigError
from utils.weights import WeightFile

OLD = Path(__file__).resolve().parent.parent / "fixtures" / "v0.1"
LOSSES = json.loads((OLD / "losses.json").read_text(encoding="utf-8"))
EVERY_OTHER = "save_every=2"


def assert_same_log(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Equal but for another processor's rounding."""
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for here, there in zip(found, expected, strict=True):
        assert here == pytest.approx(there, rel=2e-4, abs=1e-6)


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A log directory as release 0.1.0 left it after two steps."""
    return Path(shutil.copytree(OLD, tmp_path / "run"))


@pytest.mark.parametrize("method", [method for method in CONFIGS if method in LOSSES])
def test_every_method_takes_the_same_steps_as_the_first_release(
    method: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    assert_same_log(rows(run(configs[method], tmp_path, EVERY_OTHER)), LOSSES[method])


def test_a_run_of_the_first_release_goes_on_to_the_same_end(
    old_run: Path, configs: dict[str, Path]
) -> None:
    run(configs["dmd_fdistill"], old_run, EVERY_OTHER)
    assert_same_log(rows(old_run), LOSSES["dmd_fdistill"])
    assert step_folder(old_run, 4).is_dir()


def test_a_key_that_an_older_run_did_not_know_has_its_default(
    old_run: Path, configs: dict[str, Path]
) -> None:
    path = old_run / "config.yaml"
    text = path.read_text(encoding="utf-8")
    for gone in ("\n  muon_weight_decay: 0.01", "\n  start_step: 2", "\ntimestep_shift: 5.0"):
        assert gone in text
        text = text.replace(gone, "")
    path.write_text(text, encoding="utf-8")
    assert read_run(path).generator.muon_weight_decay == 0.01
    with pytest.raises(ConfigError) as caught, built(configs["dmd_fdistill"], old_run):
        pytest.fail("a run was continued with another average")
    assert str(caught.value).endswith(": ema.start_step: is 0, now 2")


def test_weights_of_an_older_checkpoint_are_converted_bit_for_bit(
    old_run: Path, tmp_path: Path
) -> None:
    target = tmp_path / "ema.safetensors"
    words = ["--input_path", str(old_run), "--output_path", str(target), "--use_ema"]
    assert convert_checkpoint.main(words) == 0
    state, written = read_state(step_folder(old_run, 2)), WeightFile(target)
    for name in written.shapes():
        assert torch.equal(written.read(name), state[f"ema.generator.{name}"])
