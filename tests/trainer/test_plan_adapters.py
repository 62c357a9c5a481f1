"""Plans of runs whose roles share a frozen network: what is held once, what each role adds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.wan.transformer import WanTransformer
from tests.sources import ROOT
from tests.trainer.test_plan import SIZES, small_run
from trainer.bases import bases
from trainer.config import load
from trainer.plan_command import sketched_run
from trainer.plan_encoders import with_encoders
from trainer.plan_inference import trace_clips, with_adapters
from trainer.plan_trace import BASE, Spokesman, World, build_stand_in, planned, trace_step
from trainer.run import Run
from utils.dry_run import dry_run
from utils.metering import Meter, Place, Tag

RANKS = ("generator.adapter.rank=8", "critic.adapter.rank=4")
BF16 = ("mixed_precision=true",)


def added(rank: int) -> int:
    """The parameters of an adapter of the tiny transformer's blocks."""
    sizes = SIZES["tiny"][0]
    return sizes.num_layers * rank * (18 * sizes.dim + 2 * sizes.ffn_dim)


def standing(run: Run, ranks: int) -> dict[Tag, int]:
    """What the first of so many ranks holds all the time."""
    with dry_run(world_size=ranks, on_gpu=True):
        session, meter = Spokesman(0, ranks, torch.device("cpu")), Meter()
        with meter:
            trainer = build_stand_in(planned(run, meter), session, meter, on_gpu=True)
        held = {tag: count for tag, count in meter.live.items() if count}
        del trainer
    return held


def test_a_network_that_roles_share_is_counted_once_beside_16_bytes_per_weight_of_an_adapter(
    tmp_path: Path,
) -> None:
    run = small_run(tmp_path, "tiny", *RANKS, *BF16)
    trace = trace_step(run, World(1, 1), "most")
    held = {(tag.role, tag.kind): count for tag, count in trace.standing.items()}
    generator, critic = added(8), added(4)
    with torch.device("meta"):
        whole = sum(p.nbytes for p in WanTransformer(SIZES["tiny"][0]).bfloat16().parameters())
    assert held[BASE, "weights"] == whole
    assert (held["generator", "weights"], held["critic", "weights"]) == (4 * generator, 4 * critic)
    assert held["generator", "average"] == 4 * generator
    for role, count in (("generator", generator), ("critic", critic)):
        assert held[role, "optimizer"] == pytest.approx(8 * count, rel=1e-3)  # and step counters
    gradients = max(
        count for peak in trace.peaks.values() for tag, count in peak.contents.items()
        if tag == Tag("generator", "gradients")
    )  # fmt: skip
    assert gradients == 4 * generator


def test_each_pass_is_told_of_the_role_that_makes_it(tmp_path: Path) -> None:
    trace = trace_step(small_run(tmp_path, "tiny", *RANKS), World(1, 1), "most")
    roles = {place.role for place, work in trace.work if work.flops and place.part.endswith("loss")}
    assert roles == {"generator", "critic", "teacher"}


@pytest.mark.slow  # three networks over pretended ranks
def test_what_lies_over_two_gpus_is_halved_but_for_networks_that_are_whole(tmp_path: Path) -> None:
    run = small_run(tmp_path, "tiny", *RANKS, *BF16)
    one, two = standing(run, 1), standing(run, 2)
    own = [Tag("generator", "weights"), Tag("generator", "optimizer"), Tag("generator", "average")]
    for tag in (Tag(BASE, "weights"), *own):
        assert two[tag] == pytest.approx(one[tag] / 2, rel=0.02), tag
    held = standing(small_run(tmp_path, "tiny", *RANKS, *BF16, "teacher.sharded=false"), 2)
    assert held[Tag(BASE, "weights")] == one[Tag(BASE, "weights")]
    assert all(held[tag] == two[tag] for tag in own)


def test_a_role_that_trains_a_network_whole_shares_none(tmp_path: Path) -> None:
    run = small_run(tmp_path, "tiny", "generator.adapter.rank=8")
    assert [base.roles for base in bases(run)] == [("generator", "teacher"), ("critic",)]
    weights = {tag: count for tag, count in standing(run, 1).items() if tag.kind == "weights"}
    whole = weights[Tag("critic", "weights")]
    assert weights == {
        Tag(BASE, "weights"): whole,
        Tag("critic", "weights"): whole,
        Tag("generator", "weights"): 4 * added(8),
    }


@pytest.mark.parametrize(
    ("words", "more"),
    [
        ((), 0),
        (("generator.adapter.rank=8",), added(8)),
        (("generator.adapter.rank=8", "generator.adapters=[style.safetensors]"), 2 * added(8)),
    ],
)
def test_clips_are_planned_with_the_adapters_of_their_generator(
    words: tuple[str, ...], more: int, tmp_path: Path
) -> None:
    plain = trace_clips(small_run(tmp_path, "tiny", *BF16), 1, None)
    trace = trace_clips(small_run(tmp_path, "tiny", *words, *BF16), 1, None)
    weights = Tag("generator", "weights")
    assert trace.standing[weights] == plain.standing[weights] + 4 * more
    flops = [sum(work.flops * n for (_, work), n in t.work.items()) for t in (trace, plain)]
    assert (flops[0] > flops[1]) == bool(more)


def test_an_adapter_of_the_command_line_comes_beside_those_of_the_configuration() -> None:
    config = load(ROOT / "configs" / "lora_a14b_low_dmd.yaml")
    asked = with_adapters(config, ["low=style.safetensors:0.5"])
    assert asked.generator.adapters == [
        "high=logs/lora_a14b_high",
        "low=style.safetensors:0.5",
    ]


@pytest.mark.slow  # two steps of two experts
def test_of_two_experts_one_is_there_where_the_idle_one_waits(tmp_path: Path) -> None:
    words = [
        "generator.model=Wan2.2-T2V-A14B-Tiny", "latent_shape=[16,5,4,4]", "batch_size=1",
        "accumulation=1", "parallel.context=1", "data.text_embeddings=none", "steps=1",
        "generator.adapters=[]",
    ]  # fmt: skip
    most = []
    for waits in ("false", "true"):
        overrides = [*words, f"parallel.offload_idle_expert={waits}"]
        config = load(ROOT / "configs" / "lora_a14b_low_dmd.yaml", overrides)
        trace = trace_step(sketched_run(config, tmp_path), World(1, 1), "most")
        base = [peak.contents.get(Tag(BASE, "weights"), 0) for peak in trace.peaks.values()]
        most.append(max(base))
    both, one = most
    assert one == both / 2


def test_encoders_that_wait_in_host_memory_come_where_batches_are_encoded() -> None:
    data, loss = (Place("critic", 0, part, "") for part in ("data", "loss"))
    weights, encoder = Tag(BASE, "weights"), {Tag("text_encoder", "encoders"): 5.0}
    peaks = {data: {weights: 1.0}, loss: {weights: 3.0}}
    assert with_encoders(peaks, encoder, waiting=True) == {
        data: {weights: 1.0, **encoder},
        loss: {weights: 3.0},
    }
    assert all(encoder.items() <= held.items() for held in with_encoders(
        peaks, encoder, waiting=False
    ).values())  # fmt: skip
