"""The classifier of noisy latents without a training: its input, its gradient, and which runs are one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from ldm.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import X0
from ldm.diffusion.schedule import cosine, linear
from ldm.errors import UserError
from ldm.sampling import classifier_guidance
from ldm.sampling.classifier_guidance import CLASSIFIER_RECIPE, weights_path
from ldm.training.classifier import noisy_logits


def test_classifier_guidance_points_to_requested_class(monkeypatch):
    """A classifier whose log odds are the mean of x_t: told class 1 it raises x0, told class 0 it lowers it, by as
    much.
    """

    class Odds(torch.nn.Module):
        def forward(self, x, t):
            return torch.stack([0 * x.mean((1, 2, 3)), x.mean((1, 2, 3))], 1)

    class Half(torch.nn.Module):
        def forward(self, x, t, cond):
            return torch.full_like(x, 0.5)

    monkeypatch.setattr(classifier_guidance, "load_classifier", lambda run: (Odds(), cosine()))
    cond = Condition(label=torch.tensor([1, 0]))
    denoise = classifier_guidance.classifier_guidance(Denoiser(Half(), cosine(), X0()), cond, None, "some", scale=2.0)
    with torch.inference_mode():
        x0 = denoise(torch.zeros(2, 1, 4, 4), torch.tensor(0.5, dtype=torch.float64)).x0 - 0.5
    assert x0[0].min() > 0 > x0[1].max()
    torch.testing.assert_close(x0[0], -x0[1])
    with pytest.raises(UserError, match="trained on another noise schedule"):
        classifier_guidance.classifier_guidance(Denoiser(Half(), linear(), X0()), cond, None, "some")


def test_noisy_logits_use_noised_latent_and_schedule_time():
    seen = {}

    def net(x, t):
        seen.update(x=x, t=t)
        return x.flatten(1)[:, :2]

    z, eps, t = torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0), torch.tensor([0.25, 1.0])
    alpha, sigma = cosine().alpha_sigma(t)
    noisy_logits(net, cosine(), z, t, eps)
    torch.testing.assert_close(seen["x"][:, 0, 0, 0], alpha + 3 * sigma)
    assert seen["t"].tolist() == [249.0, 999.0]


def test_weights_of_a_classifier_are_those_of_a_run_that_trained_one(tmp_path):
    def source(target: str, folder: Path) -> SimpleNamespace:
        return SimpleNamespace(config=OmegaConf.create({"training": {"_target_": target}}), folder=folder)

    with pytest.raises(UserError, match="that run trained no classifier"):
        weights_path("some", source("ldm.recipes.diffusion.DiffusionRecipe", tmp_path))
    with pytest.raises(UserError, match="has no weights yet"):
        weights_path("some", source(CLASSIFIER_RECIPE, tmp_path))
    (tmp_path / "weights.safetensors").touch()
    assert weights_path("some", source(CLASSIFIER_RECIPE, tmp_path)) == tmp_path / "weights.safetensors"
