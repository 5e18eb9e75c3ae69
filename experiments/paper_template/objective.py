"""The objective: the squared error plus the angle between output and target."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ldm.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import target
from ldm.diffusion.schedule import add_noise
from ldm.tensors import KeyedNoise


class VelocityDirection(nn.Module):
    """|out - v|^2 / D + strength (1 - cos(out, v)), with v what the network predicts (FasterDiT, Yao et al. 2024)."""

    def __init__(self, timestep_sampling: Callable[..., Tensor], strength: float = 1.0):
        super().__init__()
        self.times, self.strength = timestep_sampling, strength

    def forward(
        self, denoiser: Denoiser, x0: Tensor, cond: Condition, noise: KeyedNoise, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return terms (B,) for the data x0 (B, C, h, w); `loss` is minimised, each is logged as train/NAME."""
        t, eps = self.times(noise, x0, denoiser.schedule), noise.normal("eps", x0)
        row = denoiser.prediction.coefficients(*denoiser.schedule.alpha_sigma(t))
        out, _ = denoiser.output(add_noise(denoiser.schedule, x0, eps, t), t, cond)
        out, v = out.to(x0.dtype).flatten(1), target(row, x0, eps).flatten(1)
        error, angle = (out - v).square().mean(1), 1 - cosine_similarity(out, v)
        return {"loss": error + self.strength * angle, "error": error, "angle": angle, "t": t}
