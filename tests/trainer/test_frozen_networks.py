"""Networks that are used as they are: whole on each rank, or in eight bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.ranks import run_on_ranks
from tests.runs import build, rows, run
from utils.distributed import distributed_session

BF16 = "mixed_precision=true"  # which has even a single process shard its networks
WHOLE, FP8 = "teacher.sharded=false", "teacher.storage=fp8"
SHORT = ("steps=2", "batch_size=2")


def kinds(config: Path, logdir: Path) -> list[tuple[bool, set[torch.dtype]]]:
    """Of each run on this rank whether the teacher is sharded, and what its weights are kept in."""
    found = []
    with distributed_session(timeout_s=60.0) as session:
        for number, words in enumerate(((), (WHOLE,), (FP8,))):
            trainer = build(config, logdir / str(number), session, BF16, *words)
            teacher = trainer.method.teacher.model  # type: ignore[attr-defined]
            roles = [p for role in trainer.roles.values() for p in role.module.parameters()]
            assert {p.dtype for p in roles} == {torch.float32}
            assert not any(p.requires_grad for p in teacher.parameters())
            dtypes = {p.dtype for p in teacher.parameters()}
            found.append((isinstance(teacher, FSDPModule), dtypes))
    return found


def test_on_several_ranks_a_teacher_lies_as_its_section_says(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    for found in run_on_ranks(2, kinds, configs["dmd"], tmp_path):
        assert found == [
            (True, {torch.bfloat16}),
            (False, {torch.bfloat16}),
            (False, {torch.bfloat16, torch.float8_e4m3fn}),
        ]


@pytest.mark.parametrize("method", ["dmd", "sid"])  # whose gradient does not or does pass through
def test_a_teacher_in_eight_bits_gives_losses_near_those_of_a_whole_one(
    method: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    run(configs[method], tmp_path / "full", *SHORT)
    run(configs[method], tmp_path / "fp8", *SHORT, FP8)
    for low, full in zip(rows(tmp_path / "fp8"), rows(tmp_path / "full"), strict=True):
        losses = [key for key in full if key.endswith("/loss")]
        assert [low[key] for key in losses] == pytest.approx([full[k] for k in losses], rel=0.2)
        assert low != full


@pytest.mark.slow
def test_a_teacher_in_eight_bits_serves_a_run_in_bf16(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    run(configs["sid"], tmp_path / "full", BF16, *SHORT)
    run(configs["sid"], tmp_path / "fp8", BF16, *SHORT, FP8, "parallel.activation_checkpoint=block")
    for low, full in zip(rows(tmp_path / "fp8"), rows(tmp_path / "full"), strict=True):
        assert low["critic/loss"] == pytest.approx(full["critic/loss"], rel=0.2)
        assert low != full
