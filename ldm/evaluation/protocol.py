"""The protocol of a score: all that must be equal for two numbers to be compared, and the short hash that tells."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.runs import identity

OMITTED_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "scale")


def describe_node(node: Any) -> str:
    """A config node in short, `ddim(eta=0)`: a target's last word and its options but null ones and the scale, which is said beside it.

    Of a path the last part is said: a run's folder is named by what determines it.
    """
    if isinstance(node, Mapping):
        inner = ", ".join(
            f"{key}={describe_node(value)}"
            for key, value in node.items()
            if key not in OMITTED_KEYS and value is not None
        )
        return f"{str(node.get('_target_', '')).split('.')[-1]}({inner})"
    if isinstance(node, list | tuple):
        return f"[{', '.join(map(describe_node, node))}]"
    if isinstance(node, int | float) and not isinstance(node, bool):
        return f"{node:g}"
    return Path(node).name if isinstance(node, str) and "/" in node else str(node)


def sampling_settings(
    cfg: Mapping[str, Any], *, steps: int, scale: float | str, sigma_rel: float | None, arithmetic: str
) -> dict[str, Any]:
    """How samples were drawn, of a plain config with sampler, grid and guidance.

    scale: of the guidance, or how it was chosen.  sigma_rel: of the averaged weights, None for those of the last step.
    """
    return {
        "sampler": describe_node(cfg["sampler"]),
        "grid": describe_node(cfg["timestep_spacing"]),
        "steps": steps,
        "guidance": describe_node(cfg["guidance"]),
        "scale": scale,
        "weights": "raw" if sigma_rel is None else f"ema({sigma_rel:g})",
        "arithmetic": arithmetic,
    }


def with_protocol_hash(said: Mapping[str, Any]) -> dict[str, Any]:
    """What goes beside the numbers: `protocol`, the hash (12 hex digits), and `score/<key>` for all that is hashed."""
    return {"protocol": identity.hash_config(said)[:12], **{f"score/{name}": value for name, value in said.items()}}


def protocol_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys `score/...` in which two rows of numbers differ, a key that one of them lacks among them."""
    names = {name for row in (one, other) for name in row if name.startswith("score/")}
    return sorted(name for name in names if one.get(name) != other.get(name))
