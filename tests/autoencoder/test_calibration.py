import pytest
import torch

from ldm.autoencoder.calibration import Statistics, fixed, per_channel, scalar
from ldm.autoencoder.identity import Identity
from ldm.autoencoder.posterior import DeterministicPosterior, DiagonalGaussian


def posteriors(n: int = 10) -> tuple[DiagonalGaussian, torch.Tensor]:
    """And very many samples of them, (B, C, places)."""
    torch.manual_seed(0)
    mean = (
        torch.randn(n, 3, 2, 2, dtype=torch.float64) * torch.tensor([0.5, 2, 8])[:, None, None]
        + torch.tensor([1.0, -3, 0])[:, None, None]
    )
    logvar = torch.randn(n, 3, 2, 2, dtype=torch.float64)
    posterior = DiagonalGaussian(mean, logvar)
    return posterior, torch.cat([posterior.sample(torch.randn_like(mean)).flatten(2) for _ in range(1500)], 2)


def test_statistics_equal_those_of_samples():
    posterior, samples = posteriors()
    found = Statistics.of([posterior], 3)
    assert found.images == 10
    torch.testing.assert_close(found.mean, samples.mean((0, 2)), atol=0.02, rtol=0)
    torch.testing.assert_close(found.variance, samples.var((0, 2)), atol=0, rtol=0.02)


def test_statistics_combine_over_batches_and_processes():
    """Each process gives its sums; all have the statistics of the whole."""
    posterior, _ = posteriors()
    whole = Statistics.of([posterior], 3)

    def part(rows: slice) -> DiagonalGaussian:
        return DiagonalGaussian(posterior.mean[rows], posterior.logvar[rows])

    shares, sums = ([part(slice(0, 3)), part(slice(3, 4))], [part(slice(4, 10))], []), []
    for share in shares:
        with pytest.raises(StopIteration):
            Statistics.of(share, 3, total=lambda own: sums.append(own) or next(iter(())))
    for share in shares:
        found = Statistics.of(share, 3, total=lambda own: torch.stack(sums).sum(0))
        assert found.images == 10
        torch.testing.assert_close(found.mean, whole.mean)
        torch.testing.assert_close(found.variance, whole.variance)


@pytest.mark.parametrize("choice", [per_channel, scalar])
def test_calibration_gives_unit_variance(choice):
    posterior, samples = posteriors()
    shift, scale = choice(Statistics.of([posterior], 3))
    z = (samples - shift[:, None]) * scale[:, None]
    if choice is per_channel:
        torch.testing.assert_close(z.mean((0, 2)), torch.zeros(3).double(), atol=0.02, rtol=0)
        torch.testing.assert_close(z.var((0, 2)), torch.ones(3).double(), atol=0, rtol=0.02)
    else:  # as Stable Diffusion: one divisor, nothing subtracted
        assert not shift.any()
        assert len(scale.unique()) == 1
        assert z.std().item() == pytest.approx(1, rel=0.01)


def test_fixed_keeps_published_scale():
    posterior, _ = posteriors()
    shift, scale = fixed(Statistics.of([posterior], 3), scale=0.18215)
    assert scale.tolist() == [0.18215] * 3
    assert shift.tolist() == [0.0] * 3


def test_calibrate_applies_chosen_statistics():
    space = Identity(3)
    image = torch.randn(50, 3, 4, 4) * 3 + 1
    space.calibrate([image[:20], image[20:]], scalar)
    assert space.calibrated_on == 50
    assert space.encode(image).std().item() == pytest.approx(1, rel=1e-3)
    assert not space.shift.any()
    space.calibrate([image], per_channel)
    torch.testing.assert_close(space.encode(image).mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)


def test_statistics_of_deterministic_posterior_are_exact():
    found = Statistics.of([DeterministicPosterior(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))], 1)
    assert (found.mean.item(), found.variance.item()) == (2, 1)
