"""Sizes that no network and no image can have."""

import pytest

from ldm.autoencoder.discriminator import PatchDiscriminator
from ldm.autoencoder.patch import PatchDecoder, PatchEncoder
from ldm.data.synthetic import Synthetic


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PatchEncoder(1, 2, factor=0), "factor=0: expected 1 or more"),
        (lambda: PatchDecoder(1, 2, factor=2, width=-1), "width=-1"),
        (lambda: PatchDiscriminator(1, width=0), "width=0"),
        (lambda: Synthetic(size=0), "size=0: expected at least one image of at least one pixel"),
    ],
)
def test_autoencoder_rejects_invalid_sizes(make, said):
    with pytest.raises(ValueError, match=said):
        make()
