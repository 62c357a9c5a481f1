"""What a run takes of memory at least: a bound that no real run is refused by."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.wan.config import PRESETS
from tests.sources import ROOT
from trainer.config import Config, load
from trainer.limits import check_memory, device_bytes, training_bytes
from utils.config import ConfigError
from utils.distributed import Session
from utils.parallel import ParallelConfig

ALONE = Session(0, 1, torch.device("cpu"))
SHIPPED = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.name != "default_config.yaml")


def config(**changes: object) -> Config:
    return replace(load(ROOT / "configs" / "tiny" / "dmd.yaml"), **changes)  # type: ignore[arg-type]


def needed(run: Config, samples: int, tokens: int) -> int:
    return training_bytes(run, samples, tokens=tokens, layers=4, width=128, latent_values=1280)


def test_memory_grows_with_samples_and_tokens() -> None:
    run = config(mixed_precision=False)
    latents = 4 * 4 * 1280  # four fp32 copies
    assert needed(run, 1, 20) == 10 * 4 * 128 * 20 * 4 + latents
    assert needed(run, 3, 20) == 3 * needed(run, 1, 20)
    assert needed(run, 1, 40) - latents == 2 * (needed(run, 1, 20) - latents)


def test_recomputed_blocks_keep_their_inputs_alone() -> None:
    run = config(mixed_precision=True)
    run = replace(run, parallel=replace(run.parallel, activation_checkpoint="block"))
    assert needed(run, 1, 20) == 4 * 128 * 20 * 2 + 4 * 4 * 1280


@pytest.mark.parametrize(
    ("parallel", "kept"),
    [
        (ParallelConfig("selective"), 3 + 3 + 3 + 3),
        (ParallelConfig("block", checkpoint_every=3), 1 + 10 + 10 + 1),
        (ParallelConfig("selective", checkpoint_every=2, offload_inputs=True), 2 + 10 + 2 + 10),
        (ParallelConfig("block", offload_inputs=True), 0),
    ],
)
def test_what_blocks_keep_depends_on_how_they_are_recomputed(
    parallel: ParallelConfig, kept: int
) -> None:
    run = config(mixed_precision=True, parallel=parallel)
    assert needed(run, 1, 20) == kept * 128 * 20 * 2 + 4 * 4 * 1280


def test_a_machine_has_memory() -> None:
    assert 2**28 < device_bytes(torch.device("cpu")) < 2**50


def test_only_a_rank_s_share_of_a_batch_counts() -> None:
    there = device_bytes(ALONE.device)
    tokens = there // needed(config(batch_size=1), 1, 1) // 2  # of one sample: half the memory
    sizes = {"tokens": tokens, "layers": 4, "width": 128}
    with pytest.raises(ConfigError, match="4 samples at once"):
        check_memory(config(batch_size=4), ALONE, **sizes)
    check_memory(config(batch_size=4, accumulation=4), ALONE, **sizes)
    check_memory(config(batch_size=4), replace(ALONE, world_size=4), **sizes)


def test_ranks_that_share_a_sample_share_the_memory_of_its_tokens() -> None:
    run = config(batch_size=1)
    token = needed(run, 1, 2) - needed(run, 1, 1)
    tokens = 3 * (device_bytes(ALONE.device) // token) // 2  # one and a half memories
    sizes = {"tokens": tokens, "layers": 4, "width": 128}
    with pytest.raises(ConfigError, match="1 samples at once"):
        check_memory(run, ALONE, **sizes)
    check_memory(run, replace(ALONE, world_size=2, group=2), **sizes)


@pytest.mark.parametrize("path", SHIPPED, ids=[str(p.relative_to(ROOT)) for p in SHIPPED])
def test_no_shipped_configuration_is_refused_on_what_it_is_made_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tiny = load(path), path.parent.name == "tiny"
    sizes = PRESETS["Wan2.1-T2V-Tiny" if tiny else "Wan2.1-T2V-14B"]
    monkeypatch.setattr("trainer.limits.device_bytes", lambda _: (4 if tiny else 80) * 10**9)
    if not tiny:  # a sample for each GPU
        run = replace(run, batch_size=run.accumulation)
    tokens = math.prod(run.latent_shape[1:]) // 4
    check_memory(run, ALONE, tokens=tokens, layers=sizes.num_layers, width=sizes.dim)
