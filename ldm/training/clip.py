"""The training step of CLIP: images and captions embedded in one space (Radford et al. 2021)."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.conditioner.clip_image import preprocess
from ldm.tensors import KeyedNoise, at_least_float32
from ldm.training.diffusion import batch_noise

MAX_LOGIT_SCALE = 100.0  # the largest factor on cosines (Radford et al. 2021, sec. 2.5)


class LitCLIP(L.LightningModule):
    """Symmetric cross-entropy of a batch's images against its captions, over the rows of one process.

    Radford et al. 2021, fig. 3.  net: open_clip's model.  tokenize: B texts -> ids (B, L) int64.  crop: least part of a
    side that a random square crop keeps, in (0, 1].  Rows with the same caption are targets of each other, in equal
    parts.
    """

    has_unused_parameters = False

    def __init__(
        self,
        net: nn.Module,
        tokenize: Callable[[Sequence[str]], Tensor],
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        crop: float = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        self.net, self.tokenize, self.optimizer, self.crop, self.seed = net, tokenize, optimizer, crop, seed

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        ids = self.tokenize(batch["caption"]).to(self.device)
        image, text, scale = self.net(
            preprocess(self.net.visual, random_crop(batch["image"], batch_noise(self.seed, batch), self.crop)), ids
        )
        return clip_loss(image, text, scale, (ids[:, None] == ids).all(-1))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step and clip the scale, as open_clip does: clipped in the loss, it could not fall again."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            cast(Tensor, self.net.logit_scale).clamp_(max=math.log(MAX_LOGIT_SCALE))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the network, with the arguments of nn.Module.compile."""
        self.net.compile(*args, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return what is learned besides parameters: the statistics of a ResNet's batch normalisation."""
        return dict(self.net.named_buffers())

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        for name, buffer in self.net.named_buffers():
            buffer.copy_(state[name])


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> dict[str, Tensor]:
    """Compute loss (), accuracy () and scale () of embeddings (B, D) of norm 1.

    same: (B, B) bool, whether a text (column) belongs to an image (row).
    """
    with torch.autocast(image.device.type, enabled=False):
        dtype = at_least_float32(image.dtype)
        logits = scale.to(dtype) * image.to(dtype) @ text.to(dtype).T  # (B, B)
        right = same.to(dtype) / same.sum(1, keepdim=True)
        loss = 0.5 * (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right))
    correct = same.gather(1, logits.argmax(1, keepdim=True))
    return {"loss": loss, "accuracy": correct.to(dtype).mean(), "scale": scale.detach()}


def random_crop(image: Tensor, noise: KeyedNoise, least: float) -> Tensor:
    """Crop a random square of each image (B, C, H, W), of `least` to 1 times its side, and resize it to (H, W)."""
    if least == 1:
        return image
    side, x, y = noise.uniform("crop", image.new_empty(len(image), 3)).unbind(1)
    side = least + (1 - least) * side
    zero = torch.zeros_like(side)
    theta = torch.stack([side, zero, (1 - side) * (2 * x - 1), zero, side, (1 - side) * (2 * y - 1)], 1).unflatten(
        1, (2, 3)
    )
    with torch.autocast(image.device.type, enabled=False):  # in bfloat16 positions would be off by a pixel
        positions = F.affine_grid(theta, list(image.shape), align_corners=False)
    return F.grid_sample(image, positions, "bilinear", "border", align_corners=False)
