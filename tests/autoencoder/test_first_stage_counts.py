"""The parameter counts of LDM's first stages, from our configs, on the meta device."""

import pytest
import torch
from hydra.utils import instantiate

from ldm.config import build
from ldm.config.compose import compose_option

TABLE = {  # Rombach et al. 2022, tab. 8 and their released configs
    "kl_f4": 55_312_063,
    "kl_f8": 83_653_863,
    "kl_f16": 69_610_963,
    "kl_f32": 103_880_131,
    "vq_f4": 55_322_782,
    "vq_f4_noattn": 53_219_486,
    "vq_f8": 67_717_295,
    "vq_f8_n256": 67_652_783,
    "vq_f16": 69_593_371,
    "VA-VAE f16d32": None,  # Yao et al. 2025 print no count
}


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", TABLE)
def test_autoencoder_has_published_parameter_count(name):
    if TABLE[name] is None:
        pytest.skip(f"{name}: no count was published")
    with torch.device("meta"):
        autoencoder = build.build_autoencoder(compose_option("autoencoder", name), 3)
    assert count(autoencoder) == TABLE[name]
    assert len(autoencoder.encoder.down) == len(autoencoder.decoder.up) == autoencoder.factor.bit_length()


def test_kl_f8_encoder_and_decoder_have_published_parameter_counts():
    with torch.device("meta"):
        autoencoder = build.build_autoencoder(compose_option("autoencoder", "kl_f8"), 3)
    assert count(autoencoder.encoder) == 34_163_664
    assert count(autoencoder.decoder) == 49_490_199


def test_discriminator_has_published_parameter_count():
    node = compose_option("training", "autoencoder").discriminator
    with torch.device("meta"):
        assert count(instantiate(node, width=64, layers=3, num_groups=32)()) == 2_765_633
