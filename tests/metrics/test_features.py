from hashlib import sha256

import pytest
import torch
from torch import nn

from ldm.io.download import AssetNotFoundError
from ldm.io.images import to_uint8
from ldm.metrics.features import Inception, SpatialInception, extract, hash_weights, require_uint8
from ldm.metrics.judge import FashionNet


def test_to_uint8_round_trips_every_byte():
    byte = torch.arange(256, dtype=torch.uint8)
    for nudge in (-0.49, 0.0, 0.49):
        assert torch.equal(to_uint8((byte.float() + nudge) / 127.5 - 1), byte)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).item() == 191


@pytest.mark.parametrize("bad", [torch.zeros(1, dtype=torch.uint8), torch.tensor([0.0, float("nan")])])
def test_to_uint8_rejects_non_finite_and_integer(bad):
    with pytest.raises(ValueError, match=r"image (is|holds)"):
        to_uint8(bad)


@pytest.mark.parametrize(
    "bad", [torch.rand(2, 3, 8, 8), torch.zeros(2, 4, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)]
)
def test_require_uint8_rejects_invalid_images(bad):
    with pytest.raises(ValueError, match=r"expected|uint8"):
        require_uint8(bad, (1, 3))


@pytest.mark.parametrize(("size", "said"), [(None, "any, any"), (8, "8, 8")])
def test_require_uint8_names_expected_size(size, said):
    with pytest.raises(ValueError, match=rf"images are \(2, 4, 6, 6\): expected \(B, 1 or 3, {said}\)"):
        require_uint8(torch.zeros(2, 4, 6, 6, dtype=torch.uint8), (1, 3), size)


def test_hash_weights_depends_on_every_weight_and_buffer():
    def net(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    a, b = net(0), net(0)
    assert hash_weights(a) == hash_weights(b) != hash_weights(net(1))
    b[1].running_mean += 1
    assert hash_weights(a) != hash_weights(b)
    old = sha256()  # the formula behind every identity in a results table
    for name, value in sorted(b.state_dict().items()):
        old.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    assert hash_weights(b) == old.hexdigest()
    assert (
        len({hash_weights(nn.Linear(3, 3).to(t).requires_grad_(False)) for t in (torch.float32, torch.bfloat16)}) == 2
    )


def judge(seed: int = 0) -> FashionNet:
    torch.manual_seed(seed)
    net = FashionNet(width=2, num_features=8).eval()
    for norm in (x for x in net.modules() if isinstance(x, nn.BatchNorm2d | nn.BatchNorm1d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return net


def images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def test_fashion_net_standardises_over_training_set():
    net, x = judge(), images(200)
    net.standardise(net.penultimate(x))
    features = net(x)
    assert features.shape == (200, net.num_features)
    torch.testing.assert_close(features.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(net.classify(features), net.logits(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net.penultimate(x[:1]), net.penultimate(x)[:1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_fashion_net_takes_pixels_of_mean_0_and_deviation_1():
    net, seen = judge(), []
    net.body.register_forward_pre_hook(lambda body, args: seen.append(args[0]))
    x = images(2)
    net(x)
    torch.testing.assert_close(seen[0], (x.float() - 73) / 90)


@torch.no_grad()
def test_fashion_net_computes_features_in_float32_under_autocast():
    net, x = judge(), images(4)
    before, features = net.identity, net(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x), features)
        assert net.logits(x).dtype == torch.bfloat16  # training may use it
    net.standardise(net.penultimate(x))
    assert net.identity != before


def test_fashion_net_rejects_training_mode_and_wrong_images():
    net = judge()
    with pytest.raises(ValueError, match=r"\.eval\(\)"):
        net.train()(images(2))
    with pytest.raises(ValueError, match="1 of 8 features are constant"):
        net.standardise(torch.randn(9, 8) * torch.tensor([1.0] * 7 + [0.0]))
    with pytest.raises(ValueError, match="32"):
        net.eval()(images(2)[..., :28])


def test_extract_joins_batches_in_order():
    net, x = judge(), images(5)
    image = x.float() / 127.5 - 1
    torch.testing.assert_close(extract(net, [image[:3], image[3:]]), net(x).detach(), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no images"):
        extract(net, [])


def test_inception_reports_missing_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_OFFLINE", "1")
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("LDM_INCEPTION", raising=False)
    with pytest.raises(AssetNotFoundError) as error:
        Inception()
    assert f"put {Inception.FILE} into {tmp_path / 'inception'}" in str(error.value)
    assert "\n" not in str(error.value)
    for given in (
        lambda: Inception(tmp_path / "no.pth"),
        lambda: monkeypatch.setenv("LDM_INCEPTION", str(tmp_path / "no.pth")) or Inception(),
    ):
        with pytest.raises(AssetNotFoundError, match=r"no\.pth is not a file"):
            given()


@pytest.mark.parametrize("place", ["cache/inception", "hub/checkpoints"])
def test_inception_finds_its_file_in_cache_and_hub(place, monkeypatch, tmp_path):
    file = tmp_path / place / Inception.FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    monkeypatch.setattr(Inception, "SHA256", sha256(b"weights").hexdigest())
    monkeypatch.setenv("LDM_OFFLINE", "1")
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("LDM_INCEPTION", raising=False)
    assert Inception.find() == file


@pytest.mark.slow
def test_inception_matches_torch_fidelity(tmp_path):
    """Random weights of the right shapes: the file is read, grey is repeated, training mode is refused."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Theirs

    class Empty(Theirs):
        def load_state_dict(self, state, **options):
            return None

    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save({}, path)
    theirs = Empty("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(theirs.state_dict(), path)
    net = Inception(path).train()
    x = torch.randint(0, 256, (2, 1, 40, 40), dtype=torch.uint8)
    features = net(x)
    assert features.shape == (2, net.num_features)
    assert torch.equal(features, theirs(x.expand(-1, 3, -1, -1))[0])
    assert net.identity == hash_weights(theirs)
    wide, places = SpatialInception(path), []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: places.append(out.clone()))
    theirs(x.expand(-1, 3, -1, -1))
    both = wide(x)
    assert both.shape == (2, 2048 + 2023)
    assert torch.equal(both[:, :2048], features)
    flat = [places[0][:, channel, row, column] for row in range(17) for column in range(17) for channel in range(7)]
    assert torch.equal(both[:, 2048:], torch.stack(flat, 1))
    assert both[:, 2048:].min() == 0  # after its activation
    torch.testing.assert_close(wide.classify(both), net.classify(features))
    unbiased = Empty("inception-v3-compat", ["logits_unbiased"], feature_extractor_weights_path=str(path))
    nn.Module.load_state_dict(unbiased, theirs.state_dict())
    torch.testing.assert_close(net.classify(features), unbiased(x.expand(-1, 3, -1, -1))[0])
