"""One step of stage one at every downsample factor, and what a step does."""

from functools import partial

import lightning as L
import pytest
import torch

from ldm.autoencoder.conv import Decoder, Encoder
from ldm.autoencoder.discriminator import PatchDiscriminator
from ldm.autoencoder.kl import AutoencoderKL
from ldm.autoencoder.loss import ReconstructionLoss
from ldm.autoencoder.vq import AutoencoderVQ
from ldm.data.synthetic import Synthetic
from ldm.training.autoencoder import LitAutoencoder
from ldm.training.callbacks import LearningRate
from ldm.training.fit import fit
from ldm.training.lr import constant

FACTORS = {"kl": (AutoencoderKL, (1, 2, 4, 8, 16, 32)), "vq": (AutoencoderVQ, (2, 4, 8, 16, 32))}


class Watch(L.Callback):
    """The terms of every step, the trainer's own count after it, and whether each network moved in it."""

    def __init__(self):
        self.terms, self.counts, self.moved = [], [], []

    def on_train_batch_start(self, trainer, lit, batch, batch_idx):
        self.before = [[p.clone() for p in net.parameters()] for net in (lit.autoencoder, lit.discriminator)]

    def on_train_batch_end(self, trainer, lit, outputs, batch, batch_idx):
        self.terms.append({name: float(value) for name, value in outputs.items()})
        self.counts.append((batch["step"], trainer.global_step))
        nets = zip(self.before, (lit.autoencoder, lit.discriminator), strict=True)
        self.moved.append(
            tuple(any(not torch.equal(a, b) for a, b in zip(old, net.parameters(), strict=True)) for old, net in nets)
        )


def stage(kind: str, f: int, start: int = 0, ramp: int = 1, weight: float = 0.5) -> LitAutoencoder:
    torch.manual_seed(0)
    cls, _ = FACTORS[kind]
    options = dict(
        z_channels=2,
        width=4,
        channel_mult=(1,) * f.bit_length(),
        num_res_blocks=1,
        num_groups=2,
        attention_resolutions=(f,) if f > 8 else (),
    )
    autoencoder = cls(Encoder(1, double_z=kind == "kl", **options), Decoder(1, **options), 2, f)
    adam = partial(torch.optim.Adam, lr=1e-3)
    return LitAutoencoder(
        autoencoder,
        ReconstructionLoss(),
        adam,
        PatchDiscriminator(1, width=4, layers=2, num_groups=2),
        adam,
        start,
        ramp,
        weight,
    )


def watched(lit: LitAutoencoder, steps: int) -> Watch:
    watch = Watch()
    data = Synthetic(num=8, size=32)
    fit(lit, data, [LearningRate(constant, steps), watch], batch_size=4, steps=steps, accelerator="cpu", precision="32")
    return watch


@pytest.mark.parametrize(("kind", "f"), [(kind, f) for kind, (_, factors) in FACTORS.items() for f in factors])
def test_autoencoder_step_trains_at_every_factor(kind, f):
    lit = stage(kind, f)
    watch = watched(lit, 1)
    (terms,) = watch.terms
    assert all(torch.isfinite(torch.tensor(value)) for value in terms.values())
    assert watch.moved == [(True, True)]
    assert {"kl": {"kl", "dead_channels"}, "vq": {"codebook", "perplexity", "dead_codes"}}[kind] < terms.keys()
    assert {"logits_real", "logits_fake", "discriminator_accuracy", "adversarial_weight"} < terms.keys()


def test_autoencoder_steps_count_batches_with_two_optimizers():
    """Lightning counts each optimiser's step; ours are the stream's, so that the discriminator enters when it is said
    to.
    """
    watch = watched(stage("kl", 2, start=2), 4)
    assert watch.counts == [(0, 1), (1, 2), (2, 4), (3, 6)]
    assert watch.moved == [(True, False)] * 2 + [(True, True)] * 2
    assert ["discriminator" in terms for terms in watch.terms] == [False, False, True, True]


def test_discriminator_ramp_scales_adversarial_weight():
    """At the same weights, the ramp alone scales the adaptive weight."""
    whole, slow = (watched(stage("kl", 2, start=0, ramp=ramp), 1).terms[0]["adversarial_weight"] for ramp in (1, 4))
    assert slow == pytest.approx(whole / 4)


def test_zero_adversarial_weight_disables_discriminator():
    watch = watched(stage("kl", 2, weight=0.0), 2)
    assert watch.moved == [(True, False)] * 2
    assert "adversarial" not in watch.terms[-1]
