import torch
from torch.distributions import Normal, kl_divergence

from ldm.autoencoder.posterior import DiagonalGaussian


def test_posterior_moments_are_mean_and_clamped_log_variance():
    moments = torch.tensor([1.0, -2.0, -50.0, 40.0]).reshape(1, 4, 1, 1)
    posterior = DiagonalGaussian.of(moments)
    assert posterior.mean.flatten().tolist() == [1.0, -2.0]
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]
    assert torch.equal(posterior.mode, posterior.mean)
    inside = torch.randn(2, 6, 3, 3)
    assert torch.equal(DiagonalGaussian.of(inside).moments, inside)


def test_posterior_sample_has_its_moments():
    torch.manual_seed(0)
    posterior = DiagonalGaussian(
        torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), 2 * torch.tensor(0.5).log())
    )
    z = posterior.sample(torch.randn(1, 1, 200, 200))
    assert abs(z.mean() - 3.0) < 0.01
    assert abs(z.std() - 0.5) < 0.01
    assert torch.equal(posterior.sample(torch.zeros(1, 1, 200, 200)), posterior.mean)


def test_posterior_kl_matches_closed_form():
    torch.manual_seed(0)
    posterior = DiagonalGaussian.of(torch.randn(3, 4, 2, 5, dtype=torch.float64))
    one = torch.ones((), dtype=torch.float64)
    expected = kl_divergence(Normal(posterior.mean, (0.5 * posterior.logvar).exp()), Normal(0 * one, one)).sum(
        (1, 2, 3)
    )
    torch.testing.assert_close(posterior.kl(), expected)
    assert torch.equal(DiagonalGaussian(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).kl(), torch.zeros(1))


def test_posterior_kl_per_channel_averages_over_pixels():
    torch.manual_seed(0)
    posterior = DiagonalGaussian.of(torch.randn(3, 4, 2, 5, dtype=torch.float64))
    torch.testing.assert_close(posterior.kl_per_channel().sum() * 10, posterior.kl().mean())
    assert posterior.kl_per_channel().shape == (2,)
    assert torch.equal(posterior.variance, posterior.logvar.exp())


def test_sample_adds_noise_times_standard_deviation():
    mean, variance, noise = (
        torch.tensor(x).double().reshape(1, 2, 1, 1) for x in ([1.0, -2.0], [1.0, 4.0], [3.0, 5.0])
    )
    sample = DiagonalGaussian(mean, variance.log()).sample(noise)
    torch.testing.assert_close(sample, mean + variance.sqrt() * noise, rtol=1e-14, atol=0)
