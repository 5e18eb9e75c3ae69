"""First stages over one, two and three sides: against references in plain functions, of still clips, on rings."""

import pytest
import torch
from helpers import randomize_weights
from torch.nn import functional as F

from ldm.autoencoder.conv import Decoder, Encoder
from ldm.autoencoder.discriminator import PatchDiscriminator
from ldm.autoencoder.kl import AutoencoderKL
from ldm.autoencoder.loss import gradient_loss
from ldm.autoencoder.patch import PatchDecoder, PatchEncoder, shuffle, unshuffle
from ldm.autoencoder.tiled import Tiled
from ldm.autoencoder.vq import AutoencoderVQ
from ldm.metrics.paired import Reconstruction
from ldm.metrics.spectrum import high_frequency_ratio

FACTORS = ([4], [4, 2], [1, 4, 2])  # those that differ from side to side
CONV = {"z_channels": 3, "width": 8, "channel_mult": (1, 2, 2), "num_res_blocks": 1, "num_groups": 4}
PATCH = {"channels": 2, "z_channels": 3, "width": 8, "num_res_blocks": 1}


def draws(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def made(module):
    return randomize_weights(module).double().requires_grad_(False)


def convolve(x, layer, margins=None, stride=1, mode="constant"):
    dims, reach = x.ndim - 2, layer.weight.shape[-1] // 2
    x = F.pad(x, [reach] * 2 * dims if margins is None else margins, mode=mode)
    return (F.conv1d, F.conv2d, F.conv3d)[dims - 1](x, layer.weight, layer.bias, stride)


def block(x, layer):
    h = convolve(F.silu(F.group_norm(x, 4, layer.norm1.weight, layer.norm1.bias, layer.norm1.eps)), layer.conv1)
    h = convolve(F.silu(F.group_norm(h, 4, layer.norm2.weight, layer.norm2.bias, layer.norm2.eps)), layer.conv2)
    return h + (convolve(x, layer.skip) if hasattr(layer.skip, "weight") else x)


def attended(x, layer):
    h = F.group_norm(x, 4, layer.norm.weight, layer.norm.bias, 1e-6)
    q, k, v = (convolve(h, part).flatten(2) for part in (layer.q, layer.k, layer.v))
    weights = (torch.einsum("bcn,bcm->bnm", q, k) / x.shape[1] ** 0.5).softmax(2)
    return x + convolve(torch.einsum("bnm,bcm->bcn", weights, v).reshape(x.shape), layer.out)


def ended(x, out):
    return convolve(F.silu(F.group_norm(x, 4, out[0].weight, out[0].bias, out[0].eps)), out[2])


@pytest.mark.parametrize("factor", FACTORS, ids=str)
def test_conv_first_stage_equals_reference(factor):
    encoder, decoder = made(Encoder(2, factor=factor, **CONV)), made(Decoder(2, factor=factor, **CONV))
    assert Encoder.spatial_dims(factor=factor, width=8) == Decoder.spatial_dims(factor=factor) == len(factor)
    x = draws(2, 2, *([8, 4, 12][: len(factor)]))
    h = convolve(x, encoder.stem)
    for level, stage in enumerate(encoder.down):
        h = block(h, stage.blocks[0])
        if level < 2:
            strides = [2 if f > 2**level else 1 for f in factor]
            margins = [m for s in reversed(strides) for m in ((0, 1) if s == 2 else (1, 1))]
            h = convolve(h, stage.resample.conv, margins, strides)
    h = block(attended(block(h, encoder.middle[0]), encoder.middle[1]), encoder.middle[2])
    z = convolve(ended(h, encoder.out), encoder.moments)
    torch.testing.assert_close(encoder(x), z, rtol=1e-9, atol=1e-9)
    assert z.shape == (2, 6, *(side // f for side, f in zip(x.shape[2:], factor, strict=True)))
    h = convolve(convolve(z[:, :3], decoder.latent), decoder.stem)
    h = block(attended(block(h, decoder.middle[0]), decoder.middle[1]), decoder.middle[2])
    for level in (2, 1, 0):
        for part in decoder.up[level].blocks:
            h = block(h, part)
        if level:
            for axis, f in enumerate(factor, start=2):
                h = h.repeat_interleave(2 if f > 2 ** (level - 1) else 1, axis)
            h = convolve(h, decoder.up[level].resample.conv)
    torch.testing.assert_close(decoder(z[:, :3]), ended(h, decoder.out), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor", FACTORS, ids=str)
def test_patch_first_stage_equals_reference(factor):
    encoder, decoder = made(PatchEncoder(factor=factor, **PATCH)), made(PatchDecoder(factor=factor, **PATCH))
    x = draws(2, 2, *([8, 4, 12][: len(factor)]))
    offsets = torch.cartesian_prod(*map(torch.arange, factor)).reshape(-1, len(factor)).tolist()
    places = [(..., *(slice(o, None, f) for o, f in zip(offset, factor, strict=True))) for offset in offsets]
    cut = torch.stack([x[place] for place in places], 2).flatten(1, 2)  # channel, then position in the patch
    h = ended(block(convolve(cut, encoder.stem), encoder.blocks[0]), encoder.out)
    moments = torch.cat([h[:, :3] + convolve(cut, encoder.shortcut), h[:, 3:]], 1)
    torch.testing.assert_close(encoder(x), moments, rtol=1e-9, atol=1e-9)
    z, y = moments[:, :3], torch.empty_like(x)
    h = ended(block(convolve(z, decoder.stem), decoder.blocks[0]), decoder.out) + convolve(z, decoder.shortcut)
    for k, place in enumerate(places):
        y[place] = h.unflatten(1, (2, -1))[:, :, k]
    torch.testing.assert_close(decoder(z), y, rtol=1e-9, atol=1e-9)


def test_unshuffle_equals_torch_and_shuffle_undoes_it():
    x = draws(2, 3, 8, 12)
    assert torch.equal(unshuffle(x, (4, 4)), F.pixel_unshuffle(x, 4))
    assert torch.equal(shuffle(unshuffle(x, (4, 4)), (4, 4)), x)
    for factor in FACTORS:
        x = draws(2, 3, *[8] * len(factor))
        assert not torch.equal(unshuffle(x, factor).flatten(), x.flatten()) or len(factor) == 1
        assert torch.equal(shuffle(unshuffle(x, factor), factor), x)


@pytest.mark.parametrize(("taps", "mode"), [((0.0, 1.0, 0.0), "zeros"), ((0.3, -0.4, 1.1), "circular")], ids=str)
def test_first_stage_of_a_still_clip_equals_that_of_its_image(taps, mode):
    """Each frame of the answer, of half as many frames where the first stage halves them."""
    for part, shape in ((Encoder, (1, 2, 8, 12)), (Decoder, (1, 3, 4, 6))):
        images = made(part(2, **CONV, padding_mode=mode))
        clips = made(part(2, factor=[2, 4, 4], **CONV, padding_mode=mode))
        state = images.state_dict()
        assert state.keys() == clips.state_dict().keys()
        for name, value in clips.state_dict().items():
            frames = value.new_tensor(taps if value.ndim == 5 and value.shape[2] == 3 else [1.0])
            value.copy_(state[name][:, :, None] * frames[:, None, None] if value.ndim == 5 else state[name])
        x = draws(*shape)
        found, expected = clips(x[:, :, None].expand(-1, -1, 4, -1, -1)), images(x)
        assert found.shape[2] == (2 if part is Encoder else 8)
        torch.testing.assert_close(found, expected[:, :, None].expand_as(found), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor", FACTORS, ids=str)
def test_circular_first_stage_moves_its_latent_with_its_input(factor):
    """By whole cells; a border of zeros is felt."""
    x, axes = draws(1, 2, *[8] * len(factor)), tuple(range(2, 2 + len(factor)))
    for mode in ("zeros", "circular"):
        stages = [
            (Encoder(2, factor=factor, padding_mode=mode, **CONV), Decoder(2, factor=factor, padding_mode=mode, **CONV))
        ]
        stages += [
            (
                PatchEncoder(factor=factor, padding_mode=mode, **PATCH),
                PatchDecoder(factor=factor, padding_mode=mode, **PATCH),
            )
        ]
        for encoder, decoder in stages:
            stage = made(AutoencoderKL(encoder, decoder, 3, factor))
            z, moved = stage.encode(x), stage.encode(x.roll(factor, axes)).roll([-1] * len(factor), axes)
            assert ((moved - z).abs().max() < 1e-9) == (mode == "circular")
            moved = stage.decode(z.roll([1] * len(factor), axes)).roll([-f for f in factor], axes)
            assert ((moved - stage.decode(z)).abs().max() < 1e-9) == (mode == "circular")


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderVQ])
@pytest.mark.parametrize("factor", FACTORS, ids=str)
def test_first_stage_of_any_sides_trains_and_calibrates(kind, factor):
    double = kind is AutoencoderKL
    torch.manual_seed(0)
    stage = kind(Encoder(2, factor=factor, double_z=double, **CONV), Decoder(2, factor=factor, **CONV), 3, factor)
    x = draws(3, 2, *[8] * len(factor)).float()
    output = stage.training_forward(x, torch.zeros_like)
    assert output.reconstruction.shape == x.shape
    assert all(penalty.shape == (3,) for penalty in output.penalties.values())
    output.reconstruction.square().sum().backward()
    posterior = stage.posterior(x)
    if double:
        each = posterior._divergence().transpose(0, 1).flatten(1).mean(1)
        torch.testing.assert_close(output.diagnostics, each.detach())
    stage.calibrate([posterior.moments.detach()])
    z = stage.normalise(posterior.mean).detach().transpose(0, 1).flatten(1)
    total = z.square().mean(1) + (stage.scale.square() * posterior.variance.detach().transpose(0, 1).flatten(1).mean(1))
    torch.testing.assert_close(z.mean(1), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(total, torch.ones(3), rtol=1e-3, atol=1e-3)
    sides = "x".join(["8"] * (len(factor) - 1) + ["9"])
    with pytest.raises(
        ValueError, match=f"image is {sides}: all sides must be multiples of {'x'.join(map(str, factor))}"
    ):
        stage.posterior(F.pad(x, (0, 1)))


@pytest.mark.parametrize(
    ("factor", "message"), [([3, 4], "powers of 2"), (8, "the largest 4, for 3 levels"), ([2, 2], "4")]
)
def test_conv_first_stage_rejects_other_factors(factor, message):
    with pytest.raises(ValueError, match=message):
        Encoder(2, factor=factor, **CONV)


def test_tiled_clips_equal_whole_ones_where_no_cell_sees_another():
    class Cells(torch.nn.Conv3d):
        def forward(self, x):
            return super().forward(x)

    class Spread(torch.nn.ConvTranspose3d):
        def forward(self, z):
            return super().forward(z)

    factor = (1, 4, 2)
    stage = made(AutoencoderKL(Cells(2, 6, factor, factor), Spread(3, 2, factor, factor), 3, factor))
    x, pieces = draws(1, 2, 7, 28, 10), Tiled(stage, tile=4, overlap=1)
    torch.testing.assert_close(pieces.posterior(x).moments, stage.posterior(x).moments)
    torch.testing.assert_close(pieces.decode(stage.encode(x)), stage.decode(stage.encode(x)))


def test_gradient_loss_of_a_clip_has_the_error_of_its_motion():
    still = draws(2, 1, 1, 3, 3).expand(-1, -1, 4, -1, -1)
    clip = still + torch.tensor([0.0, 1.0, 1.0, 3.0])[:, None, None]  # brighter by 1, 0 and 2 between its frames
    torch.testing.assert_close(gradient_loss(clip, still), torch.full((2,), 27.0, dtype=torch.float64))
    a, b = draws(2, 2, 5, 6), draws(2, 2, 5, 6).flip(0)
    error = a - b
    edges = error.diff(dim=2).abs().sum((1, 2, 3)) + error.diff(dim=3).abs().sum((1, 2, 3))
    torch.testing.assert_close(gradient_loss(a, b), edges)


def test_discriminator_judges_a_clip_frame_by_frame():
    torch.manual_seed(0)
    x = draws(2, 3, 4, 16, 16)
    clips = made(PatchDiscriminator(3, width=4, layers=2, num_groups=2, dims=3))
    images = made(PatchDiscriminator(3, width=4, layers=2, num_groups=2))
    assert images.state_dict().keys() == clips.state_dict().keys()
    expected = torch.cat([images(x[b, :, f][None]) for b in range(2) for f in range(4)])
    torch.testing.assert_close(clips(x), expected)
    assert PatchDiscriminator(3, width=4, layers=2, dims=1)(torch.zeros(2, 3, 16)).shape == (2, 1, 2)


def test_reconstructions_of_clips_are_scored_by_their_frames():
    """PSNR is the sample's; of one side there is no SSIM.  Power above a quarter cycle, of a signal as of its rows."""
    clip = draws(2, 1, 3, 16, 16).clamp(-1, 1)
    rebuilt = (clip + 0.1 * draws(2, 1, 3, 16, 16).flip(0)).clamp(-1, 1)
    of_clips, of_frames, of_sound = Reconstruction(), Reconstruction(), Reconstruction()
    of_clips.update(clip, rebuilt)
    of_frames.update(clip.transpose(1, 2).flatten(0, 1), rebuilt.transpose(1, 2).flatten(0, 1))
    assert of_clips.compute()["ssim"] == pytest.approx(of_frames.compute()["ssim"])
    mse = (clip - rebuilt).square().flatten(1).mean(1)
    assert of_clips.compute()["psnr"] == pytest.approx(float((10 * (4 / mse).log10()).mean()), rel=1e-5)
    of_sound.update(clip.flatten(2), rebuilt.flatten(2))
    assert of_sound.compute() == {"psnr": pytest.approx(of_clips.compute()["psnr"])}
    each = clip.transpose(1, 2).flatten(0, 1), rebuilt.transpose(1, 2).flatten(0, 1)
    assert high_frequency_ratio(rebuilt, clip) == high_frequency_ratio(each[1], each[0])
    sound = torch.linspace(0, 50, 64, dtype=torch.float64).sin().expand(2, 1, -1)
    assert float(high_frequency_ratio(0.5 * sound, sound)) == pytest.approx(0.25)
