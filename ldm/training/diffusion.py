"""Stage two: the training step of a denoiser in the latent space of a frozen first stage."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol

import lightning as L
import torch
from torch import Tensor, nn

from ldm.conditioner.compose import drop_condition
from ldm.model import LatentDiffusion
from ldm.tensors import KeyedNoise
from ldm.training.callbacks import LOSS_BY_T
from ldm.training.optimizers import ChainedOptimizer
from ldm.training.profiler import phase
from ldm.training.sharded import shard


def batch_noise(seed: int, batch: dict[str, Any]) -> KeyedNoise:
    """Return the keyed noise of a training batch: rows are (epoch, index), strata are positions in the global batch."""
    rows = list(zip(batch["epoch"], batch["index"], strict=True))
    return KeyedNoise(seed, rows, batch["position"], batch["total"])


class JointObjective(Protocol):
    """An objective that trains the first stage together with the denoiser (REPA-E, Leng et al. 2025).

    trains_first_stage: an attribute of the class, so that a config can be refused before anything is trained.
    first_stage_lr: the learning rate of the first stage's parameters, before the schedule's factor.
    """

    trains_first_stage: ClassVar[bool]
    first_stage_lr: float

    def __call__(
        self, denoiser: Any, x0: Tensor, cond: Any, noise: KeyedNoise, batch: dict[str, Any], *, first_stage: Any
    ) -> dict[str, Tensor]:
        """Return the terms (B,) of a batch, as other objectives do.

        x0: (B, C, h, w), with a graph back to the encoder; x0.detach() keeps a term from it.  first_stage: the
        FirstStage, for terms of its own, as those of its reconstruction of batch["image"].
        """
        ...


class LitDiffusion(L.LightningModule):
    """The training step of a latent diffusion model (Ho et al. 2020, algorithm 1; LDM eq. 3).

    objective: (denoiser, z, cond, noise, batch) -> {"loss": (B,), ...}, or a JointObjective.
    drop: probability with which a sample's condition is dropped, in [0, 1].  clip: largest norm of the gradient, None
    for any. A batch has the moments (B, M, h, w) of the first stage's posterior, or an image to encode.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        objective: nn.Module,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        drop: float = 0.1,
        clip: float | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.model, self.objective = model, objective
        self.optimizer, self.drop, self.clip, self.seed = optimizer, drop, clip, seed
        self.trains_first_stage = bool(getattr(objective, "trains_first_stage", False))
        if self.trains_first_stage:
            model.unfreeze_first_stage()

    @property
    def has_unused_parameters(self) -> bool:
        """Return whether a step may leave a parameter without gradient, as a module of model or objective states."""
        return any(
            getattr(module, "has_unused_parameters", False) for part in self.children() for module in part.modules()
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        noise = batch_noise(self.seed, batch)
        with phase(self, "encode"):
            z = self.sample_latent(batch, noise)  # (B, C, h, w)
        cond = self.model.condition({**batch, "noise": noise})
        if self.drop:
            cond = drop_condition(cond, self.model.null_condition(batch), noise, "drop", self.drop)
        terms = self.terms(self.objective, z, cond.to(z.dtype), noise, batch)
        means = {name: term.mean() for name, term in terms.items() if name != "t"}
        return means | {LOSS_BY_T: loss_by_t(terms["loss"].detach(), terms["t"])} if "t" in terms else means

    def terms(self, objective: nn.Module, z: Tensor, cond: Any, noise: KeyedNoise, batch: dict[str, Any]) -> Any:
        """Return the terms (B,) of an objective, this module's or a part of it, for latents z (B, C, h, w)."""
        joint = {"first_stage": self.model.autoencoder} if self.trains_first_stage else {}
        return objective(self.model.denoiser, z, cond, noise, batch, **joint)

    def sample_latent(self, batch: dict[str, Any], noise: KeyedNoise) -> Tensor:
        """Draw a sample z (B, C, h, w) of the normalised posterior, without a graph unless the first stage is trained.

        Images are encoded without autocast, in the weights' precision, as those of a latent cache are.
        """
        autoencoder = self.model.autoencoder
        with torch.set_grad_enabled(self.trains_first_stage and torch.is_grad_enabled()):
            if "moments" in batch:
                posterior = autoencoder.posterior_of(batch["moments"])
            else:
                with torch.autocast(batch["image"].device.type, enabled=False):
                    posterior = autoencoder.posterior(batch["image"])
            return autoencoder.normalise(posterior.sample(noise.normal("posterior", posterior.mean)))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the network, with the arguments of nn.Module.compile."""
        self.model.denoiser.net.compile(*args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.clip is not None:  # Lightning's trainer refuses to clip for a fused optimizer under autocast
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.clip)

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # trainer.strategy=fsdp
            shard((self.model.denoiser.net, self.model.conditioner, self.objective), self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        first_stage = [p for p in self.model.autoencoder.parameters() if p.requires_grad]
        ids = {id(p) for p in first_stage}
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad and id(p) not in ids])
        if not first_stage:
            return optimizer
        other = self.optimizer(first_stage)
        for group in optimizer.param_groups:
            group["name"] = "denoiser"
        for group in other.param_groups:
            group["name"], group["lr"] = "first_stage", self.objective.first_stage_lr
        return ChainedOptimizer([optimizer, other])


def loss_by_t(loss: Tensor, t: Tensor, parts: int = 4) -> Tensor:
    """Sum the losses (B,), and count them, by equal parts of [0, 1] in which their t (B,) lies; returns (2, parts)."""
    part = (t * parts).long().clamp(max=parts - 1)
    return torch.stack([loss.new_zeros(parts).index_add(0, part, value) for value in (loss, torch.ones_like(loss))])
