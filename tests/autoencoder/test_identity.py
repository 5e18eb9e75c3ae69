import pytest
import torch

from ldm.autoencoder.identity import Scaled
from ldm.errors import ConfigError


def test_scaled_multiplies_channels_and_back():
    stage = Scaled([2.0, 0.25])
    sample = torch.tensor([[[1.0, -1.0, 0.5], [1.0, -1.0, 0.0]]])
    z = stage.encode(sample)
    assert z.tolist() == [[[2, -2, 1], [0.25, -0.25, 0]]]
    assert torch.equal(stage.decode(z), sample)
    assert stage.weights_hash() != Scaled([2.0, 0.5]).weights_hash()
    assert not list(stage.parameters())


@pytest.mark.parametrize("scale", [[], [1.0, 0.0]])
def test_scaled_rejects_other_numbers(scale):
    with pytest.raises(ConfigError, match="expected a number above 0 for each channel"):
        Scaled(scale)
