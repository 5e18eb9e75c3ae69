from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.metrics.judge import FashionNet

KEYS = {"fd": ["fd_fashion"], "full": ["fd_fashion", "accuracy"], "diversity": ["recall", "density", "coverage", "authenticity", "copies"]}
CONF = Path(__file__).parents[2] / "conf" / "metrics"


@pytest.mark.parametrize("option", ["fd", "full", "diversity"])
def test_every_option_scores_what_the_judge_sees(option):
    from hydra.utils import instantiate

    net = FashionNet(width=2, num_features=4).eval()
    score = instantiate(OmegaConf.load(CONF / f"{option}.yaml"))(net=net, reference=torch.randn(20, 4))
    score.update(torch.rand(8, 1, 32, 32) * 2 - 1, torch.arange(8))
    with pytest.warns(UserWarning, match="biased"):
        assert {"n", *KEYS[option]} <= score.compute().keys()


@pytest.mark.parametrize("option", ["fid", "adm"])
def test_fid_asks_for_inception(option, monkeypatch):
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    monkeypatch.setenv("LDM_INCEPTION", "/nowhere.pth")
    with pytest.raises(InstantiationException, match=r"/nowhere\.pth is not a file"):
        instantiate(OmegaConf.load(CONF / f"{option}.yaml"))


@pytest.mark.parametrize(("option", "said"), [("clip", "CLIP ViT-L-14-336"), ("dinov2", "DINOv2"), ("lpips", "LPIPS needs VGG-16")])
def test_others_say_which_weights_are_missing(option, said, monkeypatch, tmp_path):
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    monkeypatch.setenv("LDM_OFFLINE", "1")
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    config = OmegaConf.load(CONF.parent / ("paired" if option == "lpips" else "metrics") / f"{option}.yaml")
    if option == "clip":
        config.net.towers.weights = None
    with pytest.raises(InstantiationException, match=said):
        instantiate(config)
