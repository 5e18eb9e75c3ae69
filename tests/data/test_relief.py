from itertools import pairwise

import numpy as np
import pytest

from ldm.data.relief import DEEPEST, HIGHEST, RAMP, heights, median_filter, to_bytes


def test_heights_invert_colour_ramp():
    table = np.array(RAMP)
    found = heights(table[None, :, 1:].astype(np.uint8))[0]
    assert (np.abs(found - table[:, 0]) <= np.where(table[:, 0] > -9000, 350, 900)).all(), (
        "the deepest are hardly told apart"
    )
    assert ((found < 0) == (table[:, 0] < 0)).all()
    plains = (table[:, 0] >= 0) & (table[:, 0] <= 500)
    assert (np.abs(found - table[:, 0])[plains] <= 50).all()


def test_heights_are_robust_to_shading():
    for metres, *colour in RAMP:
        if -10000 < metres < 6000:  # beyond, the colours are shades of one another
            (found,) = heights((np.array([[colour]]) * 0.88).astype(np.uint8))[0]
            assert (found < 0) == (metres < 0)
            assert abs(found - metres) <= 1500


def test_heights_are_those_of_the_nearest_hue_and_brightness():
    """Of the ramp in eighths of its steps, in float64; not across the shore."""
    steps = [(np.array(a), np.array(b)) for a, b in pairwise(RAMP) if (a[0], b[0]) != (-1, 0)]
    ramp = np.array([a + (b - a) * k / 8 for a, b in steps for k in range(8)] + [RAMP[-1]])
    image = np.random.default_rng(0).integers(0, 256, (20, 10, 3), dtype=np.uint8)

    def features(colours):
        brightness = np.sqrt((colours**2).sum(-1, keepdims=True))
        return np.concatenate([255 * colours / brightness, brightness / 4], -1)

    middle = image // 8 * 8.0 + 4  # of the colours that differ by less than a step of five bits
    distance = ((features(middle)[..., None, :] - features(ramp[:, 1:])) ** 2).sum(-1)
    found = np.where(heights(image)[..., None] == ramp[:, 0].round(), distance, np.inf).min(-1)
    assert (found - distance.min(-1)).max() < 0.1  # of squares up to 130,000, in float32


def test_to_bytes_is_monotonic_and_splits_at_shore():
    metres = np.array([-DEEPEST, -5000, -200, -1, 0, 200, 1000, HIGHEST])
    found = to_bytes(metres)
    assert found[[0, -1]].tolist() == [0, 255]
    assert (np.diff(found.astype(int)) > 0).all()
    assert found[3] <= 127 < 128 <= found[4]
    assert found[5] == 128 + round(127 * (200 / HIGHEST) ** 0.5)
    assert to_bytes(metres.astype(np.int16)).tolist() == found.tolist(), "no overflow"


def test_median_filter_removes_single_pixels():
    picture = np.full((9, 9), 100, np.uint8)
    picture[:, 5:] = 200
    noisy = picture.copy()
    noisy[4, 2] = 255
    assert median_filter(noisy).tolist() == picture.tolist()


@pytest.mark.slow
def test_heights_of_known_places():
    from PIL import Image

    from ldm.data.blue_marble import blue_marble

    found = heights(np.array(Image.open(blue_marble() / "etopo1.jpg").convert("RGB")))
    known = {  # degrees east, degrees north, metres
        "Amazon": (-60, -5, 60),
        "Kansas": (-98, 38, 550),
        "Tibet": (88, 33, 5000),
        "Altiplano": (-68, -18, 3800),
        "North Sea": (3, 56, -40),
        "Sargasso Sea": (-50, 25, -5000),
    }
    for name, (east, north, metres) in known.items():
        x, y = int((east + 180) * 15), int((90 - north) * 15)
        assert abs(np.median(found[y - 6 : y + 7, x - 6 : x + 7]) - metres) < 300 + 0.4 * abs(metres), name
