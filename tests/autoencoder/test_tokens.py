import torch
from torch import nn

from ldm.autoencoder.loss import cross_entropy
from ldm.autoencoder.tokens import AutoencoderTokens

LOGITS = torch.tensor([[[2.0, 0.0], [0.5, 1.0], [-1.0, 0.0]], [[0.0, 0.0], [0.0, 3.0], [0.0, 0.0]]]).double()
SAMPLE = 2 * torch.eye(3)[torch.tensor([[0, 2], [1, 1]])].transpose(1, 2).double() - 1  # of tokens (2, 2)


def test_cross_entropy_is_sum_of_negative_log_likelihoods():
    """- log p of the symbols 0, 2 and 1, 1, by the definition of softmax."""
    p = LOGITS.exp() / LOGITS.exp().sum(1, keepdim=True)
    expected = torch.stack([-(p[0, 0, 0] * p[0, 2, 1]).log(), -(p[1, 1, 0] * p[1, 1, 1]).log()])
    torch.testing.assert_close(cross_entropy(LOGITS, SAMPLE), expected)


class Logits(nn.Module):
    """A decoder that gives LOGITS for any latent."""

    def forward(self, z):
        return LOGITS[: len(z)] + 0 * z.sum()


def test_tokens_are_decoded_one_hot_and_trained_on_logits():
    stage = AutoencoderTokens(nn.Conv1d(3, 4, 1).double(), Logits(), z_channels=2, factor=1)
    decoded = stage.decode(torch.zeros(2, 2, 2).double())
    assert decoded.tolist() == [[[1, -1], [-1, 1], [-1, -1]], [[1, -1], [-1, 1], [-1, -1]]]  # of equals, the first
    output = stage.training_forward(SAMPLE, torch.zeros_like)
    assert torch.equal(output.reconstruction, LOGITS)
    torch.testing.assert_close(output.penalties["kl"], stage.posterior(SAMPLE).kl())
