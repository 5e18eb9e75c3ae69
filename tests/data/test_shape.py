import pytest

from ldm.data.shape import format_size, parse_size
from ldm.errors import ConfigError
from ldm.io.images import COLOUR_CHANNELS, image_fault


def test_images_have_three_axes_and_channels_of_a_picture():
    assert [image_fault((channels, 8, 6)) for channels in (1, 3, 4)] == ["", "", ""]
    assert "(1, 16) are no images of 1 or 3 or 4 channels" in image_fault((1, 16))
    assert all(image_fault(shape) for shape in ((2, 8, 6), (3, 2, 8, 6)))
    assert image_fault((4, 8, 6), COLOUR_CHANNELS)


def test_sizes_are_one_number_for_a_square_or_two():
    assert parse_size(8) == (8, 8)
    assert parse_size([8, 6], least=6) == (8, 6)
    assert (format_size((8, 8)), format_size((8, 6))) == (8, [8, 6])
    for size in (0, [8], [8, 5], [8, 6.0], [8, 6, 7]):
        with pytest.raises(ConfigError, match="expected"):
            parse_size(size, least=6 if size == [8, 5] else 1)
