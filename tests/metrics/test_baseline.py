import pytest
import torch

from ldm.metrics.baseline import PCAGaussian, add_noise
from ldm.tensors import KeyedNoise

LABEL = torch.arange(400) % 2


def images() -> torch.Tensor:
    """Two classes in 12 dimensions, each with three strong directions and a little of everything."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(2, 3, 12, generator=generator) * torch.tensor([0.08, 0.05, 0.03])[:, None]
    mean = torch.tensor([-0.3, 0.2])[:, None].expand(2, 12)
    x = torch.einsum("nr,nrd->nd", torch.randn(400, 3, generator=generator), basis[LABEL]) + mean[LABEL]
    return (x + 0.001 * torch.randn(400, 12, generator=generator)).view(400, 1, 3, 4)


def test_pca_gaussian_samples_have_class_mean_and_covariance():
    x = images()
    pca = PCAGaussian.fit(x, LABEL, rank=3)
    label = torch.arange(8000) % 2
    y = pca.sample(label, KeyedNoise(0, range(8000)))
    assert y.shape == (8000, 1, 3, 4)
    assert y.abs().max() <= 1
    for k in (0, 1):
        a, b = x[k == LABEL].flatten(1), y[label == k].flatten(1)
        torch.testing.assert_close(b.mean(0), a.mean(0), atol=0.01, rtol=0)
        torch.testing.assert_close(b.T.cov(), a.T.cov(), atol=0.002, rtol=0.1)
        torch.testing.assert_close((pca.basis[k] @ pca.basis[k].T), a.T.cov(), atol=1e-5, rtol=0)


def test_pca_gaussian_of_few_samples_is_that_of_the_covariance():
    """With fewer samples than dimensions the smaller matrix is decomposed: it has the same leading components."""
    x = images()[LABEL == 0][:11]
    pca = PCAGaussian.fit(x, torch.zeros(11, dtype=torch.long), rank=3)
    variance, vectors = torch.linalg.eigh(x.flatten(1).double().T.cov())
    expected = (vectors[:, -3:] * variance[-3:]) @ vectors[:, -3:].T
    torch.testing.assert_close(pca.basis[0].double() @ pca.basis[0].double().T, expected, atol=1e-8, rtol=1e-4)


def test_pca_gaussian_sample_depends_on_key_only():
    pca = PCAGaussian.fit(images(), LABEL, rank=3)
    all_of_them = pca.sample(torch.tensor([0, 1, 1]), KeyedNoise(0, [5, 6, 7]))
    torch.testing.assert_close(pca.sample(torch.tensor([1]), KeyedNoise(0, [6])), all_of_them[1:2])


def test_pca_gaussian_rejects_rank_above_images():
    with pytest.raises(ValueError, match="class 0 has 2 images: expected more than rank=3"):
        PCAGaussian.fit(images()[:5], torch.tensor([0, 0, 1, 1, 1]), rank=3)


def test_add_noise_scale_is_black_to_white():
    image = torch.zeros(50, 1, 16, 16)
    out = add_noise(image, 0.05, KeyedNoise(0, range(50)))
    assert (out + 1).div(2).std().item() == pytest.approx(0.05, rel=0.02)
    assert add_noise(image - 1, 0.05, KeyedNoise(0, range(50))).min() == -1
    assert torch.equal(image, torch.zeros_like(image))


def test_add_noise_adds_twice_the_share_of_the_range():
    image, noise = torch.full((2, 1, 4, 4), 0.25), KeyedNoise(0, [1, 2])
    torch.testing.assert_close(
        add_noise(image, 0.125, noise), (image + 0.25 * noise.normal("noisy", image)).clamp(-1, 1)
    )
