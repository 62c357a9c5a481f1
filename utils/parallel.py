"""Parallelism from the outside: recompute blocks, then shard them; no model file knows of it.

The order per block is recompute, compile, offload, share tokens, shard: each step takes what the
one before it made.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from utils.compiling import compile_blocks
from utils.context_parallel import context_parallel
from utils.distributed import Session
from utils.errors import UserError
from utils.recompute import offload_inputs, recompute_blocks

M = TypeVar("M", bound=nn.Module)

NOTHING_RUNS_AGAIN = (
    "has no effect with parallel.activation_checkpoint=none; set that to block or selective"
)


@dataclass(frozen=True)
class ParallelConfig:
    """How a network is laid over the ranks."""

    # Whether blocks run again in the backward pass: none; block: all of it, from its inputs;
    # selective: all but attention, whose output is kept.
    activation_checkpoint: Literal["none", "block", "selective"] = "none"
    checkpoint_every: int = 1  # every n-th block runs again; the others keep what they need
    offload_inputs: bool = False  # the inputs of blocks that run again wait in host memory
    # When ranks share gradients: after each micro-batch, so that a rank holds those of its shard;
    # or after the last alone, with less traffic, for 4 bytes per weight of the whole network.
    reduce_gradients: Literal["each", "last"] = "each"
    prefetch: int = 1  # blocks ahead whose weights are gathered while one is computed
    # Each block is compiled as one graph: faster steps, after minutes at the first one.
    compile: bool = False
    # Attention kernel: sdpa (torch's choice), cudnn, flash, efficient, math, flash2, flash3, or for
    # inference alone sage; auto = the fastest exact one of this GPU, measured at the start.
    attention: str = "auto"
    # Attention under a mask of frames: flex, FlexAttention; or blocks, calls of the kernel above on
    # groups of frames, which a GPU may do faster; auto = flex on CUDA.
    masked_attention: Literal["auto", "flex", "blocks"] = "auto"
    # Sharded weights stay gathered from one pass of a rollout to the next, where none learns: one
    # exchange instead of one per pass, for the memory of the whole generator in compute precision.
    keep_gathered: bool = False
    # Ulysses: so many neighbouring ranks of a host share each sample's tokens, and its memory.
    context: int = 1
    # Encoders of text and images, and the codec, wait in host memory but while they are used.
    offload_encoders: bool = False
    # Of two experts that are used as they are, the one that is not asked waits in host memory.
    offload_idle_expert: bool = False

    def problems(self) -> Iterator[str]:
        """What is impossible about these settings, one line each."""
        recomputes = self.activation_checkpoint != "none"
        if self.checkpoint_every < 1:
            yield f"parallel.checkpoint_every: must be at least 1, got {self.checkpoint_every}"
        elif self.checkpoint_every > 1 and not recomputes:
            yield f"parallel.checkpoint_every: {self.checkpoint_every} {NOTHING_RUNS_AGAIN}"
        if self.offload_inputs and not recomputes:
            yield f"parallel.offload_inputs: true {NOTHING_RUNS_AGAIN}"
        if self.context < 1:
            yield f"parallel.context: must be at least 1, got {self.context}"
        if self.prefetch < 1:
            yield f"parallel.prefetch: must be at least 1, got {self.prefetch}"


AS_IT_IS = ParallelConfig()


def build_mesh(session: Session, sharding_strategy: str) -> DeviceMesh:
    """The ranks as one shard axis (full), or as replicas x shards of one.

    Replicas are nodes, and shards the ranks of a node (hybrid_full); or each rank is a replica
    (none), whose gathering FSDP2 then knows to be a cast at most.
    """
    kind, world = session.device.type, session.world_size
    if sharding_strategy == "full":
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    inside = 1 if sharding_strategy == "none" else int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % inside:
        raise UserError(f"hybrid_full needs nodes of equal size: {world} ranks, {inside} here")
    return init_device_mesh(kind, (world // inside, inside), mesh_dim_names=("replicate", "shard"))


def parallelize(
    module: M,
    blocks: nn.ModuleList,
    mesh: DeviceMesh | None,
    compute_dtype: torch.dtype,
    config: ParallelConfig = AS_IT_IS,
    *,
    context: DeviceMesh | None = None,
    added: Collection[nn.Parameter] = (),
    whole: bool = False,
) -> M:
    """Let `blocks` run again in the backward pass as `config` says, and shard all. In place.

    context: the ranks that share a sample's tokens; None = each has samples of its own. added,
    whole: see `shard`.
    """
    every = config.checkpoint_every
    if config.activation_checkpoint != "none":
        recompute_blocks(blocks, config.activation_checkpoint, every=every)
    if config.compile:  # what is recomputed belongs to the graph, copies to the host do not
        compile_blocks(blocks)
    if config.offload_inputs:
        offload_inputs(blocks, every=every)
    if context is not None:
        context_parallel(module, context)
    if mesh is not None:
        shard(module, blocks, mesh, compute_dtype, added=added, whole=whole)
        prefetch(module, blocks, config.prefetch)
    return module


def shard(
    module: nn.Module,
    blocks: nn.ModuleList,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    *,
    added: Collection[nn.Parameter] = (),
    whole: bool = False,
) -> None:
    """Shard `module` over `mesh`, one unit per block and one for the rest (FSDP2). In place.

    Weights stay in their own dtype; forward and backward run in `compute_dtype`, and gradients
    are reduced in fp32. One rank that computes in the dtype of the weights needs none of this.

    added: parameters that are cast by those who use them, so that their dtype does not count. They
    belong to their block's unit: one gathering per block, frozen weights or not. whole: these alone
    are sharded, and all others stay as they are. Modules that say that they are `exact` compute in
    fp32, and are units of their own in any case.
    """
    exact = [part for part in module.modules() if getattr(part, "exact", False)]
    own = set(module.parameters()) - set(added) - {p for part in exact for p in part.parameters()}
    same_dtype = whole or all(p.dtype == compute_dtype for p in own)
    if (mesh.size() == 1 and same_dtype) or (whole and not added and not exact):
        return
    ignored = own if whole else None
    # Inputs are not cast: fp32 timesteps rounded to bf16 would move to a neighbouring noise level.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    fp32 = MixedPrecisionPolicy(
        param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for part in exact:
        fully_shard(part, mesh=mesh, mp_policy=fp32, reshard_after_forward=True)
    for block in blocks:
        fully_shard(
            block, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=ignored
        )
    # The root too is resharded, or EMA and loading would read weights that forward does not use.
    fully_shard(
        module, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=ignored
    )


def prefetch(module: nn.Module, blocks: nn.ModuleList, ahead: int) -> None:
    """Have the weights of so many blocks gathered while one is computed, in either direction.

    One is what FSDP2 does by itself.
    """
    if ahead == 1 or not isinstance(module, FSDPModule):
        return
    units: list[Any] = list(blocks)
    module.set_modules_to_forward_prefetch(units[:ahead])
    for index, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[index + 1 : index + 1 + ahead])
        unit.set_modules_to_backward_prefetch(units[max(0, index - ahead) : index][::-1])


def sharded_roots(module: nn.Module) -> list[nn.Module]:
    """The outermost sharded modules in `module`: itself, or networks beside each other."""
    if isinstance(module, FSDPModule):
        return [module]
    return [root for child in module.children() for root in sharded_roots(child)]


@contextmanager
def keep_gathered(network: nn.Module) -> Iterator[None]:
    """Within the body, weights stay gathered after passes without autograd; after it, none does.

    A pass with autograd gives them back as ever: its activations need the memory. Weights must not
    be written within the body.
    """
    roots: list[Any] = sharded_roots(network)

    def follow(root: Any, inputs: object) -> None:
        del inputs
        root.set_reshard_after_forward(torch.is_grad_enabled())

    handles = [root.register_forward_pre_hook(follow) for root in roots]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for root in roots:
            root.set_reshard_after_forward(True)
            for unit in root.modules():
                if isinstance(unit, FSDPModule):
                    unit.reshard()


def sync_gradients(module: nn.Module, config: ParallelConfig, *, last: bool) -> None:
    """How the next backward pass reduces gradients over ranks; `last`: of the micro-batches.

    Sharded gradients add up from micro-batch to micro-batch. Replicas share theirs at the last.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last or config.reduce_gradients == "each")
        module.set_requires_all_reduce(last)


def fix_gradient_reduction(module: nn.Module) -> None:
    """Fix now how a sharded network's gradients are reduced; all its weights must want one.

    FSDP2 decides it at the first forward pass, by which weights want a gradient then: a network
    that is frozen there for a phase would be reduced wrongly ever after.
    """
    if isinstance(module, FSDPModule):
        module._get_fsdp_state()._lazy_init()
