import pytest
import torch
from torch import nn

from ldm.autoencoder.conv import Decoder, Encoder
from ldm.autoencoder.identity import Identity
from ldm.autoencoder.posterior import DeterministicPosterior
from ldm.autoencoder.vq import AutoencoderVQ, Codebook


def vq(codes: int = 7, **options) -> AutoencoderVQ:
    """Encoder and decoder leave everything as it is: image, latent and codes are one space."""
    torch.manual_seed(0)
    model = AutoencoderVQ(nn.Identity(), nn.Identity(), 2, 1, num_codes=codes, **options)
    nn.init.normal_(model.codebook.weight)
    return model.double()


def test_codebook_nearest_minimizes_distance():
    torch.manual_seed(0)
    book = Codebook(11, 3).double()
    nn.init.normal_(book.weight)
    raw = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    index = book.nearest(raw)
    wanted = torch.cdist(raw.movedim(1, -1).reshape(-1, 3), book.weight).argmin(1)
    assert torch.equal(index, wanted.view(2, 4, 5))
    assert torch.equal(book(index)[1, :, 2, 3], book.weight[index[1, 2, 3]])


def test_codebook_nearest_is_unchanged_by_autocast():
    raw = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    book = Codebook(500, 3)
    plain = book.nearest(raw)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(book.nearest(raw), plain)


def test_vq_quantizes_only_in_decode():
    model, image = vq(), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    posterior = model.posterior(image)
    assert torch.equal(model.encode(image), image)
    assert torch.equal(posterior.sample(torch.randn_like(image)), image)
    assert torch.equal(model.posterior_of(posterior.moments).mode, image)
    codes = model.codebook(model.codebook.nearest(image))
    assert torch.equal(model.decode(model.encode(image)), codes)
    model.calibrate([posterior.moments])
    torch.testing.assert_close(model.decode(model.encode(image)), codes)
    torch.testing.assert_close(model.encode(image).var((0, 2, 3), correction=0), torch.ones(2).double())


def test_vq_gradients_are_straight_through_and_split_by_penalty():
    model = vq(codebook_weight=3.0, commitment_weight=0.5)
    image = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    reconstruction, penalties, _ = model.training_forward(image, torch.randn_like)
    codes = model.codebook(model.codebook.nearest(image))
    torch.testing.assert_close(reconstruction, codes)
    (through,) = torch.autograd.grad(reconstruction.square().sum(), image, retain_graph=True)
    torch.testing.assert_close(through, 2 * codes)  # as if nothing had been quantised
    penalty = penalties["codebook"]
    torch.testing.assert_close(penalty, 3.5 * (codes - image).square().mean((1, 2, 3)))
    to_encoder, to_book = torch.autograd.grad(penalty.sum(), (image, model.codebook.weight))
    size = image[0].numel()
    torch.testing.assert_close(to_encoder, 2 * 0.5 * (image - codes) / size)
    expected = torch.zeros_like(model.codebook.weight)
    expected.index_add_(
        0, model.codebook.nearest(image).flatten(), (2 * 3.0 * (codes - image) / size).movedim(1, -1).flatten(0, 2)
    )
    torch.testing.assert_close(to_book, expected)


def test_vq_diagnostics_report_perplexity_and_dead_codes():
    model = vq(codes=4)
    with torch.no_grad():
        model.codebook.weight.copy_(torch.tensor([[0.0, 0], [10, 0], [0, 10], [99, 99]]))
    image = torch.tensor([[0.1, 9.0, 0.2, 0.0], [0.1, 0.0, 0.0, 9.5]], dtype=torch.float64).view(
        1, 2, 2, 2
    )  # codes 0, 1, 0, 2
    told = model.diagnostics(model.training_forward(image, torch.randn_like).diagnostics)
    assert told["dead_codes"] == 1
    assert told["perplexity"].item() == pytest.approx(2**1.5)  # entropy of (1/2, 1/4, 1/4)


def test_vq_conv_shapes():
    options = dict(z_channels=3, width=8, channel_mult=(1, 2), num_res_blocks=1, num_groups=4)
    model = AutoencoderVQ(Encoder(1, **options, double_z=False), Decoder(1, **options), 3, 2, num_codes=16)
    image = torch.randn(2, 1, 8, 12)
    assert model.posterior(image).moments.shape == (2, 3, 4, 6)
    assert model.decode(model.encode(image)).shape == image.shape
    reconstruction, penalties, vitals = model.training_forward(image, torch.randn_like)
    (reconstruction.abs().sum() + penalties["codebook"].sum()).backward()
    assert vitals.sum() == 1
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_identity_autoencoder_returns_image():
    space, image = Identity(3), torch.rand(2, 3, 4, 6) * 2 - 1
    assert torch.equal(space.encode(image), image)
    assert torch.equal(space.decode(image), image)
    posterior = space.posterior(image)
    assert isinstance(posterior, DeterministicPosterior)
    assert torch.equal(posterior.moments, image)
    assert not posterior.variance.any()
    assert torch.equal(posterior.sample(torch.randn_like(image)), image)
    assert (space.factor, space.z_channels) == (1, 3)
    assert not list(space.parameters())
    assert space.weights_hash() == Identity(3).weights_hash()


def test_codebook_starts_uniform_within_one_over_its_size():
    torch.manual_seed(0)
    weight = Codebook(100, 50).weight
    assert 0.0099 < weight.max().item() <= 0.01
    assert -0.01 <= weight.min().item() < -0.0099
