"""The training step of a classifier of noisy latents, for guidance (Dhariwal & Nichol 2021, sec. 4.1)."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.diffusion.schedule import Schedule, add_noise
from ldm.diffusion.times import Times
from ldm.tensors import at_least_float32
from ldm.training.diffusion import batch_noise


class LitClassifier(L.LightningModule):
    """Cross-entropy of net(x_t, net_time) against a batch's label, where x_t is its latent at a random t.

    net: (B, C, h, w) and time (B,) -> logits (B, classes).  autoencoder: the frozen first stage of the latents.
    times: draws t.  A batch has the moments of the first stage's posterior.
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
        self.frozen = [autoencoder]  # in a list, so that it is no submodule, which would be trained and saved

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        noise, autoencoder = batch_noise(self.seed, batch), cast(Any, self.frozen[0].to(self.device))
        with torch.no_grad():
            posterior = autoencoder.posterior_of(batch["moments"])
            z = autoencoder.normalise(posterior.sample(noise.normal("posterior", posterior.mean)))
            t = self.times(noise, z, self.schedule)
        logits = noisy_logits(self.net, self.schedule, z, t, noise.normal("eps", z))
        right = (logits.argmax(1) == batch["label"]).float()
        return {"loss": F.cross_entropy(logits, batch["label"]), "accuracy": right.mean()}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the network, with the arguments of nn.Module.compile."""
        self.net.compile(*args, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


def noisy_logits(net: nn.Module, schedule: Schedule, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Compute logits (B, classes) of z (B, C, h, w) with noise eps at t (B,), in float32 or the type of wider z."""
    logits = net(add_noise(schedule, z, eps, t), schedule.net_time(t).to(z.device, at_least_float32(z.dtype)))
    return logits.to(at_least_float32(logits.dtype))
