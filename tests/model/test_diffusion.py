"""Flow matching on real latents: the target, the noise levels, the dropped captions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from model.base import Parts
from model.diffusion import Diffusion, DiffusionConfig
from model.flow import shift
from model.types import FULL_ATTENTION, Batch, Conditioning, Context, Prediction
from tests.gaussian import SHAPE, batch_of, streams_of_step

SIZE = 400


@dataclass(eq=False)
class Stubborn:
    """A denoiser that always says velocity -3, and keeps what it was asked."""

    asked: list[tuple[Tensor, Tensor, Conditioning]] = field(default_factory=list)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        assert vars(context) == vars(FULL_ATTENTION)
        self.asked.append((x, sigma, conditioning))
        return Prediction(x, torch.full_like(x, -3.0))


def real(size: int = SIZE) -> Batch:
    """A batch whose captions say 2, whose negative prompt says 0, and whose latents are all 3."""
    return replace(batch_of(size, mean=2.0), x0=torch.full((size, *SHAPE), 3.0))


def ask(config: DiffusionConfig, batch: Batch) -> tuple[Tensor, Tensor, Conditioning]:
    """What the network is asked for one batch: x, sigma and conditioning."""
    net = Stubborn()
    Diffusion(config, Parts({"generator": net})).generator_loss(batch, streams_of_step(SIZE))
    return net.asked[0]


def test_the_target_is_noise_minus_latents() -> None:
    method = Diffusion(DiffusionConfig(), Parts({"generator": Stubborn()}))
    loss = method.generator_loss(real(), streams_of_step(SIZE)).loss
    # noise - 3, minus the -3 that was said: the error is the noise.
    assert float(loss) == pytest.approx(1.0, abs=0.02)


def test_the_network_sees_latents_on_the_straight_path_to_noise() -> None:
    x, sigma, _ = ask(DiffusionConfig(), real())
    level = sigma[:, :, None, None, None]
    noise = (x - (1.0 - level) * 3.0) / level
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("timestep_shift", [1.0, 3.0])
def test_noise_levels_are_shifted_uniform(timestep_shift: float) -> None:
    _, sigma, _ = ask(DiffusionConfig(timestep_shift=timestep_shift), real())
    assert sigma.shape == (SIZE, 1)
    for quantile in (0.25, 0.5, 0.75):
        expected = shift(quantile, timestep_shift)
        assert float(sigma.quantile(quantile)) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(("dropout", "kept"), [(0.0, 1.0), (0.3, 0.7), (1.0, 0.0)])
def test_captions_are_dropped_at_their_rate(dropout: float, kept: float) -> None:
    _, _, conditioning = ask(DiffusionConfig(caption_dropout=dropout), real())
    assert set(conditioning.text.flatten().tolist()) <= {0.0, 2.0}
    assert float((conditioning.text == 2.0).float().mean()) == pytest.approx(kept, abs=0.06)


def test_a_dropped_caption_leaves_the_image() -> None:
    image = Conditioning(
        torch.zeros(SIZE, 1, 1), torch.ones(SIZE, 1, 1), torch.ones(SIZE, 20, 1, 1, 1)
    )
    batch = replace(real(), conditioning=image, unconditional=image)
    _, _, conditioning = ask(DiffusionConfig(caption_dropout=1.0), batch)
    assert conditioning.clip is image.clip
    assert conditioning.first_frame is image.first_frame
