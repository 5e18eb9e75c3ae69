"""diffusers' names of adapters to a U-Net: its ControlNetModel, and LoRA factors in PEFT's layout, both ways."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ldm.interop.diffusers import encoder_half, unet
from ldm.interop.keymap import (
    KeyMapping,
    State,
    count,
    export_state,
    layer_rows,
    reject_unknown,
    require_floating,
    strip_prefix,
)
from ldm.interop.layout import UNetLayout
from ldm.io.parse import parse_json

HALF = "copied."  # prefix in ours: the copied encoder half
DOWN, UP, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"


def export_controlnet(state: State) -> dict[str, Tensor]:
    """Convert our ControlNet weights to diffusers'.  Raises UserError for a weight without a name there."""
    hints = count(r"(?m)^hint\.(\d+)\.", state) // 2 - 1
    return export_state(controlnet(UNetLayout.of_ours(strip_prefix(HALF, state)), hints), state, "diffusers ControlNet")


def controlnet(layout: UNetLayout, hints: int) -> Iterator[KeyMapping]:
    """Yield every name that a ControlNet of this layout may have.

    hints: number of convolutions between the first and the last one of the hint encoder.
    """
    yield from (replace(row, ours=HALF + row.ours) for row in encoder_half(layout))
    names = ["conv_in", *(f"blocks.{i}" for i in range(hints)), "conv_out"]
    yield from layer_rows({f"{2 * i}": name for i, name in enumerate(names)}, "hint.", "controlnet_cond_embedding.")
    skips = layout.levels * (layout.blocks + 1)
    yield from layer_rows({f"{i}": f"{i}" for i in range(skips)}, "zeros.", "controlnet_down_blocks.")
    yield from layer_rows({"of_middle": "controlnet_mid_block"}, "", "")


def import_lora(state: State, net: State, prefix: str = "unet.") -> dict[str, Tensor]:
    """Convert PEFT's LoRA factors to ours (LAYER.down, LAYER.up).

    net: state dict of our U-Net.  prefix: of the names in `state`.
    Where ours is one layer and theirs are several, our rank is the sum of theirs: `up` is block-diagonal.
    Each layer is scaled by its own LAYER.alpha / rank, and by 1 (alpha = rank) if the file has no alpha for it,
    whatever
    its other layers have: kohya's convention (create_network_from_weights of sd-scripts). diffusers uses the most
    frequent alpha of the file for such a layer.
    Raises UserError for names that the U-Net does not have, and for factors that are not floating-point.
    """
    factors = {name.removeprefix(prefix): value for name, value in state.items()}
    require_floating({name: value for name, value in factors.items() if not name.endswith(ALPHA)}, "LoRA")
    converted: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in unet(UNetLayout.of_ours(net)):
        parts = [name.removesuffix(".weight") for name in row.theirs]
        present = [part for part in parts if part + DOWN in factors and part + UP in factors]
        if not present:
            continue
        weight = net[row.ours]
        downs = [factors[part + DOWN] for part in present]
        ranks = [len(down) for down in downs]
        up = weight.new_zeros(len(weight), sum(ranks))
        rows = len(weight) // len(parts)
        for part, first, rank in zip(present, offsets(ranks), ranks, strict=True):
            start = parts.index(part) * rows
            up[start : start + rows, first : first + rank] = (
                factors[part + UP].reshape(rows, rank) * float(factors.get(part + ALPHA, rank)) / rank
            )
        layer = row.ours.removesuffix(".weight")
        converted |= {f"{layer}.down": torch.cat(downs).reshape(sum(ranks), *weight.shape[1:]), f"{layer}.up": up}
        used |= {part + end for part in present for end in (DOWN, UP, ALPHA)}
    reject_unknown(factors.keys() - used, "LoRA")
    return converted


def lora_scaling(header: str | None, prefix: str = "unet.") -> float:
    """Return alpha / rank from the header of a LoRA file in diffusers' format; 1 if it has neither.

    header: the file's `lora_adapter_metadata`, JSON.
    """
    values = parse_json(header) if header else {}
    alpha, rank = values.get(f"{prefix}lora_alpha"), values.get(f"{prefix}r")
    return float(alpha) / float(rank) if alpha and rank else 1.0


def export_lora(factors: State, net: State, prefix: str = "unet.") -> dict[str, Tensor]:
    """Convert our LoRA factors to PEFT's; net: state dict of our U-Net.

    Raises UserError for a layer that diffusers' U-Net does not have.
    """
    converted: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in unet(UNetLayout.of_ours(net)):
        layer = row.ours.removesuffix(".weight")
        if f"{layer}.up" not in factors:
            continue
        down, up = factors[f"{layer}.down"], factors[f"{layer}.up"]
        ones = [1] * (down.ndim - 2 + row.trailing_ones)
        for name, part in zip(row.theirs, up.chunk(len(row.theirs)), strict=True):
            theirs = prefix + name.removesuffix(".weight")
            converted |= {
                theirs + DOWN: down.reshape(*down.shape, *[1] * row.trailing_ones).clone(),
                theirs + UP: part.reshape(*part.shape, *ones).clone(),
            }
        used |= {f"{layer}.down", f"{layer}.up"}
    reject_unknown(factors.keys() - used, "LoRA")
    return converted


def offsets(lengths: list[int]) -> list[int]:
    """Return the start of each of several consecutive pieces."""
    return [sum(lengths[:i]) for i in range(len(lengths))]
