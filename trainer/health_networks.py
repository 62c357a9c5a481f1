"""What a run's own networks say of its samples: scores, critic lag, how far weights have moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from model.experts import asking
from model.given import count_given, learnt, on_given
from model.matching import DistributionMatching, NoisedSample, Scores, error_size, made_frames
from model.types import Batch, Sample
from trainer.roles import Role, group_of
from utils.distributed import Session
from utils.ema import local
from utils.optim import lr_factor
from utils.seeding import StepRNG, step_rng

ROUNDS = 2  # noise levels at which each sample is looked at
MARKED = 256  # elements of a tensor that are remembered, to tell how far weights have moved


@dataclass(frozen=True, eq=False)
class Chunk:
    """Clips of a probe that pass through the networks together."""

    batch: Batch
    indices: Sequence[int]  # of its clips among all of the probe


def noise_of(chunk: Chunk, seed: int, number: int, device: torch.device) -> StepRNG:
    """The randomness of one look at a chunk's samples, the same at every probe."""
    name = f"health noise {number}"
    return step_rng(seed, name, step=0, first=0, indices=chunk.indices, device=device)


@torch.no_grad()
def look(
    method: DistributionMatching, chunks: Sequence[Chunk], x0: Tensor, seed: int
) -> dict[str, float]:
    """Teacher and critic on samples [N, C, F, H, W] of all chunks, at fixed noise and levels.

    score_gap: mean |x0_critic - x0_teacher| as a share of mean |x0 - x0_teacher|. removed: the part
    of their difference that lies along the critic's own error, which projected DMD
    (arXiv:2609.35768) takes away, as a share of its size. critic_fresh and teacher_fresh: mean
    squared errors of velocities, the teacher's without guidance.
    """
    sums: dict[str, Tensor] = {}
    for chunk in chunks:
        for number in range(ROUNDS):
            rng = noise_of(chunk, seed, number, x0.device)
            sample = Sample(x0[list(chunk.indices)], count_given(chunk.batch.given))
            fake = method.noised(sample, rng)
            scores = method.scores(fake, chunk.batch)
            found = {
                **compare(*made_frames(sample, scores)),
                "critic_fresh": method.denoising_loss(fake, chunk.batch),
                "teacher_fresh": teacher_error(method, fake, chunk.batch),
            }
            for name, value in found.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * len(chunk.indices)
    means = {name: float(value) / (ROUNDS * len(x0)) for name, value in sums.items()}
    means["critic_excess"] = means["critic_fresh"] / max(means["teacher_fresh"], 1e-12)
    return means


@torch.no_grad()
def critic_error(
    method: DistributionMatching, chunks: Sequence[Chunk], x0: Tensor, seed: int
) -> float:
    """The critic's loss on other samples [N, C, F, H, W], at the noise and levels of `look`."""
    total = torch.zeros((), device=x0.device)
    for chunk in chunks:
        for number in range(ROUNDS):
            rng = noise_of(chunk, seed, number, x0.device)
            sample = Sample(x0[list(chunk.indices)], count_given(chunk.batch.given))
            loss = method.denoising_loss(method.noised(sample, rng), chunk.batch)
            total = total + loss * len(chunk.indices)
    return float(total) / (ROUNDS * len(x0))


def compare(sample: Sample, scores: Scores) -> dict[str, Tensor]:
    """Means over samples of what `look` tells of two scores; scalars."""
    apart = scores.x0_critic - scores.x0_teacher
    gap = apart.abs() / error_size(sample.x0, scores)
    return {
        "score_gap": gap.mean(),
        "removed": removed_share(apart, scores.x0_critic - sample.x0).mean(),
    }


def removed_share(difference: Tensor, error: Tensor) -> Tensor:
    """Share of a difference [B, ...] that lies along the critic's error [B, ...]; [B]."""
    d, p = difference.float().flatten(1), error.float().flatten(1)
    along: Tensor = (d * p).sum(dim=1).abs() / p.norm(dim=1).clamp(min=1e-8)
    share: Tensor = along / d.norm(dim=1).clamp(min=1e-8)
    return share


def teacher_error(method: DistributionMatching, fake: NoisedSample, batch: Batch) -> Tensor:
    """Mean squared error of the teacher's velocity without guidance; a scalar."""
    teacher, given = on_given(method.teacher, fake.given), count_given(fake.given)
    context = asking(fake.side)
    velocity: Tensor = teacher(fake.x, fake.sigma, batch.conditioning, context=context).velocity
    wanted = learnt(fake.noise - fake.x0, given)
    return F.mse_loss(learnt(velocity, given), wanted)


@dataclass(eq=False)
class Marks:
    """A few elements of each role's weights as they were at the last probe, and its updates."""

    session: Session
    weights: dict[str, list[Tensor]] = field(default_factory=dict)
    updates: dict[str, int] = field(default_factory=dict)

    def moved(
        self, roles: Mapping[str, Role], updates: Mapping[str, int], totals: Mapping[str, int]
    ) -> dict[str, float]:
        """How far roles have moved since the last call, none at the first. Collective.

        <role>_change: as a share of the weights' size. <role>_updates: so many were made.
        <role>_rate: the learning rate as a share of the full one. Of two experts, both together.
        """
        found: dict[str, float] = {}
        for group in dict.fromkeys(map(group_of, roles)):
            own = [role for name, role in roles.items() if group_of(name) == group]
            now = [marked(p) for role in own for p in role.parameters.values()]
            made = sum(count for name, count in updates.items() if group_of(name) == group)
            if group in self.weights:
                pairs = list(zip(now, self.weights[group], strict=True))
                sizes = [(a - b).square().sum() for a, b in pairs], [b.square().sum() for b in now]
                sums = self.session.mean(torch.stack([torch.stack(part).sum() for part in sizes]))
                change, size = sums.tolist()
                found[f"{group}_change"] = (change / max(size, 1e-30)) ** 0.5
                found[f"{group}_updates"] = float(made - self.updates[group])
                last = max(0, made - 1)
                found[f"{group}_rate"] = lr_factor(own[0].config, last, totals[group])
            self.weights[group], self.updates[group] = now, made
        return found


def marked(parameter: Tensor) -> Tensor:
    """A copy of the first elements of this rank's part of a tensor, fp32."""
    return local(parameter.detach()).flatten()[:MARKED].float().clone()
