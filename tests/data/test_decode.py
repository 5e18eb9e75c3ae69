import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.decode import adm_rectangle, to_8bit


def test_to_8bit_rounds_each_of_65536_levels():
    levels = np.arange(65536)
    made = to_8bit(Image.fromarray(levels.astype(np.uint16).reshape(256, 256)))
    assert np.array_equal(np.asarray(made).ravel(), np.rint(levels * (255 / 65535)))


@pytest.mark.parametrize("tall", [False, True])
def test_adm_rectangle_is_the_middle_of_a_wide_and_a_tall_image(tmp_path, tall):
    """At its own size, and after one halving: columns of a ramp, whose box averages are known."""
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None], 32, 0)
    Image.fromarray(ramp.T if tall else ramp).save(tmp_path / "x.png")
    for size, middle in ((32, np.arange(68, 132, 2)), (16, np.arange(17, 33) * 4 + 1)):
        expected = torch.from_numpy(middle).expand(1, size, size)
        made, original = adm_rectangle(tmp_path / "x.png", size, size, 1)
        assert torch.equal(made.long(), expected.mT if tall else expected)
        assert original == ((100, 32) if tall else (32, 100))


def test_adm_rectangle_does_not_halve_what_is_below_twice_its_size(tmp_path):
    """In one direction is not enough: the middle of a narrow image is its own pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (100, 32), dtype=np.uint8)
    for image, middle in ((noise, noise[34:66]), (noise.T, noise[34:66].T)):
        Image.fromarray(np.ascontiguousarray(image)).save(tmp_path / "x.png")
        made, _ = adm_rectangle(tmp_path / "x.png", 32, 32, 1)
        assert np.array_equal(made[0].numpy(), middle)
