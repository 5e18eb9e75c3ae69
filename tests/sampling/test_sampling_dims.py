"""Sampling (C, L), (C, H, W) and (C, F, H, W): the exact Gaussian, known parts of a clip, conditions on the grid."""

from functools import partial

import pytest
import torch
from helpers import randomize_weights
from oracle import Gaussian, affine
from torch import Tensor, nn

from ldm.adapter import lora
from ldm.autoencoder.identity import Identity
from ldm.autoencoder.kl import AutoencoderKL
from ldm.autoencoder.patch import PatchDecoder, PatchEncoder
from ldm.condition import Condition
from ldm.conditioner.none import Unconditional
from ldm.conditioner.spatial import MaskedImage, SourceImage, SpatialMap, cell_means, max_pool_mask
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grids import uniform_grid
from ldm.diffusion.prediction import X0
from ldm.diffusion.sampler import ddim, dpmpp_2m, heun
from ldm.diffusion.schedule import Flow
from ldm.model import LatentDiffusion
from ldm.net.unet import UNet
from ldm.sampling.pixels import fill_holes
from ldm.sampling.tasks import img2img, inpaint, outpaint, sample, super_resolution
from ldm.tensors import KeyedNoise

SHAPES = ((3, 7), (2, 5, 6), (1, 3, 4, 5))


class Exact(nn.Module):
    """The exact E[x0 | x_t] of Gaussian data as a network over samples of any shape."""

    def __init__(self):
        super().__init__()
        self.oracle, self.anchor = Gaussian(Flow()), nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, t, cond):
        return self.oracle(x, t / 1000).x0


def exact_model(shape, autoencoder=None) -> LatentDiffusion:
    first_stage = Identity(shape[0]) if autoencoder is None else autoencoder
    return LatentDiffusion(first_stage, Unconditional(), Denoiser(Exact(), Flow(), X0()), shape[1:])


@pytest.mark.parametrize("sampler", [ddim, heun, dpmpp_2m])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_samples_of_gaussian_data_are_affine_in_their_noise(shape, sampler):
    """As a single coordinate is, whose slope and offset `affine` measures; then it is clipped to [-1, 1]."""
    model, oracle = exact_model(shape), Gaussian(Flow())
    ts = uniform_grid(Flow(), 8).double().clamp(max=0.999)
    slope, offset, _ = affine(sampler, oracle, Flow(), ts, 0)
    found = sample(model, {"index": [0, 1]}, [4, 9], ts, sampler)
    noise = KeyedNoise(0, [4, 9]).normal("start", torch.empty(2, *shape, dtype=torch.float64))
    alpha, sigma = Flow().alpha_sigma(ts[0])
    expected = (slope * torch.hypot(alpha, sigma) * noise + offset).clamp(-1, 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert 0.1 < float(expected.std()) < 0.6


def patched(shape, factor) -> LatentDiffusion:
    parts = (PatchEncoder(shape[0], 3, factor, width=8), PatchDecoder(shape[0], 3, factor, width=8))
    stage = randomize_weights(AutoencoderKL(*parts, 3, factor)).double()
    return exact_model(shape, stage)


def test_inpaint_keeps_the_first_frame_of_a_clip_and_samples_the_rest():
    """A cell of two frames is known if both are; what is behind the mask changes nothing."""
    model = patched((1, 6, 8, 8), [2, 4, 4])
    clip = torch.rand(2, 1, 6, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.ones_like(clip)
    mask[:, :, :3] = 0
    draw = partial(sample, model, seeds=[0, 1], ts=uniform_grid(Flow(), 3), task=inpaint)
    found = draw({"image": clip, "mask": mask})
    assert torch.equal(found[:, :, :3], clip[:, :, :3])
    assert (found[:, :, 3:] - clip[:, :, 3:]).abs().amax((1, 3, 4)).min() > 1e-3
    assert torch.equal(draw({"image": torch.where(mask > 0, -clip, clip), "mask": mask}), found)
    known = max_pool_mask(mask, model.autoencoder.factor) == 0
    assert known.flatten(2).sum(2).tolist() == [[4], [4]]  # the first two frames; the third shares its cells
    with pytest.raises(ValueError, match=r"mask of \(2, 1, 8, 8\): expected \(2, 1, 6, 8, 8\)"):
        draw({"image": clip, "mask": mask[:, :, 0]})
    with pytest.raises(ValueError, match="outpaint takes images, not samples with 3 sides"):
        draw({"image": clip}, task=partial(outpaint, pad_left=4))


@pytest.mark.parametrize(("shape", "factor"), [((2, 16), [4]), ((1, 4, 8, 8), [1, 4, 4])])
def test_image_tasks_take_samples_of_other_sides(shape, factor):
    model = patched(shape, factor)
    x = torch.rand(2, *shape, dtype=torch.float64) * 2 - 1
    draw = partial(sample, model, seeds=[0, 1], ts=uniform_grid(Flow(), 3))
    assert draw({"image": x}, task=partial(img2img, strength=0.5)).shape == x.shape
    wide = draw({"low_res": x}, task=partial(super_resolution, scale=2))
    assert wide.shape == (2, shape[0], *(2 * side for side in shape[1:]))
    with pytest.raises(ValueError, match="back_projection_steps=1: expected 0 for samples with"):
        draw({"low_res": x}, task=partial(super_resolution, back_projection_steps=1))
    with pytest.raises(ValueError, match=r"all sides must be multiples of (4|1x4x4), the first stage's factor"):
        model.latent_shape(1, [side + 1 for side in shape[1:]])


def test_fill_holes_takes_means_of_known_neighbours_along_every_side():
    line, hole = torch.tensor([[[3.0, 0, 0, 0, 9.0, 1.0]]]), torch.tensor([[[False, True, True, True, False, False]]])
    torch.testing.assert_close(fill_holes(line, hole), torch.tensor([[[3.0, 3.0, 6.0, 9.0, 9.0, 1.0]]]))
    clip, hole = torch.arange(27.0).reshape(1, 1, 3, 3, 3), torch.zeros(1, 1, 3, 3, 3, dtype=torch.bool)
    hole[0, 0, 1, 1, 1] = True
    torch.testing.assert_close(fill_holes(clip, hole), clip)  # the mean of the 26 others is the middle
    hole[:] = True
    hole[0, 0, 0, 0, 0] = False  # one known corner: of 27 positions, the least that a mean is taken over
    torch.testing.assert_close(fill_holes(clip + 5, hole), torch.full_like(clip, 5.0))


@pytest.mark.parametrize(("sides", "factor"), [((8,), (4,)), ((8, 12), (4, 2)), ((2, 8, 12), (1, 4, 2))])
def test_conditions_on_the_grid_have_the_sides_of_samples(sides, factor):
    x = torch.rand(2, 1, *sides, generator=torch.Generator().manual_seed(0))
    mask = (x > 0.9).float()
    cells = [side // f for side, f in zip(sides, factor, strict=True)]
    split = [n for pair in zip(cells, factor, strict=True) for n in pair]
    inside = tuple(range(3, 3 + 2 * len(sides), 2))
    torch.testing.assert_close(cell_means(x, factor, "x"), x.reshape(2, 1, *split).mean(inside))
    assert torch.equal(max_pool_mask(mask, factor), mask.reshape(2, 1, *split).amax(inside))

    def encode(image: Tensor) -> Tensor:
        return cell_means(image, factor, "x").expand(-1, 3, *[-1] * len(sides))

    batch = {"image": x, "mask": mask, "source": x, "relief": x}
    for part in (SpatialMap(factor), MaskedImage(factor, 3, encode), SourceImage(factor, 3, encode)):
        cond, null = part(batch), part.null(batch)
        assert cond.concat.shape == null.concat.shape == (2, part.concat_channels, *cells)
        unknown = part.null({"noise": KeyedNoise(0, [0, 1])})  # of a size that the batch does not say
        assert torch.equal(unknown.expand_concat(*cells).concat, null.concat)
        both = cond.where(torch.tensor([True, False]), unknown).concat
        assert torch.equal(both, torch.stack([cond.concat[0], null.concat[1]]))
    with pytest.raises(ValueError, match="the condition is for latents of"):
        cond.expand_concat(*[side + 1 for side in cells])


@pytest.mark.parametrize("dims", [1, 3])
def test_lora_corrects_convolutions_of_any_sides(dims):
    net = randomize_weights(UNet(2, 2, channels=8, num_res_blocks=1, num_groups=4, num_head_channels=4, dims=dims))
    x, t = torch.randn(1, 2, *[4] * dims), torch.tensor([3.0])
    plain = net(x, t, Condition())
    lora.inject(net, 2, ["*res.conv1", "stem"], torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(x, t, Condition()), plain)
    layer = net.stem.parametrizations.weight
    with torch.no_grad():
        layer[0].up.normal_(generator=torch.Generator().manual_seed(1))
    expected = layer.original + (layer[0].up @ layer[0].down.flatten(1)).reshape(layer.original.shape)
    torch.testing.assert_close(net.stem.weight, expected)
    found = net(x, t, Condition())
    torch.testing.assert_close(lora.merge(net)(x, t, Condition()), found)
    assert (found - plain).abs().max() > 1e-3
