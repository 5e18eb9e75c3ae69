"""A first stage for strings of symbols: one-hot samples (symbols, L) whose decoder gives logits."""

from torch import Tensor
from torch.nn.functional import one_hot

from ldm.autoencoder.kl import AutoencoderKL


class AutoencoderTokens(AutoencoderKL):
    """AutoencoderKL for samples (B, symbols, L) in {-1, 1}, 1 for the symbol of each position.

    The decoder's (B, symbols, L) are logits in training, for `ldm.autoencoder.loss.cross_entropy`; what is decoded is
    one-hot again, for the most likely symbols.
    """

    def decode_raw(self, raw: Tensor) -> Tensor:
        """Decode a latent in the posterior's units to a sample (B, symbols, L) in {-1, 1}."""
        logits = self.decoder(raw)
        return one_hot(logits.argmax(1), logits.shape[1]).movedim(-1, 1).to(logits.dtype).mul_(2).sub_(1)
