"""GPUs by name, and how long they take for what is counted."""

from __future__ import annotations

import pytest

from utils.errors import UserError
from utils.gpus import (
    GPUS,
    LAUNCH_S,
    REACHED,
    REACHED_BANDWIDTH,
    find_device,
    find_gpu,
    kernel_of,
    seconds,
    transfer_seconds,
    uncounted,
)
from utils.op_costs import Transfer, Work

H100 = GPUS["H100"]


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "RTX-4090", "NVIDIA RTX_4090"])
def test_a_gpu_is_found_in_any_spelling(name: str) -> None:
    assert find_gpu(name) is GPUS["RTX4090"]


def test_an_unknown_gpu_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UserError, match="--gpu: 'T4' is unknown, choose one of H100, H200, A100"):
        find_gpu("T4")


def test_an_operation_takes_as_long_as_the_slower_of_arithmetic_and_memory() -> None:
    product = Work("matmul", flops=10**13, moved=10**6, itemsize=2)
    assert seconds(product, H100, "cudnn") == pytest.approx(1e13 / (REACHED["matmul"] * 989e12))
    copy = Work("elementwise", flops=0, moved=10**10, itemsize=2)
    assert seconds(copy, H100, "cudnn") == pytest.approx(1e10 / (REACHED_BANDWIDTH * 3.35e12))
    assert seconds(Work("elementwise", 0, 8, 4), H100, "cudnn") == LAUNCH_S


def test_compiled_elementwise_operations_move_less() -> None:
    copy = Work("elementwise", flops=0, moved=10**10, itemsize=2)
    assert seconds(copy, H100, "cudnn", compiled=True) < 0.5 * seconds(copy, H100, "cudnn")


def test_faster_attention_kernels_take_less_time() -> None:
    attention = Work("attention", flops=10**13, moved=10**6, itemsize=2)
    times = [seconds(attention, H100, kernel) for kernel in ("flash2", "cudnn", "flash3")]
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == 3


def test_the_kernel_is_the_one_that_is_named_or_the_fastest_that_is_shipped() -> None:
    assert kernel_of(H100, "auto") == "cudnn"
    assert kernel_of(GPUS["A100"], "auto") == "flash2"
    assert kernel_of(H100, "flash3") == "flash3"
    assert kernel_of(H100, "sdpa") == "flash2"  # torch's own order


@pytest.mark.parametrize("name", ["auto", "sdpa", "flash", "flash2", "flash3", "cudnn"])
def test_a_kernel_of_a_known_rate_needs_no_word(name: str) -> None:
    assert uncounted(H100, name) is None


@pytest.mark.parametrize(("gpu", "name"), [("H100", "sage"), ("A100", "flash3"), ("L40S", "math")])
def test_a_kernel_without_a_known_rate_is_said_to_be_counted_as_another(
    gpu: str, name: str
) -> None:
    assert kernel_of(GPUS[gpu], name) == "flash2"
    assert uncounted(GPUS[gpu], name) == (
        f"parallel.attention: no rate of '{name}' is known on {gpu}, so it is counted as flash2; "
        f"known are {', '.join(GPUS[gpu].attention)}"
    )


def test_messages_are_slower_between_machines() -> None:
    inside = transfer_seconds(Transfer("all_gather", 10**9, ranks=8, step=1), H100, per_node=8)
    whole = transfer_seconds(Transfer("all_gather", 10**9, ranks=64, step=1), H100, per_node=8)
    apart = transfer_seconds(Transfer("all_reduce", 10**9, ranks=8, step=8), H100, per_node=8)
    assert inside <= whole < apart
    assert apart == pytest.approx(1e9 / H100.outside, rel=0.01)
    assert transfer_seconds(Transfer("all_gather", 0, ranks=1, step=1), H100, per_node=8) == 0.0


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA L40S", "L40S"),
        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA GeForce RTX 4090", "RTX4090"),
    ],
)  # fmt: skip
def test_a_driver_s_name_tells_the_gpu(told: str, name: str) -> None:
    assert find_device(told) is GPUS[name]


@pytest.mark.parametrize("told", ["CPU, 2 threads", "NVIDIA T4"])
def test_what_is_not_known_is_not_guessed(told: str) -> None:
    assert find_device(told) is None
