import pytest
import torch
from torch import nn

from ldm.autoencoder.posterior import DiagonalGaussian
from ldm.data.latents import LatentDataset, batches, encode_into, encode_latents, read_latents, write_latents
from ldm.data.stream import BatchDataset, BatchStream
from ldm.data.synthetic import Synthetic


class Halves(nn.Module):
    """A first stage whose moments tell left from right: mean = every second pixel, log-variance = minus that."""

    def posterior(self, image):
        return DiagonalGaussian(image[..., ::2, ::2], -image[..., ::2, ::2])


def test_batches_cover_all_images_in_order_unflipped():
    data = Synthetic(num=7, size=16, flip=True)
    some = list(batches(data, size=3))
    assert [len(image) for image in some] == [3, 3, 1]
    assert torch.equal(torch.cat(some), data.images / 127.5 - 1)
    for rank, rows in enumerate(([0, 1], [2, 3], [4, 5])):
        expected = [data.pixels(part) for part in (rows, [6] if rank == 0 else []) if part]
        shared = list(batches(data, size=2, rank=rank, ranks=3))
        assert all(torch.equal(one, other) for one, other in zip(shared, expected, strict=True))


@pytest.mark.parametrize("flip", [False, True])
def test_latents_equal_moments_of_batch_images(flip):
    data = Synthetic(num=9, size=16, flip=flip)
    moments = encode_latents(Halves(), data)
    assert moments.shape == (1 + flip, 9, 2, 8, 8)
    assert moments.dtype == torch.float16
    at = [(epoch, i) for epoch in (0, 3) for i in (8, 0, 4, 5)]
    batch, cached = data.batch(at), LatentDataset(data, moments).batch(at)
    assert cached["moments"].dtype == torch.float32
    expected = Halves().posterior(batch["image"]).moments
    torch.testing.assert_close(cached["moments"], expected, atol=5e-4, rtol=0)
    if flip:
        assert 0 < batch["flip"].sum() < len(at), "both rows of the cache are read"
        assert not torch.equal(moments[0], moments[1])
    assert set(cached) == set(batch) - {"image"} | {"moments"}
    assert all(torch.equal(cached[k], batch[k]) for k in ("label", "flip"))
    assert all(cached[k] == batch[k] for k in ("caption", "index", "epoch"))
    both = LatentDataset(data, moments, image=True).batch(at)  # for objectives that read pixels
    assert set(both) == {*batch, "moments"}
    assert torch.equal(both["image"], batch["image"])
    assert torch.equal(both["moments"], cached["moments"])


def test_encode_latents_has_no_graph_and_is_independent_of_batch():
    class Weighted(Halves):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(2.0))

        def posterior(self, image):
            return super().posterior(image * self.gain)

    data = Synthetic(num=501, size=4)  # one more than a batch
    moments = encode_latents(Weighted(), data)
    assert not moments.requires_grad
    assert torch.equal(moments[0, 500:], Weighted().posterior(data.pixels([500])).moments.half())


def test_latent_dataset_streams_like_images():
    data = Synthetic(num=6, size=16)
    part = BatchStream(length=6, batch=4, steps=3, rank=1, world=2).batch_at(2)
    latents = LatentDataset(data, encode_latents(Halves(), data))
    assert len(BatchDataset(latents)) == len(latents) == 6
    batch = BatchDataset(latents)[part]
    assert (batch["position"], batch["total"], batch["step"]) == ([2, 3], 4, 2)
    assert torch.equal(batch["moments"], latents.batch(part.samples)["moments"])


def test_latent_dataset_rejects_moments_of_another_dataset():
    plain, flipped = Synthetic(num=5, size=16), Synthetic(num=5, size=16, flip=True)
    moments = encode_latents(Halves(), plain)
    with pytest.raises(ValueError, match=r"moments of \(1, 5\) .* do not fit a data set of \(2, 5\)"):
        LatentDataset(flipped, moments)
    with pytest.raises(ValueError, match=r"do not fit a data set of \(1, 6\)"):
        LatentDataset(Synthetic(num=6, size=16), moments)


@pytest.mark.parametrize("flip", [False, True])
def test_latents_on_disk_equal_latents_in_memory(tmp_path, flip):
    from safetensors import safe_open

    data = Synthetic(num=30, size=16, flip=flip)
    write_latents(tmp_path / "x.safetensors", Halves(), data, {"autoencoder": "it"})
    whole, moments = encode_latents(Halves(), data), read_latents(tmp_path / "x.safetensors")
    assert moments.dtype == torch.float16
    assert torch.equal(moments, whole)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"autoencoder": "it"}
        assert torch.equal(file.get_tensor("moments"), whole), "a file that anything can read"
    at = [(epoch, i) for epoch in (0, 3) for i in (8, 0, 29)]
    assert torch.equal(
        LatentDataset(data, moments).batch(at)["moments"], LatentDataset(data, whole).batch(at)["moments"]
    )
    moments[0, 0] = 7
    assert torch.equal(read_latents(tmp_path / "x.safetensors"), whole), (
        "writing to what was read leaves the file alone"
    )


def test_encode_into_works_for_any_batch_size():
    data = Synthetic(num=30, size=16, flip=True)
    parts = torch.zeros(2, 30, 2, 8, 8, dtype=torch.float16)
    encode_into(parts, Halves(), data, size=7)
    assert torch.equal(parts, encode_latents(Halves(), data))


def test_write_latents_rejects_float16_overflow_and_leaves_no_file(tmp_path):
    class Loud(Halves):
        def posterior(self, image):
            return DiagonalGaussian(image * 1e6, image)

    with pytest.raises(ValueError, match="latents of images 0 to 4 are not finite in float16"):
        write_latents(tmp_path / "x.safetensors", Loud(), Synthetic(num=5, size=16), {})
    assert not list(tmp_path.iterdir())
    data = Synthetic(num=5, size=16)
    data.images[:3] = 127  # -1/255, of which float16 has a million times as much
    with pytest.raises(ValueError, match="latents of images 3 to 4 are not finite"):
        encode_into(torch.zeros(1, 5, 2, 16, 16, dtype=torch.float16), Loud(), data, size=3)
