import pytest
import torch

from ldm.autoencoder.conv import Decoder, Encoder
from ldm.autoencoder.kl import AutoencoderKL
from ldm.autoencoder.patch import PatchDecoder, PatchEncoder
from ldm.autoencoder.posterior import DiagonalGaussian
from ldm.net.blocks import Downsample


class Affine(torch.nn.Module):
    """y = a x + b per channel, for an autoencoder whose inverse is known."""

    def __init__(self, a: float, b: float):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return self.a * x + self.b


class ExactEncoder(Affine):
    def forward(self, x):
        mean = super().forward(x)
        return torch.cat([mean, torch.full_like(mean, -2.0)], 1)


def exact() -> AutoencoderKL:
    return AutoencoderKL(ExactEncoder(4.0, 7.0), Affine(0.25, -1.75), z_channels=2, factor=1)


def conv(f: int) -> AutoencoderKL:
    mult = {2: (1, 2), 4: (1, 2, 2), 8: (1, 2, 2, 2)}[f]
    options = dict(z_channels=3, width=8, channel_mult=mult, num_res_blocks=1, num_groups=4)
    return AutoencoderKL(Encoder(1, **options), Decoder(1, **options), 3, f)


def patch(f: int) -> AutoencoderKL:
    return AutoencoderKL(
        PatchEncoder(1, 3, f, width=8, num_groups=4), PatchDecoder(1, 3, f, width=8, num_groups=4), 3, f
    )


@pytest.mark.parametrize("f", [2, 4, 8])
@pytest.mark.parametrize("make", [conv, patch])
def test_kl_shapes_follow_factor(make, f):
    model = make(f)
    image = torch.randn(2, 1, 16, 24)
    z = model.encode(image)
    assert z.shape == (2, 3, 16 // f, 24 // f)
    assert model.posterior(image).moments.shape == (2, 6, 16 // f, 24 // f)
    assert model.decode(z).shape == image.shape
    with pytest.raises(ValueError, match=rf"15x24.*multiples of {f}"):
        model.posterior(torch.randn(1, 1, 15, 24))


@pytest.mark.parametrize("make", [conv, patch])
def test_kl_trains_every_parameter(make):
    torch.manual_seed(0)
    model = make(4)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    posterior = model.posterior(torch.randn(2, 1, 16, 16))
    (model.decoder(posterior.sample(torch.randn_like(posterior.mean))).square().sum() + posterior.kl().sum()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert any(p is model.decoder.last_layer for p in model.parameters())


def test_decoder_last_layer_outputs_image():
    for model in (conv(4), patch(4)):
        seen = []
        layer = next(m for m in model.decoder.modules() if getattr(m, "weight", None) is model.decoder.last_layer)
        layer.register_forward_hook(lambda *call, seen=seen: seen.append(call[2].numel()))
        assert model.decode(torch.randn(1, 3, 4, 4)).numel() == seen[0]


def test_patch_encoder_is_linear_with_small_variance_at_init():
    model = patch(4)
    a, b = torch.randn(1, 1, 16, 16), torch.randn(1, 1, 16, 16)
    mean = lambda x: model.posterior(x).mean  # noqa: E731
    torch.testing.assert_close(mean(a + b), mean(a) + mean(b) - mean(0 * a), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.posterior(a).logvar, torch.full((1, 3, 4, 4), -4.0))


def test_patch_encoder_maps_patch_to_one_latent_pixel():
    """Height stays height: what changes in one patch moves the code there, in its rows and columns."""
    torch.manual_seed(0)
    model = patch(4)
    image = torch.randn(1, 1, 32, 48)
    other = image.clone()
    other[..., 4:8, 40:44] += 1  # patch (1, 10)
    moved = (model.encode(other) - model.encode(image)).abs().sum(1)[0]
    assert moved.shape == (8, 12)
    assert moved.nonzero().tolist() == [[1, 10]]
    z = torch.randn(1, 3, 8, 12)
    nudged = z.clone()
    nudged[..., 1, 10] += 1
    moved = (model.decode(nudged) - model.decode(z)).abs()[0, 0]
    assert moved[4:8, 40:44].all()
    assert torch.count_nonzero(moved) == 16


def test_calibrate_gives_zero_mean_and_unit_variance():
    torch.manual_seed(0)
    model = exact()
    images = (
        torch.randn(40, 2, 16, 16) * torch.tensor([0.3, 2.0])[:, None, None] + torch.tensor([1.0, -4.0])[:, None, None]
    )
    model.calibrate(model.posterior(part).moments for part in images.split(16))
    posterior = model.posterior(images)
    z = model.normalise(posterior.sample(torch.randn_like(posterior.mean)))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), atol=0.03, rtol=0)
    torch.testing.assert_close(z.var((0, 2, 3)), torch.ones(2), atol=0.03, rtol=0)
    # in closed form: the variance of the means plus that of the noise
    total = posterior.mean.double().var((0, 2, 3), correction=0) + torch.tensor(-2.0).exp()
    torch.testing.assert_close(model.scale.double(), total.rsqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(model.shift, posterior.mean.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert model.calibrated_on == 40


def test_calibrate_rejects_empty_input():
    with pytest.raises(ValueError, match="empty"):
        exact().calibrate([])


def test_decode_inverts_encode_with_scale():
    model = exact()
    image = torch.randn(3, 2, 8, 8)
    torch.testing.assert_close(model.decode(model.encode(image)), image)
    model.calibrate([model.posterior(image).moments])
    assert not torch.allclose(model.scale, torch.ones(2))
    torch.testing.assert_close(model.decode(model.encode(image)), image, rtol=1e-4, atol=1e-5)
    raw = model.posterior(image).mode
    torch.testing.assert_close(model.encode(image), (raw - model.shift[:, None, None]) * model.scale[:, None, None])


def test_calibrate_is_idempotent():
    model, image = exact(), torch.randn(3, 2, 8, 8)
    model.calibrate([model.posterior(image).moments])
    before = model.shift.clone(), model.scale.clone()
    model.calibrate([model.posterior(image).moments])
    assert torch.equal(model.shift, before[0])
    assert torch.equal(model.scale, before[1])


def test_weights_hash_depends_on_weights_shift_and_scale():
    model = patch(4)
    name = model.weights_hash()
    other = patch(4)
    assert other.weights_hash() != name
    other.load_state_dict(model.state_dict())
    assert other.weights_hash() == name
    other.scale.mul_(1.001)
    assert other.weights_hash() != name


def test_state_dict_contains_shift_and_scale():
    model, other = exact(), exact()
    model.calibrate([torch.randn(4, 4, 8, 8)])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.scale, model.scale)
    assert isinstance(other.posterior(torch.randn(1, 2, 4, 4)), DiagonalGaussian)


def test_diagnostics_count_dead_channels():
    model = exact()
    image = torch.randn(40, 2, 8, 8)

    class Encoder(torch.nn.Module):
        """Two channels tell of the image, the third is noise."""

        def forward(self, x):
            mean = torch.cat([2 * x[:, :1], 3 * x[:, :1], 0 * x[:, :1]], 1)
            return torch.cat([mean, torch.zeros_like(mean)], 1)

    model.encoder = Encoder()
    seen = model.training_forward(image, torch.randn_like)
    told = model.diagnostics(seen.diagnostics)
    assert told["dead_channels"] == 1
    assert told["kl_channel_min"] == 0
    assert told["kl_channel_max"].item() == pytest.approx(0.5 * 9 * image[:, 0].square().mean().item())
    torch.testing.assert_close(seen.penalties["kl"].mean(), 64 * seen.diagnostics.sum())


def test_training_forward_decodes_sample_not_mode():
    model, image = exact(), torch.randn(3, 2, 8, 8)
    noise = torch.randn(3, 2, 8, 8)
    posterior = model.posterior(image)
    seen = model.training_forward(image, lambda like: noise)
    torch.testing.assert_close(seen.reconstruction, model.decoder(posterior.sample(noise)))
    torch.testing.assert_close(seen.penalties["kl"], posterior.kl())


def test_autoencoder_attention_is_at_configured_factors():
    options = dict(
        z_channels=2,
        width=8,
        channel_mult=(1, 2, 2),
        num_res_blocks=2,
        num_groups=4,
        attention_resolutions=(4,),
        middle_attention=False,
    )
    encoder, decoder = Encoder(1, **options), Decoder(1, **options)
    assert [len(level.attention) for level in encoder.down] == [0, 0, 2]
    assert [len(level.attention) for level in decoder.up] == [0, 0, 3]
    assert [len(level.blocks) for level in decoder.up] == [3, 3, 3]
    seen = []
    for module in (*encoder.modules(), *decoder.modules()):
        if type(module).__name__ == "SpatialAttention":
            module.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape[-2:])))
    decoder(encoder(torch.randn(1, 1, 16, 16))[:, :2])
    assert seen == [(4, 4)] * 5


def test_padded_downsample_pads_right_and_bottom():
    """An even input has no place left over at its left and upper edge: pixel 0 moves output 0 alone, as in LDM."""
    down = Downsample(1, asymmetric=True)
    image = torch.zeros(1, 1, 8, 8)
    other = image.clone()
    other[..., 0, 0] = 1
    assert (down(other) - down(image)).nonzero().tolist() == [[0, 0, 0, 0]]
    torch.testing.assert_close((down(other) - down(image))[0, 0, 0, 0], down.conv.weight[0, 0, 0, 0])
    assert down(image).shape == (1, 1, 4, 4)


def test_autoencoder_norms_use_eps_1e_6():
    for module in (Encoder(1, width=8, num_groups=4), Decoder(1, width=8, num_groups=4)):
        assert {m.eps for m in module.modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-6}
