"""What a record of clips tells of how they were sampled: all that decides it, and no more."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.request import Request
from tests.runs import write_config
from trainer.config import load
from trainer.serving import sampling_settings


def told(tiny_root: Path, folder: Path, *words: str) -> dict[str, Any]:
    config = load(write_config(folder, tiny_root, "self_forcing_dmd"), words)
    model: Any = SimpleNamespace(sampling=None)
    return sampling_settings(config, model, Request(prompt="a red circle", seed=0))


def test_clips_made_as_before_newer_settings_are_told_as_before(
    tiny_root: Path, tmp_path: Path
) -> None:
    """Or a folder that an earlier version began could not be finished."""
    found = told(tiny_root, tmp_path)
    assert set(found) == {"denoising_step_list", "timestep_shift", "causal"}
    assert set(found["causal"]) == {
        "num_frame_per_block", "independent_first_frame", "local_attn_size", "sink_size",
        "relative_positions", "context_noise", "kv_gradient", "same_step_across_blocks",
        "last_step_only", "gradient_frames", "rollout_frames", "given_first_frame",
    }  # fmt: skip


def test_settings_that_make_other_clips_are_told(tiny_root: Path, tmp_path: Path) -> None:
    words = ("first_block_step_list=[1000,500]", "causal.remember=last_step")
    found = told(tiny_root, tmp_path, *words)
    assert found["first_block_step_list"] == [1000, 500]
    assert found["causal"]["remember"] == "last_step"
