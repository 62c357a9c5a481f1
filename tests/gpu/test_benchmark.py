"""The benchmark on a device: steps and clips in bf16 beside the plain version, and the kernels."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from scripts import benchmark
from scripts.benchmarking.shapes import METHODS
from tests.devices import CPU, CUDA, working_on

FEW = ["--timed_steps", "3", "--warmup_steps", "1"]
# bf16 keeps 8 bits, and ours and the plain version round at other places: relative differences of
# losses after a few updates, and of latents.
BF16 = 5e-2


def row(words: list[str], device: torch.device, capsys: pytest.CaptureFixture[str]) -> Any:
    """What the benchmark says of the one thing that it times."""
    with working_on(device):
        assert benchmark.main([*words, "--device", device.type]) == 0
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("{")]
    return json.loads(line)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_small_step_in_bf16_is_timed_with_memory_and_utilisation(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--shape", "small", "--method", method, *FEW, "mixed_precision=true"]
    found = row(words, CUDA, capsys)
    assert found["dtype"] == "bfloat16"
    assert found["plain_difference"] < BF16
    assert 0.0 < found["mfu"] < 1.0
    assert found["peak_gib"] > 8 * 4 * found["parameters"] / 2**30  # weights, AdamW's state, EMA
    assert found["plain_cpu_ratio"] is None


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_small_clip_in_bf16_is_timed_to_its_first_frame(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inference", "--shape", "small", "--method", method, *FEW, "mixed_precision=true"]
    found = row(words, CUDA, capsys)
    assert found["dtype"] == "bfloat16"
    assert found["plain_difference"] < BF16
    assert 0.0 < found["first_frame_s"] <= 17 / found["fps"]


@pytest.mark.gpu
def test_a_kernel_is_chosen_at_the_real_size(capsys: pytest.CaptureFixture[str]) -> None:
    found = row(["attention", "--shape", "1.3B"], CUDA, capsys)
    assert (found["tokens"], found["dtype"]) == (32760, "bfloat16")
    assert found["fastest"] in found["forward_and_backward_ms"]
    assert "math" not in found["forward_ms"]  # its scores would fill the memory
    assert set(found["masked"]["forward_and_backward_ms"]) == {"blocks", "flex"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_the_same_lines_run_on_the_cpu(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [mode, "--shape", "tiny", "--timed_steps", "1", "--warmup_steps", "0", "batch_size=2"]
    found = row([*words, "mixed_precision=true"], CPU, capsys)
    assert found["dtype"] == ("bfloat16" if mode == "train" else "float32")
    assert found["plain_difference"] < BF16
