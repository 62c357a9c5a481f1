"""A world in closed form: normal data, exact denoisers, and denoisers small enough to train.

The text of a conditioning, [B, 1, 1], is the mean of the data; so captions and guidance mean
something here too. Letters as in model/types.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from model.base import AlternatingConfig
from model.flow import expand, velocity_to_x0
from model.types import FULL_ATTENTION, Batch, Conditioning, Context, Denoiser, Prediction, Sample
from utils.seeding import SampleRNG, StepRNG, generator, sample_rng, step_rng

SHAPE = (2, 3, 4, 4)  # [C, F, H, W] of a sample
CPU = torch.device("cpu")


def saying(mean: float, batch: int) -> Conditioning:
    """The conditioning whose data has mean `mean`."""
    return Conditioning(torch.full((batch, 1, 1), mean))


def batch_of(size: int, *, mean: float = 0.0) -> Batch:
    """A batch that asks for data of mean `mean`; the negative prompt stands for mean 0."""
    return Batch(saying(mean, size), saying(0.0, size), SHAPE)


def streams(size: int, seed: int = 0) -> SampleRNG:
    """Random streams for `size` samples."""
    return sample_rng(seed, "test", range(size), CPU)


def streams_of_step(size: int, step: int = 0, phase: str = "generator") -> StepRNG:
    """The randomness of one loss."""
    return step_rng(0, phase, step=step, first=step * size, indices=range(size), device=CPU)


@dataclass(eq=False)
class Exact:
    """The optimal denoiser of N(text, std^2) per element, which keeps a record of its calls."""

    std: float = 1.0
    calls: list[tuple[int, float]] = field(default_factory=list)  # batch size, noise level

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """E[x0 | x], and the velocity that points there from x."""
        assert vars(replace(context, level=None, cache=None, side=None)) == vars(FULL_ATTENTION)
        assert context.cache is None or not context.cache.frames
        self.calls.append((len(x), float(sigma[0, 0])))
        level = expand(sigma)
        mean = conditioning.text[:, :, :, None, None]
        gain = (1.0 - level) * self.std**2 / ((1.0 - level) ** 2 * self.std**2 + level**2)
        x0 = mean + gain * (x - (1.0 - level) * mean)
        return Prediction(x0, (x - x0) / level)


class Affine(nn.Module):
    """velocity = a(sigma) x + b(sigma); a and b are a small network, and zero at first."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.coefficients = nn.Sequential(
            nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
        )
        with torch.no_grad():
            for i, p in enumerate(self.coefficients.parameters()):
                rng = torch.Generator().manual_seed(seed + i)
                p.copy_(torch.randn(p.shape, generator=rng) / p.shape[-1] ** 0.5)
            for p in self.coefficients[-1].parameters():
                p.zero_()

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """Predict from x at noise level sigma."""
        del conditioning, context
        scale, offset = self.coefficients(sigma[..., None]).unbind(-1)
        velocity = expand(scale) * x + expand(offset)
        return Prediction(velocity_to_x0(x, velocity, sigma), velocity)


@dataclass(frozen=True, eq=False)
class OneStream(SampleRNG):
    """All samples of a batch from one generator: much faster, for worlds that train."""

    size: int = 1

    def _draw(self, function: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        return function((self.size, *shape), generator=self.generators[0])


def fast_streams(size: int, *key: int | str) -> StepRNG:
    """The randomness of one loss, keyed by `key`; samples share their stream."""
    samples = OneStream([generator("samples", *key)], size)
    return StepRNG(generator("shared", *key), samples, range(size))


@dataclass(frozen=True, eq=False)
class Called:
    """What a network was asked, and how."""

    x: Tensor
    sigma: Tensor
    conditioning: Conditioning
    context: Context
    grad: bool  # under autograd


@dataclass(eq=False)
class Watched:
    """A denoiser that keeps what it was asked."""

    net: Denoiser
    calls: list[Called] = field(default_factory=list)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """What `net` says."""
        self.calls.append(Called(x, sigma, conditioning, context, torch.is_grad_enabled()))
        return self.net(x, sigma, conditioning, context=context)


@dataclass(frozen=True, eq=False)
class Said:
    """A denoiser that always says the same velocity."""

    velocity: float = 0.0

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """See the class."""
        del conditioning, context
        velocity = torch.full_like(x, self.velocity)
        return Prediction(velocity_to_x0(x, velocity, sigma), velocity)


@dataclass(frozen=True, eq=False)
class Normals:
    """The optimal denoiser of a mixture of K normal distributions over all D elements of a sample.

    E[x0 | x] = sum_k p(k | x) (m_k + (1 - sigma) S_k C_k^-1 (x - (1 - sigma) m_k)), where
    C_k = (1 - sigma)^2 S_k + sigma^2 is the covariance of x; by eigenvectors of S_k, in float64.
    The text [B, 1, 1] is added to all means.
    """

    means: Tensor  # [K, D]
    covariances: Tensor  # [K, D, D]
    weights: Tensor | None = None  # [K]; None = equal

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """E[x0 | x], and E[noise - x0 | x]; fp32."""
        del context
        turned, values, vectors, means = self.parts(x, sigma, conditioning)
        level = sigma[:, :, None].double()
        variance = (1.0 - level) ** 2 * values + level**2
        x0 = means + torch.einsum(
            "kde,bke->bkd", vectors, (1.0 - level) * values / variance * turned
        )
        velocity = -means + torch.einsum(
            "kde,bke->bkd", vectors, (level - (1.0 - level) * values) / variance * turned
        )
        belief = self.log_joint(x, sigma, conditioning).softmax(dim=1)[:, :, None]
        x0, velocity = ((belief * each).sum(1).view_as(x).float() for each in (x0, velocity))
        return Prediction(x0, velocity)

    def log_density(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """log p(x) at noise level sigma [B, 1], but for a constant of D. Returns [B]."""
        return self.log_joint(x, sigma, conditioning).logsumexp(dim=1).float()

    def log_joint(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """log p(x, k): [B, K]."""
        turned, values, _, _ = self.parts(x, sigma, conditioning)
        level = sigma[:, :, None].double()
        variance = (1.0 - level) ** 2 * values + level**2
        log_p = -0.5 * (turned.square() / variance + variance.log()).sum(dim=2)
        weights = torch.ones(len(values)) if self.weights is None else self.weights
        return log_p + (weights / weights.sum()).log()

    def parts(
        self, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x about each mean in eigenvectors [B, K, D]; eigenvalues [K, D]; vectors; means."""
        values, vectors = torch.linalg.eigh(self.covariances.double())
        means = self.means.double() + conditioning.text[:, :1]
        centred = x.flatten(1).double()[:, None] - (1.0 - sigma[:, :, None].double()) * means
        return torch.einsum("kde,bkd->bke", vectors, centred), values, vectors, means

    def draw(self, size: int, rng: torch.Generator) -> Tensor:
        """Clean samples [size, D]."""
        count = len(self.means)
        weights = torch.ones(count) if self.weights is None else self.weights
        which = torch.multinomial(weights, size, replacement=True, generator=rng)
        values, vectors = torch.linalg.eigh(self.covariances)
        noise = torch.randn((size, self.means.shape[1]), generator=rng) * values[which].sqrt()
        return self.means[which] + torch.einsum("bde,be->bd", vectors[which], noise)


def correlated(elements: int, seed: int = 0) -> Normals:
    """One normal distribution: another mean and variance per element, and a shared direction."""
    rng = torch.Generator().manual_seed(seed)
    mean = 1.5 * torch.randn((1, elements), generator=rng)
    variances = 0.3 + 0.7 * torch.rand((elements,), generator=rng)
    direction = torch.randn((elements, 1), generator=rng)
    direction = direction * (elements**0.5 / direction.norm()) * 0.5
    return Normals(mean, (variances.diag() + direction @ direction.T)[None])


class AffineMaps(nn.Module):
    """x0 = A x + b over all D elements, another A and b at each of some noise levels; A = 1 first.

    So each distribution that it makes of normal samples is normal, with moments in closed form.
    """

    def __init__(self, sigmas: Sequence[float], elements: int) -> None:
        super().__init__()
        self.sigmas = list(sigmas)
        self.a = nn.Parameter(torch.eye(elements).repeat(len(self.sigmas), 1, 1))
        self.b = nn.Parameter(torch.zeros(len(self.sigmas), elements))

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """Predict from x at listed noise levels sigma [B, 1]."""
        del conditioning, context
        which = (sigma - torch.tensor(self.sigmas)).abs().argmin(dim=1)
        x0 = torch.einsum("bde,be->bd", self.a[which], x.flatten(1)) + self.b[which]
        x0 = x0.view_as(x)
        return Prediction(x0, (x - x0) / expand(sigma))

    @torch.no_grad()
    def exits(self) -> Normals:
        """What a rollout from pure noise makes, pooled over its exit steps."""
        mean, covariance = torch.zeros_like(self.b[0]), torch.eye(len(self.b[0]))
        means, covariances = [], []
        for sigma, a, b in zip(self.sigmas, self.a, self.b, strict=True):
            noised = (1.0 - sigma) ** 2 * covariance + sigma**2 * torch.eye(len(b))
            mean, covariance = a @ ((1.0 - sigma) * mean) + b, a @ noised @ a.T
            means.append(mean)
            covariances.append(covariance)
        return Normals(torch.stack(means), torch.stack(covariances))

    @torch.no_grad()
    def predictions(self, data: Normals) -> Normals:
        """What it makes of one normal distribution's noised samples, pooled over noise levels."""
        means, covariances = [], []
        for sigma, a, b in zip(self.sigmas, self.a, self.b, strict=True):
            noised = (1.0 - sigma) ** 2 * data.covariances[0] + sigma**2 * torch.eye(len(b))
            means.append(a @ ((1.0 - sigma) * data.means[0]) + b)
            covariances.append(a @ noised @ a.T)
        return Normals(torch.stack(means), torch.stack(covariances))


class MLP(nn.Module):
    """velocity = a network of x and sigma over all D elements; zero at first."""

    def __init__(self, elements: int, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(elements + 1, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, elements),
        )
        with torch.no_grad():
            for i, p in enumerate(self.layers.parameters()):
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i))
                p.copy_(noise / p.shape[-1] ** 0.5)
            for p in self.layers[-1].parameters():
                p.zero_()

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """Predict from x at noise level sigma [B, 1]."""
        del conditioning, context
        velocity = self.layers(torch.cat([x.flatten(1), sigma], dim=1)).view_as(x)
        return Prediction(velocity_to_x0(x, velocity, sigma), velocity)


class Samples(nn.Module):
    """A generator whose samples are its weights, so that its gradient is that of the loss in x0."""

    def __init__(self, x0: Tensor, *, given_frames: int = 0) -> None:
        super().__init__()
        self.x0 = nn.Parameter(x0.clone())
        self.given_frames = given_frames

    def rollout(self, net: Denoiser, batch: Batch, rng: StepRNG, *, grad: bool) -> Sample:
        """A Rollout that draws nothing."""
        assert net is self
        del batch, rng
        return Sample(self.x0 if grad else self.x0.detach(), given_frames=self.given_frames)


@dataclass(frozen=True, eq=False)
class NoiseDraw:
    """The level and the noise that a generator's loss draws for its samples, in float64."""

    sigma: Tensor  # [B, 1]
    noise: Tensor  # [B, C, F, H, W]

    def noised(self, x0: Tensor) -> Tensor:
        """x0 [B, C, F, H, W] at that level, as rows [B, D]."""
        level = self.sigma[:, :, None, None, None]
        return ((1.0 - level) * x0.double() + level * self.noise).flatten(1)


def drawn_noise(config: AlternatingConfig, rng: StepRNG, shape: Sequence[int]) -> NoiseDraw:
    """The level u k / (1 + (k - 1) u), cut to its bounds, of a uniform u; then the noise."""
    uniform, k = rng.samples.rand((1,)).double(), config.timestep_shift
    sigma = (k * uniform / (1.0 + (k - 1.0) * uniform)).clamp(config.min_sigma, config.max_sigma)
    return NoiseDraw(sigma, rng.samples.randn(shape).double())


def gain(data: Normals, sigma: Tensor) -> Tensor:
    """G of one normal distribution's E[x0 | x] = m + G (x - (1 - sigma) m): [B, D, D], float64."""
    level, covariance = sigma[:, :, None].double(), data.covariances[0].double()
    noised = (1.0 - level) ** 2 * covariance + level**2 * torch.eye(len(covariance))
    return (1.0 - level) * torch.linalg.solve(noised, covariance.expand_as(noised), left=False)


def expected_x0(data: Normals, x: Tensor, sigma: Tensor, mean: float = 0.0) -> Tensor:
    """E[x0 | x] of rows x [B, D], with `mean` added to the distribution's; float64."""
    centre = data.means[0].double() + mean
    return centre + torch.einsum(
        "bde,be->bd", gain(data, sigma), x - (1.0 - sigma.double()) * centre
    )
