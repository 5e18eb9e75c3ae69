"""Parameter names of DiT (facebookresearch), SiT and LightningDiT, converted to ours."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.interop.keymap import KeyMapping, State, count, import_state, layer_rows
from ldm.net.positions import sincos

LABELS = (
    "y_embedder.embedding_table.weight"  # belongs to the conditioner: one row per class, the last is the null class
)
FIXED = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")  # computed from the sizes
ENDS = {
    **{"patch": "x_embedder.proj", "time.0": "t_embedder.mlp.0", "time.2": "t_embedder.mlp.2"},
    **{
        "head.norm": "final_layer.norm_final",
        "head.modulation": "final_layer.adaLN_modulation.1",
        "head.out": "final_layer.linear",
    },
}
BLOCK = {
    **{"norm1": "norm1", "norm2": "norm2", "modulation": "adaLN_modulation.1"},
    **{"attention.qkv": "attn.qkv", "attention.out": "attn.proj"},
    **{"attention.q_norm": "attn.q_norm", "attention.k_norm": "attn.k_norm"},
}
PLAIN = {"feed_forward.up": "mlp.fc1", "feed_forward.down": "mlp.fc2"}
GATED = {"feed_forward.up": "mlp.w12", "feed_forward.down": "mlp.w3"}


def import_dit(state: State) -> dict[str, Tensor]:
    """Convert DiT's weights to those of our DiT, without the class embeddings.

    Raises UserError for unknown names and for learned positions.
    """
    known = {name: value for name, value in state.items() if name not in (LABELS, *FIXED)}
    if "pos_embed" in state:
        _sinusoidal(state["pos_embed"])
    return import_state(
        dit(count(r"(?m)^blocks\.(\d+)\.", known), any(".mlp.w12." in name for name in known)), known, "DiT"
    )


def import_labels(state: State) -> dict[str, Tensor]:
    """Convert class embeddings of DiT, SiT or LightningDiT to a LabelVector's weights, (classes + 1, channels).

    Raises UserError if there are none.
    """
    if LABELS not in state:
        raise UserError(f"these are not the weights of a class-conditional DiT: no {LABELS}")
    return {"embedding.weight": state[LABELS]}


def import_sit(state: State) -> dict[str, Tensor]:
    """Convert weights of SiT or LightningDiT to those of our DiT.

    The result is for `flow` prediction with ldm.net.blocks.reversed_timestep_embedding: theirs runs from noise to data
    and predicts x0 - eps, ours eps - x0, so the sign of the output is flipped. The second half of the output channels,
    which SiT discards, is left out.  Raises as `import_dit` does.
    """
    ours = import_dit(state)
    channels, patch = ours["patch.weight"].shape[1:3]
    for name in ("head.out.weight", "head.out.bias"):
        channels_last = ours[name].unflatten(0, (patch * patch, -1))  # (p q, c, ...)
        ours[name] = -channels_last[:, :channels].flatten(0, 1)
    return ours


def dit(depth: int, gated: bool) -> Iterator[KeyMapping]:
    """Yield every name that a DiT of `depth` blocks may have; gated: with SwiGLU."""
    yield from layer_rows(ENDS, "", "")
    for n in range(depth):
        yield from layer_rows({**BLOCK, **(GATED if gated else PLAIN)}, f"blocks.{n}.", f"blocks.{n}.")


def _sinusoidal(positions: Tensor) -> None:
    """Check that positions (1, N, D) are the sine-cosine embedding of a square grid.  Raises UserError otherwise."""
    side = round(positions.shape[1] ** 0.5)
    if side * side != positions.shape[1] or not torch.allclose(
        positions[0].float(), sincos((side, side), positions.shape[2]), atol=1e-4
    ):
        raise UserError(
            "pos_embed is not the sine-cosine embedding of a square grid, which ours computes; "
            "learned positions are not supported"
        )
