"""Sizes that no network and no image can have."""

import pytest
import torch

from ldm.autoencoder.discriminator import PatchDiscriminator
from ldm.autoencoder.patch import PatchDecoder, PatchEncoder
from ldm.data.synthetic import Synthetic


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PatchEncoder(1, 2, factor=0), "factor=0: expected 1 or more"),
        (lambda: PatchDecoder(1, 2, factor=2, width=-1), "width=-1"),
        (lambda: PatchDiscriminator(1, width=0), "width=0"),
        (lambda: Synthetic(size=0), "size=0: expected 1 px or more, one number for squares or"),
    ],
)
def test_autoencoder_rejects_invalid_sizes(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def randomised(net):
    generator = torch.Generator().manual_seed(0)
    for p in net.double().parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64, generator=generator) * 0.3
    return net


def test_patch_encoder_adds_a_linear_map_of_the_patch_to_the_mean():
    net = PatchEncoder(3, 2, factor=2, width=4)
    assert net.shortcut.weight.shape == (2, 12, 1, 1)
    image = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean, logvar = net.double()(image).chunk(2, 1)
    patches = image.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 1, 4, 5, 2, 3).reshape(2, 12, 2, 3)
    linear = torch.einsum("oi,bihw->bohw", net.shortcut.weight[..., 0, 0], patches) + net.shortcut.bias[:, None, None]
    torch.testing.assert_close(mean, linear, msg="training starts from a linear code")
    assert (logvar == -4).all()
    randomised(net)
    linear = torch.einsum("oi,bihw->bohw", net.shortcut.weight[..., 0, 0], patches) + net.shortcut.bias[:, None, None]
    nonlinear = net.out(net.blocks(net.stem(patches)))
    expected = torch.cat([nonlinear[:, :2] + linear, nonlinear[:, 2:]], 1)
    torch.testing.assert_close(net(image), expected)


def test_patch_decoder_adds_a_linear_map_of_the_latent_to_the_pixels():
    net = PatchDecoder(3, 2, factor=2, width=4)
    assert net.shortcut.weight.shape == (12, 2, 1, 1)
    randomised(net)
    z = torch.randn(1, 2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    linear = torch.einsum("oi,bihw->bohw", net.shortcut.weight[..., 0, 0], z) + net.shortcut.bias[:, None, None]
    pixels = (net.out(net.blocks(net.stem(z))) + linear).reshape(1, 3, 2, 2, 2, 3)
    torch.testing.assert_close(net(z), pixels.permute(0, 1, 4, 2, 5, 3).reshape(1, 3, 4, 6))
