"""Videos that begin with a clean first frame: sampled as diffusers does, and never touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.conditioning import first_latents
from model.encoders.vae import WanVAEWrapper
from model.encoders.vae_names import to_diffusers
from model.given import on_given
from model.types import FULL_ATTENTION, Conditioning
from model.wan.cache import KVCache
from model.wan.config import WanConfig
from model.wan.transformer import WanTransformer
from model.wan_wrapper import WanDiffusionWrapper
from pipeline.bidirectional import BidirectionalInferencePipeline, BidirectionalTrainingPipeline
from pipeline.protocol import sample
from pipeline.teacher import (
    SamplingConfig,
    TeacherInferencePipeline,
    build_scheduler,
    integrate,
    trajectory,
)
from tests.folders import vae_state
from tests.gaussian import SHAPE, Affine, Watched, batch_of, saying, streams, streams_of_step
from tests.model.test_transformer import diffusers_twin, random

WanFactory = Callable[..., WanTransformer]

WAN = WanConfig(
    dim=48, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=32, text_len=12, text_dim=20
)
SOLVERS = pytest.mark.parametrize("solver", ["euler", "unipc"])
STEPS, GUIDANCE, SIGMAS = 6, 5.0, [1.0, 0.9375, 0.8333, 0.625]


def exact(config: SamplingConfig) -> Any:
    """Our scheduler, its levels set, with timesteps that are not cut to whole numbers."""
    made = build_scheduler(config)
    made.timesteps = 1000.0 * made.sigmas[:-1]
    made.set_timesteps = lambda *_, **__: None
    return made


@pytest.fixture(scope="module")
def vae() -> Any:
    from diffusers import AutoencoderKLWan

    made = AutoencoderKLWan(base_dim=4).eval()
    made.load_state_dict({to_diffusers(k): v for k, v in vae_state(base_dim=4).items()})
    return made


def theirs(kind: str, model: WanTransformer, vae: Any, config: SamplingConfig, **words: Any) -> Any:
    """Latents by a pipeline of diffusers with per-token timesteps, from the same noise."""
    import diffusers

    parts = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": vae,
        "transformer": diffusers_twin(model),
        "scheduler": exact(config),
        "expand_timesteps": True,
    }
    pipeline = getattr(diffusers, kind)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    text = random(2, 1, 12, 20, seed=5)
    with torch.no_grad():
        return pipeline(
            prompt_embeds=text[0],
            negative_prompt_embeds=text[1],
            height=32,
            width=48,
            num_frames=9,
            num_inference_steps=config.steps,
            guidance_scale=config.cfg_scale,
            latents=noise(),
            output_type="latent",
            **words,
        ).frames


def noise() -> Tensor:
    return random(1, 16, 3, 4, 6, seed=3)


def ours(model: WanTransformer, config: SamplingConfig, given: Tensor | None) -> Tensor:
    cond, uncond = (Conditioning(text) for text in random(2, 1, 12, 20, seed=5))
    return integrate(WanDiffusionWrapper(model), noise(), cond, uncond, config, given=given)


@SOLVERS
def test_image_to_video_gives_the_latents_of_diffusers(
    tiny_wan: WanFactory, vae: Any, solver: Any
) -> None:
    model, config = tiny_wan(WAN), SamplingConfig(STEPS, GUIDANCE, 5.0, solver)
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    expected = theirs("WanImageToVideoPipeline", model, vae, config, image=image)
    given = first_latents(WanVAEWrapper(vae), 2.0 * image - 1.0)
    found = ours(model, config, given)
    difference = float((found - expected).abs().max())
    print(f"{solver}: {difference:.1e} from diffusers, of size {float(expected.std()):.1f}")
    assert difference < 1e-4
    assert torch.equal(found[:, :, :1], given)
    assert float((found - ours(model, config, None)).abs().max()) > 0.1  # the image matters


@SOLVERS
def test_text_to_video_gives_the_latents_of_diffusers(
    tiny_wan: WanFactory, vae: Any, solver: Any
) -> None:
    model, config = tiny_wan(WAN), SamplingConfig(STEPS, GUIDANCE, 5.0, solver)
    expected = theirs("WanPipeline", model, vae, config)
    difference = float((ours(model, config, None) - expected).abs().max())
    print(f"{solver}: {difference:.1e} from diffusers")
    assert difference < 1e-4


def given_frames() -> Tensor:
    return random(2, SHAPE[0], 1, *SHAPE[2:], seed=7)


def samplers(net: Any) -> list[Any]:
    """Every pipeline that makes whole clips."""
    return [
        BidirectionalInferencePipeline(net, SIGMAS),
        TeacherInferencePipeline(net, SamplingConfig(5, 2.0, 5.0, "euler")),
        TeacherInferencePipeline(net, SamplingConfig(5, 2.0, 5.0, "unipc")),
    ]


@pytest.mark.parametrize("which", range(3))
def test_the_network_sees_given_frames_clean_at_level_0(which: int) -> None:
    net = Watched(Affine())
    given = given_frames()
    x0 = sample(
        samplers(net)[which], saying(2.0, 2), saying(0.0, 2), SHAPE, streams(2), initial=given
    )
    assert torch.equal(x0[:, :, :1], given)
    assert len(net.calls) >= 4
    for call in net.calls:
        assert torch.equal(call.x[:, :, :1], given.repeat(len(call.x) // 2, 1, 1, 1, 1))
        assert call.sigma.shape == (len(call.x), SHAPE[1])
        assert not call.sigma[:, 0].any()
        assert torch.equal(call.sigma[:, 1], call.sigma[:, 2])
        assert bool((call.sigma[:, 1] > 0.0).all())


@pytest.mark.parametrize("which", range(3))
def test_given_frames_that_fill_the_clip_are_refused(which: int) -> None:
    message = "3 given frames of 3 leave none to make; give fewer, or make longer clips"
    with pytest.raises(ValueError, match=message):
        sample(
            samplers(Affine())[which],
            saying(2.0, 2),
            saying(0.0, 2),
            SHAPE,
            streams(2),
            initial=torch.zeros(2, *SHAPE),
        )


@SOLVERS
def test_every_state_of_a_trajectory_begins_with_the_given_frame(solver: Any) -> None:
    given, config = given_frames(), SamplingConfig(5, 2.0, 5.0, solver)
    start = streams(2).randn(SHAPE)
    told = (saying(3.0, 2), saying(0.0, 2))
    states = list(trajectory(Affine(), start, *told, config, given=given))
    assert len(states) == 6
    assert all(torch.equal(x[:, :, :1], given) for x in states)
    assert torch.equal(states[0][:, :, 1:], start[:, :, 1:])


def test_a_rollout_begins_with_what_its_batch_gives() -> None:
    given, net = given_frames(), Watched(Affine())
    batch = replace(batch_of(2, mean=2.0), given=given)
    pipeline = BidirectionalTrainingPipeline(SIGMAS)
    made = pipeline(net, batch, streams_of_step(2, 1), grad=True)
    assert made.given_frames == 1
    assert torch.equal(made.x0[:, :, :1], given)
    assert all(torch.equal(call.x[:, :, :1], given) for call in net.calls)
    (gradient,) = torch.autograd.grad(made.x0.square().sum(), made.x0)
    assert bool(gradient.any())


def test_a_rollout_that_exits_last_makes_what_inference_makes_of_the_image() -> None:
    given, net = given_frames(), Affine()
    batch = replace(batch_of(2, mean=2.0), given=given)
    pipeline = BidirectionalTrainingPipeline(SIGMAS[:1])
    rng = streams_of_step(2, 1)
    made = pipeline(net, batch, rng, grad=False).x0
    again = sample(
        BidirectionalInferencePipeline(net, SIGMAS[:1]),
        batch.conditioning,
        batch.unconditional,
        SHAPE,
        streams_of_step(2, 1).samples,
        initial=given,
    )
    assert torch.equal(made, again)


def test_levels_of_given_frames_are_not_mistaken_for_those_of_all(tiny_wan: WanFactory) -> None:
    """One cache serves passes with and without given frames at one noise level."""
    net, x = WanDiffusionWrapper(tiny_wan()), random(1, 16, 3, 4, 4)
    text, sigma = Conditioning(random(1, 12, 64, seed=2)), torch.full((1, 1), 0.5)
    given = on_given(net, random(1, 16, 1, 4, 4, seed=4))
    shared = replace(FULL_ATTENTION, cache=KVCache(), level=0.5)
    with torch.no_grad():
        for one in (net, given, net, given):
            # A tensor of all frames' levels has the shape of one with a given frame.
            for levels in (sigma, sigma.expand(-1, 3)):
                kept = one(x, levels, text, context=shared).velocity
                anew = one(x, levels, text, context=replace(shared, cache=None)).velocity
                assert torch.equal(kept, anew)
