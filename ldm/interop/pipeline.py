"""A whole model between two layouts: our config and our weights, whatever file they come from or go to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError

STATISTICS = (
    "shift",
    "scale",
    "calibrated_on",
)  # a first stage's, which other projects keep in a config or fold into weights


@dataclass(frozen=True)
class Pipeline:
    """config: plain nodes net, autoencoder, conditioner, schedule, prediction and seed.  net, autoencoder: our state dicts, the latter with
    shift and scale.  data: what a model must know of the images it was trained on (DataCard's fields).
    text: the text tower in open_clip's names, empty where the conditioner is none.  conditioner: its own weights.
    """

    config: dict[str, Any]
    net: dict[str, Tensor]
    autoencoder: dict[str, Tensor]
    data: dict[str, Any]
    text: Mapping[str, Tensor]
    conditioner: Mapping[str, Tensor]


def unknown_data_info(channels: int, size: int, classes: int = 1) -> dict[str, Any]:
    """What is known of data that nobody has here: classes by number, captions that say nothing.  size: in pixels."""
    names = [str(n) for n in range(classes)] if classes > 1 else ["image"]
    return {"fingerprint": "", "classes": names, "captions": [[""]] * len(names), "channels": channels, "size": size}


def with_scale(weights: Mapping[str, Tensor], scale: float, z_channels: int, shift: float = 0.0) -> dict[str, Tensor]:
    """A first stage's state dict of its weights and the one number that its latents are multiplied by, after shift was taken off."""
    ones = torch.ones(z_channels)
    return {**weights, "shift": shift * ones, "scale": scale * ones, "calibrated_on": torch.zeros((), dtype=torch.long)}


def fold_scale(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """A first stage's weights without its statistics, and the one number that others multiply latents by.

    Where ours has a scale for each channel, or a shift, they go into the two 1x1 convolutions beside the latent, which then gives z itself,
    and the number is 1: the same function of the image, another rounding.  Raises UserError for a first stage without those convolutions.
    """
    weights = {name: value for name, value in state.items() if name not in STATISTICS}
    shift, scale = state["shift"].double(), state["scale"].double()
    if not shift.any() and bool((scale == scale[0]).all()):
        return weights, float(state["scale"][0])
    if (
        "encoder.moments.weight" not in weights
        or "decoder.latent.weight" not in weights
        or "codebook.weight" in weights
    ):
        raise UserError(
            "this first stage has a scale for each channel, and no convolutions to put it into; calibrate it to one scale"
        )
    z = len(scale)
    double = {
        name: weights[name].double() for name in weights if name.startswith(("encoder.moments.", "decoder.latent."))
    }
    gain = torch.cat([scale, torch.ones_like(scale)])  # means are scaled, log-variances moved
    bias = (double["encoder.moments.bias"] - torch.cat([shift, torch.zeros_like(shift)])) * gain
    bias[z:] += 2 * scale.log()
    latent = double["decoder.latent.weight"]
    folded = {
        "encoder.moments.weight": double["encoder.moments.weight"] * gain[:, None, None, None],
        "encoder.moments.bias": bias,
        "decoder.latent.weight": latent / scale[None, :, None, None],
        "decoder.latent.bias": double["decoder.latent.bias"] + latent.squeeze(3).squeeze(2) @ shift,
    }
    return {**weights, **{name: value.to(weights[name].dtype) for name, value in folded.items()}}, 1.0


def require_values(asked: Mapping[str, Any], allowed: Mapping[str, Any], what: str) -> None:
    """Raises UserError for an option of a config whose value is not the one that our counterpart has."""
    for name, value in allowed.items():
        if asked.get(name, value) != value:
            raise UserError(f"{what}: {name}={asked[name]!r:.60} has no counterpart in ours; expected {value!r}")
