"""The judge of notes: two heads on one body, and its training step."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from ldm.metrics.judge import FashionNet
from ldm.metrics.note_net import NoteNet
from ldm.training.evaluator import LitEvaluator


def spectrograms(num: int, frames: int = 64) -> torch.Tensor:
    return torch.rand(num, 1, 128, frames, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_note_net_classifies_family_and_pitch_of_any_length():
    torch.manual_seed(0)
    net = NoteNet(width=4, num_features=8).eval()
    for frames in (16, 64, 100):
        images = (127.5 * (spectrograms(3, frames) + 1)).byte()
        features = net(images)
        logits = net.logits(images)
        assert {name: part.shape[1] for name, part in net.classify_all(features).items()} == {"label": 12, "pitch": 128}
        torch.testing.assert_close(net.classify(features), logits[:, :12])
        torch.testing.assert_close(net.classify_all(features)["pitch"], logits[:, 12:])
    assert (net.name, net.identity) != (FashionNet.name, NoteNet(width=4, num_features=8).identity)


def test_note_net_sees_a_shift_by_one_band():
    """Pitch of low notes is in neighbouring bands: no layer before the first pooling may skip one."""
    torch.manual_seed(0)
    net = NoteNet(width=4, num_features=8).eval()
    images = torch.zeros(2, 1, 128, 64, dtype=torch.uint8)
    images[0, :, 40], images[1, :, 41] = 255, 255
    first = net.body[0](images.float())
    torch.testing.assert_close(first[0, :, 30:50], first[1, :, 31:51])
    assert not torch.allclose(*net(images))


def test_evaluator_step_adds_the_losses_of_both_heads():
    torch.manual_seed(0)
    net = NoteNet(width=4, num_features=8)
    batch = {"image": spectrograms(6), "label": torch.tensor([0, 3, 11, 0, 5, 6]), "pitch": 36 + 8 * torch.arange(6)}
    terms = LitEvaluator(net, partial(torch.optim.AdamW, lr=1e-3), 0.1).training_step(batch, 0)
    family, pitch = net.logits(((batch["image"] + 1) * 127.5).round().byte()).split([12, 128], 1)
    expected = F.cross_entropy(family, batch["label"], label_smoothing=0.1)
    expected = expected + F.cross_entropy(pitch, batch["pitch"], label_smoothing=0.1)
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms["accuracy"] == (family.argmax(1) == batch["label"]).float().mean()
    assert terms["accuracy_pitch"] == (pitch.argmax(1) == batch["pitch"]).float().mean()
