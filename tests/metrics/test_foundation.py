import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from ldm.conditioner.clip import load_towers
from ldm.errors import UserError
from ldm.io.download import AssetNotFoundError
from ldm.metrics.distribution import GaussianDistance, gaussian_mmd
from ldm.metrics.features import Inception, hash_weights
from ldm.metrics.foundation import CLIP, CLIPScore, DINOv2

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 64, "patch_size": 4},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """CLIP of a small config, with random weights."""
    from open_clip import factory

    known = factory._MODEL_CONFIGS.copy()
    file = tmp_path_factory.mktemp("clip") / "seen.json"
    file.write_text(json.dumps(TINY))
    yield CLIP(load_towers(str(file), random=True))
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(known)


def pictures(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def test_clip_image_features_match_open_clip_transform(clip):
    """To the rounding of Pillow, which resizes in 8 bits."""
    from open_clip.transform import image_transform
    from PIL import Image

    images = pictures(4)
    shown = image_transform(8, is_train=False, mean=clip.stats[0], std=clip.stats[1])
    theirs = torch.stack([shown(Image.fromarray(one.permute(1, 2, 0).numpy())) for one in images])
    with torch.no_grad():
        expected = F.normalize(clip.clip.visual(theirs), dim=1)
    found = clip.train()(images)
    assert found.shape == (4, clip.num_features)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    assert (clip(images[:1]) - clip(images[1:2])).abs().max() > 0.05
    assert torch.equal(clip(images[:, :1]), clip(images[:, :1].expand(-1, 3, -1, -1)))


class FirstPixel(torch.nn.Module):
    """A tower whose embedding is the colour of the first pixel of its input."""

    def __init__(self, mean, std):
        super().__init__()
        self.visual = SimpleNamespace(image_size=(4, 4), image_mean=mean, image_std=std, output_dim=3)

    def encode_image(self, x, normalize):
        assert normalize
        return x[:, :, 0, 0]


@pytest.mark.parametrize("given", [((0.1, 0.2, 0.3), (0.5, 0.25, 0.125)), (None, None)])
def test_clip_standardises_by_its_weights_or_by_openai_statistics(given):
    openai = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    mean, std = (torch.tensor(own or theirs) for own, theirs in zip(given, openai, strict=True))
    flat = torch.full((1, 3, 6, 6), 51, dtype=torch.uint8)
    torch.testing.assert_close(CLIP((FirstPixel(*given), None))(flat)[0], (51 / 255 - mean) / std)


def test_clip_score_clamps_each_cosine_at_zero():
    text = {"same": [1.0, 0.0], "opposite": [0.0, -1.0]}
    net = SimpleNamespace(embed=lambda captions: torch.tensor([text[one] for one in captions]))
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    metric = CLIPScore(net, images)
    metric.update(images, None, ["same", "same", "opposite"])
    assert metric.compute()["clip_score"] == pytest.approx(100 * (1 + 0.6 + 0) / 3, rel=1e-6)


def test_clip_score_is_mean_cosine_times_100(clip):
    images, captions = pictures(6), ["a cat", "two dogs", "a cat", "rain", "the sea", "a red bag"]
    expected = 100 * (clip(images) * clip.embed(captions)).sum(1).clamp(min=0)
    metric = CLIPScore(clip, clip(images))
    for i in range(0, 6, 4):
        metric.update(clip(images[i : i + 4]), None, captions[i : i + 4])
    assert metric.compute()["clip_score"] == pytest.approx(expected.mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="needs the caption"):
        metric.update(clip(images))


def test_cmmd_matches_double_sum(clip):
    x, y = clip(pictures(5)), clip(pictures(7))

    def k(a, b):
        return torch.stack([torch.stack([(-(p - q).square().sum() / 200).exp() for q in b]) for p in a]).mean()

    x, y = x.double(), y.double()
    expected = k(x, x) + k(y, y) - 2 * k(x, y)
    assert gaussian_mmd(x, y).item() == pytest.approx(expected.item(), rel=1e-9)
    assert gaussian_mmd(x, x).item() == pytest.approx(0, abs=1e-15)
    metric = GaussianDistance(clip, y.float())
    metric.update(x.float())
    assert metric.compute() == {"cmmd_clip": pytest.approx(1000 * expected.item(), rel=1e-6)}


@pytest.mark.slow
@torch.no_grad()
def test_dinov2_matches_timm(tmp_path):
    import timm

    tag = "vit_small_patch14_dinov2.lvd142m"
    torch.manual_seed(0)
    theirs = timm.create_model(tag, pretrained=False, img_size=28, num_classes=0).eval()
    torch.save(theirs.state_dict(), tmp_path / "dino.pth")
    net, images = DINOv2(tag, tmp_path / "dino.pth", size=28).train(), pictures(2)
    x = F.interpolate(images.float(), size=(28, 28), mode="bicubic", antialias=True).clamp(0, 255) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(
        net(images), theirs((x - mean[:, None, None]) / std[:, None, None]), atol=1e-5, rtol=1e-5
    )
    assert net(images).shape == (2, net.num_features)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold timm's weights"):
        DINOv2(tag, tmp_path / "other.pth", size=28)


def test_dinov2_reads_a_file_offline(tmp_path, monkeypatch):
    import timm

    monkeypatch.setenv("LDM_OFFLINE", "1")
    theirs = timm.create_model("test_vit", pretrained=False, img_size=16, num_classes=0)
    torch.save(theirs.state_dict(), tmp_path / "tiny.pth")
    net = DINOv2("test_vit", tmp_path / "tiny.pth", size=16)
    assert net.identity == f"{hash_weights(theirs)}-16px"


def test_foundation_networks_report_missing_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_OFFLINE", "1")
    for make, said in (
        (DINOv2, "LDM_OFFLINE is set"),
        (lambda: DINOv2(weights=tmp_path / "no.pth"), "is not a file"),
        (lambda: Inception(tmp_path / "no.pth"), "is not a file"),
        (lambda: CLIP(load_towers(weights=None)), "has no weights"),
    ):
        with pytest.raises(AssetNotFoundError, match=said) as error:
            make()
        assert "\n" not in str(error.value)
