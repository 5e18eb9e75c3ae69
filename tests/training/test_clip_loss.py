"""The loss of CLIP against numbers by hand, and its random crops."""

import math

import pytest
import torch

from ldm.tensors import KeyedNoise
from ldm.training.clip import clip_loss, random_crop


def test_clip_loss_averages_both_directions():
    angles = torch.tensor([0.0, 2.0]), torch.tensor([0.3, 1.4])
    image, text = (torch.stack([a.cos(), a.sin()], 1) for a in angles)
    cosines = [[math.cos(a - b) for b in (0.3, 1.4)] for a in (0.0, 2.0)]

    def cross(logits: list[float], right: int) -> float:
        return math.log(sum(math.exp(x) for x in logits)) - logits[right]

    rows = [cross([5 * x for x in row], i) for i, row in enumerate(cosines)]
    columns = [cross([5 * row[j] for row in cosines], j) for j in range(2)]
    terms = clip_loss(image, text, torch.tensor(5.0), torch.eye(2, dtype=torch.bool))
    assert terms["loss"].item() == pytest.approx((sum(rows) + sum(columns)) / 4, rel=1e-5)
    assert terms["accuracy"] == 1


def test_clip_loss_accepts_equal_captions():
    """Two images of one caption and one of another, all embeddings right: the loss is that of a choice between two
    equals.
    """
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    terms = clip_loss(image, image, torch.tensor(100.0), same)
    assert terms["loss"].item() == pytest.approx(2 * math.log(2) / 3, rel=1e-5)
    assert terms["accuracy"] == 1


def test_random_crop_is_keyed_by_row():
    x = torch.linspace(-1, 1, 16)
    image = torch.stack([x.expand(16, 16), x[:, None].expand(16, 16)])[None].repeat(
        3, 1, 1, 1
    )  # the coordinates themselves
    noise = KeyedNoise(0, [(0, 3), (0, 5), (1, 3)])
    out = random_crop(image, noise, 0.5)
    step = out[:, 0, 0].diff(dim=1)[:, 2:-2].mean(1) / x.diff()[0]  # the side that was kept
    assert ((step > 0.5) & (step < 1)).all()
    torch.testing.assert_close(out[:, 0, 0].diff(dim=1).mean(1), out[:, 1, :, 0].diff(dim=1).mean(1), atol=0.03, rtol=0)
    assert out.abs().max() <= 1
    assert len({round(one, 4) for one in out[:, 0, 8, 8].tolist()}) == 3
    assert torch.equal(random_crop(image[1:2], KeyedNoise(0, [(0, 5)]), 0.5), out[1:2])
    assert torch.equal(random_crop(image, noise, 1.0), image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(random_crop(image, noise, 0.5), out)


def test_clip_loss_scales_cosines_and_counts_right_choices():
    """The first image is nearer to the second's caption; the reported scale has no gradient."""
    image, text = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([[0.0, 1.0], [0.8, 0.6]])
    scale = torch.tensor(3.0, requires_grad=True)
    terms = clip_loss(image, text, scale, torch.eye(2, dtype=torch.bool))
    cosines = [[0.0, 0.8], [0.6, 1.0]]
    rows = [math.log(sum(math.exp(3 * x) for x in row)) - 3 * row[i] for i, row in enumerate(cosines)]
    columns = [math.log(sum(math.exp(3 * row[j]) for row in cosines)) - 3 * cosines[j][j] for j in range(2)]
    assert terms["loss"].item() == pytest.approx((sum(rows) + sum(columns)) / 4, rel=1e-5)
    assert terms["accuracy"] == 0.5
    assert terms["scale"] == 3.0
    assert not terms["scale"].requires_grad


def test_random_crop_keeps_the_drawn_square():
    """An image of the pixels' coordinates shows the crop's centre and side, those of the keyed draws."""
    n = 32
    x = (torch.arange(n) + 0.5) / n * 2 - 1  # centres of the pixels, in [-1, 1]
    image = torch.stack([x.expand(n, n), x[:, None].expand(n, n)])[None].repeat(4, 1, 1, 1)
    noise = KeyedNoise(7, [(0, i) for i in range(4)])
    out = random_crop(image, noise, 0.25)
    side, u, v = noise.uniform("crop", torch.empty(4, 3)).unbind(1)
    side = 0.25 + 0.75 * side
    for axis, shift in enumerate((u, v)):
        centre = (1 - side) * (2 * shift - 1)
        expected = centre[:, None] + side[:, None] * x
        found = out[:, axis, n // 2] if axis == 0 else out[:, axis, :, n // 2]
        inside = expected.abs() < x[-1]  # beyond the last pixel's centre the border is repeated
        torch.testing.assert_close(found[inside], expected[inside], atol=1e-5, rtol=0)
