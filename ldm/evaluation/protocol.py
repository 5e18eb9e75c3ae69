"""The protocol of a score: all settings that must be equal for two scores to be comparable, and their hash."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint.weights import parse_ema_length
from ldm.runs import identity

OMITTED_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "scale")


def describe_node(node: Any) -> str:
    """Describe a config node in short, as in `ddim(eta=0)`: the last part of its target and its options.

    Options that are null are left out, and the guidance scale, which the protocol lists on its own. Of a path only the
    last part is
    used: the name of a run's folder is determined by its config.
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
    cfg: Mapping[str, Any], *, steps: int, scale: float | str, weights: str, arithmetic: str
) -> dict[str, Any]:
    """Describe the sampling settings of a plain config with the nodes sampler, timestep_spacing and guidance.

    scale: the guidance scale, or how it was chosen.  weights: as of `describe_weights`.
    """
    return {
        "sampler": describe_node(cfg["sampler"]),
        "grid": describe_node(cfg["timestep_spacing"]),
        "steps": steps,
        "guidance": describe_node(cfg["guidance"]),
        "scale": scale,
        "weights": weights,
        "arithmetic": arithmetic,
    }


def describe_weights(kind: str, training: Mapping[str, Any]) -> str:
    """Describe the weights of a kind: raw, ema as averaged in the training, or ema:LENGTH.

    training: the plain config of the training.  `ema(0.1)` is a power function of that relative width, other averages
    have their options named: `ema(decay=0.9999, warmup=False)`.
    """
    if kind != "ema":
        return kind if kind == "raw" else f"ema({parse_ema_length(kind):g})"
    options = {name: value for name, value in training.get("ema", {}).items() if not name.startswith("_")}
    if not options:
        return "ema"
    if [*options] == ["sigma_rel"]:
        return f"ema({options['sigma_rel']:g})"
    return f"ema({', '.join(f'{name}={value}' for name, value in options.items())})"


def with_protocol_hash(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is stored beside scores: `protocol`, a hash (12 hex digits) of the settings, and each as
    `score/<key>`.
    """
    digest = identity.hash_config(settings)[:12]
    return {"protocol": digest, **{f"score/{name}": value for name, value in settings.items()}}


def protocol_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the `score/...` keys in which two rows of scores differ, including keys that one of them lacks."""
    names = {name for row in (a, b) for name in row if name.startswith("score/")}
    return sorted(name for name in names if a.get(name) != b.get(name))
