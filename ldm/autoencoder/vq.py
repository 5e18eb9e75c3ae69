"""The vector-quantised autoencoder (VQ-VAE, van den Oord et al. 2017; VQGAN, Esser et al. 2021; LDM app. G)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ldm.autoencoder.first_stage import FirstStage, TrainingOutput
from ldm.autoencoder.posterior import DeterministicPosterior


class Codebook(nn.Embedding):
    """`num` codes of `channels` numbers each, with nearest-neighbour lookup for every position of a latent."""

    def __init__(self, num: int, channels: int):
        super().__init__(num, channels)
        nn.init.uniform_(self.weight, -1.0 / num, 1.0 / num)

    def nearest(self, raw: Tensor) -> Tensor:
        """Find the index (B, h, w) int64 of the code with the smallest Euclidean distance to raw (B, C, h, w)."""
        # in full precision, because lower precision would produce ties
        with nullcontext() if raw.is_meta else torch.autocast(raw.device.type, enabled=False):
            codes = self.weight
            flat = raw.detach().to(codes.dtype).movedim(1, -1).flatten(0, -2)  # (B N, C)
            squares = codes.square().sum(1)
            nearest = [torch.addmm(squares, part, codes.T, alpha=-2).argmin(1) for part in flat.split(1 << 14)]
        return torch.cat(nearest).view(raw.shape[0], *raw.shape[2:])

    def forward(self, index: Tensor) -> Tensor:
        """Look up the codes (B, C, h, w) of an index (B, h, w)."""
        return super().forward(index).movedim(-1, 1)


class AutoencoderVQ(FirstStage):
    """A first stage that decodes the nearest codes; the latent that diffusion works on is the one before quantisation.

    encoder: its moments are the latent (B, z_channels, h, w).  num_codes: size of the codebook.
    codebook_weight, commitment_weight: of the penalty's two parts, |code - sg(raw)|^2 and |sg(code) - raw|^2 (VQ-VAE
    eq. 3: 1 and beta; the code that LDM's models were trained with has 0.25 and 1).
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        z_channels: int,
        factor: int | Sequence[int],
        num_codes: int = 8192,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
    ):
        super().__init__(encoder, decoder, z_channels, factor)
        self.codebook = Codebook(num_codes, z_channels)
        self.codebook_weight, self.commitment_weight = codebook_weight, commitment_weight

    def posterior_of(self, moments: Tensor) -> DeterministicPosterior:
        return DeterministicPosterior(moments)

    def decode_raw(self, raw: Tensor) -> Tensor:
        """Decode the codes nearest to raw to an image (B, C, H, W).

        LDM app. G: quantisation is the decoder's first layer.
        """
        return self.decoder(self.codebook(self.codebook.nearest(raw)).to(raw.dtype))

    def training_forward(self, image: Tensor, normal: Callable[[Tensor], Tensor]) -> TrainingOutput:
        """Encode, quantise with a straight-through gradient, and decode.

        The penalty `codebook` is a mean over the latent; diagnostics are the frequencies of the codes.
        """
        raw = self.encoder(image).to(image.dtype)
        index = self.codebook.nearest(raw)
        codes = self.codebook(index).to(raw.dtype)
        learn, commit = (error.square().flatten(1).mean(1) for error in (codes - raw.detach(), codes.detach() - raw))
        penalty = self.codebook_weight * learn + self.commitment_weight * commit
        reconstruction = self.decoder(raw + (codes - raw).detach()).to(image.dtype)
        used = index.flatten().bincount(minlength=self.codebook.num_embeddings).to(image.dtype) / index.numel()
        return TrainingOutput(reconstruction, {"codebook": penalty}, used)

    def diagnostics(self, values: Tensor) -> dict[str, Tensor]:
        """Return the perplexity of the codes over the batch, and the number of unused codes."""
        entropy = -torch.special.xlogy(values, values).sum()
        return {"perplexity": entropy.exp(), "dead_codes": (values == 0).sum().to(values.dtype)}
