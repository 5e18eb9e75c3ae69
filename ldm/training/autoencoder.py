"""Stage one: the training step of an autoencoder and its discriminator."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn

from ldm.autoencoder.discriminator import adaptive_weight, hinge_loss
from ldm.autoencoder.first_stage import FirstStage
from ldm.training.diffusion import batch_noise
from ldm.training.parallel import all_reduce_mean

OptimizerOf = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class LitAutoencoder(L.LightningModule):
    """The training step of a first stage with an adversary (VQGAN, Esser et al. 2021, eq. 6-7; LDM eq. 25).

    loss: (reconstruction, image, penalties) -> terms (B,).  The discriminator enters at step `discriminator_start`; its
    weight is the adaptive one times discriminator_weight, and grows linearly over `discriminator_ramp` steps.  Steps
    are counted by the batches, because Lightning's global_step also counts each optimizer.
    """

    # each of the two backward passes is for one optimizer's parameters, and the discriminator starts late
    has_unused_parameters = True

    def __init__(
        self,
        autoencoder: FirstStage,
        loss: nn.Module,
        optimizer: OptimizerOf,
        discriminator: nn.Module,
        discriminator_optimizer: OptimizerOf,
        discriminator_start: int = 0,
        discriminator_ramp: int = 1,
        discriminator_weight: float = 0.5,
        seed: int = 0,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.autoencoder, self.loss, self.discriminator = autoencoder, loss, discriminator
        self.optimizer, self.discriminator_optimizer = optimizer, discriminator_optimizer
        self.parts = 1  # batches that a step is made of
        self.start, self.ramp, self.weight = discriminator_start, discriminator_ramp, discriminator_weight
        self.seed = seed

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        image = batch["image"]
        generator, discriminator = cast(list, self.optimizers())
        first, last = batch_idx % self.parts == 0, (batch_idx + 1) % self.parts == 0
        adversarial = self.weight > 0 and batch["step"] >= self.start

        self.toggle_optimizer(generator)
        reconstruction, penalties, vitals = self.autoencoder.training_forward(
            image, partial(batch_noise(self.seed, batch).normal, "posterior")
        )
        terms = {name: term.mean() for name, term in self.loss(reconstruction, image, penalties).items()}
        terms |= self.autoencoder.diagnostics(all_reduce_mean(vitals))
        loss = terms["loss"]
        if adversarial:
            fake = -self.discriminator(reconstruction).to(image.dtype).mean()
            weight = (
                self.adaptive_weight(terms["rec"], fake)
                * self.weight
                * min(1.0, (batch["step"] - self.start + 1) / self.ramp)
            )
            loss = loss + weight * fake
            terms |= {"adversarial": fake, "adversarial_weight": weight}
        if first:
            generator.zero_grad()
        self.manual_backward(loss / self.parts)
        if last:
            generator.step()
        self.untoggle_optimizer(generator)

        if adversarial:
            self.toggle_optimizer(discriminator)
            real, fake = (self.discriminator(x).to(image.dtype) for x in (image, reconstruction.detach()))
            discriminator_loss = hinge_loss(real, fake)
            if first:
                discriminator.zero_grad()
            self.manual_backward(discriminator_loss / self.parts)
            if last:
                discriminator.step()
            self.untoggle_optimizer(discriminator)
            right = 0.5 * ((real > 0).to(real.dtype).mean() + (fake < 0).to(fake.dtype).mean())
            terms |= {
                "discriminator": discriminator_loss,
                "logits_real": real.mean(),
                "logits_fake": fake.mean(),
                "discriminator_accuracy": right,
            }
        return {name: term.detach() for name, term in (terms | {"loss": loss}).items()}

    def adaptive_weight(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """Compute the adaptive weight from gradients averaged over all processes, so that each has the same."""
        last = self.autoencoder.last_layer
        rec, adv = (torch.autograd.grad(term, last, retain_graph=True)[0] for term in (reconstruction, adversarial))
        return adaptive_weight(all_reduce_mean(rec), all_reduce_mean(adv))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile nothing: the adaptive weight needs two backward passes through one graph."""

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            self.optimizer(self.autoencoder.parameters()),
            self.discriminator_optimizer(self.discriminator.parameters()),
        ]
