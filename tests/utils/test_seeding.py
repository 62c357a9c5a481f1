"""Random streams that depend on their keys alone."""

from __future__ import annotations

import pytest
import torch

from utils.seeding import derive_seed, generator, sample_rng, step_rng

CPU = torch.device("cpu")


def test_a_seed_is_the_same_on_every_machine() -> None:
    assert derive_seed(0, "weights", "head") == 7377528156858800252


@pytest.mark.parametrize("key", [(1, "noise"), (0, "sigma"), (0, "noise", 0), ("noise", 0)])
def test_another_key_gives_another_seed(key: tuple[int | str, ...]) -> None:
    assert derive_seed(*key) != derive_seed(0, "noise")


def test_seeds_fit_a_generator() -> None:
    assert all(0 <= derive_seed("seed", i) < 2**63 for i in range(100))


def test_a_samples_noise_does_not_depend_on_its_batch() -> None:
    together = sample_rng(0, "noise", [4, 5, 6], CPU).randn((2, 3))
    alone = sample_rng(0, "noise", [5], CPU).randn((2, 3))
    assert torch.equal(together[1], alone[0])


def test_samples_of_a_batch_get_different_noise() -> None:
    noise = sample_rng(0, "noise", [4, 5], CPU).randn((8,))
    assert not torch.equal(noise[0], noise[1])


def test_successive_draws_differ() -> None:
    rng = sample_rng(0, "noise", [4], CPU)
    assert not torch.equal(rng.randn((8,)), rng.randn((8,)))


def test_noise_is_standard_normal() -> None:
    noise = sample_rng(0, "noise", range(64), CPU).randn((1000,))
    assert noise.mean().abs() < 0.02
    assert abs(float(noise.std()) - 1.0) < 0.02


def test_uniform_noise_has_one_number_per_sample_by_default() -> None:
    values = sample_rng(0, "sigma", range(1000), CPU).rand()
    assert values.shape == (1000,)
    assert abs(float(values.mean()) - 0.5) < 0.05


def test_drawing_from_a_subset_advances_the_original() -> None:
    rng, twin = (sample_rng(0, "noise", [4, 5], CPU) for _ in range(2))
    from_subset = rng.subset([1]).randn((3,))
    assert torch.equal(from_subset[0], twin.randn((3,))[1])
    assert torch.equal(rng.randn((3,))[1], twin.randn((3,))[1])


def test_drawing_from_a_subset_leaves_the_others_alone() -> None:
    rng, twin = (sample_rng(0, "noise", [4, 5], CPU) for _ in range(2))
    rng.subset([1]).randn((3,))
    assert torch.equal(rng.randn((3,))[0], twin.randn((3,))[0])


def test_ranks_share_the_shared_stream_and_split_the_samples() -> None:
    whole = step_rng(0, "generator", step=3, first=12, indices=[0, 1, 2, 3], device=CPU)
    second = step_rng(0, "generator", step=3, first=12, indices=[2, 3], device=CPU)
    assert torch.equal(whole.samples.randn((5,))[2:], second.samples.randn((5,)))
    assert int(torch.randint(1000, (), generator=whole.shared)) == int(
        torch.randint(1000, (), generator=second.shared)
    )


@pytest.mark.parametrize(("phase", "step"), [("critic", 3), ("generator", 4)])
def test_phases_and_steps_have_shared_streams_of_their_own(phase: str, step: int) -> None:
    one = step_rng(0, "generator", step=3, first=0, indices=[0], device=CPU)
    other = step_rng(0, phase, step=step, first=0, indices=[0], device=CPU)
    assert one.shared.initial_seed() != other.shared.initial_seed()


def test_samples_are_keyed_by_their_number_in_the_whole_run() -> None:
    early = step_rng(0, "generator", step=3, first=12, indices=[4], device=CPU)
    late = step_rng(0, "generator", step=4, first=16, indices=[0], device=CPU)
    assert torch.equal(early.samples.randn((5,)), late.samples.randn((5,)))


def test_generators_of_one_key_agree() -> None:
    assert torch.equal(
        torch.rand(3, generator=generator(1, "x")), torch.rand(3, generator=generator(1, "x"))
    )
