import pytest
import torch

from ldm.autoencoder.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from ldm.autoencoder.loss import ReconstructionLoss, gradient_loss, l1, l2
from ldm.autoencoder.posterior import DiagonalGaussian


def test_pixel_losses_sum_over_image():
    a, b = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 1, 2, 2)
    assert l1(a, b).tolist() == [4.0, 8.0]
    assert l2(a, b).tolist() == [4.0, 16.0]
    assert l1(a + 3, b).tolist() == [8.0, 4.0]
    assert l2(a + 3, b).tolist() == [16.0, 4.0]


def test_gradient_loss_measures_edges_not_brightness():
    image = torch.randn(2, 1, 5, 4)
    torch.testing.assert_close(gradient_loss(image + 3.0, image), torch.zeros(2), atol=1e-5, rtol=0)
    step = torch.zeros(1, 1, 5, 4)
    step[..., 2:] = 1.0  # one column of edges, 5 high
    assert gradient_loss(step, torch.zeros_like(step)).tolist() == [5.0]
    assert gradient_loss(step.transpose(2, 3), torch.zeros(1, 1, 4, 5)).tolist() == [5.0]
    assert torch.equal(gradient_loss(step, 0 * step), gradient_loss(0 * step, step))


def test_reconstruction_loss_sums_its_terms():
    torch.manual_seed(0)
    image, penalties = torch.randn(3, 1, 4, 4), {"kl": torch.rand(3)}
    reconstruction = image + 0.1 * torch.randn_like(image)
    terms = ReconstructionLoss(l2, gradient_loss, perceptual_weight=3.0, kl_weight=0.5)(
        reconstruction, image, penalties
    )
    assert all(term.shape == (3,) for term in terms.values())
    torch.testing.assert_close(terms["pixel"], l2(reconstruction, image))
    torch.testing.assert_close(terms["rec"], l2(reconstruction, image) + 3 * gradient_loss(reconstruction, image))
    torch.testing.assert_close(terms["loss"], terms["rec"] + 0.5 * penalties["kl"])
    assert torch.equal(terms["kl"], penalties["kl"])
    bare = ReconstructionLoss(l1, None)(reconstruction, image, {})
    assert torch.equal(bare["rec"], l1(reconstruction, image))
    assert not bare["perceptual"].any()


def test_hinge_loss_is_zero_beyond_margin():
    assert hinge_loss(torch.tensor([2.0, 1.0]), torch.tensor([-1.0, -5.0])) == 0
    assert hinge_loss(torch.tensor([0.0]), torch.tensor([0.0])) == 1
    assert hinge_loss(torch.tensor([-1.0]), torch.tensor([-1.0])) == 1  # 0.5 (1 + 1) + 0
    assert hinge_loss(torch.tensor([1.0]), torch.tensor([1.0])) == 1  # 0 + 0.5 (1 + 1)


def test_adaptive_weight_is_ratio_of_gradient_norms():
    rec, adv = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([0.0, 2.0])
    weight = adaptive_weight(rec, adv)
    torch.testing.assert_close(weight, torch.tensor(5.0 / (2.0 + 1e-4)))
    assert not weight.requires_grad
    assert adaptive_weight(torch.ones(3), torch.zeros(3)) == 1e4
    assert adaptive_weight(torch.zeros(3), torch.ones(3)) == 0
    assert adaptive_weight(torch.ones(4), torch.zeros(4), limit=7.0) == 7


@pytest.mark.parametrize(("layers", "side"), [(2, 6), (3, 2)])
def test_discriminator_output_has_patch_shape(layers, side):
    net = PatchDiscriminator(1, width=8, layers=layers, num_groups=4)
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 1, side, side)


def test_discriminator_is_independent_per_image():
    net = PatchDiscriminator(1, width=8, layers=2, num_groups=4)
    images = torch.randn(3, 1, 32, 32)
    torch.testing.assert_close(net(images)[1:2], net(images[1:2]))


def gradient_of(loss: ReconstructionLoss, size: int) -> torch.Tensor:
    """Of the loss of an affine first stage with respect to its few weights, which trade the reconstruction for the
    divergence.
    """
    torch.manual_seed(1)
    image, noise = torch.randn(5, 3, size, size, dtype=torch.float64), torch.randn(5, 2, 2, 2, dtype=torch.float64)
    weights = torch.randn(2 * 3 * size * size, 4, dtype=torch.float64).mul(0.1).requires_grad_()
    inward, outward = weights.chunk(2)
    mean = (image.flatten(1) @ inward).unflatten(1, (1, 2, 2)).expand(-1, 2, -1, -1)
    posterior = DiagonalGaussian(mean, torch.full_like(mean, -1.0))
    reconstruction = (posterior.sample(noise)[:, 0].flatten(1) @ outward.T).view_as(image)
    terms = loss(reconstruction, image, {"kl": posterior.kl()})
    return torch.autograd.grad(terms["loss"].mean(), weights)[0]


@pytest.mark.parametrize("size", [4, 8])
def test_reductions_have_same_minimum_at_rescaled_kl_weight(size):
    """The mean's gradient is the sum's over the number of pixels: the same minimum; with kl_weight left as it was it
    would not be.
    """
    under_sum = gradient_of(ReconstructionLoss(l2, kl_weight=0.7, reduction="sum"), size)
    under_mean = gradient_of(ReconstructionLoss(l2, kl_weight=0.7, reduction="mean"), size)
    torch.testing.assert_close(under_mean, under_sum / (3 * size**2))
    other = gradient_of(ReconstructionLoss(l2, kl_weight=0.7 * 3 * size**2, reduction="mean"), size)  # the trap
    assert torch.cosine_similarity(other.flatten(), under_sum.flatten(), dim=0) < 0.95


def test_mean_reduction_rescales_kl_weight():
    """rec / D_x + w' kl / D_z is the sum over D_x for w' = w D_z / D_x."""
    image, penalties = torch.randn(2, 3, 8, 8), {"kl": torch.rand(2)}
    terms = ReconstructionLoss(l1, kl_weight=0.3, reduction="mean")(0.5 * image, image, penalties)
    means = l1(0.5 * image, image) / 192 + 0.3 * 12 / 192 * penalties["kl"] / 12
    torch.testing.assert_close(terms["loss"], means)
    torch.testing.assert_close(terms["rec"], l1(0.5 * image, image) / 192)


def test_mean_reduction_keeps_codebook_weight():
    image, penalties = torch.randn(2, 3, 4, 4), {"codebook": torch.rand(2)}
    mean = ReconstructionLoss(l1, codebook_weight=2.0, reduction="mean")(0 * image, image, penalties)
    torch.testing.assert_close(mean["loss"], image.abs().mean((1, 2, 3)) + 2 * penalties["codebook"])
    total = ReconstructionLoss(l1, codebook_weight=2.0)(0 * image, image, penalties)
    torch.testing.assert_close(total["loss"], 48 * mean["loss"])


def test_reconstruction_loss_rejects_unknown_reduction():
    with pytest.raises(ValueError, match="reduction=average: expected sum"):
        ReconstructionLoss(reduction="average")
