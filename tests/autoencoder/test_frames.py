import pytest
import torch

from ldm.autoencoder.conv import Decoder, Encoder
from ldm.autoencoder.frames import FrameDecoder, FrameEncoder, FramePatchDecoder, FramePatchEncoder
from ldm.autoencoder.kl import AutoencoderKL
from ldm.autoencoder.patch import PatchDecoder, PatchEncoder
from ldm.errors import ConfigError

PATCH = {"channels": 1, "z_channels": 2, "width": 8}
CONV = {"channels": 1, "z_channels": 2, "width": 8, "channel_mult": (1, 2, 2), "num_res_blocks": 1, "num_groups": 4}


@torch.no_grad()
@pytest.mark.parametrize(
    ("kinds", "plain", "options"),
    [
        ((FramePatchEncoder, FramePatchDecoder), (PatchEncoder, PatchDecoder), PATCH),
        ((FrameEncoder, FrameDecoder), (Encoder, Decoder), CONV),
    ],
)
def test_frame_first_stage_is_the_images_on_every_frame(kinds, plain, options):
    """With the weights of a first stage of images, under their names."""
    torch.manual_seed(0)
    image = AutoencoderKL(*(kind(factor=4, **options).double() for kind in plain), 2, 4)
    for p in image.parameters():
        torch.nn.init.normal_(p, std=0.2)
    clips = AutoencoderKL(*(kind(factor=[1, 4, 4], **options).double() for kind in kinds), 2, [1, 4, 4])
    clips.load_state_dict(image.state_dict())
    x = torch.rand(2, 1, 3, 8, 12, dtype=torch.float64)
    z = clips.encode(x)
    assert z.shape == (2, 2, 3, 2, 3)
    assert clips.last_layer is clips.decoder.last_layer
    back = clips.decode(z)
    for k in range(3):
        assert torch.allclose(z[:, :, k], image.encode(x[:, :, k]), atol=1e-12)
        assert torch.allclose(back[:, :, k], image.decode(z[:, :, k].contiguous()), atol=1e-12)


@pytest.mark.parametrize("factor", [4, [2, 4, 4], [4, 4]])
def test_frame_first_stage_refuses(factor):
    with pytest.raises(ConfigError, match=r"expected \[1,f,f\]"):
        FramePatchEncoder(1, 2, factor)
