"""The classifier of noisy latents, which guides (Dhariwal & Nichol 2021, sec. 4.1)."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.diffusion.schedule import Schedule, add_noise
from ldm.diffusion.times import Times
from ldm.training.diffusion import batch_noise


class LitClassifier(L.LightningModule):
    """Cross-entropy of net(x_t, net_time) against a batch's label, x_t being its latent at a random t.

    net: (B, C, h, w) and time (B,) -> logits (B, classes).  autoencoder: frozen, owner of the latent.  A batch carries moments.
    """

    has_unused_parameters = False

    def __init__(
        self,
        net: nn.Module,
        autoencoder: nn.Module,
        schedule: Schedule,
        times: Times,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        seed: int = 0,
    ):
        super().__init__()
        self.net, self.optimizer, self.seed = net, optimizer, seed
        self.schedule, self.times = schedule, times
        self.kept = [autoencoder]  # in a list: not to be trained or saved

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        noise, autoencoder = batch_noise(self.seed, batch), cast(Any, self.kept[0].to(self.device))
        with torch.no_grad():
            posterior = autoencoder.posterior_of(batch["moments"])
            z = autoencoder.normalise(posterior.sample(noise.normal("posterior", posterior.mean)))
            t = self.times(noise, z, self.schedule)
        logits = noisy_logits(self.net, self.schedule, z, t, noise.normal("eps", z))
        right = (logits.argmax(1) == batch["label"]).float()
        return {"loss": F.cross_entropy(logits, batch["label"]), "accuracy": right.mean()}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As nn.Module.compile, of the network."""
        self.net.compile(*args, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


def noisy_logits(net: nn.Module, schedule: Schedule, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Logits (B, classes) float32 of z (B, C, h, w) with noise eps at t (B,)."""
    return net(add_noise(schedule, z, eps, t), schedule.net_time(t).to(z)).float()
