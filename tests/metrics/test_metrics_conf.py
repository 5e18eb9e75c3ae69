import pytest
import torch
from smoke import ROOT

from ldm.config.compose import compose_option
from ldm.config.overrides import ConfigSearchPath
from ldm.metrics.judge import FashionNet
from ldm.metrics.names import metric_names

KEYS = {
    "fd": ["fd_fashion"],
    "full": ["fd_fashion", "accuracy"],
    "diversity": ["recall", "density", "coverage", "authenticity", "copies"],
}
OPTIONS = ConfigSearchPath((ROOT / "conf",), ROOT).groups()["metrics"]


@pytest.mark.parametrize("option", ["fd", "full", "diversity"])
def test_metrics_option_scores_images(option):
    from hydra.utils import instantiate

    net = FashionNet(width=2, num_features=4).eval()
    score = instantiate(compose_option("metrics", option))(net=net, reference=torch.randn(20, 4))
    score.update(torch.rand(8, 1, 32, 32) * 2 - 1, torch.arange(8))
    with pytest.warns(UserWarning, match="biased"):
        assert {"n", *KEYS[option]} <= score.compute().keys()


@pytest.mark.parametrize("option", [option for option in OPTIONS if option != "none"])
def test_metric_names_equal_computed_keys(option, monkeypatch):
    """The keys that compute() gives, of each option, with a small network under the name of its own."""
    from hydra.utils import get_object, instantiate

    node = compose_option("metrics", option)
    names = metric_names(node, {"_target_": "ldm.metrics.judge.FashionNet"})
    net = FashionNet(width=2, num_features=4).eval()
    net.embed = lambda captions: torch.ones(len(captions), 4)
    monkeypatch.setattr(FashionNet, "name", get_object(node.net._target_).name if "net" in node else "fashion")
    for one in node.metrics.values():
        one.update({"start": 0, "stop": 4} if "metric" in one else {})
    node.pop("net", None)
    score = instantiate(node)(net=net, reference=torch.randn(20, 4))
    score.update(torch.rand(8, 1, 32, 32) * 2 - 1, torch.arange(8), ["a"] * 8)
    with pytest.warns(UserWarning, match="biased"):
        assert score.compute().keys() - {"n"} == names


def test_metric_names_of_a_users_class_are_unknown():
    node, net = compose_option("metrics", "fd"), {"_target_": "ldm.metrics.judge.FashionNet"}
    assert metric_names(node, net) == {"fd_fashion"}
    assert metric_names({**node, "_target_": "collections.Counter"}, net) is None
    assert metric_names(node, None) is None
    assert metric_names(node, {"_target_": "torch.nn.Identity"}) is None  # a network without a name
    assert metric_names({**node, "metrics": {"x": {"_target_": "collections.Counter"}}}, net) is None


@pytest.mark.parametrize("option", ["fid", "adm"])
def test_fid_option_requires_inception_weights(option, monkeypatch):
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    monkeypatch.setenv("LDM_INCEPTION", "/nowhere.pth")
    with pytest.raises(InstantiationException, match=r"/nowhere\.pth is not a file"):
        instantiate(compose_option("metrics", option))


@pytest.mark.parametrize(
    ("option", "said"), [("clip", "CLIP ViT-L-14-336"), ("dinov2", "DINOv2"), ("lpips", "LPIPS needs VGG-16")]
)
def test_metrics_option_reports_missing_weights(option, said, monkeypatch, tmp_path):
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    monkeypatch.setenv("LDM_OFFLINE", "1")
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    config = compose_option("reconstruction_metrics" if option == "lpips" else "metrics", option)
    if option == "clip":
        config.net.towers.weights = None
    with pytest.raises(InstantiationException, match=said):
        instantiate(config)
