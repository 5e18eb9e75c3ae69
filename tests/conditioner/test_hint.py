"""Hints beside what a model is told: made of what they read, given ready, dropped with the words or kept."""

import pytest
import torch

from ldm.conditioner.edges import Canny
from ldm.conditioner.hint import HintConditioner, Keypoints, Relief, Segmentation, palette
from ldm.conditioner.label import Label
from ldm.tensors import KeyedNoise


@pytest.fixture
def batch():
    image = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {
        "image": image,
        "label": torch.arange(4),
        "map": torch.zeros(4, 16, 16, dtype=torch.long),
        "noise": KeyedNoise(0, range(4)),
    }


def test_hint_conditioner_appends_one_hint(batch):
    two = HintConditioner(HintConditioner(Label(10), Canny()), Segmentation(3)).eval()
    assert two.keys == ("label", "hint", "hint2")
    cond = two(batch)
    assert torch.equal(cond.hint[0], Canny()(batch["image"]))
    assert cond.hint[1].max() == 0
    given = torch.full((4, 3, 16, 16), 0.5)
    assert torch.equal(two({**batch, "hint2": given}).hint[1], given)
    assert torch.equal(cond.context, Label.forward(two.told.told, batch).context)
    assert [hint.shape for hint in two.null(batch).hint] == [(4, 3, 1, 1)] * 2
    assert [hint.shape for hint in two({"label": batch["label"]}).hint] == [(4, 3, 1, 1)] * 2
    with pytest.raises(ValueError, match=r"hint of \(4, 1, 16, 16\)"):
        two({**batch, "hint": given[:, :1]})


def test_hint_condition_supports_cat_and_where(batch):
    told = HintConditioner(Label(10), Canny()).eval()
    cond, null = told(batch), told.null(batch)
    both = cond.cat(null)
    assert both.hint[0].shape == (8, 3, 16, 16)
    assert both.hint[0][4:].sum() == 0
    some = cond.where(torch.tensor([True, False, True, False]), null)
    assert torch.equal(some.hint[0][::2], cond.hint[0][::2])
    assert some.hint[0][1::2].sum() == 0


def test_hint_conditioner_drops_text_in_training(batch):
    many = {name: value.repeat(100, *[1] * (value.ndim - 1)) for name, value in batch.items() if name != "noise"}
    many["noise"] = KeyedNoise(0, range(400))
    told = HintConditioner(Label(10), Canny(), text_drop_prob=0.25).train()
    cond, null = told(many), told.told.null(many)
    untold = (cond.context == null.context).flatten(1).all(1)
    assert 0.17 < untold.float().mean() < 0.33
    assert torch.equal(cond.hint[0], Canny()(many["image"]))
    assert not (told.eval()(many).context == null.context).flatten(1).all(1).any()
    with pytest.raises(ValueError, match="text_drop_prob=2"):
        HintConditioner(Label(10), Canny(), text_drop_prob=2)


def test_segmentation_relief_and_points_become_images():
    map = torch.arange(4).reshape(1, 2, 2)
    drawn = Segmentation(4)(map)
    assert torch.equal(drawn[0, :, 1, 0], palette(4)[2])
    assert len(palette(30).unique(dim=0)) == 30
    assert torch.equal(palette(30)[:5], palette(5))
    with pytest.raises(ValueError, match="map with classes 0 to 3: expected 0 to 1"):
        Segmentation(2)(map)
    relief = torch.tensor([[[[-1.0, 1.0]]]])
    assert torch.equal(Relief()(relief), torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2))
    dots = Keypoints((20, 40), radius=1.5)([[(0.25, 0.5), None, (0.75, 0.5)]])
    assert dots.shape == (1, 3, 20, 40)
    assert torch.equal(dots[0, :, 10, 10], palette(4)[1])
    assert torch.equal(dots[0, :, 10, 30], palette(4)[3])
    assert (
        dots[0].sum(0).gt(0).sum() == 2 * 4
    )  # all pixels whose middle is within 1.5 of the point between four of them
    for bad in ([[(0.5, 1.5)]], [[(0.5,)]]):
        with pytest.raises(ValueError, match=r"expected \[x, y\] in \[0, 1\]"):
            Keypoints()(bad)


def test_keypoint_is_drawn_at_pixel_centre():
    dot = Keypoints((4, 8), radius=0.1)([[(3.5 / 8, 1.5 / 4)]])[0]
    assert dot.any(0).nonzero().tolist() == [[1, 3]]


def test_palette_steps_hue_by_golden_ratio():
    """HSV to RGB as V (1 - S max(0, min(k, 4 - k, 1))), k = n + 6 hue modulo 6, n = 5, 3, 1."""
    step = torch.arange(199, dtype=torch.float64)[:, None]
    k = (torch.tensor([5, 3, 1]) + 6 * step * 0.618034) % 6
    saturation, value = torch.where(step % 2 == 0, 0.9, 0.5), torch.where(step % 3 == 2, 0.6, 1.0)
    expected = value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1))
    torch.testing.assert_close(palette(200)[1:], expected.float(), atol=1e-6, rtol=0)
    assert palette(1).tolist() == [[0, 0, 0]]
