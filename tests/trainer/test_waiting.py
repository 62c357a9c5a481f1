"""What a training loop reads of its device on the host, and so waits for.

Metrics, once a log; and before each phase moves anything, whether its gradients are finite.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import trainer.build
from model.types import Batch, LossOutput
from tests.pretend import CPU, PRETENDED, pretended_device
from tests.runs import CONFIGS, rows, run
from trainer.base import Trainer
from trainer.build import RunOptions, build_trainer
from trainer.config import load
from utils.distributed import Session, distributed_session
from utils.parallel import build_mesh
from utils.seeding import StepRNG

# Of two outer steps the second logs; both kinds of optimizer.
SETTINGS = ("steps=2", "log_every=2", "batch_size=1", "generator.muon_lr=0.01")
MICRO = ("batch_size=2", "accumulation=2")
LOG = "aten._to_copy.default in utils/metrics.py:read"
FINITE = "aten._local_scalar_dense.default in utils/finite.py:all_finite"
# What reads a tensor on the host.
READS: dict[str, Callable[[Tensor], object]] = {
    "t.item()": lambda t: t.item(),
    "float(t)": lambda t: float(t.detach()),
    "if t > 0": lambda t: bool(t > 0),
    "t.tolist()": lambda t: t.tolist(),
    "t.numpy()": lambda t: t.detach().numpy(),
    "print(t)": repr,
    "f'{t:.3f}'": lambda t: f"{t.detach():.3f}",
    "t.cpu()": lambda t: t.cpu(),
    "torch.equal": lambda t: torch.equal(t, t),
    "t[t > 0]": lambda t: t[t > 0],
    "t.nonzero()": lambda t: t.nonzero(),
    "range(t)": lambda t: range(t.long()),
    "cpu.copy_(t)": lambda t: torch.zeros(()).copy_(t.detach()),
}


@contextmanager
def on_the_device(path: Path, logdir: Path, *overrides: str) -> Iterator[tuple[Trainer, Any]]:
    """A trainer of a config file whose tensors lie on the pretended device, and its reads so far.

    All prompts are encoded already: a prompt's first encoding waits, inside of transformers.
    """

    def mesh(session: Session, strategy: str) -> DeviceMesh:
        return build_mesh(replace(session, device=CPU), strategy)

    with (
        distributed_session() as session,
        pretended_device() as reads,
        patch.object(trainer.build, "build_mesh", mesh),
    ):
        config = load(path, [*SETTINGS, *overrides])
        options = RunOptions(logdir, path.stem, save=False, wandb=False)
        built = build_trainer(config, replace(session, device=PRETENDED), options)
        batches = built.parts.batches
        drawn = [batches.dataset[batches.order[draw]] for draw in range(16)]
        batches.encoder.encode([item.prompt for item in drawn])
        reads.clear()
        yield built, reads


@pytest.mark.parametrize("method", CONFIGS)
def test_only_the_log_and_each_phase_wait_for_the_device_and_only_once(
    method: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    with on_the_device(configs[method], tmp_path) as (trained, reads):
        counts, after = [], trained.after_step

        def counted(*args: Any) -> None:
            counts.append(dict(reads))
            after(*args)

        with patch.object(trained, "after_step", counted):
            trained.train()
    # Before anything is logged: one read for each phase so far.
    assert counts == [{FINITE: number} for number in phases_by_step(trained)]
    assert reads == Counter({LOG: 1, FINITE: phases_by_step(trained)[-1]})


def phases_by_step(trained: Trainer) -> list[int]:
    """How many phases there have been after each of the two steps."""
    first, second = (len(list(trained.phases(step))) for step in range(2))
    return [first, first + second]


KEYS = {
    "recomputed": ("dmd", "parallel.activation_checkpoint=block"),
    "selective": ("self_forcing_dmd", "parallel.activation_checkpoint=selective"),
    "offloaded": (
        "self_forcing_dmd", "parallel.activation_checkpoint=block", "parallel.offload_inputs=true",
    ),
    "gathered": ("self_forcing_dmd", "parallel.keep_gathered=true", "parallel.prefetch=2"),
    "whole": ("dmd", "teacher.sharded=false"),
    "eight bits": ("sid", "teacher.storage=fp8"),
    "reused": ("dmd", "loss.reuse_rollout=true"),
    "one by one": ("dmd", "loss.batched_guidance=false"),
    "resting": ("self_forcing_dmd", "parallel.offload_encoders=true", "causal.rollout_frames=9"),
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_no_key_that_saves_time_or_memory_waits_for_the_device(
    key: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    method, *words = KEYS[key]
    with on_the_device(configs[method], tmp_path, *words) as (trained, reads):
        trained.train()
    assert reads == Counter({LOG: 1, FINITE: phases_by_step(trained)[-1]})


def test_a_read_planted_in_a_loss_is_counted(configs: dict[str, Path], tmp_path: Path) -> None:
    with on_the_device(configs["diffusion"], tmp_path, *MICRO) as (trained, reads):
        loss, missed = trained.method.generator_loss, []
        for name, read in READS.items():

            def planted(batch: Batch, rng: StepRNG, read: Any = read) -> LossOutput:
                output = loss(batch, rng)
                read(output.loss)
                return output

            reads.clear()
            with patch.object(trained.method, "generator_loss", planted):
                for phase in trained.phases(0):
                    trained.optimise(phase)
            if sum(reads.values()) < 2:  # one for each micro-batch
                missed.append(name)
    assert not missed


def test_the_device_that_pretends_computes_what_the_cpu_computes(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    with on_the_device(configs["causvid"], tmp_path / "pretended", *MICRO) as (trained, _):
        trained.train()
    del trained
    gc.collect()  # LMDB opens a folder only once
    run(configs["causvid"], tmp_path / "cpu", *SETTINGS, *MICRO)
    found, expected = (rows(tmp_path / name) for name in ("pretended", "cpu"))
    # Not bit for bit: attention is another kernel where torch knows the CPU.
    assert found == [pytest.approx(row, rel=1e-4) for row in expected]


def test_the_device_that_pretends_refuses_a_tensor_of_the_cpu() -> None:
    with pretended_device(), pytest.raises(RuntimeError, match="on one device"):
        torch.ones(2, device=PRETENDED) + torch.ones(2)
