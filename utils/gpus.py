"""GPUs that runs are planned for: what they have, and how much of it kernels reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from utils.errors import UserError
from utils.op_costs import Transfer, Work

USUAL = "flash2"  # the attention kernel that torch takes by itself
LAUNCH_S = 4e-6  # of a kernel that has next to nothing to do


@dataclass(frozen=True)
class GPU:
    """One kind. Peaks are those of the data sheets, dense; rates that are reached are below."""

    name: str
    memory: int  # bytes that the driver shows
    flops: float  # per second, bf16 with fp32 accumulation
    flops_fp32: float  # per second, of matrix products in fp32 (TF32 is off)
    bandwidth: float  # bytes per second, of its own memory
    inside: float  # bytes per second that it sends to its neighbours on the node
    outside: float  # bytes per second that it sends to other nodes: its share of the network
    attention: Mapping[str, tuple[float, float]]  # kernel -> share of `flops`, forward, backward


GIB = 2**30
# Shares of the peak that attention kernels reach at heads of 128 and tens of thousands of tokens.
# FlashAttention-2: arXiv:2307.08691 (A100: 230 of 312 forward, 200 backward; on Hopper it reaches
# 350 to 400 of 989). FlashAttention-3: arXiv:2407.08608, fig. 5 and 6 (650 forward, 550 backward).
# cuDNN: the same figures (about 600 and 480).
_HOPPER = {"flash2": (0.37, 0.31), "cudnn": (0.60, 0.49), "flash3": (0.66, 0.54)}
_AMPERE = {"flash2": (0.70, 0.60)}
_ADA = {"flash2": (0.70, 0.60)}
_BLACKWELL = {"flash2": (0.65, 0.55), "cudnn": (0.70, 0.60)}

# Data sheets of NVIDIA: dense bf16 (GeForce: with fp32 accumulation), memory bandwidth, NVLink in
# one direction. `inside` and `outside` are what nccl-tests report of them, per GPU: 8 x 400 Gb/s
# of InfiniBand for server GPUs, 100 Gb/s for workstations, PCIe without NVLink.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("H100", 80 * GIB - GIB // 2, 989e12, 67e12, 3.35e12, 360e9, 45e9, _HOPPER),
        GPU("H200", 140 * GIB, 989e12, 67e12, 4.8e12, 360e9, 45e9, _HOPPER),
        GPU("A100", 80 * GIB - GIB // 2, 312e12, 19.5e12, 2.04e12, 230e9, 22e9, _AMPERE),
        GPU("L40S", 45 * GIB, 362e12, 91e12, 0.864e12, 22e9, 11e9, _ADA),
        GPU("RTX4090", 24 * GIB - GIB // 2, 165e12, 82e12, 1.008e12, 20e9, 10e9, _ADA),
        GPU("RTX5090", 32 * GIB - GIB // 2, 209e12, 104e12, 1.792e12, 40e9, 10e9, _BLACKWELL),
    )
}
# Shares of peaks that other kernels reach: large matrix products under cuBLAS, convolutions of
# video codecs, and reading and writing memory.
REACHED = {"matmul": 0.72, "convolution": 0.45}
REACHED_BANDWIDTH = 0.85
# Of what elementwise operations of a block read and write, compiled ones still do; counted by hand
# over a block: what stays is its inputs, its outputs and what products and attention read.
FUSED = 0.45
# Memory that tensors do not show: the CUDA context and its kernels, NCCL's buffers, and what the
# allocator cannot use of freed pieces.
HIDDEN_BYTES = 2 * GIB


def find_gpu(name: str) -> GPU:
    """The GPU of a name, in any spelling. Raises UserError that lists those that are known."""
    words = {key.lower(): gpu for key, gpu in GPUS.items()}
    plain = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    found = words.get(plain.removeprefix("nvidia").removesuffix("sxm"))
    if found is None:
        raise UserError(f"--gpu: '{name}' is unknown, choose one of {', '.join(GPUS)}")
    return found


def find_device(name: str) -> GPU | None:
    """The GPU that a driver calls `name`, as NVIDIA H100 80GB HBM3; None = it is not known."""
    plain = name.replace(" ", "")
    return next((gpu for key, gpu in GPUS.items() if key in plain), None)


def kernel_of(gpu: GPU, wanted: str) -> str:
    """The attention kernel that is counted on; `auto` = the fastest that needs no installation.

    What torch chooses by itself is FlashAttention-2; so is what no rate is known of, see
    `uncounted`.
    """
    if wanted == "auto":
        return "cudnn" if "cudnn" in gpu.attention else USUAL
    return wanted if wanted in gpu.attention else USUAL


def uncounted(gpu: GPU, wanted: str) -> str | None:
    """What to say if the kernel that was asked for is counted as another; None = it is not."""
    if wanted in ("auto", "sdpa", "flash") or wanted in gpu.attention:
        return None
    known = ", ".join(gpu.attention)
    return (
        f"parallel.attention: no rate of '{wanted}' is known on {gpu.name}, so it is counted as "
        f"{kernel_of(gpu, wanted)}; known are {known}"
    )


def seconds(work: Work, gpu: GPU, kernel: str, *, compiled: bool = False) -> float:
    """How long one operation takes: the slower of its arithmetic and its memory traffic.

    compiled: whether what only moves memory is fused with its neighbours.
    """
    if compiled and work.kind == "elementwise":
        return FUSED * work.moved / (gpu.bandwidth * REACHED_BANDWIDTH)
    peak = gpu.flops_fp32 if work.itemsize > 2 else gpu.flops
    if work.kind in ("attention", "attention_backward"):
        reached = gpu.attention[kernel][work.kind == "attention_backward"]
    else:
        reached = REACHED.get(work.kind, 1.0)
    busy = work.flops / (peak * reached)
    return max(busy, work.moved / (gpu.bandwidth * REACHED_BANDWIDTH), LAUNCH_S)


def transfer_seconds(transfer: Transfer, gpu: GPU, per_node: int) -> float:
    """How long a message takes: a ring sends through one link per member on each node."""
    if transfer.ranks == 1:
        return 0.0
    members = max(1, per_node // transfer.step)  # of the group, on one node
    rate = gpu.inside if transfer.ranks <= members else min(gpu.inside, members * gpu.outside)
    return transfer.sent / rate + 20e-6
