from functools import partial

import pytest
import torch

from ldm.autoencoder.kl import AutoencoderKL
from ldm.autoencoder.patch import PatchDecoder, PatchEncoder
from ldm.conditioner.label import NoCondition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grids import trailing
from ldm.diffusion.prediction import v
from ldm.diffusion.schedule import cosine
from ldm.errors import ConfigError
from ldm.model import LatentDiffusion
from ldm.net.dit import DiT
from ldm.sampling.clips import complete_clip, extend_clip
from ldm.sampling.tasks import sample


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    """A model of clips (1, 6, 8, 8) with random weights, whose latent cells have two frames."""
    torch.manual_seed(0)
    options = {"channels": 1, "z_channels": 2, "factor": [2, 4, 4], "width": 8}
    first_stage = AutoencoderKL(PatchEncoder(**options), PatchDecoder(**options), 2, [2, 4, 4])
    net = DiT(2, 2, [1, 1, 1], 24, 1, 2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return LatentDiffusion(first_stage, NoCondition(), Denoiser(net, cosine(), v), (6, 8, 8))


def test_placeholder(model):
    pass
