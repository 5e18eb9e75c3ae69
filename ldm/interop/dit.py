"""The names of DiT (facebookresearch), of SiT and of LightningDiT, into ours."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.interop.keymap import KeyMapping, State, count, import_state, layer_rows
from ldm.net.positions import sincos_2d

LABELS = "y_embedder.embedding_table.weight"  # the conditioner's: one row a class, and last the null's
FIXED = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")  # computed from the sizes alone
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
    """Our DiT's weights of DiT's, without the classes' rows. Raises UserError for names it does not have, and for learned positions."""
    known = {name: value for name, value in state.items() if name not in (LABELS, *FIXED)}
    if "pos_embed" in state:
        _sinusoidal(state["pos_embed"])
    return import_state(
        dit(count(r"(?m)^blocks\.(\d+)\.", known), any(".mlp.w12." in name for name in known)), known, "DiT"
    )


def import_labels(state: State) -> dict[str, Tensor]:
    """A LabelVector's weights of DiT's, SiT's or LightningDiT's: (classes + 1, channels). Raises UserError if there are none."""
    if LABELS not in state:
        raise UserError(f"these are not the weights of a class-conditional DiT: no {LABELS}")
    return {"embedding.weight": state[LABELS]}


def import_sit(state: State) -> dict[str, Tensor]:
    """Our DiT's weights of SiT's or LightningDiT's, as a network of `flow` prediction whose sinusoid is ldm.net.blocks.reversed_timestep_embedding.

    Theirs runs from noise to data and answers x0 - eps, ours eps - x0: the answer's sign is turned. What SiT computes and throws away
    (the second half of its channels) is left out.  Raises as import_dit does.
    """
    ours = import_dit(state)
    channels, patch = ours["patch.weight"].shape[1:3]
    for name in ("head.out.weight", "head.out.bias"):
        whole = ours[name].unflatten(0, (patch * patch, -1))  # (p q, c, ...)
        ours[name] = -whole[:, :channels].flatten(0, 1)
    return ours


def dit(depth: int, gated: bool) -> Iterator[KeyMapping]:
    """Every name that a DiT of so many blocks may have."""
    yield from layer_rows(ENDS, "", "")
    for n in range(depth):
        yield from layer_rows({**BLOCK, **(GATED if gated else PLAIN)}, f"blocks.{n}.", f"blocks.{n}.")


def _sinusoidal(positions: Tensor) -> None:
    """Raises UserError unless these (1, N, D) are the sines and cosines of a square that ours are computed as."""
    side = round(positions.shape[1] ** 0.5)
    if side * side != positions.shape[1] or not torch.allclose(
        positions[0].float(), sincos_2d(side, side, positions.shape[2]), atol=1e-4
    ):
        raise UserError(
            "pos_embed is not the sines and cosines of a square grid, which ours computes; learned positions have no place"
        )
