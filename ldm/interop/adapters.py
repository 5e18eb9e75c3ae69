"""diffusers' names of what is added to a U-Net: its ControlNetModel, and LoRA factors as PEFT lays them out, both ways."""

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

HALF = "copied."  # of ours: the copied way down
DOWN, UP, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"


def export_controlnet(state: State) -> dict[str, Tensor]:
    """diffusers' ControlNet weights of ours. Raises UserError for what it has no name for."""
    hints = count(r"(?m)^hint\.(\d+)\.", state) // 2 - 1
    return export_state(controlnet(UNetLayout.of_ours(strip_prefix(HALF, state)), hints), state, "diffusers ControlNet")


def controlnet(layout: UNetLayout, hints: int) -> Iterator[KeyMapping]:
    """Every name that a ControlNet of this layout may have; hints: convolutions between its encoder's first and last."""
    yield from (replace(row, ours=HALF + row.ours) for row in encoder_half(layout))
    names = ["conv_in", *(f"blocks.{i}" for i in range(hints)), "conv_out"]
    yield from layer_rows({f"{2 * i}": name for i, name in enumerate(names)}, "hint.", "controlnet_cond_embedding.")
    skips = layout.levels * (layout.blocks + 1)
    yield from layer_rows({f"{i}": f"{i}" for i in range(skips)}, "zeros.", "controlnet_down_blocks.")
    yield from layer_rows({"of_middle": "controlnet_mid_block"}, "", "")


def import_lora(state: State, net: State, prefix: str = "unet.") -> dict[str, Tensor]:
    """Our factors (LAYER.down, LAYER.up) of PEFT's; net: our U-Net's state dict.

    Where ours is one layer and theirs are several, our rank is the sum of theirs: up is their blocks on its diagonal.
    A layer's correction counts its own LAYER.alpha / rank, and 1 (alpha = rank) where the file has no alpha of that layer, whatever its
    other layers have: kohya's convention (create_network_from_weights of sd-scripts).  diffusers gives such a layer the alpha that is
    most frequent in the file.
    Raises UserError for names that the U-Net does not have, and for factors that are not floating-point.
    """
    given = {name.removeprefix(prefix): value for name, value in state.items()}
    require_floating({name: value for name, value in given.items() if not name.endswith(ALPHA)}, "LoRA")
    made: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in unet(UNetLayout.of_ours(net)):
        parts = [name.removesuffix(".weight") for name in row.theirs]
        there = [part for part in parts if part + DOWN in given and part + UP in given]
        if not there:
            continue
        weight = net[row.ours]
        downs = [given[part + DOWN] for part in there]
        narrow = [len(down) for down in downs]
        up = weight.new_zeros(len(weight), sum(narrow))
        rows = len(weight) // len(parts)
        for part, first, rank in zip(there, offsets(narrow), narrow, strict=True):
            at = parts.index(part) * rows
            up[at : at + rows, first : first + rank] = (
                given[part + UP].reshape(rows, rank) * float(given.get(part + ALPHA, rank)) / rank
            )
        layer = row.ours.removesuffix(".weight")
        made |= {f"{layer}.down": torch.cat(downs).reshape(sum(narrow), *weight.shape[1:]), f"{layer}.up": up}
        used |= {part + end for part in there for end in (DOWN, UP, ALPHA)}
    reject_unknown(given.keys() - used, "LoRA")
    return made


def lora_scaling(said: str | None, prefix: str = "unet.") -> float:
    """What alpha and rank in the header of a LoRA file of diffusers make of its factors; 1 where it says neither."""
    told = parse_json(said) if said else {}
    alpha, rank = told.get(f"{prefix}lora_alpha"), told.get(f"{prefix}r")
    return float(alpha) / float(rank) if alpha and rank else 1.0


def export_lora(factors: State, net: State, prefix: str = "unet.") -> dict[str, Tensor]:
    """PEFT's factors of ours; net: our U-Net's state dict. Raises UserError for a layer that diffusers' U-Net has not."""
    made: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in unet(UNetLayout.of_ours(net)):
        layer = row.ours.removesuffix(".weight")
        if f"{layer}.up" not in factors:
            continue
        down, up = factors[f"{layer}.down"], factors[f"{layer}.up"]
        ones = [1] * (down.ndim - 2 + row.trailing_ones)
        for name, part in zip(row.theirs, up.chunk(len(row.theirs)), strict=True):
            theirs = prefix + name.removesuffix(".weight")
            made |= {
                theirs + DOWN: down.reshape(*down.shape, *[1] * row.trailing_ones).clone(),
                theirs + UP: part.reshape(*part.shape, *ones).clone(),
            }
        used |= {f"{layer}.down", f"{layer}.up"}
    reject_unknown(factors.keys() - used, "LoRA")
    return made


def offsets(lengths: list[int]) -> list[int]:
    """Where each of several pieces begins, laid end to end."""
    return [sum(lengths[:i]) for i in range(len(lengths))]
