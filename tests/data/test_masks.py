import math
from functools import partial

import pytest
import torch

from ldm.data import masks
from ldm.data.masks import borders, boxes, randint, random_choice, strokes, uniform

SIZE = (48, 64)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def drawn(kind, n=100, size=SIZE):
    return torch.stack([kind(size, generator(i)) for i in range(n)])


@pytest.mark.parametrize("kind", [strokes, boxes, borders])
def test_masks_are_binary_mixed_and_keyed(kind):
    masks = drawn(kind)
    assert masks.shape == (100, 1, *SIZE)
    assert masks.dtype == torch.float32
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert all(0 < mask.mean() < 1 for mask in masks)
    assert torch.equal(drawn(kind, 5), masks[:5])
    assert len(masks.flatten(1).unique(dim=0)) > 60
    assert kind((8, 8), generator(0)).shape == (1, 8, 8)


def test_strokes_cover_image_and_follow_width():
    assert drawn(strokes, 300).mean(0).min() > 0.05, "no place is spared"
    areas = [drawn(partial(strokes, times=(1, 1), width=(w, w))).mean() for w in (0.05, 0.1, 0.2)]
    assert areas[0] < areas[1] < areas[2]


@pytest.mark.parametrize("seed", range(4))
def test_strokes_are_lines_between_discs(seed):
    """Every pixel of a segment, or of a disc at its end, is set and none beyond, within the raster's two pixels."""
    height, wide = size = (60, 90)
    mask = strokes(size, generator(seed), times=(1, 3), length=(0.2, 0.6), width=(0.1, 0.2))[0].bool()
    draw, least, most = generator(seed), torch.full(size, math.inf), torch.full(size, math.inf)
    pixels = torch.stack(torch.meshgrid(torch.arange(60.0), torch.arange(90.0), indexing="ij")[::-1], -1)
    for _ in range(randint(draw, 1, 3)):
        start = torch.tensor([uniform(draw, 0, wide), uniform(draw, 0, height)])
        thick = round(height * uniform(draw, 0.1, 0.2))
        for _ in range(randint(draw, 2, 6)):
            angle, length = uniform(draw, 0, 2 * math.pi), height * uniform(draw, 0.2, 0.6)
            end = start + length * torch.tensor([math.cos(angle), math.sin(angle)])
            end = torch.minimum(end.clamp(min=0), torch.tensor([wide - 1.0, height - 1.0]))
            far = (end - start).norm()
            along = (pixels - start) @ (end - start) / far
            nearest = start + (along / far).clamp(0, 1)[..., None] * (end - start)
            edge = (pixels - nearest).norm(dim=-1) - thick / 2
            least = torch.minimum(least, edge)
            most = torch.minimum(most, torch.where(along >= 2, edge, math.inf))  # no disc at its start
            start = end
    assert mask[most < -2].all()
    assert not mask[least > 1.5].any()


def test_strokes_stop_at_the_border(monkeypatch):
    """From (5, 20) right, down, left and up again, each as far as it goes."""
    turns = [angle for quarter in range(4) for angle in (quarter * math.pi / 2, 9.0)]
    values = iter([5, 20, 0.03, *turns])
    counts = iter([1, 4])
    monkeypatch.setattr(masks, "uniform", lambda draw, low, high: next(values))
    monkeypatch.setattr(masks, "randint", lambda draw, low, high: next(counts))
    expected = torch.zeros(30, 40)
    expected[20, 5:] = expected[20:, 39] = expected[29] = expected[:, 0] = 1
    made = strokes((30, 40), generator(0))[0]
    assert torch.equal(made.bool() | expected.bool(), made.bool()), "all of the lines"
    assert made.sum() <= expected.sum() + 12, "and little more than the ends of them"


def test_borders_turn_from_the_left_side_clockwise(monkeypatch):
    sides = {"left": (slice(None), slice(2)), "top": (slice(1), slice(None))}
    sides |= {"right": (slice(None), slice(-2, None)), "bottom": (slice(-1, None), slice(None))}
    for first in range(4):
        for count in (1, 2, 3):
            numbers = iter([first, count])
            monkeypatch.setattr(masks, "randint", lambda draw, low, high, numbers=numbers: next(numbers))
            expected = torch.zeros(1, 4, 8)
            for turn in range(count):
                expected[0][[*sides.values()][(first + turn) % 4]] = 1
            assert torch.equal(borders((4, 8), generator(0), part=(0.25, 0.25)), expected), (first, count)


def test_boxes_have_requested_size():
    for mask in drawn(partial(boxes, times=(1, 1), side=(0.25, 0.5))):
        rows, columns = (mask[0].amax(axis) > 0 for axis in (1, 0))
        assert 12 <= rows.sum() <= 24
        assert 16 <= columns.sum() <= 32
        assert mask.sum() == rows.sum() * columns.sum(), "filled"


def test_borders_leave_rectangle_at_other_sides():
    masks = drawn(partial(borders, part=(0.25, 0.25), sides=(1, 1)), 200)
    found = {(bool(m[0, 0, 32]), bool(m[0, -1, 32]), bool(m[0, 24, 0]), bool(m[0, 24, -1])) for m in masks}
    assert found == {tuple(i == j for j in range(4)) for i in range(4)}, "each of the four sides, one at a time"
    assert {round(m.mean().item(), 6) for m in masks} == {0.25}
    two = drawn(partial(borders, part=(0.25, 0.25), sides=(2, 2)))
    assert {round(m.mean().item(), 6) for m in two} == {1 - 0.75**2}


def test_random_choice_selects_one_kind():
    full, empty = (lambda size, draw, v=v: torch.full((1, *size), v) for v in (1.0, 0.0))
    share = drawn(partial(random_choice, kinds=[full, empty, empty, empty]), 400).mean()
    assert 0.18 < share < 0.32
    with pytest.raises(ValueError, match="kinds is empty"):
        random_choice(SIZE, generator(0), kinds=[])


def test_mask_random_numbers_reach_both_ends():
    draw = generator(0)
    assert {randint(draw, 2, 4) for _ in range(60)} == {2, 3, 4}
    values = [uniform(draw, -1, 3) for _ in range(500)]
    assert -1 <= min(values) < -0.9
    assert 2.9 < max(values) < 3
