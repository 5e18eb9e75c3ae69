import numpy as np
import pytest
import torch
from PIL import Image
from test_experiments import some_clips

from ldm.data.clip_files import read_clip
from ldm.errors import UserError
from ldm.sampling.clip_inputs import clip_input
from ldm.sampling.inputs import InputSpec


def test_clip_input_reads_clips_and_pictures(tmp_path):
    """A clip's first frames, and a picture as often as a clip has frames; what cannot be used is one line."""
    some_clips(tmp_path)
    clip, spec = tmp_path / "kind 0" / "0.gif", InputSpec((4, 32, 32), 1)
    read = clip_input(spec, str(clip))([0, 1])
    expected = read_clip(clip, (32, 32), 1).frames[:4].transpose(0, 1).float() / 127.5 - 1
    assert torch.equal(read, expected.expand(2, -1, -1, -1, -1))
    Image.fromarray(np.full((40, 50, 3), 51, np.uint8)).save(tmp_path / "photo.png")
    for channels in (1, 3):
        picture = clip_input(InputSpec((4, 32, 32), channels), str(tmp_path / "photo.png"))([0])
        assert torch.allclose(picture, torch.full((1, channels, 4, 32, 32), 51 / 127.5 - 1))
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    for one, file, message in (
        (InputSpec((17, 32, 32), 1), clip, "has 16 frames: expected 17 or more, or a picture"),
        (spec, tmp_path / "broken.mp4", "cannot be read as a clip: "),
        (InputSpec((32, 32), 1), clip, "this task is for models of clips"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            clip_input(one, str(file))
        assert "\n" not in str(caught.value)
