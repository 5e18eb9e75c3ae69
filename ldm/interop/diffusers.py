"""Parameter names of diffusers' UNet2DConditionModel, UNet2DModel, AutoencoderKL and VQModel, both ways."""

from collections.abc import Iterator

from torch import Tensor

from ldm.interop.compvis import LEVEL
from ldm.interop.keymap import KeyMapping, State, count, export_state, import_state, layer_rows
from ldm.interop.layout import UNetLayout
from ldm.interop.transformer import transformer

RES = {
    **{"norm1": "norm1", "conv1": "conv1", "emb": "time_emb_proj"},
    **{"norm2": "norm2", "conv2": "conv2", "skip": "conv_shortcut"},
}
STEM = {
    **{"time.0": "time_embedding.linear_1", "time.2": "time_embedding.linear_2"},
    **{"vector.0": "add_embedding.linear_1", "vector.2": "add_embedding.linear_2"},
    "stem": "conv_in",
}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # names before diffusers 0.17


def import_unet(state: State) -> dict[str, Tensor]:
    """Convert diffusers' U-Net weights to ours.  Raises UserError for unknown names."""
    return import_state(unet(UNetLayout.of_diffusers(state)), state, "diffusers U-Net")


def export_unet(state: State) -> dict[str, Tensor]:
    """Convert our U-Net's weights to diffusers'.  Raises UserError for a weight without a name there."""
    return export_state(unet(UNetLayout.of_ours(state)), state, "diffusers U-Net")


def import_autoencoder(state: State) -> dict[str, Tensor]:
    """Convert diffusers' AutoencoderKL or VQModel, with old or new names.  Raises UserError for unknown names."""
    levels, blocks = count(r"\.(?:down|up)_blocks\.(\d+)\.", state), count(r"\.resnets\.(\d+)\.", state)
    return import_state(autoencoder(levels, blocks), rename_old_attention(state), "diffusers autoencoder")


def export_autoencoder(state: State) -> dict[str, Tensor]:
    """Convert our first stage to diffusers', without scale and shift.

    Raises UserError for a weight without a name there.
    """
    return export_state(
        autoencoder(count(LEVEL, state), count(r"\.blocks\.(\d+)\.", state)), state, "diffusers autoencoder"
    )


def rename_old_attention(state: State) -> dict[str, Tensor]:
    """Rename the attention layers of a first stage's state dict from before diffusers 0.17."""
    renamed = {}
    for name, value in state.items():
        *path, layer, leaf = name.split(".")
        renamed[".".join([*path, OLD.get(layer, layer), leaf])] = value
    return renamed


def unet(layout: UNetLayout) -> Iterator[KeyMapping]:
    """Yield every name that a U-Net of this layout may have."""
    yield from encoder_half(layout)
    yield from layer_rows({"out.0": "conv_norm_out", "out.2": "conv_out"}, "", "")
    for stage in range(layout.levels):
        for i in range(layout.blocks + 1):
            yield from layer(f"up.{stage}.layers.{i}.", f"up_blocks.{stage}.", i, layout)
        yield from resample(f"up.{stage}.resample.", f"up_blocks.{stage}.upsamplers.0.")


def encoder_half(layout: UNetLayout) -> Iterator[KeyMapping]:
    """Yield the names of a U-Net's encoder half and middle."""
    yield from layer_rows(STEM, "", "")
    for level in range(layout.levels):
        for i in range(layout.blocks):
            yield from layer(f"down.{level}.layers.{i}.", f"down_blocks.{level}.", i, layout)
        yield from resample(f"down.{level}.resample.", f"down_blocks.{level}.downsamplers.0.")
    yield from layer("middle1.", "mid_block.", 0, layout)
    yield from layer_rows(RES, "middle2.res.", "mid_block.resnets.1.")


def layer(ours: str, theirs: str, i: int, layout: UNetLayout) -> Iterator[KeyMapping]:
    """Yield the names of a residual block and the attention after it, of the U-Net's kind."""
    yield from layer_rows(RES, f"{ours}res.", f"{theirs}resnets.{i}.")
    attending = transformer if layout.depth else qkv
    yield from attending(f"{ours}attention.", f"{theirs}attentions.{i}.", layout.depth)


def qkv(ours: str, theirs: str, depth: int = 0) -> Iterator[KeyMapping]:
    """Yield the names of a QKVAttention with new_order."""
    yield from layer_rows({"norm": "group_norm", "out": "to_out.0"}, ours, theirs)
    for leaf in ("weight", "bias"):
        yield KeyMapping(f"{ours}qkv.{leaf}", tuple(f"{theirs}{part}.{leaf}" for part in ("to_q", "to_k", "to_v")))


def resample(ours: str, theirs: str) -> Iterator[KeyMapping]:
    """Yield the names of a layer that halves or doubles the resolution: a convolution or a residual block."""
    yield from layer_rows({"conv": "conv"}, ours, theirs)
    yield from layer_rows(RES, ours, theirs)


def autoencoder(levels: int, blocks: int) -> Iterator[KeyMapping]:
    """Yield every name that a first stage of so many levels and blocks may have."""
    yield from layer_rows({"encoder.moments": "quant_conv", "decoder.latent": "post_quant_conv"}, "", "")
    yield KeyMapping("codebook.weight", ("quantize.embedding.weight",))
    for half, levelled, change in (("encoder", "down", "downsamplers"), ("decoder", "up", "upsamplers")):
        yield from layer_rows(
            {"stem": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}, f"{half}.", f"{half}."
        )
        yield from layer_rows(RES, f"{half}.middle.0.", f"{half}.mid_block.resnets.0.")
        yield from attention(f"{half}.middle.1.", f"{half}.mid_block.attentions.0.")
        yield from layer_rows(RES, f"{half}.middle.2.", f"{half}.mid_block.resnets.1.")
        for level in range(levels):
            # Ours are numbered from the finest level in both halves.
            number = level if levelled == "down" else levels - 1 - level
            ours, theirs = f"{half}.{levelled}.{level}.", f"{half}.{levelled}_blocks.{number}."
            for i in range(blocks):
                yield from layer_rows(RES, f"{ours}blocks.{i}.", f"{theirs}resnets.{i}.")
                yield from attention(f"{ours}attention.{i}.", f"{theirs}attentions.{i}.")
            yield from layer_rows({"resample.conv": f"{change}.0.conv"}, ours, theirs)


def attention(ours: str, theirs: str) -> Iterator[KeyMapping]:
    """Yield the names of a first stage's attention: linear layers where ours are 1x1 convolutions."""
    yield from layer_rows({"norm": "group_norm"}, ours, theirs)
    yield from layer_rows(ATTENTION, ours, theirs, ones=-2)
