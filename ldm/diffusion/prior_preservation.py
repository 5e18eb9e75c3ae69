"""Prior preservation: a few images of one thing are learnt, while what its kind looked like before is held on to (DreamBooth)."""

from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.errors import ConfigError
from ldm.tensors import KeyedNoise


class PriorPreservation(nn.Module):
    """The mean loss of the instance's rows plus `weight` times that of the prior's (Ruiz et al. 2023, eq. 2).

    objective: any objective.  prior: the label of the rows that show the kind, drawn by the model as it was before.
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
        """The objective's terms (B,), `loss` scaled so that its mean is the sum of the two means."""
        if "label" not in batch:
            raise ConfigError(
                "prior preservation tells instance and kind apart by label, and the batch has none: give each its own folder"
            )
        terms = self.objective(denoiser, x0, cond, noise, batch)
        prior = torch.as_tensor(batch["label"], device=x0.device) == self.prior
        shares = torch.where(prior, self.weight * inverse_fraction(prior), inverse_fraction(~prior))
        return terms | {"loss": shares * terms["loss"]}


def inverse_fraction(rows: Tensor) -> Tensor:
    """What makes the mean over all (B,) of some rows: B over their number."""
    return len(rows) / rows.sum().clamp(min=1)
