"""Faults of the training and sampling path that are more than one flipped sign, each with the text that it replaces."""

from typing import NamedTuple


class Fault(NamedTuple):
    """name: what is wrong with it.  file: relative to ldm/.  function: with its class.  old: once in the function."""

    name: str
    file: str
    function: str
    old: str
    new: str


FAULTS = (
    Fault(
        "condition dropout never applied",
        "training/diffusion.py",
        "LitDiffusion.training_step",
        "if self.drop:",
        "if False:",
    ),
    Fault(
        "the posterior's mean in place of its sample",
        "training/diffusion.py",
        "LitDiffusion.sample_latent",
        'posterior.sample(noise.normal("posterior", posterior.mean))',
        "posterior.mean",
    ),
    Fault(
        "the adversarial term with the wrong sign",
        "training/autoencoder.py",
        "LitAutoencoder.training_step",
        "loss = loss + weight * fake",
        "loss = loss - weight * fake",
    ),
    Fault(
        "the generator's sign flipped",
        "training/autoencoder.py",
        "LitAutoencoder.training_step",
        "fake = -self.discriminator(reconstruction)",
        "fake = self.discriminator(reconstruction)",
    ),
    Fault(
        "an adversarial loss of zero",
        "training/autoencoder.py",
        "LitAutoencoder.training_step",
        "loss = loss + weight * fake",
        "loss = loss + 0 * weight * fake",
    ),
    Fault(
        "real and fake swapped",
        "training/autoencoder.py",
        "LitAutoencoder.training_step",
        "hinge_loss(real, fake)",
        "hinge_loss(fake, real)",
    ),
)
