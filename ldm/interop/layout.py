"""What a U-Net's names tell of its shape: how many levels and layers there are, and where attention is."""

import re
from collections.abc import Collection
from dataclasses import dataclass

from ldm.errors import UserError
from ldm.interop.keymap import count


@dataclass(frozen=True)
class UNetLayout:
    """levels, blocks: of the U-Net.  attended: the stages of its way up, coarsest first, with attention.  depth: the most blocks of one."""

    levels: int
    blocks: int
    attended: frozenset[int]
    depth: int

    @staticmethod
    def of_ours(names: Collection[str]) -> "UNetLayout":
        """The layout of our U-Net. Raises UserError for names of something else."""
        levels, blocks = count(r"(?m)^down\.(\d+)\.", names), count(r"(?m)^down\.0\.layers\.(\d+)\.", names)
        if not levels or not blocks:
            raise UserError("these are not the weights of ldm.net.unet.UNet: no down.0.layers.0")
        attended = re.findall(r"(?m)^up\.(\d+)\.layers\.0\.attention\.", "\n".join(names))
        return UNetLayout(levels, blocks, frozenset(map(int, attended)), count(r"\.attention\.blocks\.(\d+)\.", names))

    @staticmethod
    def of_compvis(names: Collection[str]) -> "UNetLayout":
        """The layout of ADM's and CompVis' U-Net, whose blocks are numbered through. Raises UserError for names of something else."""
        text = "\n".join(names)
        outputs = count(r"(?m)^output_blocks\.(\d+)\.", names)
        ups = {int(n) for n in re.findall(r"(?m)^output_blocks\.(\d+)\.[12]\.(?:conv|in_layers)\.", text)}
        levels = len(ups) + 1
        if not outputs or outputs % levels:
            raise UserError(
                f"these are not the weights of a CompVis U-Net: {outputs} output_blocks, of which {len(ups)} upsample"
            )
        each = outputs // levels
        attended = {int(n) // each for n in re.findall(r"(?m)^output_blocks\.(\d+)\.1\.norm\.", text)}
        return UNetLayout(levels, each - 1, frozenset(attended), count(r"\.transformer_blocks\.(\d+)\.", names))

    @staticmethod
    def of_diffusers(names: Collection[str]) -> "UNetLayout":
        """The layout of diffusers' UNet2DConditionModel or UNet2DModel. Raises UserError for names of something else."""
        levels, blocks = (
            count(r"(?m)^down_blocks\.(\d+)\.", names),
            count(r"(?m)^down_blocks\.0\.resnets\.(\d+)\.", names),
        )
        if not levels or not blocks:
            raise UserError("these are not the weights of a diffusers U-Net: no down_blocks.0.resnets.0")
        return UNetLayout(levels, blocks, frozenset(), count(r"\.transformer_blocks\.(\d+)\.", names))
