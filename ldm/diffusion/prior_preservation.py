"""Prior preservation (DreamBooth): learn a few images of one instance without forgetting the rest of its class."""

from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.errors import ConfigError
from ldm.tensors import KeyedNoise


class PriorPreservation(nn.Module):
    """The mean loss of the instance's rows plus `weight` times that of the prior's rows (Ruiz et al. 2023, eq. 2).

    objective: any objective.  prior: the label of the class images, which the model generated before fine-tuning.
    Raises ConfigError if the batch has no labels.
    """

    def __init__(self, objective: nn.Module, prior: int, weight: float = 1.0):
        super().__init__()
        if weight < 0:
            raise ConfigError(f"weight={weight}: expected 0 or more")
        self.objective, self.prior, self.weight = objective, prior, weight
        self.keys = tuple(getattr(objective, "keys", ()))

    def forward(
        self, denoiser: Any, x0: Tensor, cond: Condition, noise: KeyedNoise, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return the objective's terms (B,), with `loss` scaled so that its mean is the sum of the two means."""
        if "label" not in batch:
            raise ConfigError(
                "prior preservation distinguishes instance and class images by label, and the batch has no labels: "
                "put each kind in its own folder"
            )
        terms = self.objective(denoiser, x0, cond, noise, batch)
        prior = torch.as_tensor(batch["label"], device=x0.device) == self.prior
        shares = torch.where(prior, self.weight * inverse_fraction(prior), inverse_fraction(~prior))
        return terms | {"loss": shares * terms["loss"]}


def inverse_fraction(rows: Tensor) -> Tensor:
    """Return the factor that turns the mean over all B rows into the mean over the selected ones: B / their number."""
    return len(rows) / rows.sum().clamp(min=1)
