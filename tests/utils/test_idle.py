"""Modules whose weights wait in host memory: when they come and go, and what they compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.encoders.idle import Encoders, IdleCodec
from tests.pretend import CPU, PRETENDED, OnDevice, pretended_device
from tests.runs import built, rows, run
from utils.idle import Idle, Turns
from utils.tiny_world.codec import PatchCodec

OFFLOAD = "parallel.offload_encoders=true"


class Tied(nn.Module):
    """Two layers that share a weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.ones(4))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.get_buffer("shift")


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def on_device(module: nn.Module) -> set[bool]:
    return {isinstance(tensor, OnDevice) for tensor in tensors(module)}


def test_weights_are_on_the_device_while_they_are_used_and_only_then() -> None:
    with pretended_device():
        module, x = Tied(), torch.ones(2, 4)
        expected, idle = module(x), Idle(module, PRETENDED)
        with idle.awake():
            assert on_device(module) == {True}
            with idle.awake():
                found = module(x.to(PRETENDED))
            assert idle.here
        assert (on_device(module), idle.here) == ({False}, False)
        assert torch.equal(found.cpu(), expected)


def test_of_modules_that_take_turns_one_is_on_the_device() -> None:
    with pretended_device():
        modules, x = {"high": Tied(), "low": Tied()}, torch.ones(2, 4)
        expected = {name: module(x) for name, module in modules.items()}
        turns = Turns(modules, PRETENDED)
        assert [on_device(module) for module in modules.values()] == [{False}, {False}]
        for name in ("high", "high", "low", "high"):
            turns.bring(name)
            assert {other: on_device(one) for other, one in modules.items()} == {
                other: {other == name} for other in modules
            }
            assert torch.equal(modules[name](x.to(PRETENDED)).cpu(), expected[name])


def test_weights_that_learn_stay_where_they_are() -> None:
    with pretended_device():
        module = Tied()
        bias = module.second.bias.requires_grad_(True)
        with Idle(module, PRETENDED).awake():
            assert module.second.bias is bias
            assert isinstance(module.first.bias, OnDevice)


def test_weights_that_are_held_come_once_and_only_if_they_are_used() -> None:
    with pretended_device():
        module = Tied()
        idle = Idle(module, PRETENDED)
        with idle.held():
            assert not idle.here
            with idle.awake():
                first = module.first.weight
            with idle.awake():
                assert module.first.weight is first
            assert idle.here
        assert not idle.here


def test_weights_go_although_their_use_fails() -> None:
    with pretended_device():
        idle = Idle(Tied(), PRETENDED)
        with pytest.raises(ZeroDivisionError), idle.held(), idle.awake():
            1 / 0  # noqa: B018
        assert not idle.here


def test_weights_that_layers_share_stay_one_and_keep_their_names() -> None:
    module = Tied()
    names = list(module.state_dict())
    before = module.first.weight.data_ptr()
    idle = Idle(module, CPU)
    with idle.awake():
        assert module.first.weight.data_ptr() == module.second.weight.data_ptr()
    assert module.first.weight.data_ptr() == before  # nothing is copied that is there
    assert list(module.state_dict()) == names
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_codec_that_rests_between_the_pieces_of_a_stream_decodes_the_same() -> None:
    torch.manual_seed(0)
    codec = PatchCodec.fit(torch.rand(2, 3, 9, 16, 16) * 2 - 1)
    latents = torch.randn(1, 16, 3, 2, 2)
    expected = codec.decode_to_pixel(latents)
    with pretended_device():
        encoders = Encoders(PRETENDED, rest=True)
        resting = encoders.codec(codec.to)
        assert isinstance(resting, IdleCodec)
        decoder, parts = resting.stream_decoder(), []
        for frame in latents.to(PRETENDED).split(1, dim=2):
            parts.append(decoder.decode(frame))
            assert not resting.idle.here
        assert torch.equal(torch.cat(parts, dim=2).cpu(), expected)
        whole = resting.encode_to_latent(expected.to(PRETENDED))
        pieces = resting.stream_encoder().encode(expected.to(PRETENDED))
        assert torch.equal(whole.cpu(), pieces.cpu())
        assert resting.temporal_stride == codec.temporal_stride


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("dmd", ("generator.model=Wan2.1-I2V-Tiny", "validation.every=2", "validation.count=2")),
        ("self_forcing_dmd", ("causal.rollout_frames=9",)),
    ],
)
def test_encoders_that_rest_change_no_number(
    method: str, words: tuple[str, ...], configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    data = f"data.path={tiny_root}/data/tiny/latents"
    words = (*words, data, "steps=2", "batch_size=2")
    run(configs[method], tmp_path / "there", *words)
    run(configs[method], tmp_path / "resting", *words, OFFLOAD)
    assert rows(tmp_path / "resting") == rows(tmp_path / "there")
    for picture in (tmp_path / "there").rglob("*.png"):
        again = tmp_path / "resting" / picture.relative_to(tmp_path / "there")
        assert again.read_bytes() == picture.read_bytes()


def test_all_encoders_and_the_codec_of_a_run_rest_between_batches(
    configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    words = ("generator.model=Wan2.1-I2V-Tiny", f"data.path={tiny_root}/data/tiny/latents", OFFLOAD)
    with built(configs["dmd"], tmp_path, *words) as trainer:
        idle = trainer.parts.batches.encoders.idle
        kinds = [type(one.module).__name__ for one in idle]
        came: list[str] = []
        for one in idle:
            awake = one._put

            def noting(place: object, one: Idle = one, awake: object = awake) -> None:
                came.append(type(one.module).__name__)
                awake(place)  # type: ignore[operator]

            one._put = noting  # type: ignore[method-assign, assignment]
        trainer.parts.batches(0, range(2))
        assert not any(one.here for one in idle)
    assert sorted(kinds) == ["PatchCodec", "WanCLIPEncoder", "WanTextEncoder"]
    assert sorted(came) == sorted(kinds * 2)  # each came once for the batch, and went once
