"""A complete model in our format, between two file formats."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError

# Statistics of a first stage, which other projects store in a config or fold into weights.
STATISTICS = ("shift", "scale", "calibrated_on")


@dataclass(frozen=True)
class Pipeline:
    """A complete model.

    config: plain nodes net, autoencoder, conditioner, schedule, prediction and seed.
    net, autoencoder: our state dicts, the latter with shift and scale.
    data: metadata of the training images (the fields of DataCard).
    text: the text tower in open_clip's names, empty if the conditioner has none.
    conditioner: the conditioner's other weights.
    """

    config: dict[str, Any]
    net: dict[str, Tensor]
    autoencoder: dict[str, Tensor]
    data: dict[str, Any]
    text: Mapping[str, Tensor]
    conditioner: Mapping[str, Tensor]


def unknown_data_info(channels: int, size: int, classes: int = 1) -> dict[str, Any]:
    """Return metadata for a data set that is not known: numbered classes and empty captions; size: in pixels."""
    names = [str(n) for n in range(classes)] if classes > 1 else ["image"]
    return {"fingerprint": "", "classes": names, "captions": [[""]] * len(names), "shape": [channels, size, size]}


def with_scale(weights: Mapping[str, Tensor], scale: float, z_channels: int, shift: float = 0.0) -> dict[str, Tensor]:
    """Add statistics to a first stage's weights: its latents are (z - shift) * scale."""
    ones = torch.ones(z_channels)
    return {**weights, "shift": shift * ones, "scale": scale * ones, "calibrated_on": torch.zeros((), dtype=torch.long)}


def fold_scale(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """Return a first stage's weights without statistics, and the factor that other projects multiply its latents by.

    If ours has a scale per channel, or a shift, they are folded into the two 1x1 convolutions next to the latent, and
    the
    factor is 1: the same function of the image up to rounding.  Raises UserError for a first stage without those
    convolutions.
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
            "this first stage has a scale per channel and no convolutions to fold it into; calibrate it to one scale"
        )
    z = len(scale)
    double = {
        name: weights[name].double() for name in weights if name.startswith(("encoder.moments.", "decoder.latent."))
    }
    gain = torch.cat([scale, torch.ones_like(scale)])  # for means; log-variances are shifted instead
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


def require_values(options: Mapping[str, Any], allowed: Mapping[str, Any], what: str) -> None:
    """Check that options, where set, have the values that our implementation supports.

    what: the file, for the message.  Raises UserError otherwise.
    """
    for name, value in allowed.items():
        if options.get(name, value) != value:
            raise UserError(f"{what}: {name}={options[name]!r:.60} has no counterpart in ours; expected {value!r}")
