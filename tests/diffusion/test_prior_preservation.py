"""Prior preservation: the sum of two means, whatever their numbers."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.diffusion.prior_preservation import PriorPreservation


class Given(nn.Module):
    keys = ("image",)

    def forward(self, denoiser, x0, cond, noise, batch):
        return {"loss": batch["loss"], "t": batch["loss"]}


@pytest.mark.parametrize("label", [[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_prior_preservation_is_weighted_sum_of_means(label):
    loss, label = torch.tensor([1.0, 2.0, 4.0, 9.0]), torch.tensor(label)
    made = PriorPreservation(Given(), prior=1, weight=0.5)
    assert made.keys == ("image",)
    terms = made(SimpleNamespace(), torch.zeros(4, 1), None, None, {"loss": loss, "label": label})
    wanted = sum(w * loss[label == k].mean() for k, w in ((0, 1.0), (1, 0.5)) if (label == k).any())
    assert terms["loss"].mean() == pytest.approx(float(wanted))
    assert torch.equal(terms["t"], loss)


def test_prior_preservation_rejects_invalid_arguments():
    with pytest.raises(ValueError, match="weight=-1"):
        PriorPreservation(Given(), 0, -1)
    with pytest.raises(ValueError, match="by label, and the batch has no labels"):
        PriorPreservation(Given(), 0)(SimpleNamespace(), torch.zeros(4, 1), None, None, {"loss": torch.ones(4)})
