"""Ranks that make clips together: they share the tokens, or the two passes of guidance."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model.types import Denoiser
from pipeline.branches import BRANCHES, GuidanceBranch
from pipeline.request import Capabilities, Request
from pipeline.teacher import adjusted
from utils.config import ConfigError
from utils.context_parallel import gather_rows, ranks_at_hand, sharing_problems
from utils.distributed import Launch, Session
from utils.media.given_frames import Size


@dataclass(frozen=True)
class Team:
    """How ranks make a clip together."""

    context: int = 1  # so many share the tokens of a pass
    cfg_parallel: bool = False  # those of the prompts' pass and those of the negative prompts'

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.context * (BRANCHES if self.cfg_parallel else 1)


@dataclass(frozen=True)
class TeamMeshes:
    """This rank's places among those of its team; None = there is nobody to share with."""

    context: DeviceMesh | None = None
    branches: DeviceMesh | None = None

    @property
    def tokens_shared(self) -> int:
        """By how many ranks a pass's tokens are shared."""
        return 1 if self.context is None else self.context.size()

    def denoiser(self, net: Denoiser) -> Denoiser:
        """`net` as this rank's part of guidance."""
        if self.branches is None:
            return net
        join = partial(gather_rows, mesh=self.branches)
        return GuidanceBranch(net, self.branches.get_local_rank(), join)


ALONE = TeamMeshes()


def add_team_flags(parser: argparse.ArgumentParser) -> None:
    """The words of a command that make a team."""
    parser.add_argument(
        "--context", type=int, default=1,
        help="so many GPUs (torchrun) make each clip together, and share its tokens",
    )  # fmt: skip
    parser.add_argument(
        "--cfg_parallel", action="store_true",
        help="two GPUs, or twice --context, make a guided clip: one takes the negative prompt",
    )  # fmt: skip


def read_team(args: argparse.Namespace) -> Team:
    """The team that the words of `add_team_flags` ask for. Raises ConfigError."""
    if args.context < 1:
        raise ConfigError(f"--context: must be at least 1, got {args.context}")
    return Team(args.context, args.cfg_parallel)


def check_team(
    team: Team, model: Capabilities, heads: int, shared: Request, sizes: Iterable[Size]
) -> None:
    """Raise ConfigError unless this launch's ranks can make such clips in such teams.

    heads: of the network. shared: what all clips have in common; sizes: theirs.
    """
    counts = {"attention heads of the generator": heads}
    for size in dict.fromkeys(sizes):
        tokens = model.latent.tokens((1, 1, *model.latent.latent_size(size)))
        counts[f"tokens of a frame of {size[0]} x {size[1]} pixels"] = tokens
    found = list(sharing_problems("--context", team.context, counts))
    asked = (
        "--context" if not team.cfg_parallel else f"--cfg_parallel with --context {team.context}"
    )
    found += sharing_problems(asked, team.ranks, ranks_at_hand(Launch.here().world_size))
    if team.cfg_parallel and not _guided(model, shared):
        found.append(
            "--cfg_parallel: these clips are made without guidance, in one pass per step; leave "
            "the flag out, or ask for a --cfg_scale other than 1 where the model has one"
        )
    if found:
        raise ConfigError("\n".join(found))


def _guided(model: Capabilities, shared: Request) -> bool:
    """Whether every pass is guided: of two experts both."""
    if model.sampling is None:
        return False
    sampling = adjusted(model.sampling, shared.steps, shared.cfg_scale)
    return sampling.cfg_scale != 1.0 and sampling.cfg_scale_low != 1.0


def team_meshes(team: Team, session: Session) -> TeamMeshes:
    """Where this rank is. Collective over all ranks."""
    if team.ranks == 1:
        return ALONE
    branches = team.ranks // team.context
    mesh = init_device_mesh(
        session.device.type,
        (session.world_size // team.ranks, branches, team.context),
        mesh_dim_names=("teams", "branches", "context"),
    )
    return TeamMeshes(
        context=mesh["context"] if team.context > 1 else None,
        branches=mesh["branches"] if team.cfg_parallel else None,
    )
