"""The step of stage one, both optimizers, recomputed by hand: linear networks, whose every gradient is a formula.

Image patches P (B, N, 4) of 2 x 2 pixels, encoder m = P E + e, decoder r = z D + d, discriminator logit = P W + w.
"""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from recomputed import TOLERANCE, Adam, StepRecorder, power_average, recompute, warm_cosine
from torch import Tensor, nn

from ldm.autoencoder.kl import AutoencoderKL
from ldm.autoencoder.loss import ReconstructionLoss, l2
from ldm.autoencoder.vq import AutoencoderVQ
from ldm.ema import PowerEMA
from ldm.tensors import KeyedNoise
from ldm.training.autoencoder import LitAutoencoder
from ldm.training.callbacks import EMACallback, LearningRate
from ldm.training.fit import fit
from ldm.training.lr import cosine

SIDE, CHANNELS, CODES, SEED, ROWS = 6, 2, 5, 3, 6
START, RAMP, WEIGHT, STEPS = 2, 3, 0.3, 7
KL_WEIGHT, CODEBOOK, COMMITMENT, CODEBOOK_WEIGHT, PERCEPTUAL = 0.05, 0.8, 0.3, 0.7, 0.6
WARMUP, END, SIGMA_REL = 2, 0.1, 0.1
GENERATOR = {"lr": 3e-3, "betas": (0.9, 0.99)}
DISCRIMINATOR = {"lr": 5e-3, "betas": (0.5, 0.9), "weight_decay": 0.1}
ENCODER, DECODER, PATCH = "autoencoder.encoder", "autoencoder.decoder.net", "discriminator"


class Images:
    """ROWS random images (1, SIDE, SIDE)."""

    image = torch.randn(ROWS, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(5), dtype=torch.float64).tanh()

    def __len__(self):
        return ROWS

    def batch(self, at):
        epoch, index = zip(*at, strict=True)
        return {"image": self.image[list(index)].float(), "epoch": list(epoch), "index": list(index)}


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.ConvTranspose2d(CHANNELS, 1, 2, stride=2)

    @property
    def last_layer(self) -> Tensor:
        return self.net.weight

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z)


def stage(kind: str, reduction: str, silent: bool = False) -> LitAutoencoder:
    """silent: whether the discriminator's weights are zero."""
    torch.manual_seed(1)
    encoder = nn.Conv2d(1, 2 * CHANNELS if kind == "kl" else CHANNELS, 2, stride=2)
    if kind == "kl":
        autoencoder = AutoencoderKL(encoder, Decoder(), CHANNELS, 2)
    else:
        autoencoder = AutoencoderVQ(encoder, Decoder(), CHANNELS, 2, CODES, CODEBOOK, COMMITMENT)
    discriminator = nn.Conv2d(1, 1, 2, stride=2)
    with torch.no_grad():
        for p in (*autoencoder.parameters(), *discriminator.parameters()):
            p.normal_(0, 0.8 if p.ndim > 1 else 0.2)
        if silent:
            discriminator.weight.zero_()
    loss = ReconstructionLoss(
        perceptual=l2,
        perceptual_weight=PERCEPTUAL,
        kl_weight=KL_WEIGHT,
        codebook_weight=CODEBOOK_WEIGHT,
        reduction=reduction,
    )
    return LitAutoencoder(
        autoencoder,
        loss,
        partial(torch.optim.Adam, **GENERATOR, fused=True),
        discriminator,
        partial(torch.optim.AdamW, **DISCRIMINATOR, fused=True),
        START,
        RAMP,
        WEIGHT,
        SEED,
    )


def patches(image: Tensor) -> Tensor:
    """(B, 1, SIDE, SIDE) -> (B, N, 4), rows of patches first."""
    return image.unfold(2, 2, 2).unfold(3, 2, 2).reshape(len(image), -1, 4)


class Formulas:
    """Terms and gradients of one batch at some parameters, in the order in which the batches are asked for."""

    def __init__(self, kind: str, reduction: str, parts: int):
        self.kind, self.reduction, self.parts, self.batches = kind, reduction, parts, 0
        self.hinges: list[tuple[float, float]] = []  # fractions of real and fake logits beyond the margin

    def __call__(self, p: dict[str, Tensor], rows: Sequence[tuple[int, int]]) -> tuple[dict, dict]:
        step = self.batches // self.parts
        self.batches += 1
        image = patches(Images.image[[index for _, index in rows]].float().double())
        B, N, _ = image.shape
        pixels = 1.0 if self.reduction == "sum" else 4.0 * N  # by which sums over an image are divided
        E, D, W = (p[f"{name}.weight"].flatten(1) for name in (ENCODER, DECODER, PATCH))
        e, d, w = (p[f"{name}.bias"] for name in (ENCODER, DECODER, PATCH))
        moments = image @ E.T + e
        z, terms, backward = getattr(self, self.kind)(p, moments, rows, pixels)
        error = z @ D + d - image
        pixel, perceptual = error.abs().sum() / B / pixels, error.square().sum() / B / pixels
        terms |= {"pixel": pixel, "perceptual": perceptual, "rec": pixel + PERCEPTUAL * perceptual}
        terms["loss"] = terms["rec"] + terms.pop("penalty")
        by_output = (error.sign() + PERCEPTUAL * 2 * error) / B / pixels
        gradients = {}
        if step >= START:
            # VQGAN eq. 6-7: L_rec + lambda L_GAN, lambda = |grad L_rec| / (|grad L_GAN| + delta); L_GAN = -mean logit
            adversarial = -W[0].expand_as(error) / (B * N)
            norms = [torch.einsum("bnz,bnk->zk", z, by).square().sum().sqrt() for by in (by_output, adversarial)]
            weight = min(norms[0] / (norms[1] + 1e-4), torch.tensor(1e4).double())
            weight = weight * WEIGHT * [1 / 3, 2 / 3, 1.0, 1.0, 1.0][step - START]
            real, fake = image @ W[0] + w, (image + error) @ W[0] + w
            terms |= {"adversarial": -fake.mean(), "adversarial_weight": weight}
            terms["loss"] = terms["loss"] - weight * fake.mean()
            by_output = by_output + weight * adversarial
            # hinge (Lim & Ye 2017): the mean over both of what a real logit lacks to 1, and a fake one to -1
            lacks, exceeds = (real < 1).double(), (fake > -1).double()
            self.hinges.append((1 - float(lacks.mean()), 1 - float(exceeds.mean())))
            terms |= {
                "discriminator": ((1 - real) * lacks + (1 + fake) * exceeds).mean() / 2,
                "logits_real": real.mean(),
                "logits_fake": fake.mean(),
                "discriminator_accuracy": ((real > 0).double() + (fake < 0).double()).mean() / 2,
            }
            by_logit = -lacks / (2 * B * N), exceeds / (2 * B * N)
            gradients[f"{PATCH}.weight"] = torch.einsum("bn,bnk->k", by_logit[0], image)
            gradients[f"{PATCH}.weight"] = gradients[f"{PATCH}.weight"] + torch.einsum(
                "bn,bnk->k", by_logit[1], image + error
            )
            gradients[f"{PATCH}.bias"] = sum(by_logit).sum()[None]
        by_moments, others = backward(by_output @ D.T)
        gradients |= {
            f"{DECODER}.weight": torch.einsum("bnz,bnk->zk", z, by_output),
            f"{DECODER}.bias": by_output.sum()[None],
            f"{ENCODER}.weight": torch.einsum("bnm,bnk->mk", by_moments, image),
            f"{ENCODER}.bias": by_moments.sum((0, 1)),
        }
        gradients = {name: value.reshape(p[name].shape) for name, value in (gradients | others).items()}
        return terms, gradients

    def kl(self, p, moments, rows, pixels):
        """LDM eq. 25: a sample of the posterior, and KL(q | N(0, 1)) = sum (mu^2 + s^2 - 1 - log s^2) / 2."""
        B = len(moments)
        mean, logvar = moments.chunk(2, 2)
        side = SIDE // 2
        eps = KeyedNoise(SEED, rows).normal("posterior", torch.empty(B, CHANNELS, side, side))
        eps = eps.double().flatten(2).transpose(1, 2)
        std = logvar.exp().sqrt()
        divergence = (mean**2 + std**2 - 1 - logvar) / 2
        terms = {
            "kl": divergence.sum() / B,
            "penalty": KL_WEIGHT * divergence.sum() / B / pixels,
            "kl_channel_min": divergence.mean((0, 1)).min(),
            "kl_channel_max": divergence.mean((0, 1)).max(),
            "dead_channels": (divergence.mean((0, 1)) < 0.01).double().sum(),
        }

        def backward(by_z: Tensor):
            by_mean = by_z + KL_WEIGHT / pixels / B * mean
            by_logvar = by_z * eps * std / 2 + KL_WEIGHT / pixels / B * (std**2 - 1) / 2
            return torch.cat([by_mean, by_logvar], 2), {}

        return mean + std * eps, terms, backward

    def vq(self, p, raw, rows, pixels):
        """VQ-VAE eq. 3: |code - sg(raw)|^2 and |sg(code) - raw|^2, and the decoder's gradient passed to raw."""
        codes = p["autoencoder.codebook.weight"]
        index = (raw[:, :, None] - codes).square().sum(-1).argmin(-1)
        z = codes[index]
        share = torch.stack([(index == k).double().mean() for k in range(CODES)])
        squares = (z - raw).square().mean()
        size = SIDE * SIDE if pixels == 1 else 1
        terms = {
            "codebook": (CODEBOOK + COMMITMENT) * squares,
            "penalty": CODEBOOK_WEIGHT * size * (CODEBOOK + COMMITMENT) * squares,
            "perplexity": (-sum(s * s.log() for s in share if s > 0)).exp(),
            "dead_codes": (share == 0).double().sum(),
        }

        def backward(by_z: Tensor):
            slope = 2 * CODEBOOK_WEIGHT * size / raw.numel()
            by_codes = torch.stack([((z - raw) * (index == k)[..., None]).sum((0, 1)) for k in range(CODES)])
            return by_z + COMMITMENT * slope * (raw - z), {"autoencoder.codebook.weight": CODEBOOK * slope * by_codes}

        return z, terms, backward


def trained(
    kind: str, reduction: str, parts: int, precision: str, silent: bool = False
) -> tuple[StepRecorder, PowerEMA, dict[str, float], Formulas]:
    lit = stage(kind, reduction, silent)
    recorder, ema = StepRecorder(), PowerEMA(lit.autoencoder, SIGMA_REL)
    schedule = partial(cosine, warmup=WARMUP, end=END)
    callbacks = [LearningRate(schedule, STEPS), EMACallback(ema), recorder]
    options = {"batch_size": 4, "steps": STEPS, "accelerator": "cpu", "accumulate_grad_batches": parts}
    fit(lit, Images(), callbacks, precision=precision, **options)
    formulas = Formulas(kind, reduction, parts)
    adams = {name: Adam(**(GENERATOR if "autoencoder" in name else DISCRIMINATOR)) for name in recorder.start}
    worst = recompute(recorder, formulas, adams, lambda step: warm_cosine(step, STEPS, WARMUP, END), parts)
    return recorder, ema, worst, formulas


@pytest.mark.parametrize("precision", ["64", "32"])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(("kind", "reduction"), [("kl", "sum"), ("kl", "mean"), ("vq", "sum"), ("vq", "mean")])
def test_autoencoder_steps_equal_formulas(kind, reduction, parts, precision):
    """Seven steps from the first weights alone: the discriminator enters at the third, with a third of its weight."""
    recorder, ema, worst, formulas = trained(kind, reduction, parts, precision)
    assert max(worst.values()) < TOLERANCE[precision], worst
    assert all(0.05 < sum(side) / len(side) < 0.95 for side in zip(*formulas.hinges, strict=True)), formulas.hinges
    moved = [
        tuple(any(not torch.equal(old[n], new[n]) for n in old if n.startswith(part)) for part in ("auto", "discr"))
        for old, new in zip(
            [recorder.start, *(step.weights for step in recorder.steps)],
            [step.weights for step in recorder.steps],
            strict=False,
        )
    ]
    assert moved == [(True, False)] * START + [(True, True)] * (STEPS - START)
    for name, average in ema.shadow.items():
        expected = power_average([step.weights[f"autoencoder.{name}"] for step in recorder.steps], SIGMA_REL)
        torch.testing.assert_close(average, expected, rtol=TOLERANCE[precision], atol=TOLERANCE[precision])


def test_adversarial_weight_is_clamped():
    """A discriminator without a gradient: its weight would be the reconstruction's over 1e-4, and is 1e4."""
    recorder, _, worst, _ = trained("kl", "sum", 1, "64", silent=True)
    assert max(worst.values()) < TOLERANCE["64"], worst
    assert float(recorder.steps[START].terms["adversarial_weight"]) == pytest.approx(1e4 * WEIGHT / RAMP, rel=1e-12)
