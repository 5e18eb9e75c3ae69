"""Infer the shape of a U-Net from its parameter names: levels, blocks per level, and where attention is."""

import re
from collections.abc import Collection
from dataclasses import dataclass

from ldm.errors import UserError
from ldm.interop.keymap import count


@dataclass(frozen=True)
class UNetLayout:
    """The shape of a U-Net.

    levels, blocks: number of levels, and of blocks per level.  attended: stages of the decoder half with attention,
    counted from the coarsest.  depth: maximum number of transformer blocks per attention layer.
    """

    levels: int
    blocks: int
    attended: frozenset[int]
    depth: int

    @staticmethod
    def of_ours(names: Collection[str]) -> "UNetLayout":
        """Infer the layout of our U-Net.  Raises UserError for other names."""
        levels, blocks = count(r"(?m)^down\.(\d+)\.", names), count(r"(?m)^down\.0\.layers\.(\d+)\.", names)
        if not levels or not blocks:
            raise UserError("these are not the weights of ldm.net.unet.UNet: no down.0.layers.0")
        attended = re.findall(r"(?m)^up\.(\d+)\.layers\.0\.attention\.", "\n".join(names))
        return UNetLayout(levels, blocks, frozenset(map(int, attended)), count(r"\.attention\.blocks\.(\d+)\.", names))

    @staticmethod
    def of_compvis(names: Collection[str]) -> "UNetLayout":
        """Infer the layout of ADM's and CompVis' U-Net, whose blocks are numbered consecutively.

        Raises UserError for other names.
        """
        text = "\n".join(names)
        outputs = count(r"(?m)^output_blocks\.(\d+)\.", names)
        ups = {int(n) for n in re.findall(r"(?m)^output_blocks\.(\d+)\.[12]\.(?:conv|in_layers)\.", text)}
        levels = len(ups) + 1
        if not outputs or outputs % levels:
            raise UserError(
                f"these are not the weights of a CompVis U-Net: {outputs} output_blocks, of which {len(ups)} upsample"
            )
        per_level = outputs // levels
        attended = {int(n) // per_level for n in re.findall(r"(?m)^output_blocks\.(\d+)\.1\.norm\.", text)}
        return UNetLayout(levels, per_level - 1, frozenset(attended), count(r"\.transformer_blocks\.(\d+)\.", names))

    @staticmethod
    def of_diffusers(names: Collection[str]) -> "UNetLayout":
        """Infer the layout of diffusers' UNet2DConditionModel or UNet2DModel.  Raises UserError for other names."""
        levels, blocks = (
            count(r"(?m)^down_blocks\.(\d+)\.", names),
            count(r"(?m)^down_blocks\.0\.resnets\.(\d+)\.", names),
        )
        if not levels or not blocks:
            raise UserError("these are not the weights of a diffusers U-Net: no down_blocks.0.resnets.0")
        return UNetLayout(levels, blocks, frozenset(), count(r"\.transformer_blocks\.(\d+)\.", names))
