from functools import partial

import pytest
import torch

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
