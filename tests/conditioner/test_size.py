"""Size and crop conditioning against diffusers' SDXL network, and what guidance and dropout make of it."""

from functools import partial

import pytest
import torch
from torch import nn

from ldm.condition import Condition
from ldm.conditioner.compose import Compose, condition_or_null, drop_condition
from ldm.conditioner.size import SIZE_KEYS, SizeCrop, uncropped
from ldm.net.blocks import mlp, timestep_embedding
from ldm.tensors import KeyedNoise

SIZES = {
    "original_size": torch.tensor([[512, 768], [31, 4096]]),
    "crop": torch.tensor([[0, 120], [7, 0]]),
    "target_size": torch.tensor([[1024, 960], [256, 256]]),
}


class Pooled(nn.Module):
    """A pooled text of `dim` numbers."""

    keys, context_dim, concat_channels = ("pooled",), None, 0

    def __init__(self, dim: int):
        super().__init__()
        self.vector_dim = dim

    def forward(self, batch):
        return Condition(vector=batch["pooled"])

    def null(self, batch):
        return Condition(vector=torch.zeros(len(batch["noise"]), self.vector_dim))


def conditioner(pooled: int, dim: int) -> Compose:
    return Compose(text=Pooled(pooled), size_crop=SizeCrop(timestep_embedding, dim))


def test_size_crop_equals_sdxl_embedding():
    """The six integers and a pooled text, through diffusers' add_time_proj and add_embedding with our weights."""
    from diffusers import UNet2DConditionModel

    made = conditioner(pooled=5, dim=8)
    small = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 8}
    theirs = UNet2DConditionModel(
        **small,
        sample_size=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=made.vector_dim,
    )
    ours = mlp(made.vector_dim, 32)  # the network's map of cond.vector
    for layer, name in ((ours[0], "linear_1"), (ours[2], "linear_2")):
        layer.load_state_dict(getattr(theirs.add_embedding, name).state_dict())
    pooled = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    time_ids = torch.tensor([[512, 768, 0, 120, 1024, 960], [31, 4096, 7, 0, 256, 256]])
    projected = theirs.add_time_proj(time_ids.flatten()).reshape(2, -1)
    vector = made({"pooled": pooled, **SIZES}).vector
    # an angle up to 4096 has an error of a few roundings of its size
    torch.testing.assert_close(vector, torch.cat([pooled, projected], 1), rtol=0, atol=8 * 2**-24 * 4096)
    assert torch.equal(vector[:, :5], pooled)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(torch.cat([pooled, projected], 1)), theirs.add_embedding(torch.cat([pooled, projected], 1))
        )
        torch.testing.assert_close(
            ours(vector), theirs.add_embedding(torch.cat([pooled, projected], 1)), rtol=0, atol=1e-2
        )


def test_size_crop_in_float64_is_closed_form():
    embedding = partial(lambda t, dim, **options: timestep_embedding(t.double(), dim, **options), max_period=10_000.0)
    vector = SizeCrop(embedding, 4).double()(SIZES).vector
    numbers = [[512, 768, 0, 120, 1024, 960], [31, 4096, 7, 0, 256, 256]]
    for row, values in zip(vector.view(2, 6, 4), torch.tensor(numbers).double(), strict=True):
        expected = torch.stack([values.cos(), (values / 100).cos(), values.sin(), (values / 100).sin()], 1)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-11)


def test_sdxl_network_with_size_crop_has_published_parameter_count():
    from diffusers.models.embeddings import TimestepEmbedding
    from hydra.utils import instantiate

    from ldm.config.compose import compose_option

    made = conditioner(pooled=1280, dim=256)
    assert made.conditioners["size_crop"].vector_dim == 1536
    with torch.device("meta"):
        net = instantiate(
            compose_option("net", "sdxl"), in_channels=4, out_channels=4, context_dim=2048, vector_dim=made.vector_dim
        )
        theirs = TimestepEmbedding(2816, 1280)
    assert sum(p.numel() for p in net.parameters()) == 2_567_463_684
    assert [p.shape for p in net.vector.parameters()] == [p.shape for p in theirs.parameters()]


def test_sizes_are_neither_dropped_nor_guided_away_from():
    made, noise = conditioner(pooled=3, dim=4), KeyedNoise(0, [0, 1])
    batch = {"pooled": torch.ones(2, 3), **SIZES, "noise": noise}
    cond, null = made(batch), made.null(batch)
    dropped = drop_condition(cond, null, noise, "drop", 1.0)
    assert torch.equal(dropped.vector[:, :3], torch.zeros(2, 3))
    assert torch.equal(dropped.vector[:, 3:], cond.vector[:, 3:])
    assert torch.equal(made.null({"noise": noise}).vector, torch.zeros(2, 3 + 24))
    assert torch.equal(condition_or_null(made, {"noise": noise, **SIZES}).vector, null.vector)


@pytest.mark.parametrize("given", [{}, {"crop": torch.tensor([[3, 5]])}])
def test_sampling_defaults_to_uncropped_images(given, monkeypatch):
    """The network's vector, with guidance, is that of the image's own size in both branches, unless sizes are given."""
    from ldm.autoencoder.identity import Identity
    from ldm.diffusion import prediction, schedule
    from ldm.diffusion.denoiser import Denoiser
    from ldm.diffusion.guidance import cfg
    from ldm.model import LatentDiffusion
    from ldm.sampling.tasks import generate, sample

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.vectors, self.weight = [], nn.Parameter(torch.zeros(1))

        def forward(self, x, t, cond):
            self.vectors.append(cond.vector)
            return self.weight * x

    net, made = Net(), SizeCrop(timestep_embedding, 4)
    model = LatentDiffusion(Identity(channels=1), made, Denoiser(net, schedule.cosine(), prediction.V()), (8, 8))
    task = partial(generate, size=[16, 24])
    sample(model, dict(given), [0], torch.tensor([1.0, 0.0]), guidance=partial(cfg, scale=3.0), task=task)
    expected = made({**uncropped(1, 16, 24), **given}).vector
    assert set(SIZE_KEYS) == uncropped(1, 16, 24).keys()
    assert torch.equal(net.vectors[0], expected.repeat(2, 1))
    assert uncropped(2, 16, 24)["target_size"].tolist() == [[16, 24]] * 2
