"""A plan's figures are those of the step that is really taken, on a CPU at three sizes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from model.wan.config import PRESETS, WanConfig, write_wan_config
from tests.ranks import run_on_ranks
from trainer.config import load
from trainer.plan_trace import (
    Trace,
    World,
    build_stand_in,
    fullest_step,
    metered_step,
    planned,
    trace_step,
)
from trainer.run import Run, resolve
from utils.distributed import distributed_session
from utils.metering import Meter, plain

TINY = replace(PRESETS["Wan2.1-T2V-Tiny"], num_layers=2)
SIZES = {
    "tiny": (TINY, [16, 5, 4, 4]),
    "small": (replace(TINY, dim=256, ffn_dim=1024, num_layers=6), [16, 5, 16, 16]),
    "wide": (replace(TINY, dim=384, ffn_dim=2048, num_heads=6, num_layers=3), [16, 9, 16, 16]),
}
TEXT = """
trainer: score_distillation
mixed_precision: false
latent_shape: {shape}
steps: 4
batch_size: {batch}
denoising_step_list: [1000]
generator: {{model: {model}, lr: 1.0e-3}}
critic: {{lr: 1.0e-3}}
loss: {{cfg_scale: 2.0, generator_every: 2}}
data: {{path: none, text_embeddings: none}}
logging: {{wandb: false}}
"""
FAST = ("tiny", "block")
# Kernels of the CPU, which torch's counter knows under the names of a GPU's alone.
ATEN = torch.ops.aten
CPU_KERNELS: dict[Any, Any] = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)
    ),
}


def small_run(folder: Path, size: str, *overrides: str, batch: int = 2) -> Run:
    """A run of random networks of a size of SIZES; its folder holds config.json alone."""
    sizes, shape = SIZES[size]
    assert isinstance(sizes, WanConfig)
    model = folder / "model"
    model.mkdir(exist_ok=True)
    write_wan_config(sizes, model / "config.json")
    path = folder / "run.yaml"
    path.write_text(TEXT.format(shape=shape, batch=batch, model=model), encoding="utf-8")
    return resolve(load(path, overrides))


def peak(trace: Trace) -> int:
    """Bytes beside those that lie there all the time."""
    return max(p.total for p in trace.peaks.values()) - sum(trace.standing.values())


def kinds(trace: Trace) -> Counter[str]:
    """Standing bytes by kind, and the most that gradients took."""
    found: Counter[str] = Counter()
    for tag, count in trace.standing.items():
        found[tag.kind] += count
    for contents in (p.contents for p in trace.peaks.values()):
        grads = sum(n for tag, n in contents.items() if tag.kind == "gradients")
        found["gradients"] = max(found["gradients"], grads)
    return found


def measured(run: Run) -> tuple[dict[str, int], int]:
    """Bytes of what lies there, tensor by tensor, and torch's own account of the step's peak."""
    with distributed_session() as session:
        trainer = build_stand_in(planned(run, Meter()), session, Meter(), on_gpu=False)
        roles = trainer.roles.values()
        sizes = {
            "weights": sum(
                plain(p).nbytes for p in {
                    id(p): p for n in trainer.method.parts.networks.values()
                    for p in n.parameters()
                }.values()
            ),
            "optimizer": sum(
                plain(t).nbytes
                for role in roles for o in role.optimizers for s in o.state.values()
                for t in s.values()
            ),
            "average": sum(plain(t).nbytes for t in trainer.ema.shadow.values()),
            "gradients": max(sum(p.nbytes for p in r.parameters.values()) for r in roles),
        }  # fmt: skip
        trainer.state.step = fullest_step(trainer)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            for phase in trainer.phases(trainer.state.step):
                trainer.optimise(phase)
    events = prof.profiler.kineto_results.events()
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return sizes, most


WHAT = {  # what is trained of the networks
    "whole": (),
    "adapters": ("generator.adapter.rank=8", "critic.adapter.rank=4"),
    "an adapter": ("critic.adapter.rank=4",),
}
CASES = [
    pytest.param(
        size, recomputed, what, marks=() if (size, recomputed) == FAST else pytest.mark.slow
    )
    for size in SIZES
    for recomputed in ("none", "block")
    for what in WHAT
]


@pytest.mark.parametrize(("size", "recomputed", "what"), CASES)
def test_memory_is_what_torch_accounts_for(
    tmp_path: Path, size: str, recomputed: str, what: str
) -> None:
    words = (f"parallel.activation_checkpoint={recomputed}", *WHAT[what])
    run = small_run(tmp_path, size, *words)
    trace = trace_step(run, World(1, 1), "most", on_gpu=False)
    sizes, most = measured(run)
    planned_sizes = kinds(trace)
    print(
        size,
        recomputed,
        what,
        {k: (planned_sizes[k], v) for k, v in sizes.items()},
        peak(trace),
        most,
    )
    for kind, count in sizes.items():
        assert planned_sizes[kind] == pytest.approx(count, rel=0.02), kind
    assert peak(trace) == pytest.approx(most, rel=0.15)


@pytest.mark.slow  # two steps of a network of six layers
def test_arithmetic_is_what_torch_counts(tmp_path: Path) -> None:
    run = small_run(tmp_path, "small", "parallel.activation_checkpoint=block")
    trace = trace_step(run, World(1, 1), "most", on_gpu=False)
    with distributed_session() as session:
        trainer = build_stand_in(planned(run, Meter()), session, Meter(), on_gpu=False)
        trainer.state.step = fullest_step(trainer)
        with FlopCounterMode(display=False, custom_mapping=CPU_KERNELS) as counter:
            for phase in trainer.phases(trainer.state.step):
                trainer.optimise(phase)
    counted = sum(work.flops * count for (_, work), count in trace.work.items())
    assert counted == counter.get_total_flops() > 0


def sent_by_rank(folder: Path) -> dict[str, int]:
    """What a rank of a real step sends."""
    with distributed_session() as session:
        trace = metered_step(small_run(folder, "tiny"), session, Meter(), on_gpu=False)
    return sent(trace)


def sent(trace: Trace) -> dict[str, int]:
    found: Counter[str] = Counter()
    for (_, transfer), count in trace.transfers.items():
        found[transfer.kind] += transfer.sent * count
    return dict(found)


@pytest.mark.slow  # two processes
def test_traffic_is_what_two_ranks_send(tmp_path: Path) -> None:
    small_run(tmp_path, "tiny")  # writes what the ranks read
    counted = run_on_ranks(2, sent_by_rank, tmp_path)
    trace = trace_step(small_run(tmp_path, "tiny"), World(2, 2), "most", on_gpu=False)
    assert counted == [sent(trace)] * 2
    assert set(sent(trace)) == {"all_gather", "reduce_scatter", "all_reduce"}
