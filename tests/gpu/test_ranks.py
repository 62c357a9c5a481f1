"""A process group as torchrun opens it: NCCL with all GPUs that are there, gloo without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.devices import CUDA, every_device, working_on
from tests.ranks import run_on_ranks
from tests.runs import build, rows
from utils.distributed import distributed_session

STEPS = ("steps=2", "mixed_precision=true", "batch_size=4")


def collected() -> tuple[str, float, bool, str, list[int]]:
    """On each rank: the device, and each collective of a Session."""
    with distributed_session(timeout_s=60.0) as session:
        mean = session.mean(torch.tensor(float(session.rank), device=session.device))
        session.barrier()
        return (
            session.device.type,
            float(mean),
            session.any(session.rank == session.world_size - 1),
            session.from_main(f"rank {session.rank}"),
            session.gather(session.rank),
        )


def trained(config: Path, logdir: Path) -> list[dict[str, float]]:
    """On each rank: the metrics of a run."""
    with distributed_session(timeout_s=60.0) as session:
        build(config, logdir, session, *STEPS).train()
    return rows(logdir)


def ranks_of(device: torch.device) -> int:
    """One for each GPU, at most four, as many as batch_size allows; two without one."""
    return min(4, torch.cuda.device_count()) if device == CUDA else 2


@every_device
def test_collectives_reach_all_ranks(device: torch.device) -> None:
    world = ranks_of(device)
    expected = (device.type, (world - 1) / 2, True, "rank 0", list(range(world)))
    assert run_on_ranks(world, collected, gpus=device == CUDA) == [expected] * world


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["dmd", "self_forcing_dmd", "gan"])
def test_training_on_all_gpus_is_training_on_one(
    method: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    """With one GPU, that torchrun's environment changes nothing."""
    world = ranks_of(CUDA)
    found = run_on_ranks(world, trained, configs[method], tmp_path / "all", gpus=True)
    with working_on(CUDA):
        alone = trained(configs[method], tmp_path / "one")
    for row, expected in zip(found[0], alone, strict=True):
        assert row == pytest.approx(expected, rel=0.05, abs=0.02)  # bf16, summed in another order
