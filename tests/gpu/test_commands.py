"""Train, resume, infer and convert on a device, by their command lines."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import pytest
import torch

import convert_checkpoint
import inference
import train
from tests.devices import CPU, CUDA, working_on
from tests.runs import rows


@pytest.mark.parametrize(
    ("method", "device"),
    [
        pytest.param("dmd", CPU, id="dmd-cpu"),
        pytest.param("dmd", CUDA, id="dmd-cuda", marks=pytest.mark.gpu),
        pytest.param("self_forcing_dmd", CUDA, id="self_forcing_dmd-cuda", marks=pytest.mark.gpu),
    ],
)
def test_a_student_is_trained_resumed_converted_and_sampled(
    method: str, device: torch.device, configs: dict[str, Path], tmp_path: Path
) -> None:
    config, logdir, settings = configs[method], tmp_path / "run", ["mixed_precision=true"]
    line = ["--config_path", str(config), "--logdir", str(logdir), "--disable-wandb", *settings]
    (tmp_path / "prompts.txt").write_text("a red circle moves right\na blue bar\n")
    with working_on(device):
        assert train.main([*line, "steps=1", "batch_size=2"]) == 0
        assert train.main([*line, "steps=2", "batch_size=2"]) == 0
        for folder in ("once", "again"):
            words = [
                "--config_path", str(config), "--checkpoint_path", str(logdir), "--data_path",
                str(tmp_path / "prompts.txt"), "--output_folder", str(tmp_path / folder), *settings,
            ]  # fmt: skip
            assert inference.main(words) == 0
    assert [row["step"] for row in rows(logdir)] == [1, 2]
    once, again = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).glob("*.mp4")}
        for folder in ("once", "again")
    )
    assert len(once) == 2
    assert once == again
    assert all(iio.imread(tmp_path / "once" / name).shape[0] == 17 for name in once)
    target = tmp_path / "student.safetensors"
    with working_on(CPU):
        words = ["--input_path", str(logdir), "--output_path", str(target)]
        assert convert_checkpoint.main(words) == 0
    assert target.stat().st_size > 0
