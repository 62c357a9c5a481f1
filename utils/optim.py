"""Optimizers and their schedules: AdamW, and Muon for the matrices of small models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from omegaconf import MISSING
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.ema import local

RATE = "rate"  # of a group: its learning rate as a multiple of the role's, if it is not 1


@dataclass(frozen=True)
class OptimizerConfig:
    """How one role's weights move. Updates are counted per role, not per outer step."""

    lr: float = MISSING
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.01  # of matrices; norms, biases and modulation are never decayed
    muon_lr: float | None = None  # learning rate of the blocks' matrices under Muon; None = AdamW
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.01
    warmup_updates: int = 0  # the rate grows linearly from 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    decay_from: float = 0.0  # fraction of all updates at which linear or cosine decay begins
    decay_to: float = 0.0  # final learning rate, as a fraction of lr
    max_grad_norm: float = 10.0


def lr_factor(config: OptimizerConfig, update: int, total: int) -> float:
    """The learning rate of 0-based `update` among `total`, as a fraction of `lr`."""
    warm = min(1.0, (update + 1) / config.warmup_updates) if config.warmup_updates else 1.0
    if config.schedule == "constant":
        return warm
    begin = config.decay_from * total
    done = min(1.0, max(0.0, (update - begin) / max(1.0, total - begin)))
    left = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return warm * (config.decay_to + (1.0 - config.decay_to) * left)


def build_optimizers(
    parameters: Mapping[str, nn.Parameter],
    config: OptimizerConfig,
    rates: Mapping[str, float] | None = None,
) -> list[torch.optim.Optimizer]:
    """AdamW over all of them that want a gradient, or Muon over the matrices of blocks beside it.

    parameters: by name; those of blocks have a part `blocks` in theirs. rates: of some of them, by
    name, as multiples of the learning rate.
    """
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    inside = {name for name, p in trained.items() if p.ndim == 2 and "blocks" in name.split(".")}
    chosen = inside if config.muon_lr is not None else set()
    rest = {name: p for name, p in trained.items() if name not in chosen}
    # Matrices are those of linear layers and of the patch convolution.
    decayed = {name: p for name, p in rest.items() if p.ndim in (2, 5)}
    plain = {name: p for name, p in rest.items() if name not in decayed}
    rates = rates or {}
    groups = [
        *_by_rate(decayed, rates, weight_decay=config.weight_decay),
        *_by_rate(plain, rates, weight_decay=0.0),
    ]
    matrices = list(_by_rate({name: trained[name] for name in trained if name in chosen}, rates))
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        betas = (config.betas[0], config.betas[1])
        # One kernel reads and writes all that an update needs; on a CPU it would round otherwise.
        fused = all(p.is_cuda for p in rest.values())
        optimizers.append(
            torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=fused, foreach=not fused)
        )
    if matrices:
        assert config.muon_lr is not None, "matrices are chosen for Muon"
        optimizers.append(
            Muon(
                matrices,
                lr=config.muon_lr,
                momentum=config.muon_momentum,
                weight_decay=config.muon_weight_decay,
            )
        )
    return optimizers


def _by_rate(
    parameters: Mapping[str, nn.Parameter], rates: Mapping[str, float], **settings: float
) -> Iterator[dict[str, Any]]:
    """Groups of an optimizer, one for each rate; none is empty, for torch could not load it."""
    of = {name: rates.get(name, 1.0) for name in parameters}
    for rate in dict.fromkeys(of.values()):
        own = [p for name, p in parameters.items() if of[name] == rate]
        yield {"params": own, **settings} | ({} if rate == 1.0 else {RATE: rate})


def initialise(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Make the state of every weight now, also of those that no loss ever reaches.

    torch makes what is missing when it saves or loads, with a step counter of 1; and a checkpoint
    that lacks the state of an idle weight could not be loaded.
    """
    get_optimizer_state_dict(model, list(optimizers))
    for optimizer in optimizers:
        for state in optimizer.state.values():
            if "step" in state:
                state["step"].zero_()


def set_lr_factor(
    optimizers: Sequence[torch.optim.Optimizer], config: OptimizerConfig, factor: float
) -> None:
    """Scale the configured learning rates of one role's optimizers."""
    for optimizer in optimizers:
        base = config.muon_lr if isinstance(optimizer, Muon) else config.lr
        assert base is not None
        for group in optimizer.param_groups:
            group["lr"] = base * factor * group.get(RATE, 1.0)


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix update is orthogonalised (Jordan et al. 2024, Muon).

    torch.optim.Muon does the same in bf16, one matrix at a time, and cannot see through shards;
    here equal shapes share one batched iteration in fp32, so that ranks agree to rounding.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient. Collective for sharded matrices."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for shape in dict.fromkeys(p.shape for p in params):
                self._step_shape([p for p in params if p.shape == shape], group)

    def _step_shape(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        momenta, gradients = [], []
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta.append(local(self.state[p]["momentum_buffer"]))
            assert p.grad is not None
            gradients.append(local(p.grad))
        momentum = group["momentum"]
        torch._foreach_lerp_(momenta, gradients, 1.0 - momentum)
        nesterov = torch._foreach_lerp(gradients, momenta, momentum)
        whole = [_whole(update, p) for update, p in zip(nesterov, params, strict=True)]
        orthogonal = orthogonalise(torch.stack(whole)).unbind(0)
        updates = [_part(update, p) for update, p in zip(orthogonal, params, strict=True)]
        weights = [local(p) for p in params]
        rows, columns = params[0].shape
        torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(
            weights, updates, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns))
        )


def _whole(part: Tensor, like: nn.Parameter) -> Tensor:
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    ).full_tensor()


def _part(whole: Tensor, like: nn.Parameter) -> Tensor:
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(
        whole, like.device_mesh, like.placements, src_data_rank=None
    ).to_local()


def orthogonalise(matrices: Tensor, *, iterations: int = 5) -> Tensor:
    """Move the singular values of [K, rows, columns] matrices near 1, in fp32.

    A quintic Newton-Schulz iteration with the coefficients published for Muon, which trade
    exactness for speed: all but the smallest singular values end between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.float().mT if tall else matrices.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a total norm of `max_norm`. Returns the norm before, on device."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
