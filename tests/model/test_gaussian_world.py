"""Whether distillation learns: exact teachers, exact or learned critics, students that start wrong.

Exact worlds hold the optimal critic of the student as it is now, so that what a method's gradient
vanishes at is visible without the noise of a critic that lags. Tolerances are stated in each test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from model.base import Method, Parts
from model.causvid import CausVid, CausVidConfig
from model.discriminator import AdversarialConfig, DiscriminatorOutput
from model.dmd import DMD, DMDConfig
from model.flow import step_sigmas
from model.gan import GAN, GANConfig
from model.matching import DistributionMatching
from model.sid import SiD, SiDConfig
from model.types import Batch, Conditioning, Context, Denoiser, LossOutput, Prediction
from pipeline.bidirectional import BidirectionalInferencePipeline, BidirectionalTrainingPipeline
from pipeline.data import DataRollout
from pipeline.protocol import sample
from tests.gaussian import (
    MLP,
    SHAPE,
    Affine,
    AffineMaps,
    Exact,
    Normals,
    Samples,
    batch_of,
    correlated,
    drawn_noise,
    expected_x0,
    fast_streams,
    saying,
    streams,
    streams_of_step,
)
from utils.seeding import generator

Loss = Callable[[Batch, object], LossOutput]

# ---- a teacher with correlated elements, and at each step the student's own optimal critic ----

SMALL = (2, 2, 2, 1)  # [C, F, H, W]
ELEMENTS, SIZE = 8, 64
EXACT_STEPS = 300  # per noise level of the student
TEACHER = correlated(ELEMENTS)
SHIFT = 2.0  # of the levels at which samples are scored: low enough to see small variances
ONE, TWO = step_sigmas([1000], 5.0), step_sigmas([1000, 500], 5.0)


@dataclass(frozen=True, eq=False)
class LogRatio:
    """The optimal discriminator: log p_real / p_fake of noisy samples."""

    fake: Callable[[], Normals]

    def __call__(
        self, net: Denoiser, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> DiscriminatorOutput:
        del net
        real = TEACHER.log_density(x, sigma, conditioning)
        logits = real - self.fake().log_density(x, sigma, conditioning)
        return DiscriminatorOutput(logits, torch.ones_like(logits))


@dataclass(frozen=True, eq=False)
class Task:
    """A method and its settings."""

    cls: type[Method]
    config: object

    @property
    def on_data(self) -> bool:
        return self.cls is CausVid

    @property
    def discriminates(self) -> bool:
        return isinstance(self.config, GANConfig) or (
            isinstance(self.config, DMDConfig) and self.config.discriminates
        )


TASKS = {
    "dmd": Task(DMD, DMDConfig(SHIFT, cfg_scale=1.0)),
    "dmd with a gan term": Task(DMD, DMDConfig(SHIFT, cfg_scale=1.0, gan_weight=0.1)),
    "forward kl": Task(DMD, DMDConfig(SHIFT, cfg_scale=1.0, divergence="forward_kl")),
    "jensen-shannon": Task(DMD, DMDConfig(SHIFT, cfg_scale=1.0, divergence="jensen_shannon")),
    "hellinger": Task(DMD, DMDConfig(SHIFT, cfg_scale=1.0, divergence="hellinger")),
    "jeffreys": Task(DMD, DMDConfig(SHIFT, cfg_scale=1.0, divergence="jeffreys")),
    "softened reverse kl": Task(
        DMD, DMDConfig(SHIFT, cfg_scale=1.0, divergence="softened_reverse_kl")
    ),
    "sid 0.5": Task(SiD, SiDConfig(SHIFT, cfg_scale=1.0, alpha=0.5)),
    "sid 1.0": Task(SiD, SiDConfig(SHIFT, cfg_scale=1.0, alpha=1.0)),
    "sid 1.2": Task(SiD, SiDConfig(SHIFT, cfg_scale=1.0, alpha=1.2)),
    "causvid": Task(CausVid, CausVidConfig(SHIFT, cfg_scale=1.0)),
    "gan": Task(GAN, GANConfig(SHIFT)),
    "relativistic gan": Task(
        GAN, GANConfig(SHIFT, adversarial=AdversarialConfig(relativistic=True))
    ),
}
every_task = pytest.mark.parametrize("name", TASKS)
every_score_task = pytest.mark.parametrize("name", [n for n in TASKS if n.split()[-1] != "gan"])


def request(data: Normals, size: int, *key: int | str) -> Batch:
    """A batch with real latents."""
    shape = SMALL if data.means.shape[1] == ELEMENTS else POINT
    x0 = data.draw(size, generator("data", *key)).view(size, *shape)
    return Batch(saying(0.0, size), saying(0.0, size), shape, x0=x0)


def distil_exactly(task: Task, sigmas: list[float]) -> Normals:
    """What an affine student makes at its noise levels in the end, in closed form."""
    student = AffineMaps(sigmas, ELEMENTS)
    made = (lambda: student.predictions(TEACHER)) if task.on_data else student.exits

    def critic(
        x: Tensor, sigma: Tensor, conditioning: Conditioning, *, context: Context
    ) -> Prediction:
        del context
        return made()(x, sigma, conditioning)

    networks = {"generator": student, "critic": critic, "teacher": TEACHER}
    if task.discriminates:
        networks["discriminator"] = LogRatio(made)
    method = task.cls(task.config, Parts(networks, rollout(task, sigmas), sigmas))
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.5, 0.99))
    total = EXACT_STEPS * len(sigmas)
    for step in range(total):
        optimizer.param_groups[0]["lr"] = 0.05 * (1.0 - step / total)
        optimizer.zero_grad()
        batch = request(TEACHER, SIZE, step)
        method.generator_loss(batch, fast_streams(SIZE, "generator", step)).loss.backward()
        optimizer.step()
    return made()


def rollout(task: Task, sigmas: list[float]) -> DataRollout | BidirectionalTrainingPipeline:
    if task.on_data:
        return DataRollout(sigmas, None, teacher_forcing=False)
    return BidirectionalTrainingPipeline(sigmas)


@cache
def made_by(name: str, steps: int) -> Normals:
    return distil_exactly(TASKS[name], ONE if steps == 1 else TWO)


def distance(mean: Tensor, covariance: Tensor) -> tuple[float, float]:
    """To the teacher: largest error of a mean; Frobenius error of the covariance, relative."""
    target = TEACHER.covariances[0]
    wrong = (covariance - target).norm() / target.norm()
    return float((mean - TEACHER.means[0]).abs().max()), float(wrong)


def test_the_student_starts_far_from_the_teacher() -> None:
    start = AffineMaps(TWO, ELEMENTS).exits()
    mean, covariance = distance(start.means[1], start.covariances[1])
    assert mean > 1.0
    assert covariance > 0.4


@pytest.mark.parametrize("exit_step", [0, 1])
def test_the_closed_form_is_what_a_rollout_makes(exit_step: int) -> None:
    student = AffineMaps(TWO, ELEMENTS)
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    pipeline = BidirectionalInferencePipeline(student, TWO[: exit_step + 1])
    size, rng = 20_000, fast_streams(20_000, "check").samples
    x0 = sample(pipeline, saying(0.0, size), saying(0.0, size), SMALL, rng).flatten(1)
    made, covariance = student.exits(), torch.cov(x0.T)
    assert (x0.mean(0) - made.means[exit_step]).abs().max() < 0.05
    expected = made.covariances[exit_step]
    assert (covariance - expected).norm() < 0.03 * expected.norm()


@every_score_task
def test_a_one_step_student_reaches_mean_and_covariance(name: str) -> None:
    """To 0.02 and 0.1 %: with an exact critic the gradient vanishes there for every sample."""
    made = made_by(name, 1)
    mean, covariance = distance(made.means[0], made.covariances[0])
    assert mean < 0.02
    assert covariance < 1e-3


@every_task
def test_a_two_step_student_reaches_mean_and_covariance_over_its_exits(name: str) -> None:
    """To 0.02 and 1 %, pooled: the critic does not know at which exit a sample was taken.

    So single exits may lie on both sides of the teacher. The next test bounds by how much.
    """
    made = made_by(name, 2)
    mean = made.means.mean(0)
    apart = made.means - mean
    covariance = made.covariances.mean(0) + apart.T @ apart / len(apart)
    errors = distance(mean, covariance)
    assert errors[0] < 0.02
    assert errors[1] < 0.01


@every_task
def test_each_exit_of_a_two_step_student_comes_near(name: str) -> None:
    """To 0.5 and 10 %: exits at mean +- d with covariance - d d^T pool to nearly the teacher."""
    made = made_by(name, 2)
    for mean, covariance in zip(made.means, made.covariances, strict=True):
        errors = distance(mean, covariance)
        assert errors[0] < 0.5
        assert errors[1] < 0.1


# ---- two modes of unequal weight, a network as student, a critic that learns ----

POINT = (2, 1, 1, 1)
WEIGHTS = torch.tensor([0.35, 0.65])
MODES = Normals(
    torch.tensor([[-1.5, 1.0], [1.5, -1.0]]), 0.16 * torch.eye(2).repeat(2, 1, 1), WEIGHTS
)
MIXED = {
    "dmd": Task(DMD, DMDConfig(1.0, cfg_scale=1.0)),
    "sid 0.5": Task(SiD, SiDConfig(1.0, cfg_scale=1.0, alpha=0.5)),
    "sid 1.0": Task(SiD, SiDConfig(1.0, cfg_scale=1.0, alpha=1.0)),
    "causvid": Task(CausVid, CausVidConfig(1.0, cfg_scale=1.0)),
}
# A student's training takes seconds: one in the fast tier, the others in the slow one.
MIXED_NAMES = [
    "dmd",
    *(pytest.param(name, marks=pytest.mark.slow) for name in MIXED if name != "dmd"),
]
MIXED_SIZE, MIXED_STEPS = 256, 1000


@cache
def points_made_by(name: str) -> Tensor:
    """Samples [4000, 2] of the trained student: two steps from noise, or, of CausVid, from data."""
    task, student, critic = MIXED[name], MLP(2, seed=0), MLP(2, seed=10)
    networks = {"generator": student, "critic": critic, "teacher": MODES}
    method = task.cls(task.config, Parts(networks, rollout(task, TWO), TWO))
    assert isinstance(method, DistributionMatching)
    learn(method, {"generator": 5e-3, "critic": 1e-2}, every=2, steps=MIXED_STEPS)
    count = 4000
    batch, rng = request(MODES, count, "end"), fast_streams(count, "end")
    if task.on_data:
        return method.rollout(student, batch, rng, grad=False).x0.flatten(1)
    pipeline = BidirectionalInferencePipeline(student, TWO)
    return sample(pipeline, batch.conditioning, batch.unconditional, POINT, rng.samples).flatten(1)


def learn(method: DistributionMatching, rates: dict[str, float], *, every: int, steps: int) -> None:
    """Alternate critic and generator on points."""
    losses: dict[str, Loss] = {"generator": method.generator_loss, "critic": method.critic_loss}
    networks: dict[str, nn.Module] = {"generator": method.generator, "critic": method.critic}
    optimizers = {
        role: torch.optim.Adam(networks[role].parameters(), betas=(0.0, 0.99)) for role in rates
    }
    for step in range(steps):
        for role in rates if step % every == 0 else ("critic",):
            optimizers[role].param_groups[0]["lr"] = rates[role] * min(1.0, 2 - 2 * step / steps)
            optimizers[role].zero_grad()
            batch = request(MODES, MIXED_SIZE, role, step)
            losses[role](batch, fast_streams(MIXED_SIZE, role, step)).loss.backward()
            optimizers[role].step()


def nearest_mode(points: Tensor) -> Tensor:
    return torch.cdist(points, MODES.means).argmin(dim=1)


@pytest.mark.parametrize("name", MIXED_NAMES)
def test_both_modes_keep_their_weight(name: str) -> None:
    """0.35 to 0.65, within 0.05; no method drops the lighter one here."""
    share = (nearest_mode(points_made_by(name)) == 0).float().mean()
    assert float(share) == pytest.approx(0.35, abs=0.05)


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("name", MIXED_NAMES)
def test_samples_lie_at_the_modes(name: str, mode: int) -> None:
    """Their mean within a tenth of the distance between modes, 3.6; deviation 0.4 within 0.15."""
    points = points_made_by(name)
    near = points[nearest_mode(points) == mode]
    assert (near.mean(0) - MODES.means[mode]).norm() < 0.36
    assert float(near.std(0).mean()) == pytest.approx(0.4, abs=0.15)


def test_a_student_that_starts_as_noise_has_no_modes() -> None:
    points = torch.randn((4000, 2), generator=torch.Generator().manual_seed(0))
    near = points[nearest_mode(points) == 0]
    assert (near.mean(0) - MODES.means[0]).norm() > 0.5


# ---- one normal distribution, an affine student and an affine critic that learns ----

MEAN, BATCH, STEPS, GENERATOR_EVERY = 2.0, 8, 600, 3
SIGMAS = step_sigmas([1000, 750, 500, 250], 5.0)
LEARNED = {"dmd": Task(DMD, DMDConfig(cfg_scale=1.0)), "sid": Task(SiD, SiDConfig(cfg_scale=1.0))}
learned_critic = pytest.mark.parametrize("name", LEARNED)


@cache
def trained(name: str) -> DistributionMatching:
    """Distil N(2, 1) into an affine student of four steps with an affine critic."""
    networks = {"generator": Affine(0), "critic": Affine(100), "teacher": Exact(1.0)}
    task = LEARNED[name]
    method = task.cls(task.config, Parts(networks, BidirectionalTrainingPipeline(SIGMAS), SIGMAS))
    assert isinstance(method, DistributionMatching)
    rates = {"generator": 3e-3, "critic": 1e-2}
    optimizers = {
        role: torch.optim.Adam(networks[role].parameters(), lr=lr, betas=(0.5, 0.99))
        for role, lr in rates.items()
    }
    for step in range(STEPS):
        losses = {"critic": method.critic_loss}
        if step % GENERATOR_EVERY == 0:
            losses = {"generator": method.generator_loss, **losses}
        for role, loss in losses.items():
            optimizers[role].param_groups[0]["lr"] = rates[role] * (1.0 - step / STEPS)
            optimizers[role].zero_grad()
            loss(batch_of(BATCH, mean=MEAN), streams_of_step(BATCH, step, role)).loss.backward()
            optimizers[role].step()
    return method


def four_steps(student: Affine) -> Tensor:
    pipeline = BidirectionalInferencePipeline(student, SIGMAS)
    return sample(pipeline, saying(MEAN, 64), saying(0.0, 64), SHAPE, streams(64))


def test_the_student_starts_at_mean_zero() -> None:
    assert abs(float(four_steps(Affine(0)).mean())) < 0.05


@learned_critic
def test_the_four_step_student_reaches_the_teachers_mean(name: str) -> None:
    assert float(four_steps(trained(name).generator).mean()) == pytest.approx(MEAN, abs=0.05)


@learned_critic
def test_the_students_samples_reach_the_teachers_deviation(name: str) -> None:
    # The critic sees samples of all four exits and, being affine, only their pooled variance.
    student = trained(name)
    samples = [
        student.rollout(student.generator, batch_of(64), streams_of_step(64, i), grad=False).x0
        for i in range(40)
    ]
    assert float(torch.cat(samples).std()) == pytest.approx(1.0, abs=0.1)


@learned_critic
def test_the_critic_ends_at_the_students_own_velocity(name: str) -> None:
    x, sigma = streams(64, seed=1).randn(SHAPE), torch.full((64, 1), 0.8)
    learned = trained(name).critic(x, sigma, saying(MEAN, 64)).velocity
    exact = Exact(1.0)(x, sigma, saying(MEAN, 64)).velocity
    assert (learned - exact).norm() < 0.05 * exact.norm()


# ---- the gradient of a loss, against the written formula in float64 ----

CRITIC = correlated(ELEMENTS, seed=5)
HEAVY = {
    "reverse_kl": lambda r: 1.0 + 0.0 * r,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: r / (1.0 + r),
    "softened_reverse_kl": lambda r: 1.0 / (1.0 + r),
    "neyman": lambda r: 1.0 / r,
    "hellinger": lambda r: r**0.5,
    "jeffreys": lambda r: 1.0 + r,
}


@dataclass(frozen=True, eq=False)
class Fixed:
    """A discriminator that gives each sample a logit and a mean weight of its own."""

    logits: Tensor
    mean_weight: Tensor

    def __call__(
        self, net: Denoiser, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> DiscriminatorOutput:
        del net, sigma, conditioning
        return DiscriminatorOutput(self.logits + 0.0 * x.flatten(1).sum(1), self.mean_weight)


LOGITS, MEAN_WEIGHTS = torch.tensor([-5.0, -0.7, 0.4, 9.0]), torch.tensor([1.0, 0.5, 2.0, 0.01])


def gradients(
    config: DMDConfig, *, given_frames: int = 0, mean: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Of the loss in the samples [4, D]: what autograd finds, and what the papers write."""
    samples = Samples(fast_streams(4, "samples").samples.randn(SMALL), given_frames=given_frames)
    networks = {"generator": samples, "critic": CRITIC, "teacher": TEACHER}
    if config.discriminates:
        networks["discriminator"] = Fixed(LOGITS, MEAN_WEIGHTS)
    method = DMD(config, Parts(networks, samples.rollout))
    asked = Batch(saying(mean, 4), saying(0.0, 4), SMALL)
    method.generator_loss(asked, fast_streams(4, "gradient")).loss.backward()
    assert samples.x0.grad is not None

    at = drawn_noise(config, fast_streams(4, "gradient"), SMALL)
    x0, x = samples.x0.detach().double(), at.noised(samples.x0.detach())
    critic = expected_x0(CRITIC, x, at.sigma, mean).view_as(x0)[:, :, given_frames:]
    cond, uncond = (expected_x0(TEACHER, x, at.sigma, m).view_as(x0) for m in (mean, 0.0))
    teacher = (uncond + config.cfg_scale * (cond - uncond))[:, :, given_frames:]
    size = (x0[:, :, given_frames:] - teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    made = (critic - teacher) / size / critic.numel()
    if config.discriminates:
        ratio = LOGITS.double().clamp(-3.0, 3.0).exp()
        weight = HEAVY[config.divergence](ratio) / MEAN_WEIGHTS.double().clamp(min=0.049787068)
        made = made * weight[:, None, None, None, None]
    expected = torch.zeros_like(x0)
    expected[:, :, given_frames:] = made
    return samples.x0.grad, expected


def equal_to_a_millionth(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() < 1e-6 * expected.norm())


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_dmds_gradient_is_the_written_one(cfg_scale: float) -> None:
    assert equal_to_a_millionth(*gradients(DMDConfig(cfg_scale=cfg_scale), mean=0.5))


@pytest.mark.parametrize("divergence", HEAVY)
def test_a_divergence_weighs_each_samples_gradient(divergence: str) -> None:
    config = DMDConfig(cfg_scale=1.0, divergence=divergence, gan_weight=1e-30)  # type: ignore[arg-type]
    assert equal_to_a_millionth(*gradients(config))


@pytest.mark.parametrize("config", [DMDConfig(), DMDConfig(divergence="hellinger")])
def test_given_frames_have_no_gradient_and_no_part_in_the_size(config: DMDConfig) -> None:
    assert equal_to_a_millionth(*gradients(config, given_frames=1, mean=0.3))


def test_the_adversarial_term_adds_its_own_gradient() -> None:
    def gradient(gan_weight: float) -> Tensor:
        samples = Samples(fast_streams(4, "samples").samples.randn(SMALL))
        networks = {
            "generator": samples,
            "critic": CRITIC,
            "teacher": TEACHER,
            "discriminator": LogRatio(lambda: CRITIC),
        }
        config = DMDConfig(cfg_scale=1.0, gan_weight=gan_weight)
        method = DMD(config, Parts(networks, samples.rollout))
        loss = method.generator_loss(request(TEACHER, 4), fast_streams(4, "gradient")).loss
        return torch.autograd.grad(loss, samples.x0)[0]

    x0 = fast_streams(4, "samples").samples.randn(SMALL)
    at = drawn_noise(DMDConfig(), fast_streams(4, "gradient"), SMALL)
    x, sigma = at.noised(x0).float().view_as(x0), at.sigma.float()
    logit = TEACHER.log_density(x, sigma, saying(0.0, 4))
    logit = (logit - CRITIC.log_density(x, sigma, saying(0.0, 4))).double()
    # d log p / dx = -C^-1 (x - (1 - sigma) m) = ((1 - sigma) x0_hat - x) / sigma^2.
    rows = at.noised(x0)
    heads = [expected_x0(data, rows, at.sigma) for data in (TEACHER, CRITIC)]
    slope = (1.0 - at.sigma) * (heads[0] - heads[1]) / at.sigma**2
    expected = -torch.sigmoid(-logit)[:, None] * (1.0 - at.sigma) * slope / 4.0
    found = (gradient(1e3) - gradient(1e-30)).flatten(1) / 1e3
    assert (found - expected).norm() < 1e-4 * expected.norm()


# ---- the critic pulled after the generator (IDA) ----


@pytest.mark.parametrize(("role", "pull", "moved"), [
    ("generator", 0.03, 0.03), ("generator", 0.0, 0.0), ("critic", 0.03, 0.0),
])  # fmt: skip
def test_the_critic_moves_by_its_share_when_the_generator_has(
    role: str, pull: float, moved: float
) -> None:
    networks = {"generator": MLP(2, seed=0), "critic": MLP(2, seed=10), "teacher": MODES}
    own = {name: list(networks[name].parameters()) for name in ("generator", "critic")}
    parts = Parts(networks, BidirectionalTrainingPipeline(TWO), TWO, parameters=own)
    before = [p.detach().clone() for p in networks["critic"].parameters()]
    target = [p.detach().clone() for p in networks["generator"].parameters()]
    DMD(DMDConfig(critic_pull=pull), parts).after_update(role)
    for old, aim, new in zip(before, target, networks["critic"].parameters(), strict=True):
        torch.testing.assert_close(new, (1.0 - moved) * old + moved * aim)
    for aim, same in zip(target, networks["generator"].parameters(), strict=True):
        assert torch.equal(aim, same)
