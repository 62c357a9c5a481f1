"""Ulysses context parallelism: swap shares of tokens for shares of heads around attention.

Letters as in model/types.py; P ranks share a sample, and hold m = n / P of a frame's n tokens each.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from utils.distributed import Session
from utils.errors import UserError


@dataclass(frozen=True)
class Ulysses:
    """This rank's part as a model.wan.exchange.Exchange (Ulysses, arXiv:2309.14509).

    It has tokens [rank m, (rank + 1) m) of every frame, and while attending heads
    [rank H / P, (rank + 1) H / P) of all H; all is in frame-major order.

    Gradients: all ranks compute the same loss, and FSDP2 averages over them. A weight that acts on
    tokens sees a part of its gradient on each rank, and the parts must add up; one that acts before
    tokens are cut or after they are joined sees all of it on each. So joining multiplies gradients
    by P, and cutting divides them: the average is the gradient of one rank that has all tokens.

    Traffic: an exchange leaves a rank with B N D / P values and sends (P - 1) / P of them, where
    N is all tokens. Self-attention exchanges queries, keys, values and its output, and keys once
    more where unrotated ones are kept: 4 (P - 1) / P^2 B N D values per block and pass, and as many
    in a backward pass and in a pass that runs again.
    """

    group: str  # the name of the process group
    rank: int  # in it
    size: int  # P

    def cut(self, x: Tensor, frames: int) -> Tensor:
        """See Exchange. x: [B, F n, ...] to [B, F m, ...]."""
        assert x.shape[1] % (frames * self.size) == 0, "ranks divide the tokens of a frame"
        own: Tensor = _Cut.apply(x, frames, self)
        return own

    def join(self, x: Tensor, frames: int) -> Tensor:
        """See Exchange. x: [B, F m, ...] to [B, F n, ...]."""
        whole: Tensor = _Join.apply(x, frames, self)
        return whole

    def to_heads(self, x: Tensor, frames: int) -> Tensor:
        """See Exchange. x: [B, F m, H, head_dim] to [B, F n, H / P, head_dim]."""
        sent = x.unflatten(2, (self.size, -1)).movedim(2, 0)  # [P, B, F m, H / P, head_dim]
        return self._frames_joined(self.all_to_all(sent), frames)

    def to_tokens(self, x: Tensor, frames: int) -> Tensor:
        """See Exchange. x: [B, F n, H / P, head_dim] to [B, F m, H, head_dim]."""
        parts = x.unflatten(1, (frames, self.size, -1)).movedim(2, 0)  # [P, B, F, m, ...]
        received = self.all_to_all(parts.flatten(2, 3))  # [P, B, F m, H / P, head_dim]
        return received.movedim(0, 2).flatten(2, 3)

    def own_part(self, x: Tensor, frames: int) -> Tensor:
        """This rank's tokens [B, F m, ...] of all [B, F n, ...]; no gradient."""
        parts = x.unflatten(1, (frames, self.size, -1))
        return parts[:, :, self.rank].flatten(1, 2).contiguous()

    def all_parts(self, x: Tensor, frames: int) -> Tensor:
        """All tokens [B, F n, ...] from every rank's [B, F m, ...]; no gradient. Collective."""
        sent = x.contiguous()
        gather = torch.ops._c10d_functional.all_gather_into_tensor
        received = collectives.wait_tensor(gather(sent, self.size, self.group))
        return self._frames_joined(received.unflatten(0, (self.size, -1)), frames)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Send x[r] to rank r, for x [P, ...]; row r of what returns came from rank r."""
        rows = [1] * self.size
        exchange = torch.ops._c10d_functional.all_to_all_single  # a compiler's graph can hold it
        received: Tensor = collectives.wait_tensor(exchange(x.contiguous(), rows, rows, self.group))
        return received

    def _frames_joined(self, parts: Tensor, frames: int) -> Tensor:
        """Every rank's tokens [P, B, F m, ...] as [B, F n, ...]."""
        return parts.unflatten(2, (frames, -1)).movedim(0, 2).flatten(1, 3)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frames: int, ranks: Ulysses) -> Tensor:
        ctx.frames, ctx.ranks = frames, ranks
        return ranks.own_part(x, frames)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.all_parts(grads[0], ctx.frames) / ctx.ranks.size, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frames: int, ranks: Ulysses) -> Tensor:
        ctx.frames, ctx.ranks = frames, ranks
        return ranks.all_parts(x, frames)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.own_part(grads[0], ctx.frames) * ctx.ranks.size, None, None


def context_mesh(session: Session) -> DeviceMesh | None:
    """This rank and those that share its samples; None = it is alone. Collective over all ranks."""
    if session.group == 1:
        return None
    shape = (session.data_world, session.group)
    return init_device_mesh(session.device.type, shape, mesh_dim_names=("data", "context"))[
        "context"
    ]


def context_parallel(network: nn.Module, mesh: DeviceMesh) -> None:
    """Let the ranks of `mesh` share the tokens of what `network` is called for. In place.

    Its module that cuts tokens, and each that attends among them, has an attribute `exchange`.
    Raises UserError for a network without.
    """
    places: list[Any] = [module for module in network.modules() if hasattr(module, "exchange")]
    if not places:
        raise UserError(
            f"{type(network).__name__}: this network cannot share a sample's tokens among ranks; "
            f"set parallel.context=1 (or --context 1)"
        )
    ulysses = Ulysses(mesh.get_group().group_name, mesh.get_local_rank(), mesh.size())
    for module in places:
        module.exchange = ulysses


def gather_rows(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The rows [P B, ...] of all ranks of `mesh`, in their order; no gradient. Collective."""
    gather = torch.ops._c10d_functional.all_gather_into_tensor
    rows: Tensor = collectives.wait_tensor(
        gather(x.contiguous(), mesh.size(), mesh.get_group().group_name)
    )
    return rows


def sharing_problems(key: str, ranks: int, counts: Mapping[str, int]) -> Iterator[str]:
    """Why so many ranks cannot share a sample, in one line, if they cannot.

    key: what asked for it. counts: what they must divide, by how it is called.
    """
    undivided = [f"the {count} {what}" for what, count in counts.items() if count % ranks]
    if undivided:
        allowed = divisors(math.gcd(*counts.values()))
        yield (
            f"{key}: {ranks} ranks must divide {' and '.join(undivided)}; choose one of "
            f"{', '.join(map(str, allowed))}"
        )


def ranks_at_hand(world_size: int) -> dict[str, int]:
    """What ranks that share a sample must divide of those that there are; they share a host."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return {"ranks of this host (torchrun --nproc_per_node)": math.gcd(here, world_size)}


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]
