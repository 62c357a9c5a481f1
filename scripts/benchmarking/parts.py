"""The share of each part of a training step, by the labels of the loop."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

from scripts.benchmarking.training import take_step
from trainer.base import Trainer

PARTS = (
    "data", "generator loss", "generator backward", "critic loss", "critic backward", "clip",
    "optimizer", "average",
)  # fmt: skip


def parts_of_steps(trainer: Trainer, steps: int) -> str:
    """A table of the parts' shares of so many steps; host time, in which kernels are started."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(steps):
            take_step(trainer)
    totals = {event.key: event.cpu_time_total for event in trace.key_averages()}
    parts = {name: totals[name] for name in PARTS if name in totals}
    whole = sum(parts.values())
    lines = [f"| {name} | {100.0 * time / whole:.1f} % |" for name, time in parts.items()]
    return "\n".join(["", "| part | share of a step |", "| --- | --- |", *lines, ""])
